"""Connects the daemon's own agent to its bridge, as one configuration says: TCP and UDP."""

from __future__ import annotations

from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.hop import Hop
from netproxy.errors import DialError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.flows import Flow
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.config.schema import AgentConfig
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.interfaces.routing import Dialer


class BridgeTrust(Protocol):
    """How the bridge is authenticated by TLS."""

    def connect(self, stream: Stream) -> None:
        """Make the TLS handshake.  Raises ProtocolError or StreamError."""

    def keep_session(self, stream: Stream) -> None:
        """Keep the TLS session of a connection on which the bridge has sent something."""


class BridgeConnector(NamedTuple):
    """Dials the bridge as one configuration says (tunnel.agent.BridgeDialer).

    A TLS session is resumed only within one configuration: a bridge that was trusted before is
    verified anew by the certificates that now count.
    """

    hop: Hop
    trust: BridgeTrust | None
    """None: without TLS."""

    def dial(self, greet: Callable[[Stream], None]) -> Stream:
        """Return a connection on which `greet` has made the tunnel's handshake."""
        flow = Flow("tcp", UNSPECIFIED_ADDRESS, self.hop.server, "", "")
        stream = self.hop.open(flow, greet)
        if self.trust is not None:
            self.trust.keep_session(stream)
        return stream

    def dial_datagrams(self, control: Stream, port: int) -> tuple[PacketConn, Destination]:
        """Return a packet connection to the bridge, and the bridge as its destination."""
        return dial_datagrams(self.hop, control.peer_address().host, port)


def dial_datagrams(hop: Hop, host: str, port: int) -> tuple[PacketConn, Destination]:
    """Return a packet connection to a hop at the address `host`, and the hop as its destination.

    `port`: 0 for that of the hop.  Blocks.  Raises DialError.
    """
    via, server = hop.via, hop.server
    target = Address(server.host, port or server.port)
    flow = Flow("udp", UNSPECIFIED_ADDRESS, target, "", "")
    if isinstance(via, DirectDialer):
        # The name may stand for several machines: this is the one.
        flow = flow._replace(addresses=(target._replace(host=host),))
    elif "udp" not in via.carries:
        raise DialError(via.refusal, said=f"{via.name} carries no UDP")
    conn = via.dial_packet(flow)
    try:
        return conn, conn.prepare(flow)
    except BaseException:
        conn.close()
        raise


def bridge_connector(
    config: AgentConfig, via: Dialer, seconds: float, trust: BridgeTrust | None
) -> BridgeConnector:
    """Return what dials the bridge; `seconds` are for its handshake."""
    label, secure = f"bridge {config.bridge}", trust.connect if trust is not None else None
    return BridgeConnector(Hop("tunnel", label, config.bridge, via, seconds, secure=secure), trust)
