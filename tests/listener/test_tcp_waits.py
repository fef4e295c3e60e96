"""Connections that wait without a thread: what a listener does with a handler's Pause."""

from __future__ import annotations

import threading
from typing import Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.listener import poller as parker_module
from netproxy.net.stream import Stream
from tests.support.sockets import nothing_comes, read_to_end, reset, wait_until
from tests.support.tcp import TcpRig as Rig


class Pausing:
    """A handler that waits for each byte without a thread and gives it back; "!" raises, "." ends."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self.resumed: list[bool] = []

    def handle(self, stream: Stream, client: Address) -> Wait:
        def resume(ready: bool) -> Wait | None:
            self.resumed.append(ready)
            byte = stream.read_some(1) if ready else b""
            if byte == b"!":
                raise ValueError("broken")
            if byte in (b"", b"."):
                return None
            stream.write(byte)
            return pause

        pause = Wait(((stream.socket, READABLE),), self.seconds, resume)
        return pause


class TestPausing:
    def test_a_connection_that_waits_has_no_thread(self, make: Callable[..., Rig]) -> None:
        rig = make(1)
        rig.listener.handler = Pausing()
        rig.listener.start()
        socks = []
        for number in range(1, 21):
            socks.append(rig.connect())
            wait_until(lambda: len(rig.poller) == number)
        for sock in socks * 2:
            sock.send(b"x")
            assert sock.recv(1) == b"x"
        assert rig.pool.threads == 1
        assert rig.listener.live == len(rig.door.inside) == 20
        wait_until(lambda: len(rig.poller) == 20)

    @pytest.mark.parametrize("last, counted", [(b".", None), (b"!", "internal error")])
    def test_ends_as_others_do(self, rig: Rig, last: bytes, counted: str | None) -> None:
        rig.listener.handler = Pausing()
        sock = rig.connect()
        sock.send(b"x")
        assert sock.recv(1) == b"x"
        sock.send(last)
        assert read_to_end(sock) == b""
        wait_until(lambda: not rig.listener.live and not rig.door.inside)
        assert not counted or rig.counts.of("connections", counted) == 1

    def test_a_peer_that_leaves_wakes_it(self, rig: Rig) -> None:
        rig.listener.handler = Pausing()
        sock = rig.connect()
        wait_until(lambda: len(rig.poller) == 1)
        reset(sock)
        wait_until(lambda: not rig.listener.live and not rig.door.inside)
        assert rig.counts.of("connections", "broken off") == 1

    def test_its_time_is_over(
        self, make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parker_module, "TICK", 0.02)
        rig = make()
        rig.listener.handler = handler = Pausing(0.05)
        rig.listener.start()
        assert read_to_end(rig.connect()) == b""
        assert handler.resumed == [False]

    def test_an_abort_wakes_it(self, rig: Rig) -> None:
        rig.listener.handler = Pausing()
        sock = rig.connect()
        wait_until(lambda: len(rig.poller) == 1)
        rig.listener.stop()
        rig.listener.abort()
        assert read_to_end(sock) == b""
        wait_until(lambda: not rig.listener.live)

    def test_a_busy_pool_does_not_end_it(self, make: Callable[..., Rig]) -> None:
        """It was admitted before."""
        rig = make(1)
        rig.listener.handler = Pausing()
        rig.listener.start()
        sock = rig.connect()
        wait_until(lambda: len(rig.poller) == 1)
        busy = threading.Event()
        rig.pool.submit(lambda: busy.wait(5))
        sock.send(b"x")
        assert nothing_comes(sock)
        busy.set()
        assert sock.recv(1) == b"x"
