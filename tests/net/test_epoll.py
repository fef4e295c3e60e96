"""The epoll whose changes keep the lock, and the one of the select module in its place: same events, same errors."""
from __future__ import annotations

import os
import select
import socket
from typing import Iterator

import pytest

from netproxy.net import calls
from netproxy.net.calls import Epoll
from tests.support.sockets import tcp_pair

Pair = tuple[socket.socket, socket.socket]
LARGE = 1000                # a number that takes more than a byte


@pytest.fixture(params=["ctypes", "portable"])
def epoll(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Epoll]:
    if request.param == "portable":
        monkeypatch.setattr(calls, "_library", None)
    elif not calls._library:
        pytest.skip("no ctypes")
    epoll = Epoll()
    yield epoll
    epoll.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with tcp_pair() as pair:
        yield pair


def test_tells_of_what_comes_until_it_is_read(epoll: Epoll, pair: Pair) -> None:
    ours, theirs = pair
    epoll.register(ours.fileno(), select.POLLIN)
    assert epoll.poll(0) == []
    theirs.send(b"x")
    assert [epoll.poll(5), epoll.poll(5)] == [[(ours.fileno(), select.POLLIN)]] * 2
    assert ours.recv(10) == b"x" and epoll.poll(0) == []


def test_tells_each_from_the_others(epoll: Epoll) -> None:
    """A descriptor comes back as it went in, whatever its size."""
    ends = [os.pipe() for _ in range(3)]
    try:
        high = os.dup2(ends[0][0], LARGE)
        for descriptor in (high, ends[1][0], ends[2][0]):
            epoll.register(descriptor, select.POLLIN)
        os.write(ends[0][1], b"x")
        os.write(ends[2][1], b"x")
        assert sorted(epoll.poll(5)) == sorted([(high, select.POLLIN), (ends[2][0], select.POLLIN)])
        os.close(high)
    finally:
        for end in ends:
            os.close(end[0])
            os.close(end[1])


def test_a_change_counts_from_then_on(epoll: Epoll, pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(b"x")
    epoll.register(ours.fileno(), 0)
    assert epoll.poll(0) == []
    epoll.modify(ours.fileno(), select.POLLIN | select.POLLOUT)
    assert epoll.poll(5) == [(ours.fileno(), select.POLLIN | select.POLLOUT)]


def test_once_is_told_once(epoll: Epoll, pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(b"x")
    epoll.register(ours.fileno(), select.POLLIN | select.EPOLLONESHOT)
    assert epoll.poll(5) == [(ours.fileno(), select.POLLIN)] and epoll.poll(0) == []


def test_of_one_that_nothing_is_asked_of_its_being_gone_is_told(epoll: Epoll, pair: Pair) -> None:
    ours, theirs = pair
    epoll.register(ours.fileno(), 0)
    theirs.shutdown(socket.SHUT_WR)
    assert epoll.poll(0.05) == []           # it may still want to hear
    ours.shutdown(socket.SHUT_RDWR)
    (descriptor, events), = epoll.poll(5)
    assert descriptor == ours.fileno() and events & select.POLLHUP


def test_what_is_taken_out_is_told_of_no_more(epoll: Epoll, pair: Pair) -> None:
    ours, theirs = pair
    epoll.register(ours.fileno(), select.POLLIN)
    epoll.unregister(ours.fileno())
    theirs.send(b"x")
    assert epoll.poll(0) == []
    epoll.register(ours.fileno(), select.POLLIN)
    assert epoll.poll(5) == [(ours.fileno(), select.POLLIN)]


def test_errors(epoll: Epoll, pair: Pair) -> None:
    ours, _ = pair
    with pytest.raises(FileNotFoundError):
        epoll.modify(ours.fileno(), select.POLLIN)
    with pytest.raises(FileNotFoundError):
        epoll.unregister(ours.fileno())
    epoll.register(ours.fileno(), select.POLLIN)
    with pytest.raises(FileExistsError):
        epoll.register(ours.fileno(), select.POLLIN)
    descriptor = ours.fileno()
    ours.close()
    with pytest.raises(OSError):
        epoll.register(descriptor, select.POLLIN)
    with pytest.raises(ValueError):
        epoll.register(ours.fileno(), select.POLLIN)


def test_a_closed_one_changes_nothing_whoever_has_its_number_by_then(epoll: Epoll, pair: Pair) -> None:
    number = epoll._epoll.fileno()
    epoll.close()
    with select.epoll() as other:
        assert other.fileno() == number
        for change in (lambda: epoll.register(pair[0].fileno(), select.POLLIN), lambda: epoll.unregister(pair[0].fileno())):
            with pytest.raises((OSError, ValueError)):
                change()
        pair[1].send(b"x")
        assert other.poll(0) == []
    epoll.close()
