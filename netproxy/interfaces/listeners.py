"""Listeners, and who may connect to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address


CLIENT_NOT_ALLOWED = "client not allowed"
"""The reason of a client that is not in `clients` of its listener."""
EVICTED = "yielded to another client"
"""The reason of a connection that ends for one of another client."""
DECIDED_BY: Mapping[str, str] = {
    CLIENT_NOT_ALLOWED: "clients",
    "connection limit": "limits.connections",
    "client limit": "limits.connections_per_client",
    "too many handshakes": "the limit of unfinished handshakes",
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
no key."""


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

    def enter(self, client: str) -> str:
        """Count one connection of a client address in; return "" or, in words, why not."""

    def leave(self, client: str, resident: Resident | None = None) -> None:
        """Count a connection out that enter() has counted in; `resident` if it added itself."""


class Listener(Protocol):
    """A bound socket and the thread that reads it."""

    network: str
    """ "tcp" or "udp"."""
    address: Address

    def start(self) -> None:
        """Start the thread.  Raises RuntimeError if there is none to be had."""

    def stop(self) -> None:
        """Stop; after this returns nothing new is taken."""
