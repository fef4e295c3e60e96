"""A stream of a work connection that may carry another one afterwards, as a Stream.

Its owner is told at the end whether the connection may be used again (tunnel.streams.chunks).
"""

from __future__ import annotations

from netproxy.net.stream import Stream
from netproxy.tunnel.streams.chunks import ChunkedSocket
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces import connections


class ReusableStream(Stream):
    """A stream on a work connection, which another stream may use afterwards."""

    __slots__ = ("_ended",)

    def __init__(self, connection: connections.Stream, ended: Callable[[bool], None]) -> None:
        """Begin a stream behind the messages that opened it.

        `ended` is called once, with True if `connection` may carry another stream.  Nothing
        else uses the connection until then.  Raises ProtocolError, StreamError.
        """
        from netproxy.net.tls_socket import LayeredCalls  # late: ssl, which a connection here has

        sock, unread = connection.detach()
        chunked = ChunkedSocket(sock, unread)
        super().__init__(sock)
        # Any StreamSocket will do.
        self.become(chunked, LayeredCalls)  # type: ignore[arg-type]
        self._ended: Callable[[bool], None] | None = ended

    def close(self) -> None:
        """End the stream, and tell whether the connection may be used again."""
        ended, self._ended = self._ended, None
        if ended is not None:
            assert isinstance(self.socket, ChunkedSocket)
            ended(self.socket.release())
        super().close()

    def reset(self) -> None:
        """Close the connection with RST."""
        if self._ended is not None:
            assert isinstance(self.socket, ChunkedSocket)
            self.socket.spoil()
            super().reset()
