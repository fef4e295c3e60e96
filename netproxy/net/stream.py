"""TCP connections with the bytes that were read ahead, as handlers and codecs use them.

A Stream is a Reader, whose methods are generators, and the Need for more bytes, which they
yield.  complete() runs such a generator on a thread that may block.  One deadline covers
everything that is in progress (a handshake, a head), not each read.
Thread: one at a time.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time

from netproxy.errors import DeadlineError, EndOfStream, LimitError, NetProxyError, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Need, NeedResult, Progress, Ready, Steps, Watched
from netproxy.interfaces.sockets import HANG_UP
from netproxy.net import syscalls
from netproxy.net.address import from_sockaddr
from netproxy.typed import TYPE_CHECKING, Any, Callable, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces import connections
    from netproxy.interfaces.flows import PortRoute
    from netproxy.interfaces.services import Trace
    from netproxy.interfaces.sockets import SocketCalls

T = TypeVar("T")

# Bytes to receive with one call while a protocol is read.
RECEIVE = 16384
# Bytes that are read and dropped behind a refusal, and for how many seconds: otherwise a reset
# could destroy the refusal before the client has read it (RFC 9112 section 9.6).
LINGER_BYTES, LINGER_SECONDS = 65536, 2.0
# SO_LINGER on, zero seconds: close() sends RST.
_RESET = struct.pack("@ii", 1, 0)
# struct tcp_info: offsets of the milliseconds since data was sent and received, and the length
# that holds both.
_LAST_SENT, _LAST_RECEIVED, _TCP_INFO = 44, 52, 104


class Stream:
    """A connected socket and its unread bytes."""

    __slots__ = (
        *("socket", "light", "plain", "handshaking", "hang_up", "deadline", "calls"),
        *("trace", "member", "evicted", "login", "port_route"),
        *("_unread", "_local", "_receive_size", "_pace", "_on_close"),
    )

    def __init__(
        self,
        sock: socket.socket,
        unread: bytes = b"",
        limited: float | None = None,
        local: Address | None = None,
    ) -> None:
        """`limited`: as limit().  `local` is the local address, if it is known."""
        self.socket = sock
        # True if the poller's thread may handle its bytes; False for encrypted or bulk data.
        self.light = True
        # True until the client has said what it wants: until then it may be shed.
        self.handshaking = True
        # Events after which nothing can reach the peer; 0 for a UNIX socket.
        self.hang_up = HANG_UP
        self._unread = unread
        self._local = local
        # Bytes to receive with the next call.
        self._receive_size = RECEIVE
        # Monotonic; None without a limit.
        self.deadline = None if limited is None else time.monotonic() + limited
        self._pace: float | None = None
        # The calls that read and write the socket.  Any: each kind of socket has its own.
        self.calls: SocketCalls[Any] = syscalls
        # True if the peer's bytes are what the socket holds, False within TLS.
        self.plain = True
        # Writes the steps of the connection to the log, at level debug; None at any other.
        self.trace: Trace | None = None
        # The member of a group that made the connection.
        self.member = ""
        # Why the daemon ends the connection; the flow whose record says so empties it.
        self.evicted = ""
        # The user of the last request and the stamp of the login; None without a user.
        self.login: tuple[str, object] | None = None
        # The route of an sni listener that led the connection to its handler; None without one.
        self.port_route: PortRoute | None = None
        self._on_close: tuple[Callable[[], None], ...] = ()

    # -- the transport

    def become(self, sock: socket.socket, calls: SocketCalls[Any], unread: bytes = b"") -> None:
        """Go on with another socket and its unread bytes.  Any: as in calls."""
        self.socket = sock
        self.calls = calls
        self._unread = unread
        self.light = self.plain = calls is syscalls

    def move_to(self, other: connections.Stream) -> None:
        """Hand socket and unread bytes over to `other`; only close() may follow here."""
        other.become(self.socket, self.calls, self._unread)
        other.hang_up = self.hang_up
        self.become(_MovedSocket(), syscalls)  # type: ignore[arg-type]  # only closed from now on

    def replace(self, other: connections.Stream) -> None:
        """Close the socket, and go on with that of `other`, which only close() may follow."""
        self.calls.close(self.socket)
        other.move_to(self)

    # -- time

    def limit(self, seconds: float | None) -> None:
        """Give everything that follows `seconds` in total, None for no limit."""
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self._pace = None

    def pace(self, seconds: float) -> None:
        """Give each single wait `seconds`, without a limit for the total."""
        self.deadline = None
        self._pace = seconds

    # -- Need: more bytes

    def begin(self) -> bool | Progress:
        """Return True if bytes are there, False at the end of the stream, or PENDING.

        A light stream receives nothing here: it is yielded when all bytes are used up.
        Raises DeadlineError, StreamError.
        """
        if self.light:
            return Progress.PENDING
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineError("out of time")
        return self._receive_ahead()

    def watched(self) -> tuple[Watched, float | None]:
        """Watch for bytes until the deadline."""
        seconds = self._pace
        if self.deadline is not None:
            seconds = max(0.0, self.deadline - time.monotonic())
        return ((self.socket, select.POLLIN),), seconds

    def proceed(self, ready: Ready) -> bool | Progress:
        """Return as begin().  Raises DeadlineError, StreamError."""
        # Checked although bytes may be there: a peer must not send byte by byte for ever.
        deadline = self.deadline
        if not ready or (deadline is not None and time.monotonic() >= deadline):
            raise DeadlineError("out of time")
        try:
            received = self.calls.receive(self.socket, self._receive_size)
        except OSError as error:
            raise StreamError(error.strerror or "cannot receive") from error
        if received is None:
            return Progress.PENDING
        self._unread = self._unread + received if self._unread else bytes(received)
        return bool(received)

    def block(self) -> bool:
        """Not reached: the need never asks for a thread."""
        raise AssertionError

    # -- Reader

    def peek(self) -> Steps[int]:
        """Return the value of the next byte and leave it unread.  Raises EndOfStream."""
        while not self._unread:
            if not (yield self):
                raise EndOfStream("closed before the first byte", partial=False)
        return self._unread[0]

    def read_exactly(self, count: int) -> Steps[bytes]:
        """Read `count` bytes.  Raises EndOfStream."""
        while len(self._unread) < count:
            if not (yield self):
                message = f"closed after {len(self._unread)} of {count} bytes"
                raise EndOfStream(message, partial=bool(self._unread))
        data, self._unread = self._unread[:count], self._unread[count:]
        return data

    def read_until(self, separator: bytes, limit: int) -> Steps[bytes]:
        """Read up to and including `separator`.

        Raises LimitError if it is not within `limit` bytes, EndOfStream.
        """
        start = 0
        while (at := self._unread.find(separator, start, limit)) < 0:
            if len(self._unread) >= limit:
                raise LimitError(f"no end within {limit} bytes")
            start = max(0, len(self._unread) - len(separator) + 1)
            if not (yield self):
                raise EndOfStream("closed within a line", partial=bool(self._unread))
        end = at + len(separator)
        data, self._unread = self._unread[:end], self._unread[end:]
        return data

    def read_some(self, limit: int) -> Steps[bytes]:
        """Read 1 to `limit` bytes as they come; b"" at the end of the stream."""
        if not self._unread:
            self._receive_size = max(limit, RECEIVE)
            came = yield self
            self._receive_size = RECEIVE
            if not came:
                return b""
        data, self._unread = self._unread[:limit], self._unread[limit:]
        return data

    def close_staged(self) -> Steps[None]:
        """Close so that the peer can read everything we wrote while it is still sending."""
        self.shutdown_write()
        self.limit(LINGER_SECONDS)
        left = LINGER_BYTES
        try:
            while left > 0 and (self._unread or (yield self)):
                left -= len(self._unread)
                self._unread = b""
        except StreamError:
            pass
        self.close()

    # -- bytes without waiting

    def unread(self) -> bytes:
        """Return the bytes that were read ahead."""
        return self._unread

    def put_back(self, data: bytes) -> None:
        """Make bytes that were read unread again."""
        self._unread = data + self._unread

    def read_ahead(self) -> bool:
        """Keep what has come, without waiting for more; return False at the end of the stream.

        Raises StreamError.
        """
        return bool(self._receive_ahead())

    def skip(self) -> bool:
        """Drop what has come; return False if the stream has ended or failed."""
        self._unread = b""
        try:
            received = self.receive(RECEIVE)
        except StreamError:
            return False
        return received is None or bool(received)

    def receive(self, limit: int) -> memoryview | bytes | None:
        """Receive about `limit` bytes without waiting; b"" at the end, None if none have come.

        They are valid until the thread's next call.  Raises StreamError.
        """
        try:
            return self.calls.receive(self.socket, limit)
        except OSError as error:
            raise StreamError(error.strerror or "cannot receive") from error

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        """Send without waiting; return how many bytes were sent.  Raises StreamError."""
        try:
            return self.calls.send(self.socket, data)
        except OSError as error:
            raise StreamError(error.strerror or "cannot send") from error

    def reply(self, data: bytes) -> None:
        """Send the few bytes of a handshake, for which the socket has room.

        Raises StreamError if the peer is gone or reads nothing.
        """
        try:
            sent = self.calls.send(self.socket, data)
        except OSError as error:
            raise StreamError(error.strerror or "cannot send") from error
        if sent != len(data):
            raise StreamError("the peer reads nothing")

    def write_all(self, data: bytes) -> Steps[None]:
        """Send all of `data`, waiting as often as needed.  Raises StreamError, DeadlineError."""
        sent = self.write_some(data)
        while sent < len(data):
            yield _Writable(self)
            sent += self.write_some(memoryview(data)[sent:])

    def write(self, data: bytes) -> None:
        """Send all of `data`; blocks.  Raises StreamError, DeadlineError."""
        complete(self.write_all(data))

    def wait(self, events: int) -> None:
        """Block until one of the events of poll(2).  Raises DeadlineError, StreamError."""
        _, seconds = self.watched()
        if seconds == 0.0 or not poll_watched(((self.socket, events),), seconds):
            raise DeadlineError("out of time")

    # -- the ends

    @property
    def open(self) -> bool:
        """False once closed."""
        return self.socket.fileno() >= 0

    def shutdown(self) -> None:
        """End both directions: a thread that waits for the stream sees its end.  Thread: any."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the connection has ended already

    def shutdown_write(self) -> None:
        """Send the end of the stream; reading goes on."""
        try:
            self.calls.shutdown(self.socket, socket.SHUT_WR)
        except OSError:
            pass  # the peer has closed already

    def detach(self) -> tuple[socket.socket, bytes]:
        """Return the non-blocking socket and the unread bytes; only close() may follow."""
        try:
            if self.socket.gettimeout() != 0:
                self.socket.setblocking(False)
        except OSError as error:
            raise StreamError(error.strerror or "the socket is gone") from error
        unread, self._unread = self._unread, b""
        return self.socket, unread

    def close(self) -> None:
        """Close the socket and make the calls of on_close()."""
        self.calls.close(self.socket)
        calls, self._on_close = self._on_close, ()
        for call in calls:
            call()

    def on_close(self, call: Callable[[], None]) -> None:
        """Make a call, once, when the stream is closed."""
        self._on_close += (call,)

    def reset(self) -> None:
        """Close with RST, so that the peer cannot take a cut stream for a complete one."""
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        except OSError:
            pass
        self.close()

    # -- facts

    def local_address(self) -> Address:
        """Return the local address.  Raises StreamError."""
        try:
            return self._local or syscalls.local_address(self.socket)
        except OSError as error:
            raise StreamError(error.strerror or "not connected") from error

    def peer_address(self) -> Address:
        """Return the peer's address.  Raises StreamError."""
        try:
            return from_sockaddr(self.socket.getpeername())
        except OSError as error:
            raise StreamError(error.strerror or "not connected") from error

    def idle(self) -> float:
        """Return the seconds since a byte came or went, 0 if the kernel does not tell.

        Thread: any.
        """
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO)
        except OSError:
            return 0.0
        if len(info) < _TCP_INFO:
            return 0.0
        ages = [struct.unpack_from("@I", info, at)[0] for at in (_LAST_SENT, _LAST_RECEIVED)]
        return float(min(ages)) / 1000

    def _receive_ahead(self) -> bool | Progress:
        received = self.receive(self._receive_size)
        if received is None:
            return Progress.PENDING
        self._unread = self._unread + received if self._unread else bytes(received)
        return bool(received)


