"""Clients that have not finished their handshake: the oldest is shed beyond a limit."""

from __future__ import annotations

import socket
from functools import partial
from typing import Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Handshake, Stream
from netproxy.listener import tcp as tcp_module
from netproxy.net.stream import complete
from tests.support.pools import Gate
from tests.support.sockets import nothing_comes, read_to_end, wait_until
from tests.support.tcp import TcpRig

LIMIT = 3
SHED = ("connections_refused", "too many handshakes")


class Bytewise:
    """A handler that returns each byte.  "w" ends the handshake, "." the connection."""

    def handle(self, stream: Stream, client: Address) -> Handshake:
        stream.limit(60.0)
        while (byte := (yield from stream.read_some(1))) not in (b"", b"."):
            if byte == b"w":
                stream.handshaking = False
            stream.reply(byte)
        return None


class OnThread:
    """A handler that waits for one byte on a pool thread and returns it."""

    def handle(self, stream: Stream, client: Address) -> Handshake:
        byte = yield Blocking(partial(self._read, stream))
        stream.reply(byte)
        return None

    @staticmethod
    def _read(stream: Stream) -> bytes:
        return complete(stream.read_exactly(1))


@pytest.fixture
def rig(make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch) -> TcpRig:
    monkeypatch.setattr(tcp_module, "HANDSHAKING_LIMIT", LIMIT)
    rig = make(LIMIT + 2)
    rig.configure(Bytewise())
    rig.listener.start()
    return rig


def connect_silent(rig: TcpRig, number: int = 1) -> list[socket.socket]:
    """Connect clients that say nothing, each accepted before the next; the oldest is first."""
    socks = []
    for _ in range(number):
        expected = len(rig.admission.entered) + 1
        socks.append(rig.connect())
        wait_until(lambda expected=expected: len(rig.admission.entered) == expected)
    wait_until(lambda: rig.counts.of("connections", "accepted") == len(rig.admission.entered))
    return socks


def exchange(sock: socket.socket, byte: bytes) -> bytes:
    """Send a byte and return the answer."""
    sock.sendall(byte)
    return sock.recv(1)


def connect_served(rig: TcpRig) -> socket.socket:
    """Connect a client that has finished its handshake."""
    (sock,) = connect_silent(rig)
    assert exchange(sock, b"w") == b"w"
    return sock


def test_silent_clients_up_to_the_limit_stay(rig: TcpRig) -> None:
    socks = connect_silent(rig, LIMIT)
    assert all(nothing_comes(sock) for sock in socks)
    assert [exchange(sock, b"x") for sock in socks] == [b"x"] * LIMIT
    assert rig.counts.of(*SHED) == 0 and rig.listener.live == LIMIT


def test_oldest_silent_client_is_shed_for_one_more(rig: TcpRig) -> None:
    socks = connect_silent(rig, LIMIT + 1)
    assert read_to_end(socks[0]) == b""
    rig.counts.wait_for(*SHED)
    assert [exchange(sock, b"x") for sock in socks[1:]] == [b"x"] * LIMIT
    wait_until(lambda: rig.listener.live == len(rig.admission.inside) == LIMIT)
    assert rig.counts.of(*SHED) == 1


def test_silent_clients_are_shed_in_the_order_they_came(rig: TcpRig) -> None:
    socks = connect_silent(rig, LIMIT)
    for number in range(LIMIT):
        socks += connect_silent(rig)
        assert read_to_end(socks[number]) == b""
        assert rig.counts.of(*SHED) == number + 1
        assert all(nothing_comes(sock, 0.01) for sock in socks[number + 1 :])
    wait_until(lambda: rig.listener.live == LIMIT)


def test_client_that_talks_within_its_handshake_is_shed_as_well(rig: TcpRig) -> None:
    """It sends a byte now and then, and never a whole request."""
    (oldest,) = connect_silent(rig)
    assert exchange(oldest, b"x") == b"x"
    connect_silent(rig, LIMIT)
    assert read_to_end(oldest) == b""
    assert rig.counts.of(*SHED) == 1


