"""TCP connections to one of several addresses (Happy Eyeballs, RFC 8305) within one deadline.

A second address is tried when the first has not answered for a quarter of a second or
has failed; the first to connect wins.  connect() blocks; a PendingDial does not.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time

from netproxy.errors import DialError, Reason
from netproxy.net import syscalls
from netproxy.net.address import is_ipv6
from netproxy.net.socket_options import DEFAULT_OPTIONS, SocketOptions, tune
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

# Seconds until another address is tried: RFC 8305 section 5.
ATTEMPT_DELAY = 0.25
# States of TCP, the first byte of struct tcp_info.
_ESTABLISHED = b"\1"
# TCP_SYN_SENT and TCP_SYN_RECV.  A target may already have
# closed a connection that was established.
_CONNECTING = (b"\2", b"\3")

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


def connect(
    addresses: Sequence[Address], seconds: float, options: SocketOptions = DEFAULT_OPTIONS
) -> socket.socket:
    """Return a connected, non-blocking socket to the first address that answers; blocks.

    Raises DialError with the last failure.
    """
    if len(addresses) == 1:
        pending = PendingDial(addresses[0], seconds, options)
        if not pending.settled():
            pending.wait()
        return pending.finish()
    race = _Race(_interleave(addresses), time.monotonic() + seconds, options)
    try:
        return race.run()
    finally:
        race.close()


class PendingDial:
    """A connection to one address that is being established, as most are.

    Its socket becomes writable when it is settled.  Call finish() or close() exactly once.
    """

    __slots__ = ("socket", "_deadline", "_address", "_outcome", "_keepalive", "_opened", "local")

    def __init__(
        self, address: Address, seconds: float, options: SocketOptions = DEFAULT_OPTIONS
    ) -> None:
        """Begin to connect; the connection has `seconds`."""
        self._deadline = time.monotonic() + seconds
        self._address = address
        self._keepalive = options.keepalive
        # The local address, once finish() has returned.
        self.local: Address | None = None
        # Unset if no socket could be had: then the dial is settled.
        self.socket: socket.socket
        try:
            self.socket, self._outcome = _begin(address, options)
            self._opened = True
        except OSError as error:
            self._opened = False
            self._outcome = error.errno or errno.EIO

    @property
    def left(self) -> float:
        """Seconds until the dial fails with a timeout."""
        return max(0.0, self._deadline - time.monotonic())

    def settled(self) -> bool:
        """Return whether the connection has been established or has failed.

        Near targets have answered at once.  An event alone does not tell: it may be about
        the last owner of the descriptor.
        """
        if self._outcome == errno.EINPROGRESS:
            try:
                info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
                if info == _ESTABLISHED:
                    self._outcome = 0
                elif info not in _CONNECTING:
                    self._outcome = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except OSError as error:
                self._outcome = error.errno or errno.EIO
        return self._outcome != errno.EINPROGRESS

    def wait(self) -> None:
        """Block until the dial may be settled, or its time is up."""
        poll = select.poll()
        poll.register(self.socket, select.POLLOUT)
        try:
            poll.poll(min(self.left * 1000, syscalls.POLL_LIMIT_MS))
        except OSError as error:  # no memory
            self._outcome = error.errno or errno.ENOMEM

    def finish(self) -> socket.socket:
        """Return the connected, non-blocking socket.  Raises DialError; TIMEOUT if not settled."""
        outcome = self._outcome
        if outcome == errno.EINPROGRESS:
            outcome = errno.ETIMEDOUT if not self.settled() else self._outcome
        if not outcome:
            try:
                self.local = syscalls.local_address(self.socket)
                # Linux connects a socket to itself if source and target port are the same.
                if self.local.port == self._address.port and _is_own_peer(self.socket):
                    outcome = errno.ECONNREFUSED
            except OSError as error:
                outcome = error.errno or errno.EIO
        if not outcome:
            tune(self.socket, self._keepalive)
            return self.socket
        self.close()
        raise _failure(outcome, self._address)

    def close(self) -> None:
        """Abandon the attempt."""
        if self._opened:
            self.socket.close()


class AbortableDials:
    """What some threads dial, so that another thread can abort it: a dial fails at once then.

    The dialers between watched() and connect() know nothing of this: there may be many.
    """

    def __init__(self) -> None:
        # Guards both below; held while sockets are shut down, so that none of a finished
        # dial's is.
        self._lock = threading.Lock()
        self._sockets: dict[int, list[socket.socket]] = {}  # by thread
        self._aborted = False

    def watched(self) -> AbortableDials:
        """Return the context in which the connections of connect() on its thread are noted.

        connect() raises DialError there once abort() was called.
        """
        return self

    def __enter__(self) -> None:
        with self._lock:
            self._sockets[threading.get_ident()] = []
        _local.dials = self

    def __exit__(self, *error: object) -> None:
        _local.dials = None
        with self._lock:
            del self._sockets[threading.get_ident()]

    def step(self, name: str, text: str) -> None:
        """Note a step of a dial within watched(): nothing, except in classes that tell steps."""

    def note(self, sock: socket.socket) -> None:
        """Note a socket within watched().  Raises DialError after abort()."""
        with self._lock:
            if self._aborted:
                raise DialError(Reason.GENERAL, said="aborted")
            self._sockets[threading.get_ident()].append(sock)

    def abort(self) -> None:
        """End all noted connections, and those that are dialled later."""
        with self._lock:
            self._aborted = True
            for sockets in self._sockets.values():
                for sock in sockets:
                    try:
                        sock.shutdown(socket.SHUT_RDWR)  # ends a pending connection as well
                    except OSError:
                        pass  # it has failed by itself


def note_dial(sock: socket.socket, address: Address) -> None:
    """Note what this thread dials, for AbortableDials.  Raises DialError after abort()."""
    if _local.dials is not None:
        _local.dials.note(sock)
        _local.dials.step("connecting", str(address))


class _Local(threading.local):
    """What connect() knows of its thread."""

    dials: AbortableDials | None = None


_local = _Local()


def tell_step(name: str, text: object) -> None:
    """Tell a step of the dial on this thread, if somebody watches it; any dialer may call this."""
    if _local.dials is not None:
        _local.dials.step(name, str(text))


def _begin(address: Address, options: SocketOptions) -> tuple[socket.socket, int]:
    """Return a socket that connects to an address, and 0 or the errno so far.

    Raises OSError, DialError.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = syscalls.open_tcp(family)
    try:
        if options is not DEFAULT_OPTIONS:
            options.apply(sock)
        outcome = syscalls.connect(sock, family, address)
        if _local.dials is not None:
            note_dial(sock, address)  # from now on there is something to abort
    except BaseException:
        sock.close()
        raise
    return sock, outcome


