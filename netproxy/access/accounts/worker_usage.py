"""Stands in for the UsageBook in a worker process: what users have moved is in the ledger alone.

The parent collects it there (collector).  It publishes at which sum a quota is used up, and the
worker compares.  Thread: any; nothing here blocks.
"""

from __future__ import annotations

from netproxy.access.accounts.ledger import DOWN, UP, USER, Ledger, digest_of
from netproxy.access.accounts.usage import USERS_LIMIT, Usage
from netproxy.typed import Collection, Sequence

NAMES_AT_ONCE = 1000
"""Names in one answer of names()."""


class WorkerUsage:
    """What a worker knows of the usage of users (interfaces.accounts.UserUsage)."""

    def __init__(self, ledger: Ledger) -> None:
        """`ledger` has the tables of all processes."""
        self._ledger = ledger
        self._configured: Collection[str] = ()
        self._known: set[str] = set()
        self._names: list[str] = []

    def moved(self, user: str, up: int, down: int) -> None:
        """Remember the name of a user that is not configured; the bytes are in the ledger."""
        if user in self._configured or user in self._known or len(self._names) >= USERS_LIMIT:
            return
        self._known.add(user)
        self._names.append(user)

    def names(self, after: int) -> list[str]:
        """Return the users who are not configured, those after the first so many.

        The parent tells them to its collector, and asks next for those after them.  A process
        that is forked in the place of a worker begins without names.
        """
        return self._names[after : after + NAMES_AT_ONCE]

    def used_up(self, user: str, quotas: Sequence[int | None]) -> bool:
        """Return whether a quota of a user is used up, as far as the ledger says."""
        digest = digest_of(USER, user)
        quota = self._ledger.quota(digest)
        if quota <= 0:
            return quota < 0
        return self._ledger.sum(digest, UP) + self._ledger.sum(digest, DOWN) >= quota

    def is_due(self, now: float) -> bool:
        """Return True: a worker that is killed loses what flows have moved since.

        The janitor asks once a second.  10,000 flows take 10 ms.
        """
        return True

    def reserve(self, users: Collection[str]) -> None:
        """Remember the users of a configuration: the parent knows their names."""
        self._configured = users

    def of(self, user: str) -> tuple[Usage, Usage, Usage]:
        """Return nothing moved: the parent answers for all workers."""
        return Usage(0, 0), Usage(0, 0), Usage(0, 0)
