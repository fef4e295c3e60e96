"""One direction of a TCP relay: reads what is there, writes what goes, keeps the rest.

Never waits.  Small transfers are copied through a buffer of the thread.  If a source keeps
filling that buffer and both ends are plain sockets, the bytes go through a kernel pipe
instead (splice(2)) and are never seen here.  Once the transfers are small again, copying is
cheaper, and the pipe is closed.

A direction that has reached its mark (interfaces.accounts.Pace) is not read until it may carry
more: TCP's own window then slows the sender.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket

from netproxy.interfaces.accounts import UNLIMITED
from netproxy.interfaces.sockets import HANG_UP, LayeredSocket
from netproxy.net import syscalls
from netproxy.net.syscalls import BUFFER, ROOM
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Pace

ROUNDS = 16
"""Reads in a row before it is the other direction's turn."""
FULL_READS = 4
"""Buffers filled in a row before a pipe is worth its two descriptors."""
PIPE = 1 << 20
"""Bytes asked for a kernel pipe: the most that an unprivileged process may have."""
PIPE_LEAST = 65536
"""A smaller pipe, which the kernel gives a user who has many, moves less than copying does."""
DECIPHERED = ROOM // 2
"""A read of TLS that gives this many bytes may leave more behind: it never fills a buffer."""
TINY = 4096
"""Bytes of a transfer that is not worth the system calls of a pipe."""
TINY_READS = 16
"""Tiny transfers in a row before a pipe is closed."""
_PIPED = b"in the pipe"
_END = b"the end"
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Direction:
    """Bytes from one socket to the other.

    An OSError from any method means that the relay has ended.
    """

    __slots__ = (
        "source",
        "target",
        "pending",
        "ended",
        "done",
        "last",
        "bytes_moved",
        "busy",
        "pace",
        "paused",
        "hang_up",
        "_splice",
        "_encrypted",
        "_read_size",
        "_full",
        "_tiny",
        "_pipe",
        "_in_pipe",
    )

    def __init__(
        self,
        source: socket.socket,
        target: socket.socket,
        pace: Pace,
        splice: bool,
        encrypted: LayeredSocket | None = None,
        read_size: int = BUFFER,
    ) -> None:
        """Both sockets must be non-blocking.  `splice`: both are plain, and a pipe is allowed.

        `encrypted` is the source if it is encrypted.  `read_size` is the bytes of a read.
        """
        self.source = source
        self.target = target
        self.pending = b""
        """What was read and is not written yet.  _PIPED stands for bytes in the kernel pipe,
        _END for an end that could not be passed on yet."""
        self.ended = False
        """True if the source has ended."""
        self.done = False
        """True if the target has been told so."""
        self.last = False
        """True if the relay closes both sockets as soon as this direction is done: close(2) tells
        the target as shutdown(2) would."""
        self.bytes_moved = 0
        self.busy = False
        """True if enough bytes come to be worth a thread."""
        self.pace = pace
        self.paused = False
        """True if it must not be read before `pace.delay()` has passed."""
        self.hang_up = HANG_UP
        """Events of the source after which nothing can reach it."""
        self._splice = splice
        self._encrypted = encrypted
        self._read_size = read_size
        # Buffers filled in a row, and tiny transfers through the pipe in a row.
        self._full = self._tiny = 0
        self._pipe: tuple[int, int] | None = None
        self._in_pipe = 0

    def move(self) -> None:
        """Read and write as long as neither has to wait.  Nothing may be pending."""
        self.paused = False
        pace = self.pace
        for _ in range(ROUNDS):
            room = pace.mark - self.bytes_moved
            if room < pace.lease or room <= 0:
                if room <= 0 and not (room := pace.renew(self.bytes_moved)):
                    self.paused = True
                    return
                # A piece that the mark would cut costs a receive and a send more.
                if room < pace.lease:
                    room = pace.lease
            pipe = self._pipe
            if not (self._move_by_pipe(pipe, room) if pipe else self._move_by_copy(room)):
                return
        self._look_again()

    def flush(self) -> None:
        """Write what is pending.  If nothing is left of it, pass the end of the source on."""
        pending = self.pending
        if pending is _PIPED:
            if self._pipe:
                self._drain(self._pipe)
        elif pending and pending is not _END:
            self.pending = pending[self._write(pending) :]
            if not self.pending:
                self._look_again()
        if self.ended and not self.done and (not self.pending or self.pending is _END):
            self._pass_end_on()

    def _look_again(self) -> None:
        """Move again soon: small reads may have left deciphered bytes, of which no socket tells."""
        if self._encrypted is not None and self.pace.mark < UNLIMITED:
            self.paused = True

    def rest(self) -> None:
        """Release what need not be held while nothing moves."""
        if not self.pending:
            self.close()

    def close(self) -> None:
        """Close the pipe, whatever is in it."""
        if self._pipe:
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None
        self._full = self._tiny = 0
        self.busy = False

    def _move_by_copy(self, room: int) -> bool:
        """Move at most `room` bytes; return whether more may be there."""
        size = self._read_size
        view = syscalls.buffers.cleartext.view[: size if size < room else room]
        try:
            count = self.source.recv_into(view)
        except BlockingIOError:
            return False
        if not count:
            return self._end()
        # As _write(), without the call: every small transfer passes here.
        try:
            written = self.target.send(view[:count])
        except BlockingIOError:
            written = 0
        self.bytes_moved += written
        if self._encrypted is not None:
            self.ended = self._encrypted.peer_ended
        if written < count:
            self.pending = bytes(view[written:count])
            return False
        if self.ended:
            return self._end()
        if count < (BUFFER if self._encrypted is None else DECIPHERED):
            self._full = 0
            self.busy = False
            # A read that a limit has made small says nothing of what is left.
            return count == room
        self._full += 1
        if self._full == FULL_READS:
            # From here on the relay is busy, and its next turn is on a thread.
            self.busy = True
            return False
        if self._full > FULL_READS and self._splice:
            self._open_pipe()
        return True

    def _move_by_pipe(self, pipe: tuple[int, int], room: int) -> bool:
        """Move at most `room` bytes; return whether more may be there."""
        size = PIPE if room > PIPE else room
        try:
            count = os.splice(self.source.fileno(), pipe[1], size, flags=_FLAGS)
        except BlockingIOError:
            return False
        if not count:
            return self._end()
        self._in_pipe = count
        self._drain(pipe)
        if self.pending:
            return False
        self._tiny = self._tiny + 1 if count <= TINY else 0
        if self._tiny >= TINY_READS:
            self.close()
        return count > TINY or count == room

    def _pass_end_on(self) -> None:
        try:
            if not self.last:
                self.target.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            # TLS announces its end, and there is no room for that now.
            self.pending = _END
            return
        except OSError:
            # The target has ended already.  Its own direction finds out how.
            pass
        self.pending = b""
        self.done = True

    def _end(self) -> bool:
        self.ended = True
        self.flush()
        return False

    def _drain(self, pipe: tuple[int, int]) -> None:
        """Write what is in the pipe."""
        while self._in_pipe:
            try:
                count = os.splice(pipe[0], self.target.fileno(), self._in_pipe, flags=_FLAGS)
            except BlockingIOError:
                self.pending = _PIPED
                return
            self._in_pipe -= count
            self.bytes_moved += count
        self.pending = b""

    def _open_pipe(self) -> None:
        try:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            # Out of descriptors: copying needs none.
            self._splice = False
            return
        try:
            fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, PIPE)
        except OSError:
            if fcntl.fcntl(self._pipe[1], fcntl.F_GETPIPE_SZ) < PIPE_LEAST:
                self._splice = False
                self.close()

    def _write(self, data: bytes | memoryview) -> int:
        """Return how many bytes of `data` were written."""
        try:
            count = self.target.send(data)
        except BlockingIOError:
            count = 0
        self.bytes_moved += count
        return count


def has_hung_up(sock: socket.socket) -> bool:
    """Return whether a socket has hung up now.

    An event alone may be about the last owner of the descriptor.
    """
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & HANG_UP for _, events in poll.poll(0))
