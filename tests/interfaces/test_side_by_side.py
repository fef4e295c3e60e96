"""Two computations side by side: each gets its own events, and the main one's end ends both."""

from __future__ import annotations

import select
import socket
from typing import Any, Iterator

import pytest

from netproxy.errors import StreamError
from netproxy.interfaces.connections import Events, Ready, Steps
from netproxy.interfaces.side_by_side import side_by_side
from netproxy.net.stream import complete

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def wait_for(sock: socket.socket, events: int, results: list[Ready]) -> Steps[None]:
    results.append((yield Events(((sock, events),), 30.0)))


def returning(value: Any, steps: Steps[None]) -> Steps[Any]:
    yield from steps
    return value


def test_events_of_one_side_are_not_given_to_the_other(pair: Pair) -> None:
    """Both watch one descriptor; it is writable, but its peer has not left."""
    near, _ = pair
    main: list[Ready] = []
    other: list[Ready] = []
    steps = side_by_side(
        returning("done", wait_for(near, select.POLLOUT, main)),
        wait_for(near, select.POLLRDHUP, other),
    )
    assert complete(steps) == "done"
    assert main == [{near.fileno(): select.POLLOUT}] and other == []


def test_hang_up_is_given_to_both_sides(pair: Pair) -> None:
    near, far = pair
    far.close()
    main: list[Ready] = []
    other: list[Ready] = []
    twice = wait_for(near, select.POLLIN, main)

    def first_other_then_main() -> Steps[str]:
        yield from twice
        return "done"

    assert complete(side_by_side(first_other_then_main(), wait_for(near, 0, other))) == "done"
    assert main[0][near.fileno()] & select.POLLHUP


def test_error_of_the_other_side_ends_both(pair: Pair) -> None:
    near, far = pair
    ended = []

    def main() -> Steps[None]:
        try:
            yield Events(((near, select.POLLIN),), None)
        finally:
            ended.append("main")

    def other() -> Steps[None]:
        yield Events(((near, select.POLLOUT),), None)
        raise StreamError("the client has left")

    with pytest.raises(StreamError, match="the client has left"):
        complete(side_by_side(main(), other()))
    assert ended == ["main"]