def test_client_with_a_finished_handshake_is_never_shed(rig: TcpRig) -> None:
    served = [connect_served(rig) for _ in range(LIMIT + 2)]
    assert rig.counts.of(*SHED) == 0
    silent = connect_silent(rig, 4 * LIMIT)
    for sock in silent[:-LIMIT]:
        assert read_to_end(sock) == b""
    staying = served + silent[-LIMIT:]
    assert [exchange(sock, b"x") for sock in staying] == [b"x"] * (2 * LIMIT + 2)
    assert rig.counts.of(*SHED) == 3 * LIMIT
    wait_until(lambda: rig.listener.live == 2 * LIMIT + 2)


def test_client_that_finishes_its_handshake_frees_a_place(rig: TcpRig) -> None:
    first, second, third = connect_silent(rig, LIMIT)
    assert exchange(first, b"w") == b"w"
    (fourth,) = connect_silent(rig)
    assert all(nothing_comes(sock) for sock in (first, second, third, fourth))
    assert rig.counts.of(*SHED) == 0
    connect_silent(rig)
    assert read_to_end(second) == b""
    assert exchange(first, b"x") == b"x" and rig.counts.of(*SHED) == 1


def test_client_is_served_among_many_silent_ones(rig: TcpRig) -> None:
    silent = connect_silent(rig, 5 * LIMIT)
    served = connect_served(rig)
    silent += connect_silent(rig, 5 * LIMIT)
    assert exchange(served, b"x") == b"x"
    served.sendall(b".")
    assert read_to_end(served) == b""
    assert [read_to_end(sock) for sock in silent[:-LIMIT]] == [b""] * (9 * LIMIT)
    assert rig.counts.of(*SHED) == 9 * LIMIT
    wait_until(lambda: rig.listener.live == len(rig.admission.inside) == LIMIT)


@pytest.mark.parametrize("by", ["the handler", "the client"])
def test_ended_connections_do_not_count(rig: TcpRig, by: str) -> None:
    (first,) = connect_silent(rig)
    for _ in range(3 * LIMIT):
        (sock,) = connect_silent(rig)
        if by == "the handler":
            sock.sendall(b".")
            assert read_to_end(sock) == b""
        else:
            sock.close()
        wait_until(lambda: rig.listener.live == 1)
    assert exchange(first, b"x") == b"x"
    assert rig.counts.of(*SHED) == 0 and len(rig.admission.entered) == 3 * LIMIT + 1


def test_refused_client_takes_no_place(rig: TcpRig) -> None:
    socks = connect_silent(rig, LIMIT)
    rig.admission.refusal = "not allowed"
    assert [read_to_end(rig.connect()) for _ in range(LIMIT)] == [b""] * LIMIT
    assert [exchange(sock, b"x") for sock in socks] == [b"x"] * LIMIT
    assert rig.counts.of(*SHED) == 0
    assert rig.counts.of("connections_refused", "not allowed") == LIMIT


def test_client_whose_handshake_holds_a_thread_is_shed_as_well(rig: TcpRig) -> None:
    rig.configure(OnThread())
    socks = connect_silent(rig, LIMIT + 1)
    assert read_to_end(socks[0]) == b""
    assert [exchange(sock, b"x") for sock in socks[1:]] == [b"x"] * LIMIT
    assert rig.counts.of(*SHED) == 1


def test_client_whose_bytes_were_not_read_yet_is_not_shed(
    make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a burst the daemon is late, not the client."""
    monkeypatch.setattr(tcp_module, "HANDSHAKING_LIMIT", LIMIT)
    rig, gate = make(1), Gate()
    rig.configure(OnThread())
    rig.listener.start()
    assert rig.pool.submit(gate)
    first, second, third = connect_silent(rig, LIMIT)
    first.sendall(b"x")
    (fourth,) = connect_silent(rig)
    assert read_to_end(second) == b""
    gate.let_go()
    assert first.recv(1) == b"x"
    assert nothing_comes(third) and nothing_comes(fourth)
    assert rig.counts.of(*SHED) == 1


def test_shed_client_has_a_record(rig: TcpRig) -> None:
    connect_silent(rig, LIMIT + 2)
    rig.counts.wait_for(*SHED, 2)
    decided = "the limit of unfinished handshakes"
    assert {(refusal.client, refusal.decided) for refusal in rig.counts.refusals} == {
        ("127.0.0.1", decided)
    }
