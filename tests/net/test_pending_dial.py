"""Pending dials: when they are settled, how they finish, and that no socket is left."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net import connect as connect_module, syscalls
from netproxy.net.connect import PendingDial
from netproxy.net.socket_options import SocketOptions
from tests.support.sockets import HAS_IPV6, SECONDS, address_of, black_hole, listen, refusing, reset

HOSTS = [
    "127.0.0.1",
    pytest.param("::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")),
]
# Seconds of a dial that succeeds, and of one that times out.
NEAR, FAR = SECONDS, 0.1


def wait_for_event(pending: PendingDial, events: int = select.POLLOUT) -> None:
    """Wait until the kernel tells of an event."""
    poll = select.poll()
    poll.register(pending.socket, events)
    assert poll.poll(SECONDS * 1000)


def failure(pending: PendingDial) -> DialError:
    with pytest.raises(DialError) as caught:
        pending.finish()
    assert not hasattr(pending, "socket") or pending.socket.fileno() == -1
    return caught.value


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("host", HOSTS)
def test_dial_to_a_near_target_is_settled_at_once(host: str) -> None:
    with listen(host) as listening:
        pending = PendingDial(address_of(listening), NEAR)
        wait_for_event(pending)
        assert pending.settled() and 0 < pending.left <= NEAR
        with pending.finish() as sock, listening.accept()[0] as accepted:
            assert sock.getpeername() == listening.getsockname()
            assert accepted.getpeername() == sock.getsockname()
            assert sock.gettimeout() == 0
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_refused_dial_is_settled_without_waiting() -> None:
    with refusing() as address:
        pending = PendingDial(address, NEAR)
        wait_for_event(pending)
        assert pending.settled()
        error = failure(pending)
    assert (error.reason, str(error)) == (Reason.REFUSED, f"{address}: connection refused")


def test_unanswered_dial_is_not_settled_and_holds_one_descriptor() -> None:
    with black_hole() as address:
        before = descriptors()
        pending = PendingDial(address, 60.0)
        assert not pending.settled() and descriptors() == before + 1
        assert 59 < pending.left <= 60
        pending.close()
        assert descriptors() == before


def test_unanswered_dial_times_out_when_finished() -> None:
    with black_hole() as address:
        pending = PendingDial(address, FAR)
        pending.wait()
        assert pending.left == 0 and not pending.settled()
        assert failure(pending).reason is Reason.TIMEOUT


def test_time_runs_from_the_beginning() -> None:
    """Another wait does not begin it again."""
    with black_hole() as address:
        pending = PendingDial(address, FAR)
        for _ in range(3):
            pending.wait()
        assert pending.left == 0
        pending.close()


@pytest.mark.parametrize("before", [b"", b"220 welcome\r\n"])
def test_target_that_has_closed_already_was_connected_to(before: bytes) -> None:
    """It accepted, sent its bytes and closed before the dial was looked at."""
    with listen() as listening:
        pending = PendingDial(address_of(listening), NEAR)
        accepted, _ = listening.accept()
        with accepted:
            accepted.sendall(before)
        wait_for_event(pending, select.POLLRDHUP)
        assert pending.settled()
        with pending.finish() as sock:
            assert sock.recv(100) == before
            assert not before or sock.recv(1) == b""


def test_target_that_has_reset_already_is_an_error() -> None:
    with listen() as listening:
        pending = PendingDial(address_of(listening), NEAR)
        wait_for_event(pending)
        reset(listening.accept()[0])
        wait_for_event(pending, 0)
        error = failure(pending)
    assert (error.reason, error.said) == (Reason.GENERAL, os.strerror(errno.ECONNRESET))


class SamePort(SocketOptions):
    """Binds to the port that is dialled, which stands in `device`."""

    def apply(self, sock: socket.socket) -> None:
        host = "::ffff:127.0.0.1" if sock.family == socket.AF_INET6 else "127.0.0.1"
        sock.bind((host, int(self.device)))


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "0.0.0.0"),
        pytest.param("::ffff:127.0.0.1", marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")),
    ],
)
def test_socket_that_connects_to_itself_is_refused(host: str) -> None:
    """Hazard 91."""
    with refusing() as address:
        pass
    address = address._replace(host=host)
    pending = PendingDial(address, NEAR, SamePort(device=str(address.port)))
    wait_for_event(pending)
    assert pending.socket.getpeername() == pending.socket.getsockname()  # Linux has connected it
    assert pending.settled()
    assert failure(pending).reason is Reason.REFUSED


def test_dial_without_a_descriptor_is_settled_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(family: int) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(syscalls, "open_tcp", none_left)
    pending = PendingDial(Address("127.0.0.1", 9), NEAR)
    assert pending.settled() and not hasattr(pending, "socket")
    error = failure(pending)
    assert (error.reason, error.said) == (Reason.GENERAL, os.strerror(errno.EMFILE))
    PendingDial(Address("127.0.0.1", 9), NEAR).close()


def test_error_of_the_kernel_is_a_dial_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No OSError passes: the callers only handle DialError."""

    class Broken(socket.socket):
        def getsockopt(self, *_: int) -> int:  # type: ignore[override]
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(
        syscalls,
        "open_tcp",
        lambda family: Broken(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK),
    )
    monkeypatch.setattr(syscalls, "connect", lambda sock, family, address: errno.EINPROGRESS)
    error = failure(PendingDial(Address("127.0.0.1", 9), NEAR))
    assert (error.reason, error.said) == (Reason.GENERAL, os.strerror(errno.ENOBUFS))


def test_options_that_cannot_be_set_leave_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden(SocketOptions):
        def apply(self, sock: socket.socket) -> None:
            raise DialError(Reason.GENERAL, said="no")

    before = descriptors()
    with pytest.raises(DialError):
        PendingDial(Address("127.0.0.1", 9), NEAR, Forbidden())
    assert descriptors() == before


def test_connect_to_one_address_waits_for_a_pending_dial(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(PendingDial, "wait", lambda self: waited.append(self.settled()))
    with black_hole() as address, pytest.raises(DialError) as caught:
        connect_module.connect([address], 60.0)
    assert caught.value.reason is Reason.TIMEOUT and waited == [False]
