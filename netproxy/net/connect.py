"""TCP connections to one of several addresses (Happy Eyeballs, RFC 8305) within one deadline.

Runs on the thread that dials.  A second address is tried when the first has not
answered for a quarter of a second or has failed; the first to connect wins.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from contextlib import contextmanager
from typing import Any, Iterator, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net import syscalls
from netproxy.net.address import is_ipv6, to_sockaddr
from netproxy.net.syscalls import POLL_LIMIT_MS

ATTEMPT_DELAY = 0.25  # seconds, RFC 8305 section 5
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = (
    60,
    15,
    4,
)  # a vanished peer is known after two minutes
USER_TIMEOUT_MS = (
    120_000  # unacknowledged data is given up after as long: keepalive alone does not see it
)

IP_BIND_ADDRESS_NO_PORT = 24  # Linux, not named by the socket module of Python 3.10 and 3.11
_UNDER_WAY = (
    b"\2",
    b"\3",
)  # TCP_SYN_SENT, TCP_SYN_RECV: the first byte of struct tcp_info.  A target may have closed already, too

REASONS = {
    errno.ECONNREFUSED: Reason.REFUSED,
    errno.ENETUNREACH: Reason.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reason.HOST_UNREACHABLE,
    errno.ETIMEDOUT: Reason.TIMEOUT,
    errno.EADDRNOTAVAIL: Reason.NETWORK_UNREACHABLE,
    errno.EAFNOSUPPORT: Reason.NETWORK_UNREACHABLE,
    errno.EACCES: Reason.DENIED,
    errno.EPERM: Reason.DENIED,
}


class SocketOptions(NamedTuple):
    """How this machine is left; what is empty the system chooses."""

    address: str = ""  # the local address
    device: str = ""  # the interface (SO_BINDTODEVICE)
    mark: int = 0  # SO_MARK, for policy routing
    keepalive: float = KEEPALIVE_IDLE  # seconds without a byte after which a TCP peer is asked whether it is there; 0: never

    def apply(self, sock: socket.socket) -> None:
        """To a socket that is neither bound nor connected; OSError, DialError."""
        if self.device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.device.encode())
        if self.mark:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.mark)
            except PermissionError as error:  # which would else read as a rule's refusal
                raise DialError(
                    Reason.GENERAL, said="cannot set the mark: CAP_NET_ADMIN is missing"
                ) from error
        if self.address:
            try:
                sockaddr = to_sockaddr(Address(self.address, 0), sock.family)
            except ValueError as error:
                raise OSError(errno.EAFNOSUPPORT, f"not from {self.address}") from error
            if sock.type == socket.SOCK_STREAM:  # a port is only chosen when the target is known
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind(sockaddr)


DEFAULT_OPTIONS = SocketOptions()


class Dials:
    """What some threads dial, and what another one may end: whoever waits for it fails at once.

    The dialers between watched() and connect() know nothing of it: there may be many, and few callers are in a hurry.
    """

    def __init__(self) -> None:
        self._lock = (
            threading.Lock()
        )  # guards both; held while sockets are shut down, so that no finished dial's is
        self._under_way: dict[int, list[Any]] = {}  # sockets, by thread
        self._ended = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Whatever connect() opens on this thread meanwhile; DialError there once it has ended."""
        me = threading.get_ident()
        with self._lock:
            self._under_way[me] = []
        _thread.dials = self
        try:
            yield
        finally:
            _thread.dials = None
            with self._lock:
                del self._under_way[me]

    def note(self, sock: Any) -> None:
        """One that connect() has not opened, or has now; within watched()."""
        with self._lock:
            if self._ended:
                raise DialError(Reason.GENERAL, said="given up")
            self._under_way[threading.get_ident()].append(sock)

    def end(self) -> None:
        """All of them, and what is dialled later."""
        with self._lock:
            self._ended = True
            for sock in [one for several in self._under_way.values() for one in several]:
                try:
                    sock.shutdown(
                        socket.SHUT_RDWR
                    )  # which Linux takes for a connection attempt as well
                except OSError:
                    pass  # it has failed by itself


