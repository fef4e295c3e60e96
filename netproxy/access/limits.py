"""Who may connect to a listener and how many at once, counted by client address.

If all connections are taken, they are shared fairly (interfaces.fairness): the client with
most of them loses one for a client that has fewer.

With several worker processes the limits are for all of them together (accounts.gauges), and a
connection can only end for another one of its own process.
"""

from __future__ import annotations

import threading
from itertools import islice

from netproxy.interfaces.fairness import client_key
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED, DECIDED_BY
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.access.accounts.gauges import SharedConnections
    from netproxy.interfaces.listeners import AllowedClients, Resident

RefuseArrival = Callable[[str], str]
"""Returns why a new connection of a client's host is refused, "" if it is not."""
EVICTION_CANDIDATES = 16
"""How many of a client's oldest connections are compared to find the one idle longest.  Each
comparison is a system call."""
EVICTED_SHARE = 4
"""Evicted connections that have not closed yet may exceed the limit by a quarter of it."""


def refuse_nobody(client: str) -> str:
    """Refuse no connection.  A RefuseArrival."""
    return ""


class _Occupancy:
    """The connections that are counted in, with the lock that guards the counts."""

    __slots__ = (
        *("lock", "live", "entered", "by_client", "by_address", "keys"),
        *("residents", "of_client", "evicted", "shared"),
    )

    def __init__(self, shared: SharedConnections | None) -> None:
        self.shared = shared
        """The counts of all worker processes, None if there is one process."""
        self.lock = threading.Lock()
        self.live = 0
        self.entered = 0
        self.by_client: dict[str, int] = {}
        """The connections of each client, an IPv4 address or an IPv6 network."""
        self.by_address: dict[str, int] = {}
        """Those of each IPv6 address."""
        self.keys: dict[str, str] = {}
        """The client of each address in `by_address`, which costs time to compute."""
        self.residents: dict[Resident, None] = {}
        """Oldest first, those not in `of_client`.  A connection adds itself once it has entered,
        without the lock."""
        self.of_client: dict[str, dict[Resident, None]] = {}
        """The connections of each client, oldest first, since the last call of evict_for()."""
        self.evicted: set[Resident] = set()
        """Evicted connections that have not closed yet.  They no longer count for their client."""

    def add(self, address: str, client: str) -> None:
        """Count a connection of an address in; under the lock.  `client`: its client_key()."""
        self.live += 1
        self.by_client[client] = self.by_client.get(client, 0) + 1
        if ":" in address:
            self.by_address[address] = self.by_address.get(address, 0) + 1
            self.keys[address] = client

    def evict_for(self, client_has: int) -> Resident | None:
        """Return the connection that must end for one of a client; under the lock.

        `client_has`: the connections of that client.  None if no client would have more than this
        one, or has a connection that can end.
        """
        if not self.by_client:
            return None
        most = max(self.by_client.values())
        if most <= client_has + 1:
            return None
        holder = next(key for key, held in self.by_client.items() if held == most)
        self._sort()
        held = self.of_client.get(holder)
        if held is None:
            return None
        evicted = next((resident for resident in held if resident.handshaking), None)
        if evicted is None:
            oldest = islice(held, EVICTION_CANDIDATES)
            evicted = max(oldest, key=lambda resident: resident.idle())
        self.remove(evicted, holder)
        self.evicted.add(evicted)
        _subtract(self.by_client, holder)
        if self.shared is not None:
            self.shared.evict(holder)
        return evicted

    def _sort(self) -> None:
        """Move the connections in `residents` to `of_client`; under the lock."""
        for resident in list(self.residents):
            del self.residents[resident]
            host = resident.client.host
            self.of_client.setdefault(self.keys.get(host, host), {})[resident] = None

    def remove(self, resident: Resident, client: str) -> None:
        """Remove a connection of a client that is to end or has ended; under the lock."""
        if resident in self.residents:
            del self.residents[resident]
            return
        held = self.of_client.get(client, {})
        held.pop(resident, None)
        if not held:
            self.of_client.pop(client, None)


