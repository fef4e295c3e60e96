"""The bridge's side of datagram paths: offers them to agents, and receives from all of them.

One or more UDP listeners have the packets of all agents; a connection ID tells whose they are.
Thread: the listeners' readers, and any.
"""

from __future__ import annotations

import os
import threading
import time

from netproxy.net.address import from_sockaddr
from netproxy.protocol import tunnel
from netproxy.protocol.tunnels.path import ID_SIZE, KEY_SIZE, PathOffer, encode_offer
from netproxy.tunnel.path.keys import Epoch
from netproxy.tunnel.path.owner import PathSet
from netproxy.tunnel.path.dependencies import PathDependencies
from netproxy.tunnel.path.path import Path
from netproxy.tunnel.path.remote import Remote
from netproxy.tunnel.path.sealing import Opener, Sealer
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Batch, DatagramSocket, PacketHandler
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.tunnel.path.owner import PathServices
    from netproxy.tunnel.control.session import AgentSession

RENEWAL_SECONDS = 3600.0
"""A key is in use for so long, then the bridge offers another one."""


class SocketOrigin(NamedTuple):
    """A listener's socket, as the place that packets come to (table.Origin)."""

    local: DatagramSocket
    clients: AllowedClients

    def address(self, peer: Hashable) -> Address:
        """Return the address in the key of a peer."""
        return from_sockaddr(self.local.peer(peer))

    def remote(self, peer: Hashable) -> Remote | None:
        """Return where packets to a peer are sent: from the address that it has sent to."""
        destination = self.local.reply_destination(peer)
        assert destination is not None  # only streams have none
        return Remote(self.local.send, destination, peer)

    def refused_by(self, peer: Hashable) -> str:
        """Return the key of the listener that refuses packets of a peer; "" if none does."""
        clients = self.clients
        return "" if clients.everybody else clients.refused_by(self.address(peer).host)


