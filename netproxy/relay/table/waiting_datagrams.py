"""The datagrams that wait in a NAT table until the entries of their targets are ready.

Each entry has a queue of its own.  All queues together are bounded, and shared fairly by the
addresses of clients.  NatTable, which owns the lock, holds it for every call.
"""

from __future__ import annotations

from netproxy.interfaces.fairness import FairTable
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import Arena, Run
    from netproxy.relay.entry import Entry

ENTRY_WAITING_LIMIT = 64
"""Datagrams that wait for one entry: the first train of a new flow, not a buffer."""
CLIENT_WAITING_LIMIT = 256
"""Datagrams that wait for one client, so that many slow names leave room for the others."""
TOTAL_WAITING_LIMIT = 1024
"""Datagrams that wait in a table: 64 MiB of the largest, 1.5 MiB of ordinary ones."""


class WaitingDatagram:
    """A datagram in the queue of an entry."""

    __slots__ = ("entry", "data")

    def __init__(self, entry: Entry, data: bytes) -> None:
        self.entry = entry
        self.data = data


class WaitingQueues:
    """The datagrams that wait in a table: in one bounded queue for each entry.

    If the table is full, the client address with most of them loses its oldest.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: FairTable[WaitingDatagram] = FairTable(TOTAL_WAITING_LIMIT)

    @property
    def total(self) -> int:
        """Datagrams that wait, of all entries."""
        return len(self._held)

    def put(self, entry: Entry, arena: Arena, run: Run) -> int:
        """Copy the datagrams of a run to the entry's queue; return how many were lost.

        Those that another entry loses to make room are among them.
        """
        client, queue = entry.client, entry.waiting
        final, lost = run.offsets[-1], 0
        for offset in run.offsets:
            if len(queue) >= ENTRY_WAITING_LIMIT or client.waiting >= CLIENT_WAITING_LIMIT:
                lost += 1
                continue
            length = run.last if offset == final else run.length
            datagram = WaitingDatagram(entry, bytes(arena.view[offset : offset + length]))
            queue.append(datagram)
            client.waiting += 1
            yielded = self._held.put(client.share, datagram)
            if yielded is not None:
                yielded.entry.waiting.remove(yielded)
                yielded.entry.client.waiting -= 1
                lost += 1
        return lost

    def take(self, entry: Entry) -> list[bytes]:
        """Empty the entry's queue; return what was in it, in order of arrival."""
        taken, entry.waiting = entry.waiting, []
        for datagram in taken:
            self._held.remove(entry.client.share, datagram)
        entry.client.waiting -= len(taken)
        return [datagram.data for datagram in taken]
