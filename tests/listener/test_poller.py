"""Where connections wait without a thread: each is woken once, by what it waits for or when its time is over."""

from __future__ import annotations

import socket
import threading
from typing import Callable

import pytest

from netproxy.interfaces.connections import READABLE, Wait
from netproxy.listener.poller import Poller
from tests.support.doubles import Lines
from tests.support.sockets import wait_until

Pair = tuple[socket.socket, socket.socket]


class Woken:
    """Records the calls of one wake()."""

    def __init__(self) -> None:
        self.calls: list[bool] = []
        self._event = threading.Event()

    def __call__(self, ready: bool) -> None:
        self.calls.append(ready)
        self._event.set()

    def wait(self) -> bool:
        return self._event.wait(5)


def pause(*sockets: socket.socket, seconds: float | None = None) -> Wait:
    return Wait([(sock, READABLE) for sock in sockets], seconds, lambda ready: None)


def watch(poller: Poller, pause: Wait, wake: Callable[[bool], None]) -> None:
    poller.watch(pause, lambda pause, ready: wake(ready), lambda error: None)


@pytest.mark.parametrize(
    "event",
    [
        lambda peer: peer.send(b"x"),
        lambda peer: peer.shutdown(socket.SHUT_WR),
        lambda peer: peer.close(),
    ],
    ids=["a byte", "the end", "a close"],
)
def test_is_woken_by(
    poller: Poller, pair: Callable[[], Pair], event: Callable[[socket.socket], object]
) -> None:
    ours, theirs = pair()
    woken = Woken()
    watch(poller, pause(ours), woken)
    assert len(poller) == 1 and not woken.calls
    event(theirs)
    assert woken.wait()
    wait_until(lambda: not len(poller))
    assert woken.calls == [True]


def test_is_woken_by_what_was_there_before(poller: Poller, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    theirs.send(b"x")
    woken = Woken()
    watch(poller, pause(ours), woken)
    assert woken.wait() and woken.calls == [True]


def test_is_woken_once_though_both_its_sockets_are_ready(
    poller: Poller, pair: Callable[[], Pair]
) -> None:
    (first, one), (second, two) = pair(), pair()
    one.send(b"x")
    two.send(b"x")
    woken = Woken()
    watch(poller, pause(first, second), woken)
    assert woken.wait()
    other = Woken()
    third, three = pair()
    watch(poller, pause(third), other)
    three.send(b"x")
    assert other.wait()
    assert woken.calls == [True] and not len(poller)


@pytest.mark.parametrize("ready", [0, 1])
def test_either_of_two_sockets_wakes(poller: Poller, pair: Callable[[], Pair], ready: int) -> None:
    pairs = [pair(), pair()]
    woken = Woken()
    watch(poller, pause(pairs[0][0], pairs[1][0]), woken)
    assert len(poller) == 1
    pairs[ready][1].send(b"x")
    assert woken.wait() and woken.calls == [True]


def test_its_time_is_over(poller: Poller, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    woken, patient = Woken(), Woken()
    watch(poller, pause(ours, seconds=0.05), woken)
    watch(poller, pause(pair()[0]), patient)
    assert woken.wait() and woken.calls == [False]
    theirs.send(b"x")
    assert not patient.calls and len(poller) == 1


def test_can_be_parked_again(poller: Poller, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    for _ in range(5):
        woken = Woken()
        watch(poller, pause(ours), woken)
        theirs.send(b"x")
        assert woken.wait()
        assert ours.recv(10) == b"x"


def test_can_be_parked_again_by_who_was_woken(poller: Poller, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    woken = Woken()
    watch(poller, pause(ours), lambda ready: watch(poller, pause(ours), woken))
    theirs.send(b"x")
    assert woken.wait()


def test_a_fault_of_one_does_not_keep_the_others_parked(
    poller: Poller, pair: Callable[[], Pair], log: Lines
) -> None:
    def broken(ready: bool) -> None:
        raise ValueError("broken")

    (first, one), (second, two) = pair(), pair()
    woken = Woken()
    watch(poller, pause(first), broken)
    watch(poller, pause(second), woken)
    one.send(b"x")
    log.wait_for("waking a parked connection: broken")
    two.send(b"x")
    assert woken.wait()


def test_many(poller: Poller, pair: Callable[[], Pair]) -> None:
    """HAZARDS 93: nothing in it counts descriptors up to 1,023."""
    woken = []
    pairs = [pair() for _ in range(600)]
    for ours, _ in pairs:
        woken.append(Woken())
        watch(poller, pause(ours), woken[-1])
    assert max(ours.fileno() for ours, _ in pairs) > 1100
    for _, theirs in pairs:
        theirs.send(b"x")
    assert all(one.wait() for one in woken)
    assert not len(poller)


def test_stops_with_some_parked(log: Lines, pair: Callable[[], Pair]) -> None:
    poller = Poller(log)
    poller.start()
    woken = Woken()
    watch(poller, pause(pair()[0]), woken)
    poller.stop()
    assert not poller.thread.is_alive() and not woken.calls


def test_stops_though_it_never_started(log: Lines) -> None:
    Poller(log).stop()
