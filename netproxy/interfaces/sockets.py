"""Connected sockets, plain or with a protocol such as TLS between them and the bytes in clear."""

from __future__ import annotations

import select

from netproxy.typed import TYPE_CHECKING, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import SocketAddress

SocketT_contra = TypeVar("SocketT_contra", contravariant=True)


HANG_UP = select.POLLHUP | select.POLLERR
"""Events of a TCP socket after which nothing can reach its peer.  A UNIX socket hangs up as soon as
its peer has closed, with bytes of the peer left to be read: there only a read or a write tells."""


class StreamSocket(Protocol):
    """A connected socket that does not block, plain or with TLS on it: what Stream.detach() gives.

    The methods are those of socket.socket; each may raise OSError.
    """

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""

    def detach(self) -> int:
        """Give up the descriptor and return it."""

    def gettimeout(self) -> float | None:
        """Return 0.0."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Read into `buffer`; return the count, 0 at the end.  Raises BlockingIOError."""

    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        """Return how many bytes of `data` were sent.  Raises BlockingIOError."""

    def shutdown(self, how: int, /) -> None:
        """Shut down one or both directions.  Within TLS SHUT_WR may raise BlockingIOError."""

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
        """Set an option."""

    @overload
    def getsockopt(self, level: int, option: int, /) -> int:
        """Return an option that is a number."""

    @overload
    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """Return an option as at most `size` bytes."""

    def getsockname(self) -> SocketAddress:
        """Return the local address."""

    def getpeername(self) -> SocketAddress:
        """Return the peer's address."""


class LayeredSocket:
    """A socket within another protocol: its descriptor does not tell of all bytes to be read.

    The methods of StreamSocket that are here are those that this protocol has its own way for.
    """

    peer_ended = False
    """True once the peer has said that it sends no more, and all that it sent was read."""

    def reserve_record(self, count: int = 1) -> None:
        """Take `count` records less at a time: so many more layers of TLS are within this one.

        A negative `count` takes reservations back.
        """
        raise NotImplementedError

    def recv_into(self, buffer: memoryview, /) -> int:
        """As StreamSocket.recv_into()."""
        raise NotImplementedError

    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        """As StreamSocket.send()."""
        raise NotImplementedError

    def shutdown(self, how: int, /) -> None:
        """As StreamSocket.shutdown()."""
        raise NotImplementedError

    def shutdown_in_tcp(self) -> None:
        """Tell the peer in TCP alone that nothing more comes; what is unsent is lost."""
        raise NotImplementedError


class RecordSocket(LayeredSocket):
    """A StreamSocket that moves bytes in records, as TLS does, and so may carry several streams.

    tunnel.streams.chunks builds on it; net.tls_socket.TlsSocket is the implementation.
    """

    send_limit: int
    """Bytes of the longest `data` that send_behind() takes."""

    def recv_ready(self, buffer: memoryview, /) -> int:
        """Read into `buffer` what the socket has given already; return the count, 0 for none."""
        raise NotImplementedError

    def send_behind(self, head: bytes, data: bytes | bytearray | memoryview, /) -> int:
        """Send as send() does, with `head` before `data`; return the bytes sent of `data`."""
        raise NotImplementedError


class SocketCalls(Protocol[SocketT_contra]):
    """How a Stream reads and writes its socket: net.syscalls, or net.tls_socket.LayeredCalls."""

    def receive(self, sock: SocketT_contra, limit: int, /) -> memoryview | None:
        """Return what is there, about `limit` bytes; empty at the end, None for nothing yet.

        Valid until the thread's next receive.  Raises OSError.
        """

    def send(self, sock: SocketT_contra, data: bytes | bytearray | memoryview, /) -> int:
        """Return how many bytes of `data` were sent without waiting.  Raises OSError."""

    def shutdown(self, sock: SocketT_contra, how: int, /) -> None:
        """Shut down one or both directions (socket.SHUT_*).  Raises OSError."""

    def close(self, sock: SocketT_contra, /) -> None:
        """Close the socket.  A closed one is left alone."""
