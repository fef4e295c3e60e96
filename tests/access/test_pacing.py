"""Rates: leases of a bucket, shares of its flows, turns.  The clock is the tests'."""

from __future__ import annotations

import threading
import pytest

from netproxy.access.accounts import pacing
from netproxy.access.accounts.ledger import LEASED_UP, UP, Ledger, Slot
from netproxy.access.accounts.pacing import LEASE_LEAST, Bucket, LeasedPace, Level, default_burst
from netproxy.interfaces.accounts import UNLIMITED

RATE = 1_000_000
TURN = pacing.TURN_SECONDS


class Clock:
    """Stands in for the time module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    return clock


class Sender:
    """A flow that wants to carry as much as it may, or a given number of bytes a turn."""

    def __init__(self, *buckets: Bucket, wants: int = UNLIMITED) -> None:
        self.pace = LeasedPace(threading.Lock())
        self.pace.configure(buckets)
        self.moved = 0
        self._wants = wants

    def send(self) -> None:
        """Carry what the turn allows."""
        left = self._wants
        while left > 0:
            room = self.pace.mark - self.moved
            if room <= 0 and not (room := self.pace.renew(self.moved)):
                return
            part = min(left, room, 1 << 40)
            self.moved += part
            left -= part


def slot() -> Slot:
    return Ledger().slot("user", "alice")


def bucket(rate: int = RATE, burst: int = 100_000) -> Bucket:
    return Bucket("users.alice.limits.rate_up", slot(), LEASED_UP, rate, burst)


def run(clock: Clock, seconds: float, *senders: Sender, step: float = TURN) -> list[int]:
    """Let senders carry bytes for a time; return what each has carried."""
    before = [sender.moved for sender in senders]
    for _ in range(round(seconds / step)):
        clock.now += step
        for sender in senders:
            sender.send()
    return [sender.moved - old for sender, old in zip(senders, before, strict=True)]


class TestLevel:
    def test_level_grows_with_time_up_to_the_burst(self) -> None:
        level = Level(100, 50, 0, 0.0)
        assert level.update(50, 0.0) == 0
        assert level.update(50, 0.1) == 10
        assert level.update(50, 10.0) == 50

    def test_level_goes_below_zero_and_recovers(self) -> None:
        level = Level(100, 50, 0, 0.0)
        assert level.update(150, 0.0) == -100
        assert level.update(150, 1.5) == 50


class TestPace:
    def test_without_a_bucket_there_is_no_limit(self) -> None:
        pace = LeasedPace(threading.Lock())
        assert pace.mark == UNLIMITED and pace.renew(5) == UNLIMITED - 5

    def test_flow_carries_the_burst_and_then_the_rate(self, clock: Clock) -> None:
        sender = Sender(bucket())
        assert run(clock, TURN, sender) == [100_000]
        assert run(clock, 10.0, sender) == pytest.approx([10 * RATE], abs=LEASE_LEAST)

    def test_rate_is_kept_although_turns_come_late(self, clock: Clock) -> None:
        sender = Sender(bucket())
        run(clock, TURN, sender)
        assert run(clock, 10.0, sender, step=0.1) == pytest.approx([10 * RATE], abs=LEASE_LEAST)

    @pytest.mark.parametrize("rate", [1, 100, 8_000, 125_000, 125_000_000, 10_000_000_000])
    def test_every_rate_is_kept(self, clock: Clock, rate: int) -> None:
        sender = Sender(bucket(rate, default_burst(rate)))
        run(clock, 2.0, sender)
        seconds = max(60.0, 3 * LEASE_LEAST / rate)
        step = max(TURN, seconds / 2000)
        moved = sum(run(clock, seconds, sender, step=step))
        assert moved == pytest.approx(seconds * rate, rel=0.01, abs=LEASE_LEAST)

    def test_nothing_is_carried_before_the_next_turn(self, clock: Clock) -> None:
        sender = Sender(bucket())
        run(clock, TURN, sender)
        assert sender.pace.renew(sender.moved) == 0
        assert sender.pace.delay() == pytest.approx(TURN)
        assert sender.pace.decided() == "users.alice.limits.rate_up"

    def test_datagram_beyond_the_mark_is_paid_for_later(self, clock: Clock) -> None:
        sender = Sender(bucket())
        run(clock, TURN, sender)
        sender.moved += 60_000
        assert sum(run(clock, 10.0, sender)) == pytest.approx(10 * RATE - 60_000, abs=LEASE_LEAST)

    def test_slower_of_two_buckets_counts(self, clock: Clock) -> None:
        fast, slow = bucket(RATE), bucket(RATE // 4)
        sender, other = Sender(fast, slow), Sender(fast)
        run(clock, 1.0, sender, other)
        moved = run(clock, 10.0, sender, other)
        expected = [10 * RATE / 4, 10 * RATE * 3 / 4]
        assert moved == pytest.approx(expected, rel=0.02)

    def test_unused_lease_is_returned_at_the_end(self, clock: Clock) -> None:
        owner = slot()
        shared = Bucket("key", owner, LEASED_UP, RATE, 100_000)
        for _ in range(1000):
            sender = Sender(shared, wants=10)
            sender.send()
            sender.pace.close(sender.moved)
        assert owner.sum(LEASED_UP) == 10_000 and owner.sum(UP) == 0

    def test_changed_rate_counts_for_a_running_flow(self, clock: Clock) -> None:
        shared = bucket()
        sender = Sender(shared)
        run(clock, 1.0, sender)
        shared.configure(RATE * 3, 300_000)
        run(clock, 1.0, sender)
        assert sum(run(clock, 10.0, sender)) == pytest.approx(30 * RATE, abs=300_000)

    def test_limit_begins_with_what_a_running_flow_has_carried(self, clock: Clock) -> None:
        sender = Sender(wants=10_000_000)
        sender.send()
        assert sender.moved == 10_000_000
        sender.pace.configure([bucket()])
        assert run(clock, TURN, sender) == [100_000]
        sender.pace.configure([])
        assert run(clock, TURN, sender) == [10_000_000]


class TestFairness:
    @pytest.mark.parametrize("number", [2, 8, 100])
    def test_flows_that_want_everything_get_equal_shares(self, clock: Clock, number: int) -> None:
        shared = bucket()
        senders = [Sender(shared) for _ in range(number)]
        run(clock, 2.0, *senders)
        moved = run(clock, 20.0, *senders)
        assert sum(moved) == pytest.approx(20 * RATE, abs=100_000)
        assert min(moved) >= 0.97 * max(moved)

    def test_flow_that_wants_little_leaves_the_rest_to_the_others(self, clock: Clock) -> None:
        shared = bucket()
        modest = [Sender(shared, wants=400) for _ in range(20)]
        greedy = Sender(shared)
        run(clock, 2.0, *modest, greedy)
        *little, rest = run(clock, 10.0, *modest, greedy)
        assert min(little) > 0.95 * 400 * 250
        assert rest == pytest.approx(10 * RATE - sum(little), abs=100_000)

    def test_newcomers_do_not_exceed_the_rate(self, clock: Clock) -> None:
        shared = bucket()
        moved = 0
        for _ in range(1000):
            clock.now += TURN / 4
            sender = Sender(shared)
            sender.send()
            moved += sender.moved
            sender.pace.close(sender.moved)
        assert moved == pytest.approx(1000 * TURN / 4 * RATE, abs=200_000)

    def test_flow_that_has_ended_has_no_share(self, clock: Clock) -> None:
        shared = bucket()
        first, second = Sender(shared), Sender(shared)
        run(clock, 1.0, first, second)
        first.pace.close(first.moved)
        run(clock, 0.2, second)
        assert run(clock, 10.0, second) == pytest.approx([10 * RATE], abs=100_000)