class PathPackets(NamedTuple):
    """Takes the packets of agents that come to one listener (PacketHandler)."""

    paths: BridgePaths
    clients: AllowedClients
    """The addresses that may send."""

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Take the packets of agents."""
        self.paths.table.take(batch, SocketOrigin(local, self.clients))


def new_number() -> int:
    """Return a number that no other process of the bridge gives the same client."""
    return int.from_bytes(os.urandom(6), "big")


class Control(Protocol):
    """Where an agent or a client is told of paths, within TLS."""

    def send(self, data: bytes) -> None:
        """Send messages.  Never blocks."""


class OfferedPath(NamedTuple):
    """What a path was offered to: an agent, or a client of direct paths."""

    holder: str
    """For the log: "agent 'home'"."""
    control: Control
    port: int
    """As in PathOffer."""
    is_resumable: bool
    """True if the agent may resume the session."""


class BridgePaths(PathSet):
    """The paths to all agents of a bridge, in one process."""

    def __init__(self, services: PathServices, identifier: Callable[[], bytes]) -> None:
        """`identifier()` returns a new connection ID of this process."""
        super().__init__(services)
        self.sockets: Sequence[DatagramSocket] = ()
        """The listeners' sockets; without any no path is offered."""
        self._identifier = identifier
        # Guards _numbers and _offered, and `path` of the sessions.  Sending an offer does not wait.
        self._offering = threading.Lock()
        self._numbers = 0
        self._offered: dict[Path, OfferedPath] = {}

    def packets_from(self, clients: AllowedClients) -> PathPackets:
        """Return what takes the packets of agents at a listener for these clients."""
        return PathPackets(self, clients)

    def has(self, handler: PacketHandler) -> bool:
        """Return whether a listener's handler takes the packets of agents."""
        return isinstance(handler, PathPackets) and handler.paths is self

    def offer(self, session: AgentSession) -> None:
        """Offer a path to an agent, unless the one that it has is still right.

        There is none for a session that has ended, for want of a socket or a thread, or if the
        keys could be read on their way.  Sets `session.path`.
        """
        arrival, takes = session.arrival, session.takes_paths and not session.ended
        port = self._port(arrival.port) if takes and arrival.is_sealed else None
        with self._offering:
            before = session.path
            if before is not None and self._offered[before].port == port:
                self._offer_again(before, session)
                return
            if before is not None:
                session.path = None
                self._end(before)
            if port is not None:
                holder, control = f"agent '{session.name}'", session.control
                self._numbers += 1
                offered = OfferedPath(holder, control, port, session.resumes)
                session.path = self._begin(self._numbers, offered)

    def _offer_again(self, path: Path, session: AgentSession) -> None:
        """Offer a path with other keys if the session has another control connection.

        What was told by the one before may be lost.
        """
        offered = self._offered[path]
        if offered.control is not session.control:
            self._offered[path] = offered._replace(control=session.control)
            self._renew(path)

    def _begin(self, number: int, offered: OfferedPath) -> Path | None:
        epoch, offer = self._make_keys(number, offered.port)
        dependencies = PathDependencies(self, self.services.arenas, False, RENEWAL_SECONDS)
        path = Path(number, epoch, dependencies)
        path.is_resumable = offered.is_resumable
        self._offered[path] = offered
        try:
            self.add(path, epoch)
        except RuntimeError as error:
            self._end(path)
            self.services.log.warning("tunnel: no datagram path for %s: %s", offered.holder, error)
            return None
        _tell(offered, offer)
        return path

    def _end(self, path: Path) -> None:
        self.drop(path)
        offered = self._offered.pop(path)
        offered.control.send(tunnel.encode_number(tunnel.PATH_END, path.number))

    def begin(self, holder: str, control: Control, dialled: int) -> Path | None:
        """Offer a path to a client, which has dialled this port; return it, None if there is none.

        `holder`: as in OfferedPath.
        """
        port = self._port(dialled)
        if port is None:
            return None
        with self._offering:
            return self._begin(new_number(), OfferedPath(holder, control, port, False))

    def end(self, path: Path) -> None:
        """End a path that begin() has returned."""
        with self._offering:
            self._end(path)

    def _port(self, dialled: int) -> int | None:
        """Return the port for an offer: that of the socket at the number dialled, or of another."""
        if self.services.make_cipher is None:
            return None
        ports = [local.address.port for local in self.sockets]
        return 0 if dialled in ports else next(iter(ports), None)

    def _make_keys(self, number: int, port: int) -> tuple[Epoch, PathOffer]:
        """Return new keys, as this side uses them and as the agent is told."""
        offer = PathOffer(
            number,
            port,
            self._identifier(),
            os.urandom(ID_SIZE),
            os.urandom(KEY_SIZE),
            os.urandom(KEY_SIZE),
        )
        make = self.services.make_cipher
        assert make is not None  # nothing is offered without
        sealer = Sealer(make(offer.agent_key), offer.agent_id)
        opener = Opener(make(offer.bridge_key))
        return Epoch(offer.bridge_id, sealer, opener, time.monotonic()), offer

    # -- what a path asks for

    def renew(self, path: Path) -> None:
        """Offer another key to the agent of a path."""
        with self._offering:
            if path in self._offered:
                self._renew(path)

    def _renew(self, path: Path) -> None:
        """Offer another key.  Under the lock."""
        offered = self._offered[path]
        epoch, offer = self._make_keys(path.number, offered.port)
        path.offer(epoch)
        self.table.add(path, epoch)
        _tell(offered, offer)
        self.services.counter.count("tunnel_paths", "renewed")

    def names(self, path: Path) -> str:
        """Return the agent of a path, for the log."""
        offered = self._offered.get(path)
        return f"of {offered.holder}" if offered is not None else "of an agent"


def _tell(offered: OfferedPath, offer: PathOffer) -> None:
    """Send an offer to the agent, and whether it may resume the session."""
    resumable = tunnel.encode_message(tunnel.RESUMABLE) if offered.is_resumable else b""
    offered.control.send(encode_offer(offer) + resumable)
