"""One stream on a connection that outlives it: chunks with a length, and an end of each direction.

A connection within TLS carries one stream after the other.  Each direction of a stream is a row of
chunks and a zero length, its end (man/netproxy-tunnel.7).  The bytes of a chunk are deciphered into
the reader's own buffer and encrypted from the writer's: no byte is copied once more.  A direction
with many bytes goes on without chunks, and its connection is not used again.  A connection that
closes before the end of a chunked direction is a reset.  Thread: as for a TlsSocket.
"""

from __future__ import annotations

import errno
import os
import socket
import threading

from netproxy.errors import ProtocolError
from netproxy.interfaces.sockets import LayeredSocket, RecordSocket
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces import connections
    from netproxy.interfaces.sockets import StreamSocket

HEAD_SIZE = 4
"""Bytes of a chunk's length."""

CHUNK_LIMIT = 1 << 20
"""Bytes of the longest chunk that is read; a longer one tells of a fault."""

END, REST = bytes(HEAD_SIZE), b"\xff" * HEAD_SIZE
"""Lengths: of the end of a direction, and of a rest without chunks, up to its end in TLS."""

CHUNKED_BYTES = 1 << 20
"""Bytes of a direction behind which the rest goes without chunks.

Each chunk costs some microseconds at both ends.  After so many bytes that is more than the
handshake of the next connection.
"""

_ENDLESS = 1 << 62


def can_carry_chunks(stream: connections.Stream) -> bool:
    """Return whether a connection may carry several streams: it is within TLS."""
    return isinstance(stream.socket, RecordSocket)


# A chunk; length 0 without data is the end of the direction, and with length 2^32 - 1 all that
# follows up to the end in TLS is data
# +--------+------+
# | LENGTH | DATA |
# |   4    |      |
# +--------+------+
class ChunkLengths:
    """Parses the lengths of chunks, whose bytes may come in pieces."""

    __slots__ = ("_head",)

    def __init__(self) -> None:
        self._head = b""

    @property
    def missing(self) -> int:
        """The bytes that the length still lacks."""
        return HEAD_SIZE - len(self._head)

    def parse(self, piece: bytes | memoryview) -> int | None:
        """Return the length once `piece` completes it; `piece` has at most `missing` bytes.

        Raises ProtocolError.
        """
        head = self._head + piece
        if len(head) < HEAD_SIZE:
            self._head = head
            return None
        self._head = b""
        length = int.from_bytes(head, "big")
        if length > CHUNK_LIMIT:
            if head != REST:
                raise ProtocolError(f"a chunk of {length} bytes (limit {CHUNK_LIMIT})")
            return _ENDLESS
        return length


