"""The direct dialer of an upstream whose bind gives each flow a local address of its own.

Dials run on the thread that asks, as those of DirectDialer.
"""

from __future__ import annotations

from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.dialer.plain.packet_conn import DirectPacketConn
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Bind
    from netproxy.net.connect import PendingDial
    from netproxy.net.socket_options import SocketOptions
    from netproxy.net.stream import Stream
    from netproxy.net.udp_sockets import UdpSocketFactory


class SourceDialer(DirectDialer):
    """Connects to targets from the address that its bind has for the flow."""

    def __init__(
        self,
        target_resolver: TargetResolver,
        datagrams: UdpSocketFactory,
        seconds: float,
        outgoing: SocketOptions,
        bind: Bind,
        key: str,
    ) -> None:
        """`key` names the bind in errors; the rest is as in DirectDialer."""
        super().__init__(target_resolver, datagrams, seconds, outgoing)
        self._bind = bind
        self._key = key

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target.  Blocks.  Raises DialError."""
        return self.leaving_from(self._bind, self._key, flow).dial(flow)

    def begin(self, flow: Flow) -> PendingDial | None:
        """Begin to connect without blocking, as DirectDialer.begin().  Raises DialError."""
        return self.leaving_from(self._bind, self._key, flow).begin(flow)

    def dial_packet(self, flow: Flow) -> DirectPacketConn:
        """Open one UDP socket for all datagrams of a client.  Raises DialError."""
        return self.leaving_from(self._bind, self._key, flow).dial_packet(flow)
