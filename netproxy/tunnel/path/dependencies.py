"""What a path needs of the side that has it."""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol

from netproxy.tunnel.path.monitor import FOR_EVER, Tries

if TYPE_CHECKING:
    from netproxy.interfaces.answers import DirectRow
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.net.datagram import ArenaPool
    from netproxy.protocol.tunnel import TunnelMessage
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.path.keys import Epoch
    from netproxy.tunnel.path.path import Path


class PathOwner(Protocol):
    """What a path tells of itself.  Thread: any; never blocks."""

    def path_changed(self, path: Path, why: str) -> None:
        """Note that a path has come up, gone down or moved."""

    def wake(self) -> None:
        """Have the keeper look at all paths."""

    def carried(self, sent: int, received: int, too_long: int) -> None:
        """Count bytes of packets, and datagrams that do not fit into packets."""

    def retire(self, epoch: Epoch) -> None:
        """Accept packets of a key no more."""

    def renew(self, path: Path) -> None:
        """Offer another key to the agent."""

    def left_alone(self, path: Path, flow: PathFlow) -> None:
        """Have another stream attached to a flow whose stream has failed."""

    def agent_moved(self) -> None:
        """Note that the bridge sees the agent at another address than before."""


class PathSocketDialer(Protocol):
    """Opens a packet connection to the bridge.  Thread: the dial pool's."""

    def __call__(self, port: int) -> tuple[PacketConn, Destination]:
        """Return a connection and the bridge as its destination; `port`: as in PathOffer.

        Blocks.  Raises DialError.
        """


class DirectPaths(Protocol):
    """The direct paths that share an agent's socket (tunnel.direct.end).  Thread: any."""

    def obey(self, message: TunnelMessage) -> None:
        """Obey a message of the bridge.  Raises ProtocolError."""

    def report(self, now: float) -> None:
        """Tell the bridge of them if it is time to."""

    def lose_socket(self) -> None:
        """Send nothing more: the socket has ended."""

    def describe(self) -> list[DirectRow]:
        """Return them, for netproxyctl."""

    def close(self) -> None:
        """End all of them."""


class PathDependencies(NamedTuple):
    """What a path needs of its owner."""

    owner: PathOwner
    arenas: ArenaPool
    initiates: bool
    """True on the agent's side, and on both sides of a direct path."""
    renewal_seconds: float
    """A key is renewed after so long; the agent's side has infinite patience."""
    tries: Tries = FOR_EVER
