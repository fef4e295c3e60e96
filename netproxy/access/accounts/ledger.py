"""The ledger: how many connections and bytes each user, client and listener has.

One table of slots for each process, in memory that all of them share.  A process writes its own
table only, and adds all tables up to know a sum: so no lock is needed between processes.  With
one process there is one table.

A slot belongs to a subject, whose name is kept as a digest of 128 bits: the interpreter's own
keyed hash, whose key forked processes share.  A slot without connections
and sessions is given to a new subject when there is no other, the least recently used first.
"""

from __future__ import annotations

import mmap

USED = 2
"""Words of a slot, behind the two of the digest: the number of the last taking, 0 for never."""
CONNECTIONS, SESSIONS = 3, 4
"""TCP connections and UDP sessions at the moment."""
OPENED = 5
"""Connections and sessions so far."""
UP, DOWN = 6, 7
"""Bytes so far, client to target and target to client."""
LEASED_UP, LEASED_DOWN = 8, 9
"""Bytes that flows have been allowed to carry by rate limits, those that they returned less."""
WORDS = 10
SLOTS = 16384
"""Slots of a table: those of all clients of 10,000 connections, with room to find one fast.  The
system gives memory to those that are used, 80 bytes each."""
PROBES = 32
"""Slots that are looked at for a subject.  A longer search would cost an attacker's victims more
than the counts that are lost."""


class LedgerFull(Exception):
    """No slot is left for a new subject: all that it could have belong to running flows."""


class Ledger:
    """The tables of all processes, one of which is this process's own.

    Thread: not safe; the caller holds a lock around each call, and around those of its slots.
    """

    def __init__(self, processes: int = 1, slots: int = SLOTS) -> None:
        """Make the tables of so many processes.  The first one is this process's own."""
        self._slots = slots
        self._memory = mmap.mmap(-1, processes * slots * WORDS * 8)
        words = memoryview(self._memory).cast("q")
        size = slots * WORDS
        self._tables = [words[index * size : (index + 1) * size] for index in range(processes)]
        self._own = self._tables[0]
        self._takings = 0

    def use_table(self, index: int) -> None:
        """Write to the table of another process from now on: this process is that one.

        For the processes of one daemon, once there are several.
        """
        self._own = self._tables[index]

    def slot(self, kind: str, name: str) -> Slot:
        """Return the slot of a subject in the own table, a new one if it has none.

        Raises LedgerFull.
        """
        high, low = hash(f"{kind} {name}"), hash(f"{name} {kind}")
        start = self._find(self._own, high, low)
        if start < 0:
            start = self._make(high, low)
        self._takings += 1
        self._own[start + USED] = self._takings
        return Slot(self, self._own, start, (high, low))

    def sum(self, key: tuple[int, int], word: int) -> int:
        """Return the sum of a word of a subject over all tables."""
        total = 0
        for table in self._tables:
            start = self._find(table, *key)
            if start >= 0:
                total += table[start + word]
        return total

    @property
    def is_shared(self) -> bool:
        """True if there are tables of other processes."""
        return len(self._tables) > 1

    def _find(self, table: memoryview[int], high: int, low: int) -> int:
        """Return where the slot of a digest starts, -1 if the table has none."""
        slots, place = self._slots, high % self._slots
        for _ in range(PROBES):
            start = place * WORDS
            if table[start] == high and table[start + 1] == low:
                return start
            place = (place + 1) % slots
        return -1

    def _make(self, high: int, low: int) -> int:
        """Take a slot for a digest; return where it starts.  Raises LedgerFull."""
        own, best = self._own, -1
        for step in range(PROBES):
            start = (high + step) % self._slots * WORDS
            if not own[start + USED]:
                best = start
                break
            if own[start + CONNECTIONS] or own[start + SESSIONS]:
                continue
            if best < 0 or own[start + USED] < own[best + USED]:
                best = start
        if best < 0:
            raise LedgerFull
        # The digest last: another process must not add up what belonged to another subject.
        own[best] = own[best + 1] = 0
        for word in range(USED, WORDS):
            own[best + word] = 0
        own[best + 1], own[best] = low, high
        return best


class Slot:
    """The counts of one subject in the own table."""

    __slots__ = ("_ledger", "_table", "_start", "_key")

    def __init__(
        self, ledger: Ledger, table: memoryview[int], start: int, key: tuple[int, int]
    ) -> None:
        self._ledger = ledger
        self._table = table
        self._start = start
        self._key = key

    def add(self, word: int, amount: int) -> None:
        """Add to a word; `amount` may be negative."""
        self._table[self._start + word] += amount

    def enter(self, word: int, is_new: bool) -> None:
        """Count a flow in; `word` is CONNECTIONS or SESSIONS.  `is_new`: in OPENED as well."""
        table, start = self._table, self._start
        table[start + word] += 1
        table[start + OPENED] += is_new

    def sum(self, word: int) -> int:
        """Return the sum of a word over all tables."""
        if self._ledger.is_shared:
            return self._ledger.sum(self._key, word)
        return self._table[self._start + word]
