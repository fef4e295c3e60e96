"""Who may connect to a listener and how many at once, counted by client address."""

from __future__ import annotations

import threading

from netproxy.interfaces.networks import NetworkSet


class Admission:
    """The door of one listener.  Used by its accept thread and by every connection that ends."""

    def __init__(self, clients: NetworkSet | None, total: int, per_client: int) -> None:
        self.configure(clients, total, per_client)
        self._lock = threading.Lock()  # guards all below
        self.entered = 0  # since the start
        self._count = 0
        self._by_client: dict[str, int] = {}

    def configure(self, clients: NetworkSet | None, total: int, per_client: int) -> None:
        """At the start and on a reload; who is in stays, and counts.  `clients` None admits every address."""
        self._clients = clients
        self._total = total
        self._per_client = per_client

    def enter(self, client: str) -> str:
        """Counts a connection in, or says why not: "client not allowed", "connection limit", "client limit"."""
        if self._clients is not None and client not in self._clients:
            return "client not allowed"
        with self._lock:
            if self._count >= self._total:
                return "connection limit"
            if self._by_client.get(client, 0) >= self._per_client:
                return "client limit"
            self._count += 1
            self.entered += 1
            self._by_client[client] = self._by_client.get(client, 0) + 1
        return ""

    @property
    def live(self) -> int:
        return self._count

    def leave(self, client: str) -> None:
        with self._lock:
            self._count -= 1
            left = self._by_client[client] - 1
            if left:
                self._by_client[client] = left
            else:
                del self._by_client[client]