class ChunkedSocket(LayeredSocket):
    """The stream that a connection carries now, as a StreamSocket."""

    def __init__(self, sock: StreamSocket, unread: bytes = b"") -> None:
        """Begin a stream on `sock`, of which `unread` was read before.

        Raises ProtocolError if `sock` is not within TLS.
        """
        if not isinstance(sock, RecordSocket):
            raise ProtocolError("a stream in chunks outside TLS")
        self._sock = sock
        self._unread = memoryview(unread)
        self._lengths = ChunkLengths()
        self._head = memoryview(bytearray(HEAD_SIZE))
        self._left = 0
        """Bytes of the present chunk that were not read."""
        self._incomplete = False
        """True while a send that began is not complete."""
        self._chunked_bytes = CHUNKED_BYTES
        """Bytes that may still be sent in chunks; 0 once the rest goes without."""
        self._end_sent = False
        self._rest_comes = False
        """True if the peer sends without chunks."""
        self._reserved = 0
        # Guards what follows: a stream may be shut down by any thread.
        self._lock = threading.Lock()
        self._spoiled = False
        """True if the stream was shut down or reset."""
        self._released = False
        self.fileno, self.detach, self.gettimeout = sock.fileno, sock.detach, sock.gettimeout
        self.getsockopt, self.setsockopt = sock.getsockopt, sock.setsockopt
        self.getsockname, self.getpeername = sock.getsockname, sock.getpeername

    def reserve_record(self, count: int = 1) -> None:
        """Reserve records in the TLS below, until the stream has ended."""
        self._reserved += count
        self._sock.reserve_record(count)

    # -- reading

    def recv_into(self, buffer: memoryview) -> int:
        """Read what is there into `buffer`, as TlsSocket.recv_into() does.

        Raises ConnectionResetError if the connection ends before the stream.
        """
        total, size = 0, len(buffer)
        if self._rest_comes and not self._unread:
            total = self._sock.recv_into(buffer)
            self.peer_ended = self._sock.peer_ended or not total
            return total
        while total < size and not self.peer_ended:
            if self._left:
                count = self._receive(buffer[total : total + self._left], total > 0)
                self._left -= count
                total += count
            else:
                count = self._read_length(total > 0)
            if not count:
                break
        if self._rest_comes and not self._unread:
            self.peer_ended = self._sock.peer_ended or not total
        return total

    def _read_length(self, ready_only: bool) -> int:
        """Read bytes of a chunk's length; return their number."""
        head = self._head[: self._lengths.missing]
        count = self._receive(head, ready_only)
        try:
            length = self._lengths.parse(head[:count])
        except ProtocolError as error:
            raise OSError(errno.EPROTO, str(error)) from error
        if length is not None:
            self._left, self.peer_ended = length, not length
            self._rest_comes = length == _ENDLESS
        return count

    def _receive(self, buffer: memoryview, ready_only: bool) -> int:
        """Read the bytes of the connection; 0 only if `ready_only` and none are there.

        Raises BlockingIOError, ConnectionResetError.
        """
        unread = self._unread
        if unread:
            count = min(len(buffer), len(unread))
            buffer[:count] = unread[:count]
            self._unread = unread[count:]
            return count
        if ready_only:
            return self._sock.recv_ready(buffer)
        count = self._sock.recv_into(buffer)
        if not count and not self._rest_comes:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return count

    # -- writing

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send the first bytes of `data`, as a chunk or as the rest; return their number.

        Raises BlockingIOError as TlsSocket.send() does.
        """
        if not self._chunked_bytes:
            return self._sock.send(data)
        if not data:
            return 0
        if len(data) > self._sock.send_limit:
            data = data[: self._sock.send_limit]
        if self._incomplete:
            # The head has been sent.
            head = b""
        elif len(data) < self._chunked_bytes:
            head = len(data).to_bytes(HEAD_SIZE, "big")
        else:
            head, self._chunked_bytes = REST, 0
        self._incomplete = True
        sent = self._sock.send_behind(head, data)
        self._incomplete = False
        self._chunked_bytes = max(0, self._chunked_bytes - sent)
        return sent

    def shutdown(self, how: int) -> None:
        """Shut down: SHUT_WR sends the end of this direction, SHUT_RDWR ends the connection.

        Raises BlockingIOError if there is no room for the end now.
        """
        if how == socket.SHUT_WR:
            self._send_end()
            return
        with self._lock:
            if self._released:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._spoiled = True
            self._sock.shutdown(how)

    def shutdown_in_tcp(self) -> None:
        """Tell the peer in TCP alone that nothing more comes: it takes the stream for cut off."""
        with self._lock:
            if not self._released:
                self._spoiled = True
                self._sock.shutdown_in_tcp()

    def _send_end(self) -> None:
        if not self._chunked_bytes:
            self._sock.shutdown(socket.SHUT_WR)
            return
        if self._incomplete:
            # The bytes of a chunk come first.
            raise BlockingIOError
        if not self._end_sent:
            self._sock.send(END)
            self._end_sent = True

    # -- the end

    def spoil(self) -> None:
        """Let no other stream use the connection."""
        with self._lock:
            self._spoiled = True

    def release(self) -> bool:
        """Let the connection go; return whether another stream may use it.

        So it may if both directions have ended and nothing went wrong.
        """
        with self._lock:
            self._released = True
        if self._reserved:
            self.reserve_record(-self._reserved)
        self.fileno = self.detach = _no_descriptor
        has_ended = self.peer_ended and self._end_sent and not self._unread
        return has_ended and not (self._spoiled or self._rest_comes or self._sock.peer_ended)


def _no_descriptor() -> int:
    return -1
