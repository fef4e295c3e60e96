"""Finds connections of this daemon that rules of the kernel lead back to it.

They would come back again and again, each time as a new connection.  The rules must leave out
what the daemon itself sends (`mark`); this is for rules that do not.
Thread: any.  Each step is one operation on a set; see dials().
"""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

LOOP = "loop"
"""The reason of a connection that this daemon itself has made."""
NOT_LED_HERE = "not redirected"
"""The reason of connections and datagrams whose target is the listener itself."""


class OwnConnections:
    """The connections that came to one listener, and those that it has made, while they live.

    A connection is known by its two ends: those of one that we have made are the same, seen
    from its other side, if it comes back.
    """

    def __init__(self) -> None:
        self._arrived: set[tuple[Address, Address]] = set()
        self._dialled: set[tuple[Address, Address]] = set()

    def arrives(self, client: Address, target: Address) -> bool:
        """Note a connection that came; return False if we have made it."""
        ends = client, target
        self._arrived.add(ends)
        if ends in self._dialled:
            self._arrived.discard(ends)
            return False
        return True

    def leaves(self, client: Address, target: Address) -> None:
        """Forget a connection that came."""
        self._arrived.discard((client, target))

    def dials(self, local: Address, peer: Address) -> bool:
        """Note a connection that was made; return True if it has come back to us.

        Both methods add first and look second: whichever comes later sees the other's.
        """
        ends = local, peer
        self._dialled.add(ends)
        if ends in self._arrived:
            self._dialled.discard(ends)
            return True
        return False

    def ends(self, local: Address, peer: Address) -> None:
        """Forget a connection that was made."""
        self._dialled.discard((local, peer))
