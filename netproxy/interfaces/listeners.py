"""Listeners, and who may connect to them."""

from __future__ import annotations

from netproxy.interfaces.networks import NetworkSet
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, Protocol, Sequence

if TYPE_CHECKING:
    from socket import socket as Socket

    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import PacketHandler
    from netproxy.interfaces.networks import HostSet, IpNetwork

    _NetworkList = tuple[Sequence[IpNetwork], Sequence[IpNetwork]]
    """Networks, and those that are excluded from them."""


HASH_PREFIX = "scrypt$"
"""How the hash of a password begins; any other password is plain text."""
CLIENT_NOT_ALLOWED = "client not allowed"
"""The reason of a client that may not connect, by `clients` or `clients_deny`."""
EVICTED = "yielded to another client"
"""The reason of a connection that ends for one of another client."""
CLIENT_RATE = "client connection rate"
"""The reason of a connection of a client that has opened too many within a second."""
DECIDED_BY: Mapping[str, str] = {
    CLIENT_RATE: "limits.connection_rate_per_client",
    "connection limit": "limits.connections",
    "client limit": "limits.connections_per_client",
    "too many handshakes": "limits.handshakes",
    EVICTED: "limits.connections",
    "no thread": "the limit of threads",
    "listener removed": "listeners",
    "login required": "auth",
    "user removed": "users",
    "password changed": "users",
    "user banned": "netproxyctl ban",
    "client banned": "netproxyctl ban",
    "user expired": "users.NAME.expires",
    "quota used up": "users.NAME.limits.quota",
}
"""What decides if a client is refused for a reason: a key of the configuration, or a limit that has
no key; NAME stands for a user."""


def decided_by(refusal: str, user: str = "") -> str:
    """Return what has refused or ended something of a user for a reason, "" if it is unknown."""
    return DECIDED_BY.get(refusal, "").replace("NAME", user)


TAKEN_MARK = 0x4E50
"""The mark of packets that a rule TPROXY has taken, in the rules of netproxyctl nft."""


class AllowedClients:
    """The client addresses that may connect to a listener or a port.  Immutable; any thread."""

    __slots__ = ("everybody", "_allowed", "_denied", "_proxies")

    def __init__(
        self,
        allow: _NetworkList = ((), ()),
        deny: _NetworkList = ((), ()),
        proxies: Iterable[IpNetwork] = (),
    ) -> None:
        """Allow the clients in `allow`, or all if it is empty, except those in `deny`.

        `proxies` may connect in any case: they speak for clients.
        """
        self._allowed: HostSet | None = NetworkSet(*allow) if any(allow) else None
        self._denied: HostSet | None = NetworkSet(*deny) if any(deny) else None
        self._proxies = NetworkSet(proxies)
        self.everybody = self._allowed is None and self._denied is None
        """True if every client may connect: nothing needs to be asked."""

    def refused_by(self, client: str) -> str:
        """Return the key of the configuration that refuses a client address; "" if none does."""
        if self._denied is not None and client in self._denied:
            key = "clients_deny"
        elif self._allowed is not None and client not in self._allowed:
            key = "clients"
        else:
            return ""
        return "" if client in self._proxies else key


ALL_CLIENTS = AllowedClients()


class AgentPackets(Protocol):
    """Takes the datagrams of tunnels' agents (tunnel.path.bridge)."""

    def packets_from(self, clients: AllowedClients) -> PacketHandler:
        """Return what takes them at a listener for these clients."""


class Resident(Protocol):
    """A connection that has entered, and can end for one of another client.  Hashable."""

    @property
    def client(self) -> Address:
        """The client's address."""

    @property
    def handshaking(self) -> bool:
        """True until the client's request has been read."""

    def idle(self) -> float:
        """Return the seconds since a byte came or went.  Must not block."""

    def evict(self) -> None:
        """Begin to end.  Must not block.  Thread: any."""


class Admission(Protocol):
    """Decides who may connect to a listener, and how many at once.  Thread: any."""

    residents: dict[Resident, None]
    """Where a connection that has entered adds itself."""
    counts_here: bool
    """False if another process counts the connections."""

    def enter(self, client: str) -> str:
        """Count one connection of a client address in; return "" or, in words, why not."""

    def take_over(self, client: str) -> None:
        """Count a connection in that another process has admitted."""

    def decided_by(self, refusal: str, client: str) -> str:
        """Return what has decided a refusal of enter(): a key of the configuration, or ""."""

    def leave(self, client: str, resident: Resident | None = None) -> None:
        """Count a connection out that enter() has counted in; `resident` if it added itself."""


class GivenSockets(Protocol):
    """Sockets that were bound for this process: by the service manager, or by its parent.

    Other processes have the same sockets: they must never be shut down.
    """

    def take(self, network: str, address: Address) -> Socket | None:
        """Return a duplicate of the socket of an address, None if it is not given.

        `network`: "tcp" or "udp".  Raises ListenError if it should be given, but is not.
        """

    def is_served(self, network: str, address: Address) -> bool:
        """Return whether this process serves an address: it may be given to another one alone."""

    def close(self) -> None:
        """Close the originals."""


class Listener(Protocol):
    """A bound socket and the thread that reads it."""

    network: str
    """ "tcp" or "udp"."""
    address: Address

    def start(self, held: bool = False) -> None:
        """Start the thread.  Raises RuntimeError if there is none to be had.

        `held`: it takes nothing before begin().
        """

    def begin(self) -> None:
        """Take what comes from now on."""

    def halt(self) -> None:
        """Begin to stop, without waiting: many listeners are halted before any is stopped."""

    def stop(self) -> None:
        """Stop; after this returns nothing new is taken."""