_thread = threading.local()  # .dials: those that watch what its thread dials


def connect(
    addresses: Sequence[Address], seconds: float, outgoing: SocketOptions = DEFAULT_OPTIONS
) -> socket.socket:
    """A connected socket, which does not block, to the first address that answers; DialError names the last failure."""
    if len(addresses) == 1:
        dialling = PendingDial(addresses[0], seconds, outgoing)
        if not dialling.settled():
            dialling.wait()
        return dialling.finish()
    race = _Race(_interleave(addresses), time.monotonic() + seconds, outgoing)
    try:
        return race.run()
    finally:
        race.close()


class PendingDial:
    """A connection to one address that has begun, and nothing it races with, hence with fewer calls: most are made so.

    It has `seconds`.  Its socket tells (POLLOUT) when it may be settled(); finish() or close() comes once, whenever that is.
    """

    __slots__ = ("socket", "_deadline", "_address", "_sockaddr", "_outcome", "_keepalive")

    def __init__(
        self, address: Address, seconds: float, outgoing: SocketOptions = DEFAULT_OPTIONS
    ) -> None:
        self.socket: Any = None
        self._deadline = time.monotonic() + seconds
        self._address = address
        self._keepalive = outgoing.keepalive
        try:
            self.socket, self._sockaddr, self._outcome = _begin(address, outgoing)
        except OSError as error:
            self._outcome = error.errno or errno.EIO

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._deadline - time.monotonic())

    def settled(self) -> bool:
        """Whether it has connected or failed by now: near ones have at once, and an event may be about a descriptor's last owner."""
        if self._outcome == errno.EINPROGRESS:
            try:
                if self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) not in _UNDER_WAY:
                    self._outcome = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except OSError as error:
                self._outcome = error.errno or errno.EIO
        return self._outcome != errno.EINPROGRESS

    def wait(self) -> None:
        poll = select.poll()
        poll.register(self.socket, select.POLLOUT)
        try:
            poll.poll(min(self.left * 1000, POLL_LIMIT_MS))
        except OSError as error:  # no memory
            self._outcome = error.errno or errno.ENOMEM

    def finish(self) -> socket.socket:
        """The connected socket, which does not block; DialError, TIMEOUT where there is no answer yet."""
        outcome = (self._outcome or self._own_answer()) if self.settled() else errno.ETIMEDOUT
        if not outcome:
            tune(self.socket)
            keep_alive(self.socket, self._keepalive)
            return self.socket
        self.close()
        raise _failure(outcome, self._address)

    def close(self) -> None:
        """Gives it up."""
        if self.socket is not None:
            self.socket.close()

    def _own_answer(self) -> int:
        """A port that connects to itself is no server: Linux does that when source and target port are the same."""
        try:
            return (
                errno.ECONNREFUSED if syscalls.local_sockaddr(self.socket) == self._sockaddr else 0
            )
        except OSError as error:
            return error.errno or errno.EIO


def _begin(address: Address, outgoing: SocketOptions) -> tuple[socket.socket, tuple, int]:
    """A socket that connects to an address, its sockaddr, and 0 or the errno so far; OSError."""
    family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
    sockaddr = to_sockaddr(address, family)
    sock = syscalls.open_tcp(family)
    if outgoing is not DEFAULT_OPTIONS:
        try:
            outgoing.apply(sock)
        except BaseException:
            sock.close()
            raise
    outcome = syscalls.connect(sock, sockaddr)
    watching = getattr(_thread, "dials", None)
    if watching is not None:
        try:
            watching.note(sock)  # now that there is something to end
        except DialError:
            sock.close()
            raise
    return sock, sockaddr, outcome


def _failure(code: int, address: Address) -> DialError:
    """What an errno means; one that no reason stands for is told in the system's words."""
    reason = REASONS.get(code)
    return (
        DialError(reason, str(address))
        if reason
        else DialError(Reason.GENERAL, str(address), os.strerror(code))
    )


