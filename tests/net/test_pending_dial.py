"""A connection that has begun: whether it is settled by now, how it finishes, and that nothing of it is left open."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net import syscalls
from netproxy.net import connect as connect_module
from netproxy.net.connect import PendingDial
from netproxy.net.socket_options import SocketOptions
from tests.support.sockets import HAS_IPV6, address_of, black_hole, listen, refusing, reset

HOSTS = [
    "127.0.0.1",
    pytest.param("::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")),
]
NEAR, FAR = (
    5.0,
    0.1,
)  # seconds that a dial may take: of one that succeeds, and of one that is meant not to


def answered(dialling: PendingDial, events: int = select.POLLOUT) -> None:
    """Until the kernel tells of it."""
    poll = select.poll()
    poll.register(dialling.socket, events)
    assert poll.poll(5000)


def failure(dialling: PendingDial) -> DialError:
    with pytest.raises(DialError) as caught:
        dialling.finish()
    assert dialling.socket is None or dialling.socket.fileno() == -1
    return caught.value


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("host", HOSTS)
def test_a_near_one_is_settled_at_once(host: str) -> None:
    with listen(host) as listening:
        dialling = PendingDial(address_of(listening), NEAR)
        answered(dialling)
        assert dialling.settled() and 0 < dialling.left <= NEAR
        with dialling.finish() as sock, listening.accept()[0] as accepted:
            assert (
                sock.getpeername() == listening.getsockname()
                and accepted.getpeername() == sock.getsockname()
            )
            assert sock.gettimeout() == 0
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_one_that_is_refused_is_settled_without_being_waited_for() -> None:
    with refusing() as address:
        dialling = PendingDial(address, NEAR)
        answered(dialling)
        assert dialling.settled()
        error = failure(dialling)
    assert (error.reason, str(error)) == (Reason.REFUSED, f"{address}: connection refused")


def test_one_under_way_is_not_settled_and_costs_one_descriptor() -> None:
    with black_hole() as address:
        before = descriptors()
        dialling = PendingDial(address, 60.0)
        assert not dialling.settled() and descriptors() == before + 1
        assert 59 < dialling.left <= 60
        dialling.close()
        assert descriptors() == before


def test_one_that_is_finished_too_early_has_timed_out() -> None:
    with black_hole() as address:
        dialling = PendingDial(address, FAR)
        dialling.wait()
        assert dialling.left == 0 and not dialling.settled()
        assert failure(dialling).reason is Reason.TIMEOUT


def test_the_time_runs_from_the_beginning() -> None:
    """Not from the wait: whoever waits again has no more of it."""
    with black_hole() as address:
        dialling = PendingDial(address, FAR)
        for _ in range(3):
            dialling.wait()
        assert dialling.left == 0
        dialling.close()


@pytest.mark.parametrize("before", [b"", b"220 welcome\r\n"])
def test_a_target_that_has_closed_by_then_was_there(before: bytes) -> None:
    """It connected, said what it had to say and left, all before anybody looked."""
    with listen() as listening:
        dialling = PendingDial(address_of(listening), NEAR)
        accepted, _ = listening.accept()
        with accepted:
            accepted.sendall(before)
        answered(dialling, select.POLLRDHUP)
        assert dialling.settled()
        with dialling.finish() as sock:
            assert sock.recv(100) == before
            assert not before or sock.recv(1) == b""


def test_a_target_that_has_reset_by_then_is_told_as_that() -> None:
    with listen() as listening:
        dialling = PendingDial(address_of(listening), NEAR)
        answered(dialling)
        reset(listening.accept()[0])
        answered(dialling, 0)
        error = failure(dialling)
    assert (error.reason, error.said) == (Reason.GENERAL, os.strerror(errno.ECONNRESET))


class SamePort(SocketOptions):
    """From the very port that is dialled."""

    def apply(self, sock: socket.socket) -> None:
        sock.bind(("127.0.0.1", int(self.device)))


def test_a_port_that_connects_to_itself_is_no_server() -> None:
    """HAZARDS 91."""
    with refusing() as address:
        pass
    dialling = PendingDial(address, NEAR, SamePort(device=str(address.port)))
    answered(dialling)
    assert dialling.socket.getpeername() == dialling.socket.getsockname()  # Linux has connected it
    assert dialling.settled()
    assert failure(dialling).reason is Reason.REFUSED


def test_without_a_descriptor_left_it_is_settled_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(family: int) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(syscalls, "open_tcp", none_left)
    dialling = PendingDial(Address("127.0.0.1", 9), NEAR)
    assert dialling.settled() and dialling.socket is None
    error = failure(dialling)
    assert (error.reason, error.said) == (Reason.GENERAL, os.strerror(errno.EMFILE))
    PendingDial(Address("127.0.0.1", 9), NEAR).close()


def test_a_fault_of_the_kernel_is_a_failed_dial(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no OSError, which nobody above would know what to do with."""

    class Broken(socket.socket):
        def getsockopt(self, *_: int) -> int:  # type: ignore[override]
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(
        syscalls,
        "open_tcp",
        lambda family: Broken(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK),
    )
    monkeypatch.setattr(syscalls, "connect", lambda sock, sockaddr: errno.EINPROGRESS)
    error = failure(PendingDial(Address("127.0.0.1", 9), NEAR))
    assert (error.reason, error.said) == (Reason.GENERAL, os.strerror(errno.ENOBUFS))


def test_what_may_not_be_marked_is_told_and_nothing_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Forbidden(SocketOptions):
        def apply(self, sock: socket.socket) -> None:
            raise DialError(Reason.GENERAL, said="no")

    before = descriptors()
    with pytest.raises(DialError):
        PendingDial(Address("127.0.0.1", 9), NEAR, Forbidden())
    assert descriptors() == before


def test_one_address_is_dialled_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """connect() waits where it is under way."""
    waited = []
    monkeypatch.setattr(PendingDial, "wait", lambda self: waited.append(self.settled()))
    with black_hole() as address, pytest.raises(DialError) as caught:
        connect_module.connect([address], 60.0)
    assert caught.value.reason is Reason.TIMEOUT and waited == [False]
