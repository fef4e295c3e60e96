"""How many UDP sessions a table may hold: in total, by client address, by user.

Counts what the table adds and removes; the table calls it under its own lock.
"""

from __future__ import annotations

from typing import Iterable, Mapping, NamedTuple

from netproxy.relay.session import Session

IDLE_TO_YIELD = (
    10.0  # seconds a session must have been silent before it yields its place to a new one
)


class SessionLimits(NamedTuple):
    max_sessions: int
    max_sessions_per_client: int  # by client IP address
    per_user: Mapping[str, int] = {}  # users not in it have no limit of their own


class SessionQuota:
    def __init__(self, caps: SessionLimits) -> None:
        self.caps = caps
        self._total = 0
        self._held: dict[
            tuple[str, str], int
        ] = {}  # ("client", address) and ("user", name) -> sessions

    def has_room(self, client: str, user: str) -> bool:
        return not self._full_at(client, user)

    def add(self, session: Session) -> None:
        self._total += 1
        for holder in self._holders(session):
            self._held[holder] = self._held.get(holder, 0) + 1

    def remove(self, session: Session) -> None:
        self._total -= 1
        for holder in self._holders(session):
            left = self._held[holder] - 1
            if left:
                self._held[holder] = left
            else:
                del self._held[holder]

    def yielding(
        self, sessions: Iterable[Session], client: str, user: str, now: float
    ) -> Session | None:
        """Of those that hold what a new session lacks, the one idle longest, if it has been idle at all."""
        full = self._full_at(client, user)
        rivals = [
            session
            for session in sessions
            if not session.active
            and now - session.seen >= IDLE_TO_YIELD
            and full - {("total", "")} <= set(self._holders(session))
        ]
        return min(rivals, key=lambda session: session.seen, default=None)

    def _full_at(self, client: str, user: str) -> set[tuple[str, str]]:
        caps, full = self.caps, set()
        if self._total >= caps.max_sessions:
            full.add(("total", ""))
        if self._held.get(("client", client), 0) >= caps.max_sessions_per_client:
            full.add(("client", client))
        if user in caps.per_user and self._held.get(("user", user), 0) >= caps.per_user[user]:
            full.add(("user", user))
        return full

    @staticmethod
    def _holders(session: Session) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("client", session.client.address.host), ("user", session.flow.user)
