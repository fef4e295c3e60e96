"""side_by_side: two computations, of which each waits for its own socket."""

from __future__ import annotations

import select
import socket
from functools import partial
from typing import Callable, Iterator, NamedTuple

import pytest

from netproxy.errors import DeadlineError, EndOfStream, ProtocolError
from netproxy.interfaces.side_by_side import side_by_side
from netproxy.interfaces.connections import Events, Steps
from netproxy.net.stream import Stream, complete
from tests.support.sockets import SECONDS, tcp_pair


class Sides(NamedTuple):
    """Two streams and their peers, for the main computation and for the other."""

    main: Stream
    main_peer: socket.socket
    other: Stream
    other_peer: socket.socket


@pytest.fixture
def sides() -> Iterator[Sides]:
    with tcp_pair() as (main, main_peer), tcp_pair() as (other, other_peer):
        main.setblocking(False)
        other.setblocking(False)
        yield Sides(Stream(main, limited=5.0), main_peer, Stream(other, limited=5.0), other_peer)


def read_lines(
    stream: Stream, count: int, lines: list[bytes], then: Callable[[], None]
) -> Steps[str]:
    """Read lines; make the call `then` behind each."""
    for _ in range(count):
        lines.append((yield from stream.read_until(b"\n", 100)))
        then()
    return "done"


def ignore_result(steps: Steps[str]) -> Steps[None]:
    yield from steps


def nothing() -> Steps[None]:
    yield from ()


def no_call() -> None:
    """Do nothing."""


def test_either_goes_on_when_its_socket_has_bytes(sides: Sides) -> None:
    """Each line lets the peer of the other side send the next."""
    lines: list[bytes] = []
    answer_main = partial(sides.main_peer.sendall, b"main\n")
    answer_other = partial(sides.other_peer.sendall, b"other\n")
    answer_other()
    main = read_lines(sides.main, 3, lines, answer_other)
    other = ignore_result(read_lines(sides.other, 10, lines, answer_main))
    assert complete(side_by_side(main, other)) == "done"
    assert lines == [b"other\n", b"main\n"] * 3


def test_main_goes_on_when_the_other_has_finished(sides: Sides) -> None:
    sides.main_peer.sendall(b"main\n")
    main = read_lines(sides.main, 1, [], no_call)
    assert complete(side_by_side(main, nothing())) == "done"


def test_main_without_a_need_closes_the_other(sides: Sides) -> None:
    closed: list[bool] = []

    def main() -> Steps[int]:
        yield from ()
        return 7

    def other() -> Steps[None]:
        try:
            yield from sides.other.read_exactly(1)
        finally:
            closed.append(True)

    assert complete(side_by_side(main(), other())) == 7
    assert closed == [True]


def test_other_does_not_go_on_behind_the_end_of_main(sides: Sides) -> None:
    """Both have an event at once."""
    lines: list[bytes] = []
    sides.main_peer.sendall(b"main\n")
    sides.other_peer.sendall(b"other\n")
    for stream in (sides.main, sides.other):
        poll = select.poll()
        poll.register(stream.socket, select.POLLIN)
        assert poll.poll(SECONDS * 1000)
    main = read_lines(sides.main, 1, lines, no_call)
    other = ignore_result(read_lines(sides.other, 1, lines, no_call))
    assert complete(side_by_side(main, other)) == "done"
    assert lines == [b"main\n"]


@pytest.mark.parametrize("failing", ["main", "other"])
def test_error_of_either_closes_both(failing: str, sides: Sides) -> None:
    closed: list[str] = []

    def run(name: str, stream: Stream) -> Steps[None]:
        try:
            yield from stream.read_exactly(1)
            raise ProtocolError(name)
        finally:
            closed.append(name)

    {"main": sides.main_peer, "other": sides.other_peer}[failing].sendall(b"x")
    with pytest.raises(ProtocolError, match=failing):
        complete(side_by_side(run("main", sides.main), run("other", sides.other)))
    assert sorted(closed) == ["main", "other"]


def test_error_of_a_need_is_thrown_into_its_own_side(sides: Sides) -> None:
    def main() -> Steps[str]:
        try:
            yield from sides.main.read_exactly(1)
        except EndOfStream:
            return "ended"
        return "read"

    sides.main_peer.shutdown(socket.SHUT_WR)
    other = ignore_result(read_lines(sides.other, 1, [], no_call))
    assert complete(side_by_side(main(), other)) == "ended"


def test_each_side_has_its_own_deadline(sides: Sides) -> None:
    lines: list[bytes] = []

    def other() -> Steps[None]:
        try:
            yield from sides.other.read_exactly(1)
        except DeadlineError:
            lines.append(b"late\n")
            sides.main_peer.sendall(b"main\n")

    sides.other.limit(0.05)
    main = read_lines(sides.main, 1, lines, no_call)
    assert complete(side_by_side(main, other())) == "done"
    assert lines == [b"late\n", b"main\n"]


def test_sides_may_watch_the_same_socket(sides: Sides) -> None:
    """An upload reads the client while the download writes to it."""
    lines: list[bytes] = []

    def other() -> Steps[None]:
        yield Events(((sides.main.socket, 0),), None)
        lines.append(b"hung up\n")

    sides.main_peer.sendall(b"main\n")
    main = read_lines(sides.main, 1, lines, no_call)
    assert complete(side_by_side(main, other())) == "done"
    assert lines == [b"main\n"]


def test_closed_before_the_end_closes_both(sides: Sides) -> None:
    closed: list[str] = []

    def run(name: str, stream: Stream) -> Steps[None]:
        try:
            yield from stream.read_exactly(1)
        finally:
            closed.append(name)

    steps = side_by_side(run("main", sides.main), run("other", sides.other))
    need = next(steps)
    assert not need.light
    assert {descriptor.fileno() for descriptor, _ in need.watched()[0]} == {
        sides.main.socket.fileno(),
        sides.other.socket.fileno(),
    }
    steps.close()
    assert sorted(closed) == ["main", "other"]