def _is_own_peer(sock: socket.socket) -> bool:
    """Return whether a socket has connected to itself.  Raises OSError."""
    return bool(sock.getsockname() == sock.getpeername())


def _failure(code: int, address: Address) -> DialError:
    """Return the DialError for an errno; in the system's words if no reason stands for it."""
    reason = REASONS.get(code)
    if reason is None:
        text = os.strerror(code)
        return DialError(Reason.GENERAL, str(address), text, tried=((str(address), text),))
    said = os.strerror(code) if reason is Reason.DENIED else ""
    return DialError(reason, str(address), said, tried=((str(address), said or reason.value),))


def _interleave(addresses: Sequence[Address]) -> list[Address]:
    """Alternate the families, that of the first address first (RFC 8305 section 4)."""
    if not addresses:
        return []
    first_is_ipv6 = is_ipv6(addresses[0].host)
    same = [address for address in addresses if is_ipv6(address.host) == first_is_ipv6]
    other = [address for address in addresses if is_ipv6(address.host) != first_is_ipv6]
    ordered: list[Address] = []
    while same or other:
        ordered += [queue.pop(0) for queue in (same, other) if queue]
    return ordered


class _Race:
    """Connections to several addresses that are being established, by descriptor."""

    def __init__(self, addresses: list[Address], deadline: float, options: SocketOptions) -> None:
        self._left = addresses
        self._options = options
        self._deadline = deadline
        self._pending: dict[int, tuple[socket.socket, Address]] = {}
        self._poll = select.poll()
        self._failures: list[DialError] = []

    def run(self) -> socket.socket:
        """Return the first that connects.  Raises the last failure."""
        while self._left or self._pending:
            if self._left and (winner := self._start(self._left.pop(0))):
                return winner
            if self._pending and (winner := self._wait()):
                return winner
        if not self._failures:
            raise DialError(Reason.NAME, "no address")
        last = self._failures[-1]
        tried = tuple(attempt for failure in self._failures for attempt in failure.tried)
        raise DialError(last.reason, last.detail, last.said, tried=tried)

    def _start(self, address: Address) -> socket.socket | None:
        try:
            sock, outcome = _begin(address, self._options)
        except OSError as error:
            self._failures.append(_failure(error.errno or 0, address))
            return None
        if outcome not in (0, errno.EINPROGRESS):
            sock.close()
            self._failures.append(_failure(outcome, address))
            return None
        self._pending[sock.fileno()] = (sock, address)
        if outcome == 0:
            return self._finish(sock.fileno())
        self._poll.register(sock, select.POLLOUT)
        return None

    def _wait(self) -> socket.socket | None:
        """Wait for an answer, for the time to try the next address, or for the end."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            self._abandon(errno.ETIMEDOUT)
            return None
        seconds = min(left, ATTEMPT_DELAY) if self._left else left
        try:
            answered = self._poll.poll(min(max(1, seconds * 1000), syscalls.POLL_LIMIT_MS))
        except OSError as error:  # no memory
            self._abandon(error.errno or errno.ENOMEM)
            return None
        for descriptor, _ in answered:
            if winner := self._finish(descriptor):
                return winner
        return None

    def _abandon(self, outcome: int) -> None:
        self._left.clear()
        for descriptor in list(self._pending):
            self._drop(descriptor, outcome)

    def _finish(self, descriptor: int) -> socket.socket | None:
        sock, _ = self._pending[descriptor]
        try:
            outcome = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not outcome and _is_own_peer(sock):
                outcome = errno.ECONNREFUSED
        except OSError as error:
            outcome = error.errno or errno.ECONNREFUSED
        if outcome:
            self._drop(descriptor, outcome)
            return None
        del self._pending[descriptor]
        tune(sock, self._options.keepalive)
        return sock

    def _drop(self, descriptor: int, outcome: int) -> None:
        sock, address = self._pending.pop(descriptor)
        try:
            self._poll.unregister(descriptor)
        except KeyError:
            pass
        sock.close()
        self._failures.append(_failure(outcome, address))

    def close(self) -> None:
        """Close what has not won."""
        for sock, _ in self._pending.values():
            sock.close()
