"""Where connections wait without a thread: each is woken once, by what it waits for or when its time is over."""
from __future__ import annotations

import socket
import threading
from typing import Callable, Iterator

import pytest

from netproxy.interfaces import READABLE, Pause
from netproxy.listener import parker as parker_module
from netproxy.listener.parker import Parker
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


def pause(*sockets: socket.socket, seconds: float | None = None) -> Pause:
    return Pause([(sock, READABLE) for sock in sockets], seconds, lambda ready: None)


def park(parker: Parker, pause: Pause, wake: Callable[[bool], None]) -> None:
    parker.park(pause, lambda pause, ready: wake(ready), lambda error: None)


@pytest.mark.parametrize("event", [lambda peer: peer.send(b"x"), lambda peer: peer.shutdown(socket.SHUT_WR), lambda peer: peer.close()],
                         ids=["a byte", "the end", "a close"])
def test_is_woken_by(parker: Parker, pair: Callable[[], Pair], event: Callable[[socket.socket], object]) -> None:
    ours, theirs = pair()
    woken = Woken()
    park(parker, pause(ours), woken)
    assert len(parker) == 1 and not woken.calls
    event(theirs)
    assert woken.wait()
    wait_until(lambda: not len(parker))
    assert woken.calls == [True]


def test_is_woken_by_what_was_there_before(parker: Parker, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    theirs.send(b"x")
    woken = Woken()
    park(parker, pause(ours), woken)
    assert woken.wait() and woken.calls == [True]


def test_is_woken_once_though_both_its_sockets_are_ready(parker: Parker, pair: Callable[[], Pair]) -> None:
    (first, one), (second, two) = pair(), pair()
    one.send(b"x")
    two.send(b"x")
    woken = Woken()
    park(parker, pause(first, second), woken)
    assert woken.wait()
    other = Woken()
    third, three = pair()
    park(parker, pause(third), other)
    three.send(b"x")
    assert other.wait()
    assert woken.calls == [True] and not len(parker)


@pytest.mark.parametrize("ready", [0, 1])
def test_either_of_two_sockets_wakes(parker: Parker, pair: Callable[[], Pair], ready: int) -> None:
    pairs = [pair(), pair()]
    woken = Woken()
    park(parker, pause(pairs[0][0], pairs[1][0]), woken)
    assert len(parker) == 1
    pairs[ready][1].send(b"x")
    assert woken.wait() and woken.calls == [True]


def test_its_time_is_over(parker: Parker, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    woken, patient = Woken(), Woken()
    park(parker, pause(ours, seconds=0.05), woken)
    park(parker, pause(pair()[0]), patient)
    assert woken.wait() and woken.calls == [False]
    theirs.send(b"x")
    assert not patient.calls and len(parker) == 1


def test_can_be_parked_again(parker: Parker, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    for _ in range(5):
        woken = Woken()
        park(parker, pause(ours), woken)
        theirs.send(b"x")
        assert woken.wait()
        assert ours.recv(10) == b"x"


def test_can_be_parked_again_by_who_was_woken(parker: Parker, pair: Callable[[], Pair]) -> None:
    ours, theirs = pair()
    woken = Woken()
    park(parker, pause(ours), lambda ready: park(parker, pause(ours), woken))
    theirs.send(b"x")
    assert woken.wait()


def test_a_fault_of_one_does_not_keep_the_others_parked(parker: Parker, pair: Callable[[], Pair], log: Lines) -> None:
    def broken(ready: bool) -> None:
        raise ValueError("broken")
    (first, one), (second, two) = pair(), pair()
    woken = Woken()
    park(parker, pause(first), broken)
    park(parker, pause(second), woken)
    one.send(b"x")
    log.wait_for("waking a parked connection: broken")
    two.send(b"x")
    assert woken.wait()


def test_many(parker: Parker, pair: Callable[[], Pair]) -> None:
    """HAZARDS 93: nothing in it counts descriptors up to 1,023."""
    woken = []
    pairs = [pair() for _ in range(600)]
    for ours, _ in pairs:
        woken.append(Woken())
        park(parker, pause(ours), woken[-1])
    assert max(ours.fileno() for ours, _ in pairs) > 1100
    for _, theirs in pairs:
        theirs.send(b"x")
    assert all(one.wait() for one in woken)
    assert not len(parker)


def test_stops_with_some_parked(log: Lines, pair: Callable[[], Pair]) -> None:
    parker = Parker(log)
    parker.start()
    woken = Woken()
    park(parker, pause(pair()[0]), woken)
    parker.stop()
    assert not parker.thread.is_alive() and not woken.calls


def test_stops_though_it_never_started(log: Lines) -> None:
    Parker(log).stop()
