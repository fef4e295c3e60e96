"""The ledger: how many connections and bytes each user, client and listener has.

One table of slots for each process, in memory that all of them share.  A process writes its own
table only, and adds all tables up to know a sum: so no lock is needed between processes.  With
one process there is one table.  With several the tables are those of the workers, by their
index, and one more for the parent, which has no flows.  A table outlives its worker.

A slot belongs to a subject, whose name is kept as a digest of 128 bits: the interpreter's own
keyed hash, whose key forked processes share.  A slot without connections
and sessions is given to a new subject when there is no other, the least recently used first.
"""

from __future__ import annotations

import mmap

USER = "user"
"""The kind of subjects whose bytes the parent collects."""
USED = 2
"""Words of a slot, behind the two of the digest: the number of the last use, 0 for never."""
CONNECTIONS, SESSIONS = 3, 4
"""TCP connections and UDP sessions at the moment."""
OPENED = 5
"""Connections and sessions so far."""
UP, DOWN = 6, 7
"""Bytes so far, client to target and target to client."""
LEASED_UP, LEASED_DOWN = 8, 9
"""Bytes that flows have been allowed to carry by rate limits, those that they returned less."""
WORDS = 10
OPENED_UNTIL, LEASED_UP_UNTIL, LEASED_DOWN_UNTIL = 10, 11, 12
"""Only with several processes.  Until when a rate is used, as the process knows it, in monotonic
nanoseconds."""
KEPT = 13
"""The slot is not given away before so many collections."""
TAKEN = 14
"""How often the slot was taken for a subject, times two, and 1 if the subject is a user."""
QUOTA = 15
"""In the table of the parent: the sum of UP and DOWN at which a user's quota is used up, negative
if it is used up already; 0 for no quota."""
SHARED_WORDS = 16
SLOTS = 16384
"""Slots of a table: those of all clients of 10,000 connections, with room to find one fast.  The
system gives memory to those that are used, 80 bytes each, 128 with several processes."""
PROBES = 32
"""Slots that are looked at for a subject.  A longer search would cost an attacker's victims more
than the counts that are lost."""
_LISTED, _COLLECTIONS, _HEAD = 0, 1, 2
"""Words before the slots: how many slots are listed, how many collections there were; then the
list begins, with a word for each slot that was ever used, in the order of first use."""
_FOR_EVER = 1 << 62
_NANO = 1e9

Digest = tuple[int, int]


class LedgerFull(Exception):
    """No slot is left for a new subject: all that it could have belong to running flows."""


