"""One way of a TCP relay: reads what is there, writes what goes, keeps the rest; never waits.

Small transfers are copied through a buffer of the thread's.  Where a source keeps
filling that buffer and both ends are plain sockets, bytes go through a kernel
pipe instead (splice(2)) and are never seen here; when they become few again,
copying is cheaper and comes back.
"""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Any

from netproxy.interfaces.sockets import LayeredSocket
from netproxy.net import syscalls
from netproxy.net.syscalls import BUFFER, ROOM

ROUNDS = 16  # reads in a row before the other direction has its turn
FULL_READS = 4  # buffers filled in a row before a pipe is worth its two descriptors
PIPE = 1 << 20  # bytes asked for a kernel pipe: what an unprivileged process may have
DECIPHERED = ROOM // 2  # bytes that a read gives where more may be there: TLS never fills a buffer
PIPE_LEAST = 65536  # one that is smaller, because the user has many, moves less than copying does
TINY, TINY_READS = (
    4096,
    16,
)  # so many transfers of at most so many bytes, and a pipe is not worth its calls
_END = "the end"  # is what is pending when it is nothing else
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Direction:
    """OSError from any method means that the relay has ended."""

    __slots__ = (
        "source",
        "target",
        "pending",
        "ended",
        "done",
        "traffic",
        "_splice",
        "_layered",
        "_most",
        "_full",
        "_tiny",
        "_pipe",
    )

    def __init__(
        self, source: socket.socket, target: socket.socket, unread: bytes, splice: bool
    ) -> None:
        """Both sockets do not block; `unread` goes first; `splice`: both are plain sockets."""
        self.source = source
        self.target = target
        self.pending: Any = (
            unread  # read, not yet written: bytes, or how many of them are in the pipe
        )
        self.ended = False  # the source has closed its side
        self.done = False  # and the target has been told
        self.traffic = 0
        self._splice = splice
        self._layered = isinstance(source, LayeredSocket)
        self._most = (
            ROOM if self._layered or isinstance(target, LayeredSocket) else BUFFER
        )  # bytes read at a time
        self._full = self._tiny = 0  # buffers filled, small transfers spliced, in a row
        self._pipe: tuple[int, int] | None = None

    @property
    def busy(self) -> bool:
        """Whether so much comes that it is worth a thread."""
        return self._full >= FULL_READS or self._pipe is not None

    def move(self) -> None:
        """Reads and writes while both go on without waiting."""
        for _ in range(ROUNDS):
            if not (self._move_by_pipe() if self._pipe else self._move_by_copy()):
                return

    def flush(self) -> None:
        """Writes what is pending; passes the end on once nothing is."""
        if self.pending and self.pending is not _END:
            if self._pipe:
                self._drain()
            else:
                self.pending = self.pending[self._write(self.pending) :]
        if self.ended and not self.done and (not self.pending or self.pending is _END):
            self._tell_end()

    def rest(self) -> None:
        """Nothing will move for a while: what need not be held is given back."""
        if not self.pending:
            self.close()

    def close(self) -> None:
        """Gives the pipe back, whatever is in it."""
        if self._pipe:
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None
        self._full = self._tiny = 0

    def _move_by_copy(self) -> bool:
        """Whether more may be there."""
        view = syscalls.cleartext_buffer().view[: self._most]
        try:
            count = self.source.recv_into(view)
        except BlockingIOError:
            return False
        if not count:
            return self._end()
        written = self._write(view[:count])
        # TLS knows its end before its socket does.
        self.ended = self._layered and self.source.peer_ended
        if written < count:
            self.pending = bytes(view[written:count])
            return False
        if self.ended:
            return self._end()
        if count < (DECIPHERED if self._layered else BUFFER):
            self._full = 0
            return False
        self._full += 1
        if self._full == FULL_READS:
            return False  # the next turn is a thread's
        if self._full > FULL_READS and self._splice:
            self._open_pipe()
        return True

    def _move_by_pipe(self) -> bool:
        try:
            count = os.splice(self.source.fileno(), self._pipe[1], PIPE, flags=_FLAGS)
        except BlockingIOError:
            return False
        if not count:
            return self._end()
        self.pending = count
        self._drain()
        if self.pending:
            return False
        self._tiny = self._tiny + 1 if count <= TINY else 0
        if self._tiny >= TINY_READS:
            self.close()
        return count > TINY

    def _tell_end(self) -> None:
        try:
            self.target.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self.pending = _END  # TLS has something to say at its end, and no room for it now
            return
        except OSError:
            pass  # the target has ended already; its own direction tells how
        self.pending = b""
        self.done = True

    def _end(self) -> bool:
        self.ended = True
        self.flush()
        return False

    def _drain(self) -> None:
        while self.pending:
            try:
                count = os.splice(self._pipe[0], self.target.fileno(), self.pending, flags=_FLAGS)
            except BlockingIOError:
                return
            self.pending -= count
            self.traffic += count

    def _open_pipe(self) -> None:
        try:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._splice = False  # out of descriptors: copying needs none
            return
        try:
            fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, PIPE)
        except OSError:
            if fcntl.fcntl(self._pipe[1], fcntl.F_GETPIPE_SZ) < PIPE_LEAST:
                self._splice = False
                self.close()

    def _write(self, data: Any) -> int:
        try:
            count = self.target.send(data)
        except BlockingIOError:
            count = 0
        self.traffic += count
        return count
