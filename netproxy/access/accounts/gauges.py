"""Counts the connections and UDP sessions of each listener over all worker processes.

The counts are in a ledger of their own, with its own lock.  A process adds to its own table
first, then reads the sum, and takes its addition back if the sum is above the limit: so the limit
is never exceeded.  Two processes that do so at the same time may both be refused.
Made only if there are several workers.  Thread: any; nothing here blocks.
"""

from __future__ import annotations

import threading

from netproxy.access.accounts.ledger import (
    CONNECTIONS,
    SESSIONS,
    Ledger,
    LedgerFull,
    Slot,
    digest_of,
)
from netproxy.typed import NamedTuple

_LISTENER, _CLIENT, _ADDRESS, _TABLE = "listener", "client", "address", "table"
"""The kinds of what is counted."""
_EVICTED = SESSIONS
"""The word of a listener's evicted connections that have not ended yet."""


class Held(NamedTuple):
    """What all processes have, evicted connections left out; 0 for what was not counted."""

    total: int
    of_client: int
    of_address: int
    """Of an IPv6 address, evicted connections included; that of the client for IPv4."""


class ListenerCounts:
    """The counts of all listeners."""

    def __init__(self, processes: int) -> None:
        """`processes` and the indexes of their tables: as in a Ledger."""
        self.ledger = Ledger(processes)
        # Guards the own table of the ledger.
        self._lock = threading.Lock()

    def connections(self, listener: str) -> SharedConnections:
        """Return the counts of a listener's connections."""
        return SharedConnections(self, listener)

    def sessions(self, table: str) -> SessionGauge:
        """Return the count of the UDP sessions of a table, named alike in all processes."""
        return SessionGauge(self, table)

    def add(self, kind: str, name: str, word: int, amount: int) -> Slot | None:
        """Add to a count of the own table; return it, None if there is no room for it.

        What was not counted for want of room is not subtracted either.
        """
        with self._lock:
            try:
                slot = self.ledger.slot(kind, name)
            except LedgerFull:
                return None
            if amount > 0 or slot.own(word) > 0:
                slot.add(word, amount)
        # The release of the lock orders what was written before what the caller reads next.
        return slot

    def sum(self, kind: str, name: str, word: int) -> int:
        """Return the sum of a count over all tables."""
        return self.ledger.sum(digest_of(kind, name), word)


class SharedConnections:
    """The connections of one listener in all processes (access.limits.Admission)."""

    def __init__(self, counts: ListenerCounts, listener: str) -> None:
        self._counts = counts
        self._listener = listener

    def enter(self, address: str, client: str) -> Held:
        """Count a connection of an address in; `client`: its client_key()."""
        slots = self._add(address, client, 1)
        total, of_client, *rest = [slot.sum(CONNECTIONS) if slot else 0 for slot in slots]
        return Held(total, of_client, rest[0] if rest else of_client)

    def leave(self, address: str, client: str) -> None:
        """Count a connection out."""
        self._add(address, client, -1)

    def evict(self, client: str) -> None:
        """Count a connection as evicted: it counts for its client no longer."""
        self._add_to_listener(CONNECTIONS, -1)
        self._add_to_listener(_EVICTED, 1)
        self._add_to_client(client, -1)

    def leave_evicted(self, address: str) -> None:
        """Count a connection out that was evicted."""
        self._add_to_listener(_EVICTED, -1)
        if ":" in address:
            self._add_to_address(address, -1)

    @property
    def evicted(self) -> int:
        """Evicted connections of all processes that have not ended."""
        return self._counts.sum(_LISTENER, self._listener, _EVICTED)

    def _add(self, address: str, client: str, amount: int) -> list[Slot | None]:
        slots = [self._add_to_listener(CONNECTIONS, amount), self._add_to_client(client, amount)]
        if ":" in address:
            slots.append(self._add_to_address(address, amount))
        return slots

    def _add_to_listener(self, word: int, amount: int) -> Slot | None:
        return self._counts.add(_LISTENER, self._listener, word, amount)

    def _add_to_client(self, client: str, amount: int) -> Slot | None:
        return self._counts.add(_CLIENT, f"{self._listener} {client}", CONNECTIONS, amount)

    def _add_to_address(self, address: str, amount: int) -> Slot | None:
        return self._counts.add(_ADDRESS, f"{self._listener} {address}", CONNECTIONS, amount)


class SessionGauge:
    """The UDP sessions of one table in all processes (interfaces.accounts.SharedGauge)."""

    def __init__(self, counts: ListenerCounts, table: str) -> None:
        self._counts = counts
        self._table = table

    def add(self, amount: int, client: str) -> None:
        """Add to what this process has of a client."""
        self._counts.add(_TABLE, self._table, SESSIONS, amount)
        self._counts.add(_CLIENT, self._name(client), SESSIONS, amount)

    def sum(self) -> int:
        """Return what all processes have."""
        return self._counts.sum(_TABLE, self._table, SESSIONS)

    def of_client(self, client: str) -> int:
        """Return what all processes have of a client, 0 if that could not be counted."""
        return self._counts.sum(_CLIENT, self._name(client), SESSIONS)

    def _name(self, client: str) -> str:
        return f"{self._table} {client}"
