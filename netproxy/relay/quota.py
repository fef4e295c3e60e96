"""How many UDP sessions a table may hold: in total, by client address, by user.

At the limit of a client or a user, its own session that has been idle longest can be evicted
for a new one.  At the limit of the table, the client that has most sessions yields one
(interfaces.fairness).  The table tells the quota what it adds and removes, and calls it under
its own lock.

With several worker processes the limits are for all of them together.  The datagrams of a client
come to one process, but streams that carry datagrams may be in any.
"""

from __future__ import annotations

import sys

from netproxy.interfaces.fairness import FairTable
from netproxy.typed import TYPE_CHECKING, Iterable, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Accounts, SharedGauge
    from netproxy.relay.client import Client
    from netproxy.relay.session import Session

EVICTABLE_SECONDS = 10.0
"""How long a session must have been silent before it can be evicted for a new one."""

_TOTAL = ("total", "")
_KEYS = {"client": "udp.max_sessions_per_client", "total": "udp.max_sessions"}
"""The keys of the table's own limits in the configuration, by kind of holder."""


class SessionLimits(NamedTuple):
    """The most sessions that may exist at the same time."""

    max_sessions: int
    max_sessions_per_client: int
    """By client IP address."""


class SessionQuota:
    """Counts the sessions of a table against its limits."""

    def __init__(
        self, limits: SessionLimits, accounts: Accounts, shared: SharedGauge | None = None
    ) -> None:
        """`accounts` knows the limits of users, who may have sessions in other tables too.

        `shared` counts the sessions of all worker processes; None if there is one process.
        """
        self.limits = limits
        self._accounts = accounts
        self._shared = shared
        self._held: dict[str, int] = {}
        """Sessions by the address of their client."""
        self._shares: FairTable[Session] = FairTable(sys.maxsize)
        """The sessions by client: an IPv4 address or an IPv6 network.  Has no limit of its own."""
        self._searched: set[tuple[str, str]] = set()
        """(client, user) for whom no session could be evicted since the last sweep()."""

    def has_room(self, client: str, user: str) -> bool:
        """Return whether a client address and a user may have one more session, see claim()."""
        return not self._full_at(client, user)

    def claim(self, client: str) -> bool:
        """Take the room for a session of a client; return False if other processes have taken it.

        add() or give_up() follows.
        """
        shared = self._shared
        if shared is not None:
            shared.add(1, client)
            limits = self.limits
            beyond_own = shared.of_client(client) > limits.max_sessions_per_client
            if beyond_own or shared.sum() > limits.max_sessions:
                shared.add(-1, client)
                return False
        return True

    def give_up(self, client: str) -> None:
        """Give the room back that claim() has taken: there will be no session."""
        if self._shared is not None:
            self._shared.add(-1, client)

    def reached(self, client: str, user: str) -> str:
        """Return the key of the limit that a client address and a user have reached."""
        kinds = {kind for kind, _ in self._full_at(client, user)}
        # The last one: other processes may have ended a session since.
        key = next((key for kind, key in _KEYS.items() if kind in kinds), _KEYS["total"])
        return self._accounts.reached(user) or key

    def add(self, session: Session) -> None:
        """Count a session in, which has the room that claim() has taken."""
        self._shares.put(session.client.share, session)
        host = session.client.address.host
        self._held[host] = self._held.get(host, 0) + 1

    def remove(self, session: Session) -> None:
        """Count a session out."""
        self._shares.remove(session.client.share, session)
        host = session.client.address.host
        self._held[host] -= 1
        if not self._held[host]:
            del self._held[host]
        self.give_up(host)

    def evictable(
        self, sessions: Iterable[Session], client: Client, user: str, now: float
    ) -> Session | None:
        """Return the session to evict for a new one of `client` and `user`, None if there is none.

        Only a session that counts against every reached limit can be evicted.  It must have been
        idle for EVICTABLE_SECONDS.  A busy session is evicted only if its client holds more
        sessions and the new client has an association, which proves its address.

        A search without result is not repeated before sweep(): otherwise a flood of new flows
        would cause a search each.
        """
        host = client.address.host
        if (host, user) in self._searched:
            return None
        full = self._full_at(host, user)
        if full == {_TOTAL}:
            candidates, may_be_busy = self._of_greatest_share(client.share)
            may_be_busy = may_be_busy and client.owner is not None
        else:
            of_limits, may_be_busy = full - {_TOTAL}, False
            if ("client", host) in of_limits:
                sessions = self._shares.items_of(client.share)
            candidates = [
                session for session in sessions if of_limits <= set(self._holders(session))
            ]
        if not may_be_busy:
            candidates = [session for session in candidates if _is_idle(session, now)]
        if not candidates:
            self._searched.add((host, user))
            return None
        # What is idle, then what has never got a reply, then what has been silent longest.
        return min(
            candidates, key=lambda session: (session.active, bool(session.received), session.seen)
        )

    def _of_greatest_share(self, share: str) -> tuple[list[Session], bool]:
        """Return the sessions of which one must yield to `share`, and whether it has fewer."""
        shares = self._shares
        held, most = shares.held(share) + 1, shares.most
        if most > held:
            return shares.yielding(most), True
        as_many = [*shares.holders(held), share]
        return [session for holder in as_many for session in shares.items_of(holder)], False

    def sweep(self) -> None:
        """Allow searches again.  The janitor calls it once a second."""
        self._searched.clear()

    def _full_at(self, client: str, user: str) -> set[tuple[str, str]]:
        limits, full = self.limits, set()
        held = len(self._shares) if self._shared is None else self._shared.sum()
        if held >= limits.max_sessions:
            full.add(_TOTAL)
        per_client = limits.max_sessions_per_client
        # If it is the limit of the table, as by default on loopback, it is none of its own.
        if per_client < limits.max_sessions and self._held_by(client) >= per_client:
            full.add(("client", client))
        if key := self._accounts.reached(user):
            # No session that ends makes room for a rate of new ones.
            full.add(("user", user) if key.endswith(".sessions") else ("rate", user))
        return full

    def _held_by(self, client: str) -> int:
        held = self._held.get(client, 0)
        return held if self._shared is None else max(held, self._shared.of_client(client))

    @staticmethod
    def _holders(session: Session) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("client", session.client.address.host), ("user", session.flow.user)


def _is_idle(session: Session, now: float) -> bool:
    return not session.active and now - session.seen >= EVICTABLE_SECONDS
