"""The shared memory of fake addresses: the name of each number, who asked for it, who uses it.

All worker processes share it.  Each worker has a segment of numbers, and alone writes their names
and who asked for them.  It also has a row for every number, which it alone writes: who has used
the number here, and when.
Clients are written as tags of 32 bits, of their client_key().
Thread: any; nothing here blocks.  The caller holds a lock for what it writes.
"""

from __future__ import annotations

import mmap
import struct

from netproxy.interfaces.fairness import client_key
from netproxy.resolver.client_names.shared_slots import SharedSlots
from netproxy.typed import NamedTuple

SEGMENT = 16384
"""Names with a fake address that one process keeps, 320 bytes each here and at most 1,000 in its
own memory.  A household asks for some 2,000 a day: an address stays for a week, if nobody uses
it."""
TOTAL = 65536
"""Such names of all workers together.  With more than four, the segments are smaller."""
ASKERS = 8
"""Clients that may learn the name of a number: those that have asked for it last."""
_NAME = struct.Struct("=B253s2x")
"""The content of a slot: a name and its length."""

# The words of a number: who has lost it, until when that counts, who has asked for its name; and
# for each worker a row: when it was used last, by whom, and when by anybody else before.
_LOSER, _LOST_UNTIL, _ASKERS, _ROWS = 0, 1, 2, 2 + ASKERS
_TIME, _CLIENT, _BEFORE, _ROW = 0, 1, 2, 3


class Use(NamedTuple):
    """The last use of a number."""

    time: int
    """In monotonic seconds, 0 for never."""
    client: int
    """The tag of the client."""


def client_tag(host: str) -> int:
    """Return the tag of a client's host."""
    # Strangers cannot choose it: the hash has a secret, which forked processes share.
    return hash(client_key(host)) & 0xFFFFFFFF


class FakeMemory:
    """The shared memory.  It is made before the workers are forked."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.segment = min(SEGMENT, TOTAL // workers)
        self._total = self.segment * workers
        self._names = SharedSlots(self._total, _NAME.size)
        self._stride = _ROWS + _ROW * workers
        # Behind the words of all numbers: how many numbers each worker has given.
        self._given_at = self._total * self._stride
        self._words = memoryview(mmap.mmap(-1, 4 * (self._given_at + workers))).cast("I")

    def name(self, number: int) -> str:
        """Return the name of a number, "" if it has none."""
        content = self._names.read(number) if 0 <= number < self._total else None
        if content is None:
            return ""
        length, name = _NAME.unpack(content)
        raw: bytes = name[:length]
        return raw.decode("ascii")

    def set_name(self, number: int, name: str) -> None:
        """Give a number of the own segment to a name, for which nobody has asked yet."""
        at = number * self._stride + _ASKERS
        for asker in range(at, at + ASKERS):
            self._words[asker] = 0
        self._names.write(number, _NAME.pack(len(name), name.encode("ascii")))

    # -- who asks, and who has lost a number of the own segment

    def note_asked(self, number: int, client: int) -> None:
        """Note that a client has asked for the name of a number: it may learn and use the name."""
        words, at = self._words, number * self._stride
        if words[at + _LOSER] == client:
            words[at + _LOST_UNTIL] = 0
        at += _ASKERS
        askers = words[at : at + ASKERS].tolist()
        if client not in askers:
            for place, asker in enumerate((client, *askers[:-1])):
                words[at + place] = asker

    def has_asked(self, number: int, client: int) -> bool:
        """Return whether a client is one of the last that have asked for the name of a number."""
        at = number * self._stride + _ASKERS
        return client in self._words[at : at + ASKERS].tolist()

    def take(self, number: int, client: int, now: float, seconds: float) -> bool:
        """Take a number from a client, which must not use it for so many seconds.

        Return False if another client has used the number for as long: it would be led to
        another server.
        """
        words, at = self._words, number * self._stride
        if now < words[at + _LOST_UNTIL] or self._others_use(number, client, now - seconds):
            return False
        words[at + _LOSER] = client
        words[at + _LOST_UNTIL] = int(now + seconds) + 1
        return True

    def has_lost(self, number: int, client: int, now: float) -> bool:
        """Return whether a number was taken from a client, which may mean its former name."""
        at = number * self._stride
        return self._words[at + _LOSER] == client and now < self._words[at + _LOST_UNTIL]

    # -- who uses numbers

    def note_use(self, worker: int, number: int, client: int, now: float) -> None:
        """Note that a client uses a number."""
        words, at = self._words, self._row(worker, number)
        if words[at + _CLIENT] != client:
            # First: another process must not take both for one client.
            words[at + _BEFORE] = words[at + _TIME]
            words[at + _CLIENT] = client
        words[at + _TIME] = int(now)

    def last_use(self, number: int) -> Use:
        """Return the last use of a number by any client of any worker."""
        rows = (self._row(worker, number) for worker in range(self.workers))
        return max(Use(self._words[at + _TIME], self._words[at + _CLIENT]) for at in rows)

    def _others_use(self, number: int, client: int, since: float) -> bool:
        words = self._words
        for worker in range(self.workers):
            at = self._row(worker, number)
            used = words[at + (_BEFORE if words[at + _CLIENT] == client else _TIME)]
            if used and used >= int(since):
                return True
        return False

    def _row(self, worker: int, number: int) -> int:
        return number * self._stride + _ROWS + _ROW * worker

    # -- how many numbers are given

    def given(self, worker: int) -> int:
        """Return how many numbers of its segment a worker has given, the first ones first."""
        return self._words[self._given_at + worker]

    def set_given(self, worker: int, count: int) -> None:
        """Note how many numbers of its segment a worker has given."""
        self._words[self._given_at + worker] = count
