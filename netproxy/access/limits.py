"""Who may connect to a listener and how many at once, counted by client address.

If all connections are taken, they are shared fairly (interfaces.fairness): the client with
most of them loses one for a client that has fewer.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from netproxy.interfaces.fairness import client_key
from netproxy.interfaces.networks import NetworkSet

if TYPE_CHECKING:
    from netproxy.interfaces.listeners import Resident

EVICTION_CANDIDATES = 16
"""The oldest connections of a client among which the one idle longest is looked for: a look is a
system call."""
EVICTED_SHARE = 4
"""Of so many connections one may exist beyond the limit, until it has ended for another client."""


class _Occupancy:
    """The connections that are counted in, with the lock that guards the counts."""

    __slots__ = ("lock", "live", "entered", "by_client", "by_address", "residents", "evicted")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.live = 0
        self.entered = 0
        self.by_client: dict[str, int] = {}
        """The connections of each client, an IPv4 address or an IPv6 network."""
        self.by_address: dict[str, int] = {}
        """Those of each IPv6 address."""
        self.residents: dict[Resident, None] = {}
        """Oldest first.  A connection adds itself once it has entered, without the lock."""
        self.evicted: set[Resident] = set()
        """Those that must end and have not ended yet; their client does not hold them any more."""

    def evict_for(self, client: str) -> Resident | None:
        """Return the connection that must end for one of `client`; under the lock.

        None if no client would have more than this one, or has a connection that can end.
        """
        if not self.by_client:
            return None
        most = max(self.by_client.values())
        if most <= self.by_client.get(client, 0) + 1:
            return None
        holder = next(key for key, held in self.by_client.items() if held == most)
        held = [
            resident
            for resident in list(self.residents)
            if resident not in self.evicted and client_key(resident.client.host) == holder
        ]
        if not held:
            return None
        evicted = next((resident for resident in held if resident.handshaking), None)
        if evicted is None:
            evicted = max(held[:EVICTION_CANDIDATES], key=lambda resident: resident.idle())
        self.evicted.add(evicted)
        _subtract(self.by_client, holder)
        return evicted


class Admission:
    """Decides who may connect to one listener, and how many at once.

    The limits never change; a reload makes an Admission with new limits and the same
    counts (with_limits).  Threads: the listener's, and each that ends a connection.
    """

    def __init__(
        self,
        clients: NetworkSet | None,
        total: int,
        per_client: int,
        occupancy: _Occupancy | None = None,
    ) -> None:
        """Admit `total` connections, `per_client` for each address; `clients` None: every address.

        `occupancy`: the counts to go on with, for with_limits().
        """
        self._clients = clients
        self._total = total
        self._per_client = per_client
        self._occupancy = occupancy or _Occupancy()
        self.residents = self._occupancy.residents
        """Where a connection that has entered adds itself, so that it can end for another one."""

    def with_limits(self, clients: NetworkSet | None, total: int, per_client: int) -> Admission:
        """Return an Admission with other limits that counts the same connections.

        A connection that entered by one of the two may leave by the other.
        """
        return Admission(clients, total, per_client, self._occupancy)

    def enter(self, client: str) -> str:
        """Count a connection in and return "", or return why it is refused.

        The reasons: "client not allowed", "connection limit", "client limit".  If all
        connections are taken, one of a client that has more ends for this one.
        """
        if self._clients is not None and client not in self._clients:
            return "client not allowed"
        occupancy, evicted = self._occupancy, None
        is_ipv6 = ":" in client
        key = client_key(client) if is_ipv6 else client
        with occupancy.lock:
            of_address = occupancy.by_address if is_ipv6 else occupancy.by_client
            if of_address.get(client, 0) >= self._per_client:
                return "client limit"
            excess = occupancy.live - self._total
            if excess >= 0 and excess >= len(occupancy.evicted):
                if len(occupancy.evicted) * EVICTED_SHARE < self._total:
                    evicted = occupancy.evict_for(key)
                if evicted is None:
                    return "connection limit"
            occupancy.live += 1
            occupancy.entered += 1
            occupancy.by_client[key] = occupancy.by_client.get(key, 0) + 1
            if is_ipv6:
                of_address[client] = of_address.get(client, 0) + 1
        if evicted is not None:
            evicted.evict()
        return ""

    @property
    def live(self) -> int:
        """The connections that have entered and not left."""
        return self._occupancy.live

    @property
    def entered(self) -> int:
        """The connections that have entered since the first Admission with these counts."""
        return self._occupancy.entered

    def leave(self, client: str, resident: Resident | None = None) -> None:
        """Count a connection out that enter() has counted in."""
        occupancy, key = self._occupancy, client
        with occupancy.lock:
            occupancy.live -= 1
            if ":" in client:
                key = client_key(client)
                _subtract(occupancy.by_address, client)
            if resident in occupancy.residents:
                del occupancy.residents[resident]
                if resident in occupancy.evicted:
                    occupancy.evicted.remove(resident)
                    return
            left = occupancy.by_client[key] - 1
            if left:
                occupancy.by_client[key] = left
            else:
                del occupancy.by_client[key]


def _subtract(counts: dict[str, int], key: str) -> None:
    """Subtract 1 from a count; a key that has nothing left is removed."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
