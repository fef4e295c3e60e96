"""A TCP connection with the bytes read ahead of need: what handlers and codecs work on.

One thread at a time.  Every call that waits obeys one deadline for the whole
of what goes on (a handshake, a head), not one for each read.  What is there is
taken without waiting; only where nothing is, poll(2) waits.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from typing import Any, Callable

from netproxy.errors import (
    DeadlineError,
    EndOfStream,
    LimitError,
    NetProxyError,
    StreamError,
    Unready,
)
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Wait
from netproxy.net import syscalls
from netproxy.net.address import from_sockaddr

RECEIVE = 16384  # bytes asked of the kernel at a time while a protocol is read
AGAIN_LIMIT = 2048  # bytes that an attempt may read over again: a client that drips costs whoever waits for everybody no more
LINGER_BYTES = 65536  # read and dropped after a refusal, so that the client gets to see it (RFC 9112 section 9.6)
LINGER_SECONDS = 2.0  # and for so long at the most
_RESET = struct.pack("@ii", 1, 0)  # SO_LINGER on, no time: close() sends RST
_LAST_SENT, _LAST_RECEIVED, _TCP_INFO = (
    44,
    52,
    104,
)  # struct tcp_info: milliseconds since data went or came, and its length then

GoOn = Callable[[], "Wait | None"]  # what a connection does next


class Stream:
    """A connected socket and its unread bytes."""

    __slots__ = (
        "socket",
        "_unread",
        "_hasty",
        "_deadline",
        "_pace",
        "_calls",
        "welcomed",
        "_closing",
    )

    def __init__(
        self, sock: socket.socket, unread: bytes = b"", limited: float | None = None
    ) -> None:
        """`limited`: as limit()."""
        self.socket = sock
        self._unread = unread
        self._hasty = False  # an attempt is under way: nothing is waited for
        self._deadline = None if limited is None else time.monotonic() + limited
        self._pace: float | None = None
        self._calls: Any = syscalls  # how its socket is read and written
        self.welcomed = False
        self._closing: tuple[Callable[[], None], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether what its peer sends is what the socket holds: nothing is encrypted."""
        return self._calls is syscalls

    @property
    def how(self) -> Any:
        """The calls that read and write its socket, as become() takes them."""
        return self._calls

    def become(self, sock: socket.socket, how: Any) -> None:
        """Goes on with another socket in place of its own; `how` has what net.calls has: receive, send, shutdown, close."""
        self.socket = sock
        self._calls = how

    def move_to(self, other: Stream) -> None:
        """`other` goes on with its socket and what was read ahead; this one is only closed afterwards, and closes nothing."""
        other.become(self.socket, self._calls)
        other._unread, self._unread = self._unread, b""
        self.become(_Nothing(), syscalls)  # type: ignore[arg-type]

    def welcome(self) -> None:
        """The client has said what it wants and may have it: from here on it is not dropped to make room for others."""
        self.welcomed = True

    def limit(self, seconds: float | None) -> None:
        """All that follows has `seconds` in total, None for no limit.  DeadlineError after that."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._pace = None

    def pace(self, seconds: float) -> None:
        """From here on each single wait has `seconds`; there is no limit to the whole."""
        self._deadline = None
        self._pace = seconds

    def hastily(self, go_on: GoOn) -> Wait | None:
        """Goes on by `go_on`, which never waits: Unready or StreamError where it would have to."""
        self._hasty = True
        try:
            return go_on()
        finally:
            self._hasty = False

    def attempt(self, go_on: GoOn, otherwise: GoOn, again: int = 0) -> Wait | None:
        """Goes on by `go_on`, which never waits, once what it reads has come; where it cannot, by `otherwise`, on a thread.

        `go_on` begins anew, at the same byte, each time that more has come: whatever it does but read it does after that.
        What fails fails again for `otherwise`, which has the time to tell the client; and what comes in ever more pieces a
        thread reads, each byte once.  `again`: bytes that have been read in vain.
        """
        if not self._unread:
            return self._until_readable(go_on, otherwise, again)
        before = self._unread
        try:
            return self.hastily(go_on)
        except Unready:
            self._unread = before
            again += len(before)
            if again <= AGAIN_LIMIT:
                return self._until_readable(go_on, otherwise, again)
        except NetProxyError:
            self._unread = before
        return self._on_a_thread(otherwise)

    def _on_a_thread(self, otherwise: GoOn) -> Wait:
        def resume(ready: bool) -> Wait | None:
            if not self.open:  # there is none: whatever has been read leads nowhere
                raise StreamError("nobody could go on with it")
            return otherwise()

        return Wait((), None, resume)

    def _until_readable(self, go_on: GoOn, otherwise: GoOn, again: int) -> Wait:
        def step(descriptor: int, events: int) -> Wait | None:
            return (
                self.attempt(go_on, otherwise, again)
                if self.read_ahead()
                else self._on_a_thread(otherwise)
            )

        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        return Wait(
            ((self.socket, select.POLLIN),), left, self._on_a_thread(otherwise).resume, step=step
        )

    def peek(self) -> int:
        """The value of the next byte, left unread; EndOfStream where there is none."""
        if not self._unread and not self._fill():
            raise EndOfStream("closed before the first byte", partial=False)
        return self._unread[0]

    def read_exactly(self, count: int) -> bytes:
        while len(self._unread) < count:
            if not self._fill():
                raise EndOfStream(
                    f"closed after {len(self._unread)} of {count} bytes", partial=bool(self._unread)
                )
        data, self._unread = self._unread[:count], self._unread[count:]
        return data

    def read_unbuffered(self, count: int) -> bytes:
        """So many bytes and none ahead of them, for what is followed by something that reads for itself."""
        data, self._unread = self._unread[:count], self._unread[count:]
        while len(data) < count:
            found = self._receive(count - len(data))
            if found is None:
                self.wait(select.POLLIN)
            elif not found:
                raise EndOfStream(f"closed after {len(data)} of {count} bytes", partial=bool(data))
            else:
                data += found
        return data

    def read_until(self, separator: bytes, limit: int) -> bytes:
        start = 0
        while (found := self._unread.find(separator, start, limit)) < 0:
            if len(self._unread) >= limit:
                raise LimitError(f"no end within {limit} bytes")
            start = max(0, len(self._unread) - len(separator) + 1)
            if not self._fill():
                raise EndOfStream("closed within a line", partial=bool(self._unread))
        end = found + len(separator)
        data, self._unread = self._unread[:end], self._unread[end:]
        return data

    def read_some(self, limit: int) -> bytes:
        """1 to `limit` bytes as they come, b"" at the end of the stream."""
        if not self._unread and not self._fill(limit):
            return b""
        data, self._unread = self._unread[:limit], self._unread[limit:]
        return data

    def read_ahead(self) -> bool:
        """Keeps what has come, for later, without waiting for more; False at the end of the stream.  StreamError."""
        found = self._receive(RECEIVE)
        if found:
            self._unread += found
        return found is None or bool(found)

    def skip(self) -> bool:
        """Drops what has come, without waiting for more; False at the end of the stream or where it has failed."""
        self._unread = b""
        try:
            found = self._receive(RECEIVE)
        except StreamError:
            return False
        return found is None or bool(found)

    def write(self, data: bytes) -> None:
        """All of `data`; StreamError where the peer is gone or too slow."""
        sent = self._send(data)
        if sent == len(data):
            return
        if (
            self._hasty
        ):  # its socket has room for the few bytes of a handshake, or is none to wait for
            raise StreamError("takes nothing")
        view = memoryview(data)[sent:]
        while view:
            self.wait(select.POLLOUT)
            view = view[self._send(view) :]

    def write_some(self, data: bytes) -> int:
        """As many bytes of `data` as go without waiting; StreamError."""
        return self._send(data)

    def unread(self) -> bytes:
        """What was read ahead and not yet asked for."""
        return self._unread

    def shutdown(self) -> None:
        """Both ways: whoever waits on it finds its end.  From any thread."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has just ended

    def shutdown_write(self) -> None:
        """The peer sees the end of the stream; reading goes on."""
        try:
            self._calls.shutdown(self.socket, socket.SHUT_WR)
        except OSError:
            pass  # the peer was faster

    def detach(self) -> tuple[socket.socket, bytes]:
        """The socket, which does not block any more, and the unread bytes; the stream is only closed afterwards."""
        try:
            if self.socket.gettimeout() != 0:
                self.socket.setblocking(False)
        except OSError as error:
            raise StreamError(error.strerror or "the socket is gone") from error
        unread, self._unread = self._unread, b""
        return self.socket, unread

    def local_address(self) -> Address:
        try:
            return from_sockaddr(syscalls.local_sockaddr(self.socket))
        except OSError as error:
            raise StreamError(error.strerror or "not connected") from error

    def peer_address(self) -> Address:
        try:
            return from_sockaddr(self.socket.getpeername())
        except OSError as error:
            raise StreamError(error.strerror or "not connected") from error

    def idle(self) -> float:
        """Seconds since a byte came or went, as the kernel counts them, 0 where it does not tell.  From any thread."""
        try:
            told = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO)
        except OSError:
            return 0.0
        if len(told) < _TCP_INFO:
            return 0.0
        return (
            min(struct.unpack_from("@I", told, at)[0] for at in (_LAST_SENT, _LAST_RECEIVED)) / 1000
        )

    @property
    def open(self) -> bool:
        return self.socket.fileno() >= 0

    def close(self) -> None:
        self._calls.close(self.socket)
        closing, self._closing = self._closing, ()
        for call in closing:
            call()

    def on_close(self, call: Callable[[], None]) -> None:
        """`call` is made once, when it is closed."""
        self._closing += (call,)

    def reset(self) -> None:
        """Closes with RST, so that the peer cannot take a cut stream for a whole one."""
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        except OSError:
            pass
        self.close()

    def close_staged(self) -> None:
        """Closes so that the peer can read all we wrote, though it may still be sending."""
        self.shutdown_write()
        try:
            self.limit(LINGER_SECONDS)
            left = LINGER_BYTES
            while left > 0 and self._fill():
                left -= len(self._unread)
                self._unread = b""
        except StreamError:
            pass
        self.close()

    def _fill(self, limit: int = RECEIVE) -> bool:
        """Reads what is there, or waits for it; False at the end of the stream."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise DeadlineError("out of time")
        if self._hasty:
            raise Unready
        while (found := self._receive(max(limit, RECEIVE))) is None:
            self.wait(select.POLLIN)
        self._unread = self._unread + found if self._unread else bytes(found)
        return bool(found)

    def wait(self, events: int) -> None:
        """Until one of `events` of poll(2), or an error, has come; DeadlineError."""
        seconds = self._pace
        if self._deadline is not None:
            seconds = self._deadline - time.monotonic()
            if (
                seconds <= 0
            ):  # though something may be there: a peer that drips must not go on for ever
                raise DeadlineError("out of time")
        poll = select.poll()
        try:
            poll.register(self.socket, events)
        except ValueError as error:  # closed meanwhile
            raise StreamError("the socket is gone") from error
        if not poll_streams(poll, seconds):
            raise DeadlineError("out of time")

    def _receive(self, limit: int) -> memoryview | bytes | None:
        """What is there, about `limit` bytes of it, b"" at the end, None where nothing is yet; StreamError.

        Valid until the thread's next.
        """
        try:
            return self._calls.receive(self.socket, limit)
        except OSError as error:
            raise StreamError(error.strerror or "cannot receive") from error

    def _send(self, data: bytes | memoryview) -> int:
        """How many bytes of `data` go without waiting; StreamError."""
        try:
            return self._calls.send(self.socket, data)
        except OSError as error:
            raise StreamError(error.strerror or "cannot send") from error


class _Nothing:
    """In the place of a socket that has moved elsewhere."""

    @staticmethod
    def fileno() -> int:
        return -1

    detach = close = fileno

    @staticmethod
    def shutdown(how: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def poll_streams(poll: Any, seconds: float | None) -> list[tuple[int, int]]:
    """Descriptors and their events within `seconds`, None for ever; StreamError where the kernel has no memory for it."""
    try:
        return poll.poll(
            None if seconds is None else min(seconds * 1000 + 1, syscalls.POLL_LIMIT_MS)
        )
    except OSError as error:
        raise StreamError(error.strerror or "cannot wait") from error
