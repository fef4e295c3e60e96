"""Work connections on the bridge: each carries a stream, or one stream after the other.

The session that a work connection belongs to knows which are idle.  Thread: one at a time.
"""

from __future__ import annotations

import select
import socket
import struct

from netproxy.interfaces.flows import Traffic
from netproxy.interfaces.sockets import RecordSocket
from netproxy.net.stream import Stream
from netproxy.protocol.tunnels.path import FlowOffer, encode_flow
from netproxy.tunnel.streams.chunks import can_carry_chunks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces import connections
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.control.session import AgentSession

# In struct tcp_info (Linux): tcpi_bytes_acked and tcpi_bytes_received, and the length up to them.
_INFO_BYTES = struct.Struct("=QQ")
_INFO_OFFSET = 120
_INFO_SIZE = 136


class WorkStream(Stream):
    """A work connection on the bridge; its session counts its traffic."""

    __slots__ = ("_session", "datagrams", "counted", "renewals", "flow")

    def __init__(self, stream: connections.Stream, session: AgentSession) -> None:
        """Take the socket of `stream`, which may only be closed afterwards."""
        super().__init__(stream.socket)
        stream.move_to(self)
        self._session = session
        self.datagrams = False
        """True if it carries datagrams."""
        self.flow: PathFlow | None = None
        """Carries its datagrams beside it; None without a path."""
        self.counted = False
        """True once the session counts its traffic; under the session's lock."""
        self.renewals = 0
        """Those of the session when it was added; under the session's lock."""

    @property
    def is_reusable(self) -> bool:
        """Whether the agent lets it carry one stream after the other."""
        return self._session.reuses and can_carry_chunks(self)

    def offer_flow(self, is_addressed: bool) -> bytes:
        """Return the message that offers the agent a flow beside it, empty without a path.

        `is_addressed`: as in PathFlow.
        """
        path = self._session.path
        if path is None:
            return b""
        self.flow = path.flows.new(is_addressed)
        return encode_flow(FlowOffer(path.number, self.flow.number))

    def settle_flow(self, taken: int) -> None:
        """Keep the flow that was offered if the agent has taken that number; 0: none."""
        if self.flow is not None and self.flow.number != taken:
            self.flow.close()
            self.flow = None

    def release(self, is_clean: bool) -> None:
        """Make it idle again after a stream; close it unless that has ended cleanly."""
        if not (is_clean and self._is_read() and self._session.take_back(self)):
            self.close()

    def _is_read(self) -> bool:
        """Return whether nothing was deciphered that has not been read."""
        sock = self.socket
        try:
            is_read = not isinstance(sock, RecordSocket) or not sock.recv_ready(
                memoryview(bytearray(1))
            )
        except OSError:
            return False
        return is_read and not self.unread()

    def is_usable(self) -> bool:
        """Return whether it is still idle: open, and the agent has sent nothing."""
        poll = select.poll()
        try:
            poll.register(self.socket, select.POLLIN | select.POLLRDHUP)
            return not self.unread() and not poll.poll(0)
        except (OSError, ValueError):
            return False

    def traffic(self) -> Traffic:
        """Return the bytes on the wire so far, those of TLS included."""
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
            return Traffic(*_INFO_BYTES.unpack_from(info, _INFO_OFFSET))
        except (OSError, struct.error):
            # A unix socket, a closed socket, or a kernel before 4.1.
            return Traffic(0, 0)

    def replace(self, other: connections.Stream) -> None:
        """Go on with another connection; what this one has carried stays counted."""
        self._session.note_replaced(self)
        super().replace(other)

    def close(self) -> None:
        """Close the socket, and tell the session first."""
        if self.open:
            self.settle_flow(0)
            self._session.discard(self)
        super().close()
