"""Waits that a handler returns: what a listener's connection does between two events."""

from __future__ import annotations

import threading
from typing import Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Handshake, Stream, Wait
from netproxy.listener import poller as poller_module
from netproxy.net.stream import complete
from tests.support.sockets import SECONDS, nothing_comes, read_to_end, reset, wait_until
from tests.support.tcp import TcpRig


class WaitingEcho:
    """A handler whose handshake is nothing, and that returns each byte afterwards.

    It holds no thread while it waits.  "!" raises, "." ends the connection.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self.resumed: list[bool] = []

    def handle(self, stream: Stream, client: Address) -> Handshake:
        yield from ()

        def resume(ready: bool) -> Wait | None:
            self.resumed.append(ready)
            byte = complete(stream.read_some(1)) if ready else b""
            if byte == b"!":
                raise ValueError("broken")
            if byte in (b"", b"."):
                return None
            stream.write(byte)
            return wait

        wait = Wait(((stream.socket, READABLE),), self.seconds, resume)
        return wait


def test_waiting_connection_holds_no_thread(make: Callable[..., TcpRig]) -> None:
    rig = make(1)
    rig.configure(WaitingEcho())
    rig.listener.start()
    socks = []
    for number in range(1, 21):
        socks.append(rig.connect())
        wait_until(lambda number=number: len(rig.poller) == number)
    for sock in socks * 2:
        sock.send(b"x")
        assert sock.recv(1) == b"x"
    assert rig.pool.threads == 1
    assert rig.listener.live == len(rig.admission.inside) == 20
    wait_until(lambda: len(rig.poller) == 20)


@pytest.mark.parametrize(("last", "counted"), [(b".", None), (b"!", "internal error")])
def test_waiting_connection_ends_as_others_do(
    rig: TcpRig, last: bytes, counted: str | None
) -> None:
    rig.configure(WaitingEcho())
    sock = rig.connect()
    sock.send(b"x")
    assert sock.recv(1) == b"x"
    sock.send(last)
    assert read_to_end(sock) == b""
    wait_until(rig.all_ended)
    assert not counted or rig.counts.of("connections", counted) == 1


def test_reset_by_the_peer_wakes_a_waiting_connection(rig: TcpRig) -> None:
    rig.configure(WaitingEcho())
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    reset(sock)
    wait_until(rig.all_ended)
    assert rig.counts.of("connections", "broken off") == 1


def test_waiting_connection_is_told_that_its_time_is_up(
    make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller_module, "TICK", 0.02)
    rig = make()
    handler = WaitingEcho(0.05)
    rig.configure(handler)
    rig.listener.start()
    assert read_to_end(rig.connect()) == b""
    assert handler.resumed == [False]


def test_abort_wakes_a_waiting_connection(rig: TcpRig) -> None:
    rig.configure(WaitingEcho())
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    rig.listener.stop()
    rig.listener.abort()
    assert read_to_end(sock) == b""
    wait_until(lambda: not rig.listener.live)


def test_busy_pool_does_not_end_a_waiting_connection(make: Callable[..., TcpRig]) -> None:
    """It was admitted before."""
    rig = make(1)
    rig.configure(WaitingEcho())
    rig.listener.start()
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    may_end = threading.Event()
    rig.pool.submit(lambda: may_end.wait(SECONDS))
    sock.send(b"x")
    assert nothing_comes(sock)
    may_end.set()
    assert sock.recv(1) == b"x"