class _Writable:
    """The need for space in the send buffer of a stream's socket."""

    __slots__ = ("_stream", "light")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.light = stream.light

    def begin(self) -> Progress:
        return Progress.PENDING

    def watched(self) -> tuple[Watched, float | None]:
        _, seconds = self._stream.watched()
        return ((self._stream.socket, select.POLLOUT),), seconds

    def proceed(self, ready: Ready) -> bool:
        # Checked although there may be room: a peer must not read byte by byte for ever.
        if not ready or self._stream.watched()[1] == 0.0:
            raise DeadlineError("out of time")
        return True

    def block(self) -> bool:
        raise AssertionError


class _MovedSocket:
    """Replaces a socket that has moved to another stream."""

    @staticmethod
    def fileno() -> int:
        return -1

    detach = close = fileno

    @staticmethod
    def shutdown(how: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def complete(steps: Steps[T]) -> T:
    """Run steps to their end on this thread, which may block; return their result."""
    try:
        need = next(steps)
        while True:
            try:
                result = satisfy(need)
            except NetProxyError as error:
                need = steps.throw(error)
            else:
                need = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


def satisfy(need: Need) -> NeedResult:
    """Wait for a need on this thread; return its result."""
    result = need.begin()
    if result is Progress.PENDING:
        result = wait_for(need)
    return need.block() if result is Progress.NEEDS_THREAD else result


def wait_for(need: Need) -> NeedResult:
    """Wait on this thread for a need that has begun; return its result."""
    result: NeedResult = Progress.PENDING
    while result is Progress.PENDING:
        result = need.proceed(poll_watched(*need.watched()))
    return result


def poll_watched(watched: Watched, seconds: float | None) -> Ready:
    """Wait for events; return them, or nothing when the time is up.  Raises StreamError."""
    poll = select.poll()
    try:
        for descriptor, events in watched:
            poll.register(descriptor, events)
    except ValueError as error:
        raise StreamError("the socket is gone") from error
    return dict(poll_streams(poll, seconds))


def poll_streams(poll: select.poll, seconds: float | None) -> list[tuple[int, int]]:
    """Return descriptors and their events within `seconds`, None for no limit.

    Raises StreamError if the kernel has no memory for it.
    """
    # Rounded up: a wait must not end before its time.  But 0 does not wait at all.
    limit = min(seconds * 1000 + 1, syscalls.POLL_LIMIT_MS) if seconds else seconds
    try:
        return poll.poll(limit)
    except OSError as error:
        raise StreamError(error.strerror or "cannot wait") from error
