"""The delay of a refusal ends early if its agent leaves, and for no other event."""

from __future__ import annotations

import socket
from typing import Iterator

import pytest

from netproxy.interfaces.connections import Wait
from netproxy.net.stream import Stream
from netproxy.tunnel.control.refusals import wait_for_end
from tests.support.sockets import SECONDS, tcp_pair


@pytest.fixture
def streams() -> Iterator[tuple[Stream, socket.socket]]:
    with tcp_pair() as (ours, theirs):
        ours.setblocking(False)
        yield Stream(ours), theirs


def test_event_of_a_last_owner_is_not_the_end(streams: tuple[Stream, socket.socket]) -> None:
    """Hazard 187."""
    stream, theirs = streams
    told: list[bool] = []
    wait = wait_for_end(stream, SECONDS, told.append)  # type: ignore[arg-type]
    following = wait.resume(True)
    assert isinstance(following, Wait) and following.watched == wait.watched
    assert following.seconds is not None and 0 < following.seconds <= SECONDS and not told
    theirs.sendall(b"more")  # this is no end either
    assert following.resume(True) is not None and not told
    theirs.close()
    assert following.resume(True) is None and told == [True]


def test_wait_whose_time_is_up_goes_on_without_the_end(
    streams: tuple[Stream, socket.socket],
) -> None:
    told: list[bool] = []
    wait = wait_for_end(streams[0], 0.0, told.append)  # type: ignore[arg-type]
    assert wait.resume(False) is None and told == [False]
