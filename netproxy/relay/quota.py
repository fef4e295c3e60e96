"""How many UDP sessions a table may hold: in total, by client address, by user.

At a limit the session that has been idle longest can be evicted for a new one.  The table
tells the quota what it adds and removes, and calls it under its own lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Mapping, NamedTuple

if TYPE_CHECKING:
    from netproxy.relay.session import Session

EVICTABLE_SECONDS = 10.0
"""How long a session must have been silent before it can be evicted for a new one."""

_TOTAL = ("total", "")
_KEYS = {
    "user": "users.limits.sessions",
    "client": "udp.max_sessions_per_client",
    "total": "udp.max_sessions",
}
"""The keys of the limits in the configuration, by kind of holder."""


class SessionLimits(NamedTuple):
    """The most sessions that may exist at the same time."""

    max_sessions: int
    max_sessions_per_client: int
    """By client IP address."""
    per_user: Mapping[str, int] = {}
    """A user who is not in it has no limit."""


class SessionQuota:
    """Counts the sessions of a table against its limits."""

    def __init__(self, limits: SessionLimits) -> None:
        self.limits = limits
        self._total = 0
        self._held: dict[tuple[str, str], int] = {}
        """Sessions by ("client", address) and by ("user", name)."""
        self._searched: set[tuple[str, str]] = set()
        """(client, user) for whom no session could be evicted since the last sweep()."""

    def has_room(self, client: str, user: str) -> bool:
        """Return whether a client address and a user may have one more session."""
        return not self._full_at(client, user)

    def reached(self, client: str, user: str) -> str:
        """Return the key of the limit that a client address and a user have reached."""
        kinds = {kind for kind, _ in self._full_at(client, user)}
        return next((key for kind, key in _KEYS.items() if kind in kinds), "")

    def add(self, session: Session) -> None:
        """Count a session in."""
        self._total += 1
        for holder in self._holders(session):
            self._held[holder] = self._held.get(holder, 0) + 1

    def remove(self, session: Session) -> None:
        """Count a session out."""
        self._total -= 1
        for holder in self._holders(session):
            left = self._held[holder] - 1
            if left:
                self._held[holder] = left
            else:
                del self._held[holder]

    def evictable(
        self, sessions: Iterable[Session], client: str, user: str, now: float
    ) -> Session | None:
        """Return the session to evict for a new one of `client` and `user`, None if there is none.

        Only a session that counts against every limit that is reached makes room.  Among
        those that have been idle for EVICTABLE_SECONDS it is the one idle longest.  A search
        without result is not repeated before sweep(): a flood of new flows would pay for a
        search each.
        """
        if (client, user) in self._searched:
            return None
        full = self._full_at(client, user)
        candidates = [
            session
            for session in sessions
            if not session.active
            and now - session.seen >= EVICTABLE_SECONDS
            and full - {_TOTAL} <= set(self._holders(session))
        ]
        if not candidates:
            self._searched.add((client, user))
            return None
        return min(candidates, key=lambda session: session.seen)

    def sweep(self) -> None:
        """Allow searches again.  The janitor calls it once a second."""
        self._searched.clear()

    def _full_at(self, client: str, user: str) -> set[tuple[str, str]]:
        limits, full = self.limits, set()
        if self._total >= limits.max_sessions:
            full.add(_TOTAL)
        if self._held.get(("client", client), 0) >= limits.max_sessions_per_client:
            full.add(("client", client))
        if user in limits.per_user and self._held.get(("user", user), 0) >= limits.per_user[user]:
            full.add(("user", user))
        return full

    @staticmethod
    def _holders(session: Session) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("client", session.client.address.host), ("user", session.flow.user)
