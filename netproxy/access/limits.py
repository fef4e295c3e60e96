"""Who may connect to a listener and how many at once, counted by client address."""

from __future__ import annotations

import threading

from netproxy.interfaces.networks import NetworkSet


class _Occupancy:
    """The connections that are counted in, with the lock that guards the counts."""

    __slots__ = ("lock", "live", "entered", "by_client")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.live = 0
        self.entered = 0
        self.by_client: dict[str, int] = {}


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

    def with_limits(self, clients: NetworkSet | None, total: int, per_client: int) -> Admission:
        """Return an Admission with other limits that counts the same connections.

        A connection that entered by one of the two may leave by the other.
        """
        return Admission(clients, total, per_client, self._occupancy)

    def enter(self, client: str) -> str:
        """Count a connection in and return "", or return why it is refused.

        The reasons: "client not allowed", "connection limit", "client limit".
        """
        if self._clients is not None and client not in self._clients:
            return "client not allowed"
        occupancy = self._occupancy
        with occupancy.lock:
            if occupancy.live >= self._total:
                return "connection limit"
            if occupancy.by_client.get(client, 0) >= self._per_client:
                return "client limit"
            occupancy.live += 1
            occupancy.entered += 1
            occupancy.by_client[client] = occupancy.by_client.get(client, 0) + 1
        return ""

    @property
    def live(self) -> int:
        """The connections that have entered and not left."""
        return self._occupancy.live

    @property
    def entered(self) -> int:
        """The connections that have entered since the first Admission with these counts."""
        return self._occupancy.entered

    def leave(self, client: str) -> None:
        """Count a connection out that enter() has counted in."""
        occupancy = self._occupancy
        with occupancy.lock:
            occupancy.live -= 1
            left = occupancy.by_client[client] - 1
            if left:
                occupancy.by_client[client] = left
            else:
                del occupancy.by_client[client]
