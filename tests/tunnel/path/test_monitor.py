"""The state of a path, as its two sides see it.  Time is an argument; packets are lost at will."""

from __future__ import annotations

import random
from typing import Callable

import pytest

from netproxy.protocol.tunnels.path import BASE_PACKET
from netproxy.tunnel.path import monitor
from netproxy.tunnel.path.monitor import PathMonitor, PingOrder, SentPing, Tries

START = 1000.0
RTT = 0.08


class Side:
    """One side with its state, and what it has sent."""

    def __init__(self, initiates: bool) -> None:
        self.monitor = PathMonitor(initiates, START)
        self.sent: list[PingOrder] = []
        self.packets = self.received = 0
        self.is_active = self.is_large = False
        self.changes: list[tuple[float, bool]] = []
        """When it went up or down."""


class Link:
    """Two sides and a network between them.  Answers come after RTT."""

    def __init__(self) -> None:
        self.agent, self.bridge = Side(True), Side(False)
        self.now = START
        self.passes: Callable[[Side, int], bool] = lambda side, packet: True
        """passes(side, packet): whether a packet of `packet` bytes of a side arrives."""
        self._answers: list[tuple[float, Side, bytes]] = []

    def run(self, seconds: float) -> None:
        """Let so much time pass, in steps of 10 ms."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.01
            due = [answer for answer in self._answers if answer[0] <= self.now]
            self._answers = [answer for answer in self._answers if answer[0] > self.now]
            for _, side, stamp in due:
                side.monitor.heard(self.now)
                side.monitor.answered(stamp, self.other(side).received, self.now)
            for side in (self.agent, self.bridge):
                if side.is_active or side.monitor.due() <= self.now:
                    self._tick(side)
                if not side.changes or side.changes[-1][1] is not side.monitor.up:
                    side.changes.append((self.now, side.monitor.up))

    def other(self, side: Side) -> Side:
        return self.bridge if side is self.agent else self.agent

    def _tick(self, side: Side) -> None:
        for order in side.monitor.tick(self.now, side.is_active, side.is_large):
            self._ping(side, order)

    def _ping(self, side: Side, order: PingOrder) -> None:
        side.packets += 1
        side.sent.append(order)
        stamp = bytes((side is self.agent,)) + side.packets.to_bytes(8, "big")
        side.monitor.pinged(stamp, SentPing(order, self.now, side.packets))
        if not self.passes(side, order.packet or 51):
            return
        other = self.other(side)
        other.received += 1
        other.monitor.heard(self.now)
        if other.monitor.answers_with_ping(self.now):
            self._ping(other, PingOrder(BASE_PACKET))
        other.packets += 1
        if self.passes(other, 51):
            side.received += 1
            self._answers.append((self.now + RTT, side, stamp))

    @property
    def up(self) -> tuple[bool, bool]:
        return self.agent.monitor.up, self.bridge.monitor.up


@pytest.fixture
def link() -> Link:
    """Return a link whose sides are up."""
    link = Link()
    link.run(3.0)
    assert link.up == (True, True)
    return link


def use(link: Link, is_used: bool = True) -> None:
    link.agent.is_active = link.bridge.is_active = is_used


def block(link: Link) -> None:
    link.passes = lambda side, packet: False


def unblock(link: Link) -> None:
    link.passes = lambda side, packet: True


def test_sides_come_up_at_the_first_ping() -> None:
    link = Link()
    link.run(2 * RTT + 0.1)
    assert link.up == (True, True)
    assert link.agent.sent[0] == link.bridge.sent[0] == PingOrder(BASE_PACKET)
    assert abs(link.agent.monitor.rtt - RTT) < 0.02


def test_bridge_sends_nothing_before_the_agent() -> None:
    """It does not even know where to."""
    link = Link()
    block(link)
    link.run(600.0)
    assert not link.bridge.sent and link.up == (False, False)


@pytest.mark.parametrize("side", ["agent", "bridge"])
def test_blocked_path_is_down_within_three_seconds(link: Link, side: str) -> None:
    """Hazard 168."""
    use(link)
    link.run(5.0)
    block(link)
    began = link.now
    link.run(10.0)
    at, up = getattr(link, side).changes[-1]
    assert not up and at - began < 3.0


def test_datagrams_that_begin_on_a_dead_path_wait_no_longer(link: Link) -> None:
    link.run(20.0)
    block(link)
    use(link)
    began = link.now
    link.run(10.0)
    assert max(side.changes[-1][0] for side in (link.agent, link.bridge)) - began < 3.0
    assert link.up == (False, False)


def test_path_comes_back(link: Link) -> None:
    """Hazard 168."""
    use(link)
    block(link)
    link.run(60.0)
    unblock(link)
    link.run(monitor.RETRY_LIMIT + 1.0)
    assert link.up == (True, True)


@pytest.mark.parametrize("blocked", ["agent", "bridge"])
def test_path_that_is_blocked_one_way_is_down_on_both_sides(link: Link, blocked: str) -> None:
    """Hazard 168."""
    use(link)
    one = getattr(link, blocked)
    link.passes = lambda side, packet: side is not one
    link.run(10.0)
    assert link.up == (False, False)


def test_tries_become_rare(link: Link) -> None:
    block(link)
    link.run(200.0)
    link.agent.sent.clear()
    link.run(10 * monitor.RETRY_LIMIT)
    assert 9 <= len(link.agent.sent) <= 11 and not link.bridge.sent[-1].packet


def test_side_tries_for_as_long_as_it_may() -> None:
    """Hazard 182: those of a direct path send few packets to an address that does not answer."""
    side = PathMonitor(True, START, Tries(0.25, 0.25, 3.0))
    ticks = [START + number / 100 for number in range(1000)]
    sent = [now for now in ticks if side.tick(now, False, False)]
    assert len(sent) == 12 and side.due() == float("inf")
    side.try_now(START + 100.0)
    assert side.due() == START + 100.0 and side.tick(START + 100.0, False, False)
    # A path that was up and is down waits to be told.
    side.pinged(b"stamp", SentPing(PingOrder(BASE_PACKET), START + 100.0, 1))
    assert side.answered(b"stamp", 1, START + 100.1) and side.up
    side.go_down(START + 200.0)
    assert not side.tick(START + 300.0, False, False) and side.due() == float("inf")


def test_idle_agent_keeps_the_nat_open_and_the_bridge_is_silent(link: Link) -> None:
    link.run(100.0)
    for side in (link.agent, link.bridge):
        side.sent.clear()
    link.run(10 * monitor.AGENT_KEEPALIVE)
    assert 9 <= len(link.agent.sent) <= 11 and set(link.agent.sent) == {PingOrder()}
    assert not link.bridge.sent and link.up == (True, True)


def test_agent_that_is_gone_is_noticed_by_an_idle_bridge(link: Link) -> None:
    link.run(100.0)
    block(link)
    link.run(monitor.BRIDGE_KEEPALIVE + 5.0)
    assert not link.bridge.monitor.up


def test_lost_pings_do_not_take_a_path_down(link: Link) -> None:
    use(link)
    source = random.Random(7)
    link.passes = lambda side, packet: source.random() >= 0.2
    link.run(120.0)
    assert link.up == (True, True)
    assert [len(side.changes) for side in (link.agent, link.bridge)] == [2, 2]


def test_size_that_does_not_pass_is_no_fault(link: Link) -> None:
    narrow = Link()
    narrow.passes = lambda side, packet: packet <= 1300
    use(narrow)
    narrow.agent.is_large = narrow.bridge.is_large = True
    narrow.run(30.0)
    assert narrow.up == (True, True)
    assert narrow.agent.monitor.mtu.size == narrow.bridge.monitor.mtu.size == 1232
    assert len(narrow.agent.changes) == 2


def test_path_that_loses_large_packets_alone_goes_down(link: Link) -> None:
    """Hazard 168."""
    use(link)
    link.agent.is_large = link.bridge.is_large = True
    link.passes = lambda side, packet: packet < 1000
    link.run(30.0)
    assert link.up == (False, False)


def test_loss_is_what_the_other_side_has_not_received(link: Link) -> None:
    agent, now = link.agent.monitor, link.now
    for number, received in ((600, 600), (1200, 1170), (1800, 1620)):
        agent.pinged(b"stamp", SentPing(PingOrder(), now, number))
        assert agent.answered(b"stamp", received, now + RTT)
        now += 60.0
    assert agent.loss == pytest.approx(0.25)


def test_answer_nobody_waits_for_is_ignored(link: Link) -> None:
    assert not link.agent.monitor.answered(b"stamp", 5, link.now)


def test_answers_to_an_address_of_before_prove_nothing(link: Link) -> None:
    agent = link.agent.monitor
    agent.pinged(b"stamp", SentPing(PingOrder(), link.now, 9))
    assert agent.moved(1452, link.now)
    assert not agent.answered(b"stamp", 9, link.now) and agent.mtu.size == BASE_PACKET
