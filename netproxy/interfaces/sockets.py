"""Connected sockets, plain or with a protocol such as TLS between them and the bytes in clear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import SocketAddress

SocketT_contra = TypeVar("SocketT_contra", contravariant=True)


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
    """A socket within another protocol: its descriptor does not tell of all bytes to be read."""

    peer_ended = False
    """True once the peer has said that it sends no more, and all that it sent was read."""


class SocketCalls(Protocol[SocketT_contra]):
    """How a Stream reads and writes its socket: net.syscalls, or net.tls_socket.TlsCalls."""

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
