"""Collects in the parent process what users have moved in the workers, and publishes quotas.

The bytes of a user are the sums of UP and DOWN in the tables of all workers.  Once a second the
collector adds what they have grown by to the UsageBook, which saves it.  Then it publishes for
each user with quotas the sum at which the first of them is used up.

Thread: one at a time, which the parent's guard ensures.
"""

from __future__ import annotations

import heapq

from netproxy.access.accounts.ledger import (
    CONNECTIONS,
    DOWN,
    SESSIONS,
    TAKEN,
    UP,
    USER,
    Digest,
    Ledger,
    LedgerFull,
    digest_of,
)
from netproxy.access.accounts.usage import OTHERS, USERS_LIMIT
from netproxy.typed import TYPE_CHECKING, Iterable, Iterator, Mapping, NamedTuple

if TYPE_CHECKING:
    from netproxy.access.accounts.standing import Standing, Terms
    from netproxy.access.accounts.usage import Quotas, UsageBook

UNKNOWN_LIMIT = 4096
"""Users without a name yet whose bytes are remembered; those of others count for OTHERS."""
_USED_UP = -1


class _UserSlot(NamedTuple):
    """What a table has of a user."""

    start: int
    """Where the slot is in its table."""
    taken: int
    """Another number than before if the slot was given away in between."""
    digest: Digest
    up: int
    down: int
    running: bool
    """True if the user has flows in the process of the table."""


class Collector:
    """Knows what was collected from each slot of each worker."""

    def __init__(self, ledger: Ledger, usage: UsageBook, standing: Standing) -> None:
        """`usage` gets what users have moved; `standing` knows their quotas.

        All tables except the last one are those of workers.
        """
        self._ledger = ledger
        self._usage = usage
        self._standing = standing
        self._names: dict[Digest, str] = {}
        self._unknown: dict[Digest, tuple[int, int]] = {}
        """Bytes up and down of users whose names are not known yet."""
        self._collected: list[dict[int, _UserSlot]] = [{} for _ in ledger.tables[:-1]]
        """By table and by place: the slot as it was collected last."""
        self._terms: Mapping[str, Terms] = {}
        self._quotas: dict[str, Quotas] = {}
        self._digests: dict[str, Digest] = {}
        """Of the users with quotas."""
        self._published: dict[str, int] = {}

    def configure(self, users: Iterable[str]) -> None:
        """Know the names of the users of a configuration."""
        for user in users:
            self._name(user)

    def learn(self, users: Iterable[str]) -> None:
        """Know the names of other users, told by the workers (WorkerUsage.names)."""
        for user in users:
            if len(self._names) < USERS_LIMIT:
                self._name(user)

    @property
    def unknown(self) -> int:
        """How many users have moved bytes whose names are not known: workers must be asked."""
        return len(self._unknown)

    def collect(self) -> None:
        """Add to the usage what was moved since the last time; publish the quotas.

        Call it once a second, before the first worker starts, and after the terms have changed.
        """
        sums: dict[Digest, int] = {}
        running: set[Digest] = set()
        for index, collected in enumerate(self._collected):
            for slot in _user_slots(self._ledger, index):
                before = collected.get(slot.start)
                up, down = slot.up, slot.down
                if before is not None and before.taken == slot.taken:
                    up, down = up - before.up, down - before.down
                collected[slot.start] = slot
                if up or down:
                    self._add(slot.digest, up, down)
                sums[slot.digest] = sums.get(slot.digest, 0) + slot.up + slot.down
                if slot.running:
                    running.add(slot.digest)
        self._ledger.end_collection()
        self._publish(sums, running)

    def _name(self, user: str) -> None:
        digest = digest_of(USER, user)
        self._names[digest] = user
        if digest in self._unknown:
            self._usage.moved(user, *self._unknown.pop(digest))

    def _add(self, digest: Digest, up: int, down: int) -> None:
        """Count bytes of a user."""
        name = self._names.get(digest)
        if name is None:
            earlier = self._unknown.get(digest, (0, 0))
            if digest in self._unknown or len(self._unknown) < UNKNOWN_LIMIT:
                self._unknown[digest] = earlier[0] + up, earlier[1] + down
                return
            name = OTHERS
        self._usage.moved(name, up, down)

    # -- quotas

    def _publish(self, sums: Mapping[Digest, int], running: set[Digest]) -> None:
        """Publish at which sum the quotas of users are used up."""
        self._follow_terms()
        left = self._usage.left(self._quotas)
        if len(left) > self._ledger.publishable:
            left = self._most_urgent(left, running)
        for user in self._published.keys() - left.keys():
            self._ledger.publish(user, 0)
            del self._published[user]
        for user, rest in left.items():
            quota = sums.get(self._digests[user], 0) + rest if rest > 0 else _USED_UP
            if self._published.get(user) != quota:
                try:
                    self._ledger.publish(user, quota)
                except LedgerFull:
                    # The next collection tries again.
                    continue
                self._published[user] = quota

    def _follow_terms(self) -> None:
        if self._standing.restricted is not self._terms:
            self._terms = self._standing.restricted
            limited = ((user, terms) for user, terms in self._terms.items() if terms.has_quota)
            self._quotas = {user: terms.quotas for user, terms in limited}
            self._digests = {user: digest_of(USER, user) for user in self._quotas}

    def _most_urgent(self, left: Mapping[str, int], running: set[Digest]) -> dict[str, int]:
        """Return the users who may use their quotas up next, or have done so."""

        def urgency(user: str) -> tuple[bool, int]:
            return left[user] > 0 and self._digests[user] not in running, left[user]

        users = heapq.nsmallest(self._ledger.publishable, left, urgency)
        return {user: left[user] for user in users}


def _user_slots(ledger: Ledger, index: int) -> Iterator[_UserSlot]:
    """Yield the slots of users in a worker's table."""
    table = ledger.tables[index]
    for start in ledger.listed(index):
        taken = table[start + TAKEN]
        if not taken & 1:
            continue
        digest = table[start], table[start + 1]
        up, down = table[start + UP], table[start + DOWN]
        running = bool(table[start + CONNECTIONS] or table[start + SESSIONS])
        # When a slot is given away, its digest is the first to go.
        again = table[start], table[start + 1]
        if digest == again != (0, 0) and table[start + TAKEN] == taken:
            yield _UserSlot(start, taken, digest, up, down, running)
