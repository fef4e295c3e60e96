"""The TCP listener over real connections: admission, faults of one connection, errors of accept, stop."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from typing import Any, Callable

import pytest

from netproxy.errors import ListenError, ProtocolError, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.listener import tcp as tcp_module
from netproxy.listener.tcp import TcpListener
from netproxy.net.stream import Stream
from tests.support.sockets import HAS_IPV6, nothing_comes, read_exactly, read_to_end, wait_until
from tests.support.tcp import Door, TcpRig as Rig

needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")


class TestServing:
    def test_a_connection_is_handled_and_counted(self, rig: Rig) -> None:
        sock = rig.ask()
        assert rig.handler.clients == [Address(*sock.getsockname())]
        assert rig.door.inside == ["127.0.0.1"]
        assert rig.listener.live == 1
        sock.close()
        wait_until(lambda: not rig.listener.live and not rig.door.inside)
        assert rig.counts.counts == {("connections", "accepted"): 1}

    def test_is_tuned_without_a_call_of_its_own(self, make: Callable[..., Rig]) -> None:
        rig = make()
        found: list[int] = []

        class Look:
            def handle(self, stream: Stream, client: Address) -> None:
                found.append(stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                found.append(stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

        rig.listener.handler = Look()
        rig.listener.start()
        read_to_end(rig.connect())
        assert all(found)

    def test_the_handshakes_deadline_runs_from_the_start(self, rig: Rig) -> None:
        """HAZARDS 2."""
        rig.listener.configure(rig.handler, rig.door, 0.1)
        started = time.monotonic()
        assert read_to_end(rig.connect()) == b""
        assert 0.09 <= time.monotonic() - started < 2.0
        rig.counts.wait_for("connections", "broken off")
        assert not rig.log.lines

    @pytest.mark.parametrize(
        "error, counted",
        [(StreamError("reset"), "broken off"), (ProtocolError("no SOCKS"), "bad protocol")],
    )
    def test_what_a_peer_does_wrong_is_no_error_of_ours(
        self, rig: Rig, error: Exception, counted: str
    ) -> None:
        rig.handler.raises = error
        sock = rig.connect()
        sock.sendall(b"x\n")
        assert read_to_end(sock) == b""
        rig.counts.wait_for("connections", counted)
        assert not [line for level, line in rig.log.lines if level != "debug"]

    @pytest.mark.parametrize(
        "error", [ValueError("broken"), MemoryError("broken"), RecursionError("broken")]
    )
    def test_a_fault_ends_only_its_connection_and_is_logged_once(
        self, rig: Rig, error: Exception
    ) -> None:
        """HAZARDS 97."""
        good = rig.ask()
        rig.handler.raises = error
        sock = rig.connect()
        sock.sendall(b"x\n")
        assert read_to_end(sock) == b""
        rig.counts.wait_for("connections", "internal error")
        rig.log.wait_for("broken")
        assert rig.log.of("exception") == [f"serving 127.0.0.1:{sock.getsockname()[1]}: broken"]
        rig.handler.raises = None
        rig.ask()
        assert nothing_comes(good, 0)
        for client in rig.clients:
            client.close()
        wait_until(lambda: not rig.door.inside and not rig.listener.live)

    def test_one_that_handles_nothing_is_closed(self, rig: Rig) -> None:
        class Deaf:
            def handle(self, stream: Stream, client: Address) -> None:
                pass

        rig.listener.handler = Deaf()
        assert read_to_end(rig.connect()) == b""


class TestAdmission:
    def test_one_that_is_refused_is_closed_at_once_and_said(self, rig: Rig) -> None:
        """HAZARDS 95."""
        rig.door.refusal = "client limit"
        assert read_to_end(rig.connect()) == b""
        rig.counts.wait_for("connections_refused", "client limit")
        assert not rig.handler.clients
        assert rig.log.of("limited") == [f"{rig.listener.address}: 127.0.0.1 refused: client limit"]
        rig.door.refusal = ""
        rig.ask()

    def test_a_reload_may_replace_it_while_a_connection_lives(self, rig: Rig) -> None:
        sock = rig.ask()
        old, rig.listener.admission = rig.door, Door()
        sock.close()
        wait_until(lambda: not old.inside)
        assert rig.listener.admission.inside == []

    def test_no_thread_for_it(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        """HAZARDS 94."""
        monkeypatch.setattr(rig.pool, "submit", lambda *_, **__: False)
        assert read_to_end(rig.connect()) == b""
        rig.counts.wait_for("connections_refused", "no thread")
        wait_until(lambda: not rig.door.inside)
        monkeypatch.undo()
        rig.ask()

    def test_while_all_threads_are_busy_the_kernel_holds_the_rest(
        self, make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tcp_module, "ROOM_PAUSE", 0.01)
        rig = make(1)
        rig.listener.start()
        first = rig.ask()
        second = rig.connect()
        second.sendall(b"wait\n")
        rig.log.wait_for("all threads are busy, connections wait")
        assert nothing_comes(second)
        first.close()
        assert read_exactly(second, 5) == b"wait\n"

    def test_one_that_comes_when_the_last_thread_has_just_been_taken_waits_as_well(
        self, make: Callable[..., Rig]
    ) -> None:
        """By another listener on the same pool, or by a connection that goes on: no reason to turn it away."""
        rig = make(1)
        rig.listener.start()
        rig.ask().close()
        wait_until(lambda: not rig.listener.live and not rig.pool.busy)
        taken = threading.Event()
        assert rig.pool.submit(lambda: taken.wait(5))
        sock = rig.connect()
        sock.sendall(b"wait\n")
        assert nothing_comes(sock)
        taken.set()
        assert read_exactly(sock, 5) == b"wait\n"


class TestAcceptErrors:
    def feign(self, rig: Rig, monkeypatch: pytest.MonkeyPatch, *codes: int) -> list[float]:
        """accept() fails with these, one after the other, and then works; gives back when it was called."""
        real, left, times = tcp_module.syscalls.accept, list(codes), []

        def accept(sock: socket.socket) -> Any:
            times.append(time.monotonic())
            if left:
                code = left.pop(0)
                raise OSError(code, os.strerror(code))
            return real(sock)

        monkeypatch.setattr(tcp_module.syscalls, "accept", accept)
        return times

    @pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
    def test_without_descriptors_it_rests_and_then_goes_on(
        self, make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """HAZARDS 92: at most twenty accepts a second, one line in the log."""
        monkeypatch.setattr(tcp_module, "ACCEPT_PAUSE", 0.05)
        rig = make()
        calls = self.feign(rig, monkeypatch, code, code, code)
        rig.listener.start()
        rig.ask()
        pauses = [later - earlier for earlier, later in zip(calls, calls[1:4])]
        assert len(pauses) == 3 and min(pauses) >= 0.05
        assert rig.counts.of("accept_errors", errno.errorcode[code]) == 3
        assert len(set(rig.log.keys)) == 1
        assert (
            rig.log.of("limited")[0]
            == f"{rig.listener.address}: cannot accept: {os.strerror(code)}"
        )

    def test_a_connection_that_left_before_it_was_accepted_costs_nothing(
        self, make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig = make()
        self.feign(rig, monkeypatch, errno.ECONNABORTED, errno.EPERM)
        rig.listener.start()
        rig.ask()
        assert (
            rig.counts.of("accept_errors", "ECONNABORTED")
            == rig.counts.of("accept_errors", "EPERM")
            == 1
        )
        assert not rig.log.lines

    def test_the_pause_is_long_enough(self) -> None:
        assert tcp_module.ACCEPT_PAUSE >= 0.05


class TestStop:
    def test_wakes_the_thread_that_accepts(self, rig: Rig) -> None:
        rig.listener.stop()
        assert not rig.listener.thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            rig.connect()
        assert not rig.counts.counts and not rig.log.lines

    def test_leaves_those_that_live(self, rig: Rig) -> None:
        sock = rig.ask()
        rig.listener.stop()
        assert nothing_comes(sock)
        assert rig.listener.live == 1

    def test_serves_those_that_the_kernel_has_accepted(self, make: Callable[..., Rig]) -> None:
        """They would be reset: whoever drains refuses nobody that has got through."""
        rig = make(1)
        rig.listener.start()
        busy = rig.ask()  # has the only thread, so that nobody is accepted
        waiting = [rig.connect() for _ in range(3)]
        rig.listener.stop()
        busy.close()
        for number, sock in enumerate(waiting):
            sock.sendall(b"%d\n" % number)
            assert read_exactly(sock, 2) == b"%d\n" % number
            sock.close()
        wait_until(lambda: not rig.listener.live)

    def test_while_it_rests(
        self, make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tcp_module, "ROOM_PAUSE", 0.01)
        rig = make(1)
        rig.listener.start()
        rig.ask()
        rig.log.wait_for("all threads are busy")
        rig.listener.stop()
        assert not rig.listener.thread.is_alive()

    def test_though_it_never_started(self, make: Callable[..., Rig]) -> None:
        rig = make()
        rig.listener.stop()
        rig.listener.stop()

    def test_abort_ends_those_that_live(self, rig: Rig) -> None:
        socks = [rig.ask() for _ in range(3)]
        rig.listener.stop()
        rig.listener.abort()
        assert [read_to_end(sock) for sock in socks] == [b""] * 3
        wait_until(lambda: not rig.listener.live)


class TestBinding:
    def test_an_address_in_use_is_named(self, rig: Rig) -> None:
        with pytest.raises(
            ListenError,
            match=rf"tcp 127\.0\.0\.1:{rig.listener.address.port}: Address already in use",
        ):
            TcpListener(rig.listener.address, rig.listener._serving)

    @needs_ipv6
    def test_the_wildcard_takes_both_families(self, make: Callable[..., Rig]) -> None:
        """HAZARDS 81: an IPv4 client is an IPv4 client, whatever the socket."""
        rig = make(8, Address("::", 0))
        rig.listener.start()
        for host in ("127.0.0.1", "::1"):
            sock = rig.connect(host)
            sock.sendall(b"x\n")
            assert read_exactly(sock, 2) == b"x\n"
        assert [client.host for client in rig.handler.clients] == ["127.0.0.1", "::1"]
        assert rig.door.entered == ["127.0.0.1", "::1"]

    @needs_ipv6
    def test_one_ipv6_address_takes_no_ipv4(self, make: Callable[..., Rig]) -> None:
        rig = make(8, Address("::1", 0))
        assert rig.listener.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)

    def test_a_port_just_freed_can_be_had_again(self, make: Callable[..., Rig]) -> None:
        rig = make()
        rig.listener.start()
        rig.ask()
        address = rig.listener.address
        rig.close()
        assert make(8, address).listener.address == address

    def test_the_thread_is_named_after_the_address(self, rig: Rig) -> None:
        assert rig.listener.thread.name == f"tcp-listener {rig.listener.address}"
        assert rig.listener.thread in threading.enumerate()