class Ledger:
    """The tables of all processes, one of which is this process's own.

    Thread: not safe; the caller holds a lock around each call, and around those of its slots,
    except those that only read: sum(), latest(), quota(), is_first().
    """

    def __init__(self, processes: int = 1, slots: int = SLOTS) -> None:
        """Make the tables of so many processes.  The first one is this process's own."""
        self._slots = slots
        self.is_shared = processes > 1
        """True if there are tables of other processes."""
        self._words = SHARED_WORDS if self.is_shared else WORDS
        head = _HEAD + slots if self.is_shared else 0
        size = head + slots * self._words
        self._memory = mmap.mmap(-1, processes * size * 8)
        words = memoryview(self._memory).cast("q")
        starts = range(0, processes * size, size)
        self._heads = [words[start : start + head] for start in starts]
        self.tables = [words[start + head : start + size] for start in starts]
        """Of all processes, for those who know where a slot starts."""
        self._index = 0
        self._own = self.tables[0]
        self._takings = 0

    def use_table(self, index: int) -> None:
        """Write to the table of another process from now on: this process is that one.

        For the processes of one daemon, once there are several.  A successor goes on with the
        table of a worker that has died.
        """
        self._index, self._own = index, self.tables[index]
        head, own = self._heads[index], self._own
        listed = head[_LISTED]
        if listed and not own[head[_HEAD + listed - 1] * self._words + USED]:
            # The worker died between listing the slot and using it.
            head[_LISTED] = listed - 1
        self._takings = max((own[start + USED] for start in self.listed(index)), default=0)

    def clear_gauges(self, index: int) -> None:
        """Set the connections and sessions of a table to 0: its process has ended.

        The counters stay, those of users until they are collected.
        """
        table = self.tables[index]
        kept = self._collections() + 2
        for start in self.listed(index):
            table[start + CONNECTIONS] = table[start + SESSIONS] = 0
            if table[start + TAKEN] & 1:
                table[start + KEPT] = kept

    def slot(self, kind: str, name: str) -> Slot:
        """Return the slot of a subject in the own table, a new one if it has none.

        Raises LedgerFull.
        """
        high, low = digest = digest_of(kind, name)
        start = self._find(self._own, high, low)
        if start < 0:
            start = self._make(high, low, kind == USER)
        self._takings += 1
        self._own[start + USED] = self._takings
        return Slot(self, self._own, start, digest)

    def sum(self, key: Digest, word: int) -> int:
        """Return the sum of a word of a subject over all tables."""
        total = 0
        for table in self.tables:
            start = self._find(table, *key)
            if start >= 0:
                total += table[start + word]
        return total

    def latest(self, key: Digest, word: int) -> float:
        """Return the latest time, in monotonic seconds, that a process has noted for a subject.

        Long ago if none has.
        """
        found = [(table, self._find(table, *key)) for table in self.tables]
        latest = max((table[start + word] for table, start in found if start >= 0), default=0)
        return latest / _NANO if latest else -float("inf")

    def is_first(self, key: Digest) -> bool:
        """Return whether no table before the own one has flows of a subject."""
        for table in self.tables[: self._index]:
            start = self._find(table, *key)
            if start >= 0 and (table[start + CONNECTIONS] or table[start + SESSIONS]):
                return False
        return True

    def listed(self, index: int) -> list[int]:
        """Return where the slots of a table start that were ever used."""
        head, words = self._heads[index], self._words
        return [place * words for place in head[_HEAD : _HEAD + head[_LISTED]]]

    # -- between the workers and the parent, whose table is the last one

    def keep(self, start: int) -> None:
        """Keep a user's slot of the own table until what it has is collected."""
        if self._own[start + TAKEN] & 1:
            # A collection that is under way may have passed the slot.
            self._own[start + KEPT] = self._collections() + 2

    def quota(self, key: Digest) -> int:
        """Return what the parent has published of a user, see QUOTA."""
        table = self.tables[-1]
        start = self._find(table, *key)
        return table[start + QUOTA] if start >= 0 else 0

    def publish(self, user: str, quota: int) -> None:
        """Publish the QUOTA of a user.  In the parent.  Raises LedgerFull."""
        slot, own = self.slot(USER, user), self._own
        own[slot.start + QUOTA] = quota
        own[slot.start + KEPT] = _FOR_EVER if quota else 0

    @property
    def publishable(self) -> int:
        """How many users can have a QUOTA: the table stays so empty that all find a slot."""
        return self._slots // 4

    def end_collection(self) -> None:
        """Note that all that the tables had was collected.  In the parent."""
        self._heads[-1][_COLLECTIONS] += 1

    def _collections(self) -> int:
        return self._heads[-1][_COLLECTIONS]

    # -- slots

    def _find(self, table: memoryview[int], high: int, low: int) -> int:
        """Return where the slot of a digest starts, -1 if the table has none."""
        slots, words = self._slots, self._words
        place = high % slots
        for _ in range(PROBES):
            start = place * words
            if table[start] == high and table[start + 1] == low:
                return start
            if not table[start + USED]:
                # A slot that was used once is never empty again.
                return -1
            place = (place + 1) % slots
        return -1

    def _make(self, high: int, low: int, is_user: bool) -> int:
        """Take a slot for a digest; return where it starts.  Raises LedgerFull."""
        own, words, best = self._own, self._words, -1
        for step in range(PROBES):
            start = (high + step) % self._slots * words
            if not own[start + USED]:
                best = start
                break
            if own[start + CONNECTIONS] or own[start + SESSIONS]:
                continue
            if self.is_shared and own[start + KEPT] > self._collections():
                continue
            if best < 0 or own[start + USED] < own[best + USED]:
                best = start
        if best < 0:
            raise LedgerFull
        # The digest last: another process must not add up what belonged to another subject.
        own[best] = own[best + 1] = 0
        if self.is_shared:
            self._list(best)
            taken = own[best + TAKEN]
        for word in range(USED + 1, words):
            own[best + word] = 0
        if self.is_shared:
            own[best + TAKEN] = (taken | 1) + 1 + is_user
        own[best + 1], own[best] = low, high
        return best

    def _list(self, start: int) -> None:
        """List a slot of the own table that is used for the first time."""
        if not self._own[start + USED]:
            head = self._heads[self._index]
            head[_HEAD + head[_LISTED]] = start // self._words
            head[_LISTED] += 1


class Slot:
    """The counts of one subject in the own table."""

    __slots__ = ("is_shared", "start", "_ledger", "_table", "_key")

    def __init__(self, ledger: Ledger, table: memoryview[int], start: int, key: Digest) -> None:
        self.is_shared = ledger.is_shared
        """True if other processes have counts of the subject, too."""
        self.start = start
        self._ledger = ledger
        self._table = table
        self._key = key

    def add(self, word: int, amount: int) -> None:
        """Add to a word; `amount` may be negative."""
        self._table[self.start + word] += amount

    def enter(self, word: int, is_new: bool) -> None:
        """Count a flow in; `word` is CONNECTIONS or SESSIONS.  `is_new`: in OPENED as well."""
        table, start = self._table, self.start
        table[start + word] += 1
        table[start + OPENED] += is_new

    def leave(self, word: int) -> None:
        """Count a flow out; `word` as in enter()."""
        self._table[self.start + word] -= 1
        if self.is_shared:
            self._ledger.keep(self.start)

    def own(self, word: int) -> int:
        """Return a word of the own table."""
        return self._table[self.start + word]

    def sum(self, word: int) -> int:
        """Return the sum of a word over all tables."""
        if self.is_shared:
            return self._ledger.sum(self._key, word)
        return self._table[self.start + word]

    def note(self, word: int, until: float) -> None:
        """Note a time, in monotonic seconds, that latest() returns to all processes."""
        self._table[self.start + word] = max(1, int(until * _NANO))

    def latest(self, word: int) -> float:
        """Return the latest time that a process has noted, long ago if none has."""
        return self._ledger.latest(self._key, word)

    def is_first(self) -> bool:
        """Return whether the own table is the first one with flows of the subject."""
        return self._ledger.is_first(self._key)


def digest_of(kind: str, name: str) -> Digest:
    """Return the digest of a subject."""
    return hash(f"{kind} {name}"), hash(f"{name} {kind}")
