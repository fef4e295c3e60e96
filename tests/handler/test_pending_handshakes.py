"""Handshakes and dials under way, in a whole daemon: deadlines, reloads, stops, busy pools.

While a target is being dialled the poller watches the pending connection and the client.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import Callable, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.listener import poller as poller_module
from tests.support.exchanges import (
    ANONYMOUS,
    GREETING,
    EchoTarget,
    converse,
    http_connect,
    pack_address,
    socks5_request,
)
from tests.support.handlers import LOCALHOST, SECONDS
from tests.support.pools import Gate
from tests.support.relays import SPS, Running, running
from tests.support.sockets import (
    address_of,
    black_hole,
    listen,
    nothing_comes,
    read_exactly,
    read_to_end,
    reset,
    server,
    wait_until,
)

BLOCK = SPS + "\ndefault: block"
NO_ADDRESS = b"\0\1" + bytes(6)
"""The rest of a reply of SOCKS5 behind its code, in a refusal."""


def threads(relay: Running) -> int:
    """Return the number of pool threads."""
    return relay.daemon.pools["connection"].threads


class SlowTarget:
    """A target whose kernel drops SYNs until accept() or close().

    The client's kernel sends the next SYN after a second.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._listening = self._stack.enter_context(listen(backlog=0))
        self.address = address_of(self._listening)
        # These fill the queue of the listening socket.
        for _ in range(2):
            sock = self._stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(self.address)

    def accept(self) -> socket.socket:
        """Return the first connection whose client has sent anything."""
        while True:
            sock, _ = self._listening.accept()
            self._stack.enter_context(sock)
            sock.settimeout(SECONDS)
            if not nothing_comes(sock, 0.2):
                return sock

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def slow_target() -> Iterator[SlowTarget]:
    target = SlowTarget()
    yield target
    target.close()


def dial(relay: Running, address: Address, data: bytes = b"") -> socket.socket:
    """Return a client whose target is being dialled, without a thread."""
    sock = socket.create_connection((LOCALHOST, relay.port), SECONDS)
    sock.sendall(GREETING + socks5_request(address) + data)
    assert read_exactly(sock, 2) == ANONYMOUS
    # The client and the pending connection.
    wait_until(lambda: relay.daemon._runtime.poller.watched == 2)
    assert threads(relay) == 0
    return sock


