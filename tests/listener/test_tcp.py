"""The TCP listener over real connections: admission, faults, errors of accept, binding, stop."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from typing import Any, Callable

import pytest

from netproxy.access.limits import Admission
from netproxy.errors import ListenError, ProtocolError, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Handshake, Stream
from netproxy.interfaces.listeners import ALL_CLIENTS
from netproxy.listener import tcp as tcp_module
from netproxy.listener.sockets.accept_wait import SharedAcceptWait
from netproxy.listener.tcp import TcpListener
from tests.support.sockets import (
    HAS_IPV6,
    SECONDS,
    Task,
    nothing_comes,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.tcp import RecordingAdmission, TcpRig

needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")


class OnThread:
    """A handler whose handshake is a blocking call that does nothing."""

    def handle(self, stream: Stream, client: Address) -> Handshake:
        yield Blocking(lambda: None)
        stream.reply(b"served")
        return None


class TestServing:
    def test_connection_is_handled_and_counted(self, rig: TcpRig) -> None:
        sock = rig.ask()
        assert rig.handler.clients == [Address(*sock.getsockname())]
        assert rig.admission.inside == ["127.0.0.1"]
        assert rig.listener.live == 1
        sock.close()
        wait_until(rig.all_ended)
        assert rig.counts.counts == {("connections", "accepted"): 1}

    def test_accepted_socket_inherits_the_options_of_the_listener(
        self, make: Callable[..., TcpRig]
    ) -> None:
        """It costs no system call for each connection."""
        options: list[int] = []

        class Look:
            def handle(self, stream: Stream, client: Address) -> Handshake:
                sock = stream.socket
                options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                options.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
                yield from ()
                return None

        rig = make()
        rig.configure(Look())
        rig.listener.start()
        read_to_end(rig.connect())
        assert len(options) == 2 and all(options)

    def test_deadline_of_the_handshake_runs_from_the_accept(self, rig: TcpRig) -> None:
        """Hazard 2."""
        rig.configure(rig.handler, 0.1)
        assert read_to_end(rig.connect()) == b""
        rig.counts.wait_for("connections", "timed out")
        (refusal,) = rig.counts.refusals
        assert refusal.decided == "out of time" and not rig.log.lines

    @pytest.mark.parametrize(
        ("error", "counted"),
        [(StreamError("reset"), "broken off"), (ProtocolError("no SOCKS"), "bad protocol")],
    )
    def test_fault_of_the_peer_is_counted_and_only_a_refusal_recorded(
        self, rig: TcpRig, error: Exception, counted: str
    ) -> None:
        rig.handler.raises = error
        sock = rig.connect()
        sock.sendall(b"x\n")
        assert read_to_end(sock) == b""
        rig.counts.wait_for("connections", counted)
        assert not rig.log.lines
        assert [str(refusal.decided) for refusal in rig.counts.refusals] == (
            ["no SOCKS"] if counted == "bad protocol" else []
        )

    @pytest.mark.parametrize(
        "error", [ValueError("broken"), MemoryError("broken"), RecursionError("broken")]
    )
    def test_fault_of_ours_ends_only_its_connection_and_is_logged_once(
        self, rig: TcpRig, error: Exception
    ) -> None:
        """Hazard 97."""
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
        wait_until(rig.all_ended)

    def test_connection_is_closed_when_its_handler_returns_nothing(self, rig: TcpRig) -> None:
        class Deaf:
            def handle(self, stream: Stream, client: Address) -> Handshake:
                yield from ()
                return None

        rig.configure(Deaf())
        assert read_to_end(rig.connect()) == b""

    def test_fault_before_the_handshake_costs_its_connection_only(
        self, rig: TcpRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def enter(client: str) -> str:
            raise ValueError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(rig.admission, "enter", enter)
            sock = rig.connect()
            assert read_to_end(sock) == b""
        port = sock.getsockname()[1]
        message = f"accepting 127.0.0.1:{port} on {rig.listener.address}: broken"
        assert rig.log.of("exception") == [message]
        rig.ask()


class TestAdmission:
    def test_refused_client_is_closed_at_once_and_recorded(self, rig: TcpRig) -> None:
        """Hazard 95."""
        rig.admission.refusal = "client limit"
        assert read_to_end(rig.connect()) == b""
        rig.counts.wait_for("connections_refused", "client limit")
        assert not rig.handler.clients
        (refusal,) = rig.counts.refusals
        decided = "limits.connections_per_client"
        assert (refusal.client, refusal.decided) == ("127.0.0.1", decided)
        rig.admission.refusal = ""
        rig.ask()

    def test_connection_leaves_the_admission_it_has_entered(self, rig: TcpRig) -> None:
        """A reload replaces the listener's admission while the connection lives."""
        sock = rig.ask()
        later = RecordingAdmission()
        rig.listener.configure(rig.handler, later, 5.0, 256)
        sock.close()
        wait_until(lambda: not rig.admission.inside)
        assert later.inside == []

    def test_client_with_most_connections_loses_one_for_another_client(self, rig: TcpRig) -> None:
        """Hazard 137."""
        rig.admission = Admission(ALL_CLIENTS, 4, 4)
        rig.configure(rig.handler)
        many = [rig.ask(source="127.0.0.3") for _ in range(4)]
        good = rig.ask()
        wait_until(lambda: rig.listener.live == rig.admission.live == 4)
        ended = [sock for sock in many if not nothing_comes(sock, 0.1)]
        assert len(ended) == 1 and read_to_end(ended[0]) == b""
        assert rig.counts.of("connections_refused", "yielded to another client") == 1
        (refusal,) = rig.counts.refusals
        assert (refusal.client, refusal.decided) == ("127.0.0.3", "limits.connections")
        for sock in [good, *many]:
            sock.close()
        wait_until(lambda: not rig.listener.live)
        assert not rig.admission.live and not rig.admission.residents

    def test_connection_without_a_thread_is_closed_and_counted(
        self, rig: TcpRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 94."""
        rig.configure(OnThread())
        monkeypatch.setattr(rig.pool, "submit", lambda *_, **__: False)
        assert read_to_end(rig.connect()) == b""
        rig.counts.wait_for("connections_refused", "no thread")
        wait_until(rig.all_ended)
        monkeypatch.undo()
        assert read_to_end(rig.connect()) == b"served"

    def test_connection_waits_for_a_busy_pool(self, make: Callable[..., TcpRig]) -> None:
        """Another listener on the same pool may have taken the last thread."""
        rig = make(1)
        rig.configure(OnThread())
        rig.listener.start()
        may_end = threading.Event()
        assert rig.pool.submit(lambda: may_end.wait(SECONDS))
        socks = [rig.connect() for _ in range(3)]
        assert all(nothing_comes(sock) for sock in socks)
        rig.log.wait_for("all threads are busy")
        may_end.set()
        assert [read_to_end(sock) for sock in socks] == [b"served"] * 3
        assert rig.pool.threads == 1


class TestAcceptErrors:
    def fail_accept(self, monkeypatch: pytest.MonkeyPatch, *codes: int) -> list[float]:
        """Make accept() fail with these errors, one after the other, and work afterwards.

        Returns the times of the calls.
        """
        accept, left, times = tcp_module.TcpListener._accept, list(codes), []

        def failing_accept(sock: socket.socket) -> Any:
            times.append(time.monotonic())
            if left:
                code = left.pop(0)
                raise OSError(code, os.strerror(code))
            return accept(sock)

        monkeypatch.setattr(tcp_module.TcpListener, "_accept", staticmethod(failing_accept))
        return times

    def test_listener_accepts_only_when_a_connection_waits(
        self, make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a descriptor even an accept(2) in vain would fail, and be counted."""
        rig = make()
        calls = self.fail_accept(monkeypatch)
        rig.listener.start()
        for number in range(1, 4):
            rig.ask()
            assert len(calls) == number

    @pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
    def test_listener_without_descriptors_pauses_and_then_goes_on(
        self, make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """Hazard 92: the thread does not spin, and the log says it once."""
        monkeypatch.setattr(tcp_module, "ACCEPT_PAUSE", 0.05)
        rig = make()
        calls = self.fail_accept(monkeypatch, code, code, code)
        rig.listener.start()
        rig.ask()
        pauses = [later - earlier for earlier, later in zip(calls, calls[1:4], strict=False)]
        assert len(pauses) == 3 and min(pauses) >= 0.05
        assert rig.counts.of("accept_errors", errno.errorcode[code]) == 3
        assert len(set(rig.log.keys)) == 1
        message = f"{rig.listener.address}: cannot accept: {os.strerror(code)}"
        assert rig.log.of("limited")[0] == message

    def test_connection_that_left_before_it_was_accepted_costs_no_pause(
        self, make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tcp_module, "ACCEPT_PAUSE", 10 * SECONDS)
        rig = make()
        self.fail_accept(monkeypatch, errno.ECONNABORTED, errno.EPERM)
        rig.listener.start()
        rig.ask()
        assert rig.counts.of("accept_errors", "ECONNABORTED") == 1
        assert rig.counts.of("accept_errors", "EPERM") == 1
        assert not rig.log.lines

    def test_pause_allows_at_most_twenty_accepts_a_second(self) -> None:
        assert tcp_module.ACCEPT_PAUSE >= 0.05


class TestStop:
    def test_stop_wakes_the_accepting_thread(self, rig: TcpRig) -> None:
        rig.listener.stop()
        assert not rig.listener.thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            rig.connect()
        assert not rig.counts.counts and not rig.log.lines

    def test_live_connections_survive_the_stop(self, rig: TcpRig) -> None:
        sock = rig.ask()
        rig.listener.stop()
        assert nothing_comes(sock)
        assert rig.listener.live == 1

    def test_connections_that_the_kernel_has_accepted_are_served(
        self, make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel would reset them with the socket."""
        rig = make()
        accepting = threading.Event()

        def verify_request(request: Any, client: Any) -> bool:
            accepting.set()
            time.sleep(0.2)
            return True

        rig.listener.start()
        # The accepting thread is busy with the first, so that the others wait in the backlog.
        rig.listener.verify_request = verify_request  # type: ignore[method-assign]
        socks = [rig.connect() for _ in range(4)]
        assert accepting.wait(SECONDS)
        del rig.listener.verify_request
        rig.admission.inside.append("127.0.0.1")  # for the first, which was not counted in
        rig.listener.stop()
        for number, sock in enumerate(socks):
            sock.sendall(b"%d\n" % number)
            assert read_exactly(sock, 2) == b"%d\n" % number
            sock.close()
        wait_until(rig.all_ended)

    def test_stop_while_the_thread_pauses(
        self, make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tcp_module, "ACCEPT_PAUSE", 0.1)
        rig = make()
        errors = [errno.EMFILE] * 3
        TestAcceptErrors().fail_accept(monkeypatch, *errors)
        rig.listener.start()
        with rig.connect():
            rig.log.wait_for("cannot accept")
            rig.listener.stop()
        assert not rig.listener.thread.is_alive()

    @pytest.mark.parametrize("errors", [[], [errno.EMFILE]], ids=["accepted", "accept fails"])
    def test_stop_ends_the_listening_of_other_copies(
        self, make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch, errors: list[int]
    ) -> None:
        """Those of other processes would take connections that nobody accepts."""
        rig = make()
        rig.listener._wait.close()
        rig.listener._wait = SharedAcceptWait()  # as for a socket that was given
        rig.listener._wait.watch(rig.listener.socket)
        rig.listener.start()
        with rig.listener.socket.dup():
            rig.listener.ends_socket = True
            monkeypatch.setattr(tcp_module, "ACCEPT_PAUSE", 0.0)

            def accept(sock: socket.socket) -> None:
                raise OSError(errors[0], os.strerror(errors[0]))

            if errors:
                monkeypatch.setattr(rig.listener, "_accept", accept)
            rig.listener.stop()
            with pytest.raises(ConnectionRefusedError):
                rig.connect()

    def test_listener_that_never_started_can_be_stopped(self, make: Callable[..., TcpRig]) -> None:
        rig = make()
        rig.listener.stop()
        rig.listener.stop()

    def test_abort_ends_live_connections(self, rig: TcpRig) -> None:
        socks = [rig.ask() for _ in range(3)]
        rig.listener.stop()
        rig.listener.abort()
        assert [read_to_end(sock) for sock in socks] == [b""] * 3
        wait_until(lambda: not rig.listener.live)


class TestSocketserver:
    """What TcpListener inherits from socketserver.ThreadingTCPServer works."""

    def test_shutdown_ends_serve_forever(self, make: Callable[..., TcpRig]) -> None:
        rig = make()
        serving = Task(rig.listener.serve_forever)
        rig.ask()
        Task(rig.listener.shutdown).result()
        serving.result()
        assert not rig.listener.thread.is_alive()

    def test_shutdown_ends_the_thread_of_start(self, rig: TcpRig) -> None:
        sock = rig.ask()
        Task(rig.listener.shutdown).result()
        rig.listener.thread.join(SECONDS)
        assert not rig.listener.thread.is_alive()
        assert nothing_comes(sock) and rig.listener.live == 1

    def test_shutdown_before_serve_forever_lets_it_end_at_once(
        self, make: Callable[..., TcpRig]
    ) -> None:
        rig = make()
        Task(rig.listener.shutdown).result()
        Task(rig.listener.serve_forever).result()

    def test_second_shutdown_returns(self, rig: TcpRig) -> None:
        for _ in range(2):
            Task(rig.listener.shutdown).result()

    def test_context_manager_closes_the_socket(self, make: Callable[..., TcpRig]) -> None:
        rig = make()
        with rig.listener as listener:
            assert listener.socket.fileno() >= 0
        assert listener.socket.fileno() == -1

    def test_handle_request_serves_one_connection(self, make: Callable[..., TcpRig]) -> None:
        rig = make()
        sock = rig.connect()
        sock.sendall(b"hello\n")
        Task(rig.listener.handle_request).result()
        assert read_exactly(sock, 6) == b"hello\n"


class TestBinding:
    def test_address_in_use_is_named(self, rig: TcpRig) -> None:
        port = rig.listener.address.port
        message = rf"^cannot listen on tcp 127\.0\.0\.1:{port}: Address already in use \("
        with pytest.raises(ListenError, match=message):
            TcpListener(rig.listener.address, rig.serving)

    @needs_ipv6
    def test_unspecified_ipv6_address_accepts_both_families(
        self, make: Callable[..., TcpRig]
    ) -> None:
        """Hazard 81: an IPv4 client is an IPv4 client, whatever the socket."""
        rig = make(8, Address("::", 0))
        rig.listener.start()
        for host in ("127.0.0.1", "::1"):
            sock = rig.connect(host)
            sock.sendall(b"x\n")
            assert read_exactly(sock, 2) == b"x\n"
        assert [client.host for client in rig.handler.clients] == ["127.0.0.1", "::1"]
        assert rig.admission.entered == ["127.0.0.1", "::1"]

    @needs_ipv6
    def test_other_ipv6_address_accepts_no_ipv4(self, make: Callable[..., TcpRig]) -> None:
        rig = make(8, Address("::1", 0))
        assert rig.listener.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)

    def test_port_just_freed_can_be_bound_again(self, make: Callable[..., TcpRig]) -> None:
        rig = make()
        rig.listener.start()
        rig.ask()
        address = rig.listener.address
        rig.close()
        assert make(8, address).listener.address == address

    def test_thread_is_named_after_the_address(self, rig: TcpRig) -> None:
        assert rig.listener.thread.name == f"tcp-listener {rig.listener.address}"
        assert rig.listener.thread in threading.enumerate()
