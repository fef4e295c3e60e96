"""The poller: each wait is woken once, by an event or when its time is up."""

from __future__ import annotations

import socket
import threading
import time
from typing import Callable

import pytest

from netproxy.interfaces.connections import READABLE, Wait
from netproxy.listener import poller as poller_module
from netproxy.listener.poller import Poller
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, wait_until

Pair = tuple[socket.socket, socket.socket]


class Owner:
    """A WaitOwner that remembers how it was woken; `then` is called as well."""

    def __init__(self, then: Callable[[bool], None] | None = None) -> None:
        self.wakes: list[bool] = []
        self._then = then
        self._woken = threading.Event()

    def wake(self, wait: Wait, ready: bool) -> None:
        self.wakes.append(ready)
        self._woken.set()
        if self._then is not None:
            self._then(ready)

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        raise AssertionError

    def end(self, error: Exception | None) -> None:
        raise AssertionError

    def is_woken(self) -> bool:
        """Wait until it was woken."""
        return self._woken.wait(SECONDS)


def wait_for(*sockets: socket.socket, seconds: float | None = None, idle: bool = False) -> Wait:
    """Return a wait for bytes on one of the sockets."""
    return Wait([(sock, READABLE) for sock in sockets], seconds, lambda ready: None, idle)


@pytest.mark.parametrize(
    "event",
    [
        lambda peer: peer.send(b"x"),
        lambda peer: peer.shutdown(socket.SHUT_WR),
        lambda peer: peer.close(),
    ],
    ids=["byte", "end", "close"],
)
def test_event_wakes_a_wait(
    poller: Poller, pair: Callable[[], Pair], event: Callable[[socket.socket], object]
) -> None:
    ours, theirs = pair()
    owner = Owner()
    poller.watch(wait_for(ours), owner)
    assert len(poller) == 1 and not owner.wakes
    event(theirs)
    assert owner.is_woken()
    wait_until(lambda: not len(poller))
    assert owner.wakes == [True]


def test_byte_that_has_come_before_wakes_a_wait(poller: Poller, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    theirs.send(b"x")
    owner = Owner()
    poller.watch(wait_for(ours), owner)
    assert owner.is_woken() and owner.wakes == [True]


def test_wait_is_woken_once_by_events_on_both_its_sockets(
    poller: Poller, pair: Callable[[], Pair]
) -> None:
    (first, first_peer), (second, second_peer) = pair(), pair()
    first_peer.send(b"x")
    second_peer.send(b"x")
    owner = Owner()
    poller.watch(wait_for(first, second), owner)
    assert owner.is_woken()
    later = Owner()
    third, third_peer = pair()
    poller.watch(wait_for(third), later)
    third_peer.send(b"x")
    assert later.is_woken()
    assert owner.wakes == [True] and not len(poller)


@pytest.mark.parametrize("ready", [0, 1])
def test_either_of_two_sockets_wakes_a_wait(
    poller: Poller, pair: Callable[[], Pair], ready: int
) -> None:
    pairs = [pair(), pair()]
    owner = Owner()
    poller.watch(wait_for(pairs[0][0], pairs[1][0]), owner)
    assert len(poller) == 1
    pairs[ready][1].send(b"x")
    assert owner.is_woken() and owner.wakes == [True]


def test_wait_whose_time_is_up_is_woken(poller: Poller, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    owner, other = Owner(), Owner()
    poller.watch(wait_for(ours, seconds=0.05), owner)
    poller.watch(wait_for(pair()[0]), other)
    assert owner.is_woken() and owner.wakes == [False]
    theirs.send(b"x")
    assert not other.wakes and len(poller) == 1


def test_short_wait_is_woken_in_time(
    log: Lines, pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 110: the poller sleeps for a tick, and another thread watches for less."""
    monkeypatch.setattr(poller_module, "TICK", 600.0)
    poller = Poller(log)
    poller.start()
    long, owners = Owner(), [Owner() for _ in range(3)]
    poller.watch(wait_for(pair()[0], seconds=300.0), long)
    for owner in owners:
        # Each look is far away again when the next wait comes.
        wait_until(lambda: poller._next_look > time.monotonic() + 200.0)
        poller.watch(wait_for(pair()[0], seconds=0.15, idle=True), owner)
        assert owner.is_woken() and owner.wakes == [False]
    assert not long.wakes and len(poller) == 1
    poller.stop()


def test_wait_for_nothing_is_woken_at_once(poller: Poller) -> None:
    owner = Owner()
    poller.watch(wait_for(), owner)
    assert owner.wakes == [True] and not len(poller)


def test_released_idle_waits_are_woken_now_and_later(
    poller: Poller, pair: Callable[[], Pair]
) -> None:
    idle, busy, later = Owner(), Owner(), Owner()
    poller.watch(wait_for(pair()[0], idle=True), idle)
    poller.watch(wait_for(pair()[0]), busy)
    poller.release_idle()
    poller.watch(wait_for(pair()[0], idle=True), later)
    assert (idle.wakes, busy.wakes, later.wakes) == ([False], [], [False])
    assert len(poller) == 1


def test_socket_can_be_watched_again_and_again(poller: Poller, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    for _ in range(5):
        owner = Owner()
        poller.watch(wait_for(ours), owner)
        theirs.send(b"x")
        assert owner.is_woken()
        assert ours.recv(10) == b"x"


def test_woken_owner_can_watch_again_at_once(poller: Poller, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    second = Owner()
    poller.watch(wait_for(ours), Owner(lambda ready: poller.watch(wait_for(ours), second)))
    theirs.send(b"x")
    assert second.is_woken()


def test_fault_of_one_owner_does_not_stop_the_others(
    poller: Poller, pair: Callable[[], Pair], log: Lines
) -> None:
    def fail(ready: bool) -> None:
        raise ValueError("broken")

    (first, first_peer), (second, second_peer) = pair(), pair()
    owner = Owner()
    poller.watch(wait_for(first), Owner(fail))
    poller.watch(wait_for(second), owner)
    first_peer.send(b"x")
    log.wait_for("waking a watched connection: broken")
    second_peer.send(b"x")
    assert owner.is_woken()


def test_descriptors_above_1023_are_watched(poller: Poller, pair: Callable[[], Pair]) -> None:
    """Hazard 93."""
    owners = []
    pairs = [pair() for _ in range(600)]
    for ours, _ in pairs:
        owners.append(Owner())
        poller.watch(wait_for(ours), owners[-1])
    assert max(ours.fileno() for ours, _ in pairs) > 1100
    for _, theirs in pairs:
        theirs.send(b"x")
    assert all(owner.is_woken() for owner in owners)
    assert not len(poller)


def test_stop_wakes_nothing(log: Lines, pair: Callable[[], Pair]) -> None:
    poller = Poller(log)
    poller.start()
    owner = Owner()
    poller.watch(wait_for(pair()[0]), owner)
    poller.stop()
    assert not poller.thread.is_alive() and not owner.wakes


def test_poller_that_never_started_can_be_stopped(log: Lines, pair: Callable[[], Pair]) -> None:
    poller = Poller(log)
    with pytest.raises(ValueError):
        poller.watch(wait_for(pair()[0]), Owner())
    poller.stop()