class TestDial:
    def test_reply_and_data_wait_for_the_connection(self, slow_target: SlowTarget) -> None:
        """Hazard 15."""
        with running() as relay, dial(relay, slow_target.address, b"early") as sock:
            assert nothing_comes(sock)
            upstream = slow_target.accept()
            bound = pack_address(Address(*upstream.getpeername()))
            assert read_exactly(sock, 10) == b"\5\0\0" + bound
            assert read_exactly(upstream, 5) == b"early"
            upstream.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            assert threads(relay) == 0
            sock.close()
            wait_until(lambda: not relay.daemon.live or upstream.recv(1) == b"")

    def test_refused_connection_is_answered_and_recorded(self, slow_target: SlowTarget) -> None:
        with running() as relay, dial(relay, slow_target.address) as sock:
            slow_target.close()
            assert read_to_end(sock) == b"\5\5" + NO_ADDRESS
            wait_until(lambda: not relay.daemon.live)
            assert [(record.upstream, record.ended) for record in relay.log.records] == [
                ("direct", "connection refused")
            ]
            assert relay.count("dial_failures", "connection refused") == 1

    @pytest.mark.parametrize(
        "request_for, answer",
        [
            (lambda address: GREETING + socks5_request(address), ANONYMOUS + b"\5\6" + NO_ADDRESS),
            (http_connect, b"HTTP/1.1 504 Gateway Timeout\r\n"),
        ],
        ids=["socks5", "http"],
    )
    def test_timeout_is_answered_though_the_client_keeps_sending(
        self,
        request_for: Callable[[Address], bytes],
        answer: bytes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(poller_module, "TICK", 0.02)
        with black_hole() as address, running(SPS + "\ntimeouts: {connect: 300ms}") as relay:
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                sock.sendall(request_for(address))
                for _ in range(20):
                    sock.sendall(b"x")
                assert read_to_end(sock)[: len(answer)] == answer
            wait_until(lambda: not relay.daemon.live)
            assert [(record.upstream, record.ended) for record in relay.log.records] == [
                ("direct", "timed out")
            ]
            assert relay.count("dial_failures", "timed out") == 1

    def test_reset_of_the_client_ends_the_dial(self) -> None:
        """Nothing else ends it: the target never answers, and the time to connect is long."""
        with black_hole() as address, running() as relay:
            before = len(os.listdir("/proc/self/fd"))
            reset(dial(relay, address))
            wait_until(lambda: not relay.daemon.live)
            assert len(os.listdir("/proc/self/fd")) == before
            assert [
                (record.upstream, record.sent, record.ended) for record in relay.log.records
            ] == [("direct", 0, "client left")]
            assert threads(relay) == 0 and not relay.count("dial_failures", "timed out")

    def test_half_close_of_the_client_does_not_end_the_dial(self, slow_target: SlowTarget) -> None:
        with running() as relay, dial(relay, slow_target.address, b"all I say") as sock:
            sock.shutdown(socket.SHUT_WR)
            upstream = slow_target.accept()
            assert read_to_end(upstream) == b"all I say"
            upstream.sendall(b"answer")
            upstream.shutdown(socket.SHUT_WR)
            assert read_to_end(sock)[10:] == b"answer"
        assert [(record.sent, record.received, record.ended) for record in relay.log.records] == [
            (9, 6, "closed")
        ]

    def test_stop_ends_the_dial_and_leaves_nothing_open(self) -> None:
        relay = Running(SPS)
        with black_hole() as address, dial(relay, address) as sock:
            relay.daemon.stop()
            assert read_to_end(sock) == b"" and not relay.daemon.live
            assert [record.ended for record in relay.log.records] == ["client left"]

    def test_reload_does_not_affect_the_dial(self, slow_target: SlowTarget) -> None:
        with running() as relay, dial(relay, slow_target.address, b"x") as sock:
            relay.reload(BLOCK)
            upstream = slow_target.accept()
            assert read_exactly(sock, 10)[1] == 0 and read_exactly(upstream, 1) == b"x"

    def test_event_of_the_last_owner_of_the_descriptor_does_not_end_the_dial(
        self, slow_target: SlowTarget
    ) -> None:
        with running() as relay, dial(relay, slow_target.address) as sock:
            watches = relay.daemon._runtime.poller._watches
            [watch] = {id(watch): watch for watch in watches.values()}.values()
            wait = watch.wait
            pending = wait.watched[0][0].fileno()
            # On this thread: the poller's thread has nothing to do meanwhile.
            assert wait.step is not None and wait.fixed
            assert wait.step(pending, 4) is wait
            sock.sendall(b"x")
            upstream = slow_target.accept()
            assert read_exactly(sock, 10)[1] == 0 and read_exactly(upstream, 1) == b"x"
        assert [record.ended for record in relay.log.records] != ["timed out"]

    def test_dial_of_a_closed_handshake_is_closed_and_recorded(self) -> None:
        """The daemon ends a handshake for which it can have no thread."""
        with ExitStack() as stack:
            relay = stack.enter_context(running())
            address = stack.enter_context(black_hole())
            sock = stack.enter_context(dial(relay, address))
            before = len(os.listdir("/proc/self/fd"))
            [connection] = {
                id(watch.owner): watch.owner
                for watch in relay.daemon._runtime.poller._watches.values()
            }.values()
            connection.end(None)
            assert read_to_end(sock) == b""
            wait_until(lambda: len(os.listdir("/proc/self/fd")) == before - 2)
            assert [(record.upstream, record.ended) for record in relay.log.records] == [
                ("direct", "failed")
            ]


class TestHandshake:
    def test_request_after_a_reload_meets_the_new_rules(self) -> None:
        with (
            server(EchoTarget()) as address,
            running() as relay,
            socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
        ):
            sock.sendall(GREETING)
            assert read_exactly(sock, 2) == ANONYMOUS
            relay.reload(BLOCK)
            sock.sendall(socks5_request(address))
            assert read_to_end(sock)[:2] == b"\5\2"

    def test_drain_lets_it_finish(self) -> None:
        target = EchoTarget()
        with (
            server(target) as address,
            running() as relay,
            socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
        ):
            sock.sendall(GREETING)
            assert read_exactly(sock, 2) == ANONYMOUS
            relay.daemon.stop_accepting()
            assert converse(sock, socks5_request(address) + b"x")[10:] == b"got x"

    def test_stop_ends_it(self) -> None:
        relay = Running(SPS)
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            sock.sendall(GREETING + b"\5\1")
            assert read_exactly(sock, 2) == ANONYMOUS
            relay.daemon.stop()
            assert read_to_end(sock) == b"" and not relay.daemon.live and not relay.log.records

    @pytest.mark.parametrize(
        "sent, answer",
        [
            (b"", b""),
            (b"\5", b""),
            (GREETING + b"\5\1", ANONYMOUS),
            (b"CONNECT a:1 HTTP/1.1\r\n", b"HTTP/1.1 408 Request Timeout\r\n"),
        ],
        ids=["silent", "truncated greeting", "truncated request", "truncated head"],
    )
    def test_deadline_ends_it(
        self, sent: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(poller_module, "TICK", 0.02)
        with (
            running(SPS + "\ntimeouts: {handshake: 200ms}") as relay,
            socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
        ):
            sock.sendall(sent)
            received = read_to_end(sock)
            assert received[: len(answer)] == answer and bool(received) == bool(answer)
            wait_until(lambda: not relay.daemon.live)
            assert not relay.log.records
            assert relay.count("connections", "accepted") == 1


class TestThreads:
    def test_busy_pool_does_not_delay_connections_to_an_address(self) -> None:
        gate, target = Gate(), EchoTarget()
        with (
            server(target) as address,
            running("listeners: [{listen: '127.0.0.1:0', limits: {connections: 100}}]") as relay,
        ):
            pool = relay.daemon.pools["connection"]
            try:
                for _ in range(pool.limit):
                    assert pool.submit(gate)
                for request in (GREETING + socks5_request(address), http_connect(address)) * 3:
                    with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                        assert converse(sock, request + b"hello").endswith(b"got hello")
                assert pool.busy == pool.limit
            finally:
                gate.let_go()
        assert target.received == [b"hello"] * 6
        assert [(record.sent, record.received, record.ended) for record in relay.log.records] == [
            (5, 9, "closed")
        ] * 6

    def test_thousand_silent_clients_take_no_thread(self) -> None:
        limits = "limits: {connections: 2000, handshakes: 1000}"
        target = EchoTarget()
        with (
            server(target) as address,
            running(f"listeners: [{{listen: '127.0.0.1:0', {limits}}}]") as relay,
            ExitStack() as stack,
        ):
            for _ in range(1000):
                stack.enter_context(socket.create_connection((LOCALHOST, relay.port), SECONDS))
            wait_until(lambda: len(relay.daemon._runtime.poller) == 1000)
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                request = GREETING + socks5_request(address)
                assert converse(sock, request + b"hello").endswith(b"got hello")
            # For the oldest client, which is shed.
            assert threads(relay) <= 1