class Admission:
    """Decides who may connect to one listener, and how many at once.

    The limits never change; a reload makes an Admission with new limits and the same
    counts (with_limits).  Threads: the listener's, and each that ends a connection.
    """

    counts_here = True

    def __init__(
        self,
        clients: AllowedClients,
        total: int,
        per_client: int,
        refuse_arrival: RefuseArrival = refuse_nobody,
        shared: SharedConnections | None = None,
        occupancy: _Occupancy | None = None,
    ) -> None:
        """Admit `total` connections of `clients`, `per_client` for each address.

        If that is `total` or more, as it is by default on loopback, it is no limit of its own.
        `refuse_arrival` counts each of them and may refuse it.  `shared` counts those of all
        worker processes; None if there is one process.  `occupancy`: the counts to go on with, for
        with_limits().
        """
        self._clients = clients
        self._total = total
        self._per_client = per_client
        self._refuse_arrival = refuse_arrival
        self._occupancy = occupancy or _Occupancy(shared)
        self.residents = self._occupancy.residents
        """Where a connection that has entered adds itself, so that it can end for another one."""

    def with_limits(self, clients: AllowedClients, total: int, per_client: int) -> Admission:
        """Return an Admission with other limits that counts the same connections.

        A connection that entered by one of the two may leave by the other.
        """
        refuse, occupancy = self._refuse_arrival, self._occupancy
        return Admission(clients, total, per_client, refuse, occupancy=occupancy)

    def enter(self, client: str) -> str:
        """Count a connection in and return "", or return why it is refused.

        The reasons: "client not allowed", "client banned", "client connection rate", "connection
        limit", "client limit".  If all connections are taken, one of a client that has more ends
        for this one.
        """
        if not self._clients.everybody and self._clients.refused_by(client):
            return CLIENT_NOT_ALLOWED
        if refusal := self._refuse_arrival(client):
            return refusal
        occupancy, evicted = self._occupancy, None
        is_ipv6 = ":" in client
        key = occupancy.keys.get(client) or client_key(client) if is_ipv6 else client
        with occupancy.lock:
            of_address = occupancy.by_address if is_ipv6 else occupancy.by_client
            if self._per_client < self._total and of_address.get(client, 0) >= self._per_client:
                return "client limit"
            excess = occupancy.live - self._total
            is_full = excess >= 0 and excess >= len(occupancy.evicted)
            if occupancy.shared is not None:
                refusal, evicted = self._enter_shared(occupancy.shared, client, key, is_full)
                if refusal:
                    return refusal
            elif is_full:
                if len(occupancy.evicted) * EVICTED_SHARE < self._total:
                    evicted = occupancy.evict_for(occupancy.by_client.get(key, 0))
                if evicted is None:
                    return "connection limit"
            occupancy.entered += 1
            occupancy.add(client, key)
        if evicted is not None:
            evicted.evict()
        return ""

    def take_over(self, client: str) -> None:
        """Count a connection in that another worker process had admitted, and counts no more.

        No limit refuses it, and it does not count as entered.  It ends with leave().
        """
        occupancy, key = self._occupancy, client_key(client)
        with occupancy.lock:
            occupancy.add(client, key)
            if occupancy.shared is not None:
                occupancy.shared.enter(client, key)

    def _enter_shared(
        self, shared: SharedConnections, address: str, client: str, is_full: bool
    ) -> tuple[str, Resident | None]:
        """Count a connection in for all worker processes; under the lock.

        Returns why it is refused, "" if it is not, and which connection must end for it.
        `is_full`: this process alone has all connections.
        """
        held, evicted = shared.enter(address, client), None
        is_beyond = held.of_address > self._per_client < self._total
        refusal = "client limit" if is_beyond else ""
        if not refusal and (is_full or held.total > self._total):
            if shared.evicted * EVICTED_SHARE < self._total:
                evicted = self._occupancy.evict_for(held.of_client - 1)
            refusal = "" if evicted is not None else "connection limit"
        if refusal:
            shared.leave(address, client)
        return refusal, evicted

    def decided_by(self, refusal: str, client: str) -> str:
        """Return what has decided a refusal of enter(): a key of the configuration."""
        if refusal == CLIENT_NOT_ALLOWED:
            return self._clients.refused_by(client)
        return DECIDED_BY[refusal]

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
        shared = occupancy.shared
        with occupancy.lock:
            occupancy.live -= 1
            if ":" in client:
                key = occupancy.keys[client]
                _subtract(occupancy.by_address, client)
                if client not in occupancy.by_address:
                    del occupancy.keys[client]
            if resident in occupancy.evicted:
                occupancy.evicted.remove(resident)
                if shared is not None:
                    shared.leave_evicted(client)
                return
            if shared is not None:
                shared.leave(client, key)
            if resident is not None:
                occupancy.remove(resident, key)
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
