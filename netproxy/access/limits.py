"""Admission to a listener: which clients may connect, and how many connections at once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.networks import NetworkList


class Admission:
    """Counts the connections of one listener by client address (interfaces.connections).

    Thread: any.  The listener's thread counts in; the thread that ends a connection counts out.
    """

    def __init__(self, clients: NetworkList | None, total: int, per_client: int) -> None:
        """The parameters are those of configure()."""
        self._clients = clients
        self._total = total
        self._per_client = per_client
        # Guards everything below.
        self._lock = threading.Lock()
        self.entered = 0
        """Connections admitted since the start."""
        self._count = 0
        self._by_client: dict[str, int] = {}

    def configure(self, clients: NetworkList | None, total: int, per_client: int) -> None:
        """Change the limits on a reload; connections that are in stay and count.

        `clients` None admits every address.  `total` and `per_client` limit the connections at
        the same time.
        """
        self._clients = clients
        self._total = total
        self._per_client = per_client

    def enter(self, client: str) -> str:
        """Count a connection in and return "", or return why it is not admitted.

        The reasons are "client not allowed", "connection limit" and "client limit".
        """
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
        """The number of connections that are in."""
        return self._count

    def leave(self, client: str) -> None:
        """Count a connection out that enter() has counted in."""
        with self._lock:
            self._count -= 1
            left = self._by_client[client] - 1
            if left:
                self._by_client[client] = left
            else:
                del self._by_client[client]