def tune(sock: socket.socket) -> None:
    """What every TCP connection of ours has from its first byte on: no Nagle."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        pass  # gone already: the next read will tell


def keep_alive(sock: socket.socket, idle: float = KEEPALIVE_IDLE) -> None:
    """What a connection needs that may be idle for long: an end when the peer has vanished.  `idle` seconds, 0 for none."""
    if not idle:
        return
    try:
        for level, option, value in _OPTIONS:
            sock.setsockopt(level, option, value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(idle)))
    except OSError:
        pass  # not TCP (a unix socket), or gone already: the next read will tell


_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
)


def _interleave(addresses: Sequence[Address]) -> list[Address]:
    """RFC 8305 section 4: families in turn, the family of the first address first."""
    if not addresses:
        return []
    first_family = is_ipv6(addresses[0].host)
    same = [address for address in addresses if is_ipv6(address.host) == first_family]
    other = [address for address in addresses if is_ipv6(address.host) != first_family]
    ordered = []
    while same or other:
        ordered += [queue.pop(0) for queue in (same, other) if queue]
    return ordered


class _Race:
    """Attempts under way, by descriptor."""

    def __init__(self, addresses: list[Address], deadline: float, outgoing: SocketOptions) -> None:
        self._left = addresses
        self._outgoing = outgoing
        self._deadline = deadline
        self._attempts: dict[int, tuple[socket.socket, Address]] = {}
        self._poll = select.poll()
        self._failure = DialError(Reason.NAME, "no address")

    def run(self) -> socket.socket:
        while self._left or self._attempts:
            if self._left and (winner := self._start(self._left.pop(0))):
                return winner
            if self._attempts and (winner := self._wait()):
                return winner
        raise self._failure

    def _start(self, address: Address) -> socket.socket | None:
        sock = None
        try:
            sock, _, outcome = _begin(address, self._outgoing)
        except OSError as error:
            outcome = error.errno or 0
        if sock is None or outcome not in (0, errno.EINPROGRESS):
            if sock is not None:
                sock.close()
            self._fail(outcome, address)
            return None
        self._attempts[sock.fileno()] = (sock, address)
        if outcome == 0:
            return self._finish(sock.fileno())
        self._poll.register(sock, select.POLLOUT)
        return None

    def _wait(self) -> socket.socket | None:
        """Waits for one answer, for the time to try the next address, or for the end."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            self._give_up(errno.ETIMEDOUT)
            return None
        patience = min(left, ATTEMPT_DELAY) if self._left else left
        try:
            answered = self._poll.poll(min(max(1, patience * 1000), POLL_LIMIT_MS))
        except OSError as error:  # no memory: nobody can be waited for
            self._give_up(error.errno or errno.ENOMEM)
            return None
        for descriptor, _ in answered:
            if winner := self._finish(descriptor):
                return winner
        return None

    def _give_up(self, outcome: int) -> None:
        self._left.clear()
        for descriptor in list(self._attempts):
            self._drop(descriptor, outcome)

    def _finish(self, descriptor: int) -> socket.socket | None:
        sock, _ = self._attempts[descriptor]
        outcome = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            if not outcome and sock.getsockname() == sock.getpeername():  # see Dialling
                outcome = errno.ECONNREFUSED
        except OSError as error:
            outcome = error.errno or errno.ECONNREFUSED
        if outcome:
            self._drop(descriptor, outcome)
            return None
        del self._attempts[descriptor]
        tune(sock)
        keep_alive(sock, self._outgoing.keepalive)
        return sock

    def _drop(self, descriptor: int, outcome: int) -> None:
        sock, address = self._attempts.pop(descriptor)
        try:
            self._poll.unregister(descriptor)
        except KeyError:
            pass
        sock.close()
        self._fail(outcome, address)

    def _fail(self, outcome: int, address: Address) -> None:
        self._failure = _failure(outcome, address)

    def close(self) -> None:
        for sock, _ in self._attempts.values():
            sock.close()
