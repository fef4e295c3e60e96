"""Listeners, and who may connect to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address


DECIDED_BY: Mapping[str, str] = {
    "client not allowed": "clients",
    "connection limit": "limits.connections",
    "client limit": "limits.connections_per_client",
    "too many handshakes": "the limit of unfinished handshakes",
    "no thread": "the limit of threads",
}
"""What decides if a connection is refused for a reason: a key of the listener's configuration, or
a limit that has no key."""


class Admission(Protocol):
    """Decides who may connect to a listener, and how many at once.  Thread: any."""

    def enter(self, client: str) -> str:
        """Count one connection of a client address in; return "" or, in words, why not."""

    def leave(self, client: str) -> None:
        """Count a connection out that enter() has counted in."""


class Listener(Protocol):
    """A bound socket and the thread that reads it."""

    network: str
    """ "tcp" or "udp"."""
    address: Address

    def start(self) -> None:
        """Start the thread.  Raises RuntimeError if there is none to be had."""

    def stop(self) -> None:
        """Stop; after this returns nothing new is taken."""
