"""Clients that say nothing: beyond a number of them the one that has been silent longest makes room for the next."""

from __future__ import annotations

import socket
from typing import Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.listener import tcp as tcp_module
from netproxy.net.stream import Stream
from tests.support.sockets import nothing_comes, read_to_end, wait_until
from tests.support.tcp import TcpRig

LIMIT = 3
DROPPED = ("connections_refused", "too many handshakes")


class Greeting:
    """A handler that waits without a thread; "w" is welcomed and answered, "." ends, all else is given back."""

    def handle(self, stream: Stream, client: Address) -> Wait:
        def resume(ready: bool) -> Wait | None:
            byte = stream.read_some(1) if ready else b""
            if byte in (b"", b"."):
                return None
            if byte == b"w":
                stream.welcome()
            stream.write(byte)
            return pause

        pause = Wait(((stream.socket, READABLE),), 60.0, resume)
        return pause


@pytest.fixture
def rig(make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch) -> TcpRig:
    monkeypatch.setattr(tcp_module, "GREETERS_LIMIT", LIMIT)
    rig = make(4)
    rig.listener.handler = Greeting()
    rig.listener.start()
    return rig


def silent(rig: TcpRig, number: int = 1) -> list[socket.socket]:
    """So many more clients that say nothing, each accepted before the next, oldest first."""
    socks = []
    for _ in range(number):
        entered = len(rig.door.entered)
        socks.append(rig.connect())
        wait_until(lambda: len(rig.door.entered) > entered)
    wait_until(lambda: rig.counts.of("connections", "accepted") == len(rig.door.entered))
    return socks


def say(sock: socket.socket, byte: bytes) -> bytes:
    sock.sendall(byte)
    return sock.recv(1)


def welcomed(rig: TcpRig) -> socket.socket:
    (sock,) = silent(rig)
    assert say(sock, b"w") == b"w"
    return sock


def test_as_many_as_may_be_stay(rig: TcpRig) -> None:
    socks = silent(rig, LIMIT)
    assert all(nothing_comes(sock) for sock in socks)
    assert [say(sock, b"x") for sock in socks] == [b"x"] * LIMIT
    assert rig.counts.of(*DROPPED) == 0 and rig.listener.live == LIMIT


def test_the_oldest_is_closed_for_one_more(rig: TcpRig) -> None:
    socks = silent(rig, LIMIT + 1)
    assert read_to_end(socks[0]) == b""
    rig.counts.wait_for(*DROPPED)
    assert [say(sock, b"x") for sock in socks[1:]] == [b"x"] * LIMIT
    wait_until(lambda: rig.listener.live == len(rig.door.inside) == LIMIT)
    assert rig.counts.of(*DROPPED) == 1


def test_they_are_closed_in_the_order_they_came(rig: TcpRig) -> None:
    socks = silent(rig, LIMIT)
    for number in range(LIMIT):
        socks += silent(rig)
        assert read_to_end(socks[number]) == b""
        assert rig.counts.of(*DROPPED) == number + 1
        assert all(nothing_comes(sock, 0.01) for sock in socks[number + 1 :])
    wait_until(lambda: rig.listener.live == LIMIT)


def test_one_that_talks_without_being_welcomed_is_none_the_better(rig: TcpRig) -> None:
    """A byte now and then, and never a whole request."""
    (oldest,) = silent(rig)
    assert say(oldest, b"x") == b"x"
    silent(rig, LIMIT)
    assert read_to_end(oldest) == b""
    assert rig.counts.of(*DROPPED) == 1


def test_a_welcomed_one_is_never_closed(rig: TcpRig) -> None:
    guests = [welcomed(rig) for _ in range(LIMIT + 2)]
    assert rig.counts.of(*DROPPED) == 0
    socks = silent(rig, 4 * LIMIT)
    for sock in socks[:-LIMIT]:
        assert read_to_end(sock) == b""
    assert [say(sock, b"x") for sock in guests + socks[-LIMIT:]] == [b"x"] * (2 * LIMIT + 2)
    assert rig.counts.of(*DROPPED) == 3 * LIMIT
    wait_until(lambda: rig.listener.live == 2 * LIMIT + 2)


def test_one_welcomed_while_silent_ones_wait_gives_its_place_to_another(rig: TcpRig) -> None:
    first, second, third = silent(rig, LIMIT)
    assert say(first, b"w") == b"w"
    (fourth,) = silent(rig)
    assert all(nothing_comes(sock) for sock in (first, second, third, fourth))
    assert rig.counts.of(*DROPPED) == 0
    silent(rig)
    assert read_to_end(second) == b""
    assert say(first, b"x") == b"x" and rig.counts.of(*DROPPED) == 1


def test_a_good_client_gets_through_a_crowd(rig: TcpRig) -> None:
    crowd = silent(rig, 5 * LIMIT)
    guest = welcomed(rig)
    crowd += silent(rig, 5 * LIMIT)
    assert say(guest, b"x") == b"x"
    guest.sendall(b".")
    assert read_to_end(guest) == b""
    assert [read_to_end(sock) for sock in crowd[:-LIMIT]] == [b""] * (9 * LIMIT)
    assert rig.counts.of(*DROPPED) == 9 * LIMIT
    wait_until(lambda: rig.listener.live == len(rig.door.inside) == LIMIT)


@pytest.mark.parametrize("by", ["itself", "the client"])
def test_those_that_have_ended_do_not_count(rig: TcpRig, by: str) -> None:
    (patient,) = silent(rig)
    for _ in range(3 * LIMIT):
        (sock,) = silent(rig)
        if by == "itself":
            sock.sendall(b".")
            assert read_to_end(sock) == b""
        else:
            sock.close()
        wait_until(lambda: rig.listener.live == 1)
    assert say(patient, b"x") == b"x"
    assert rig.counts.of(*DROPPED) == 0 and len(rig.door.entered) == 3 * LIMIT + 1


def test_a_refused_client_costs_nobody_a_place(rig: TcpRig) -> None:
    socks = silent(rig, LIMIT)
    rig.door.refusal = "not allowed"
    assert [read_to_end(rig.connect()) for _ in range(LIMIT)] == [b""] * LIMIT
    assert [say(sock, b"x") for sock in socks] == [b"x"] * LIMIT
    assert (
        rig.counts.of(*DROPPED) == 0
        and rig.counts.of("connections_refused", "not allowed") == LIMIT
    )


def test_one_that_waits_on_a_thread_is_closed_too(
    make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler blocks in a read."""
    monkeypatch.setattr(tcp_module, "GREETERS_LIMIT", LIMIT)
    rig = make(LIMIT + 2)
    rig.listener.start()
    socks = silent(rig, LIMIT + 1)
    assert read_to_end(socks[0]) == b""
    for sock in socks[1:]:
        sock.sendall(b"\n")
        assert sock.recv(10) == b"\n"
    assert rig.counts.of(*DROPPED) == 1


def test_the_log_says_it_once_for_each_listener(rig: TcpRig) -> None:
    silent(rig, LIMIT + 2)
    assert set(rig.log.keys) == {("greeters", rig.listener.address)}
    assert (
        rig.log.of("limited")[0]
        == f"{rig.listener.address}: {LIMIT} clients say nothing: the oldest are dropped"
    )
