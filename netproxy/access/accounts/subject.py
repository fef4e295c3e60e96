"""Subjects: the users, clients and listeners that flows count for, with their limits.

Thread: AccountBook calls everything here under its lock.
"""

from __future__ import annotations

import time

from netproxy.access.accounts.ledger import (
    CONNECTIONS,
    DOWN,
    LEASED_DOWN,
    LEASED_UP,
    OPENED,
    SESSIONS,
    UP,
    Slot,
)
from netproxy.access.accounts.ledger import USER as USER
from netproxy.access.accounts.pacing import Bucket, Level, default_burst
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.access.accounts.account import FlowAccount

CLIENT, LISTENER, CLIENT_OF_LISTENER = "client", "listener", "client of listener"
ARRIVALS = "connections of a client"
"""The kinds of subjects.  The last one counts the connections of a client to a listener, before
anything is known of their flows."""
_KEYS = {
    LISTENER: "limits.rate",
    CLIENT_OF_LISTENER: "limits.rate_per_client",
    ARRIVALS: "limits.connection_rate_per_client",
}
"""The key of the one limit that subjects of a kind have."""


class Limits(NamedTuple):
    """What one subject may use.  None: no limit."""

    connections: int | None = None
    """TCP connections at the same time."""
    sessions: int | None = None
    """UDP sessions at the same time."""
    connection_rate: float | None = None
    """New connections and sessions per second."""
    rate_up: int | None = None
    """Bytes per second, client to target."""
    rate_down: int | None = None
    burst: int | None = None
    """Bytes; None: pacing.default_burst()."""


NO_LIMITS = Limits()


class ListenerRates(NamedTuple):
    """The rates of a listener, in bytes per second and direction.  None: no limit."""

    rate: int | None = None
    """Of all clients together."""
    rate_per_client: int | None = None
    connections_per_client: float | None = None
    """New connections per second, not bytes."""


class SubjectStats(NamedTuple):
    """What a subject uses at the moment, and has moved while it was in the ledger."""

    name: str
    connections: int
    sessions: int
    up: int
    """Bytes, client to target."""
    down: int


class Subject:
    """A user, a client or a listener with running flows."""

    __slots__ = ("kind", "name", "slot", "accounts", "limits", "up", "down", "_opened")

    def __init__(self, kind: str, name: str, slot: Slot, limits: Limits) -> None:
        self.kind, self.name, self.slot = kind, name, slot
        self.accounts: dict[FlowAccount, None] = {}
        self.limits = NO_LIMITS
        self.up: Bucket | None = None
        self.down: Bucket | None = None
        # The rate of new connections.
        self._opened: Level | None = None
        if limits is not NO_LIMITS:
            self.configure(limits)

    def configure(self, limits: Limits) -> None:
        """Apply other limits; counts go on."""
        self.limits = limits
        self.up = self._bucket(self.up, "rate_up", LEASED_UP, limits.rate_up)
        self.down = self._bucket(self.down, "rate_down", LEASED_DOWN, limits.rate_down)
        if limits.connection_rate is None:
            self._opened = None
            return
        rate, burst = limits.connection_rate, max(1.0, limits.connection_rate)
        if self._opened is None:
            now = time.monotonic()
            self._opened = Level(rate, burst, self.slot.sum(OPENED), now)
            if self.slot.is_shared:
                self._opened.begin(self.slot, now)
        self._opened.rate, self._opened.burst = rate, burst

    def _bucket(
        self, bucket: Bucket | None, key: str, word: int, rate: int | None
    ) -> Bucket | None:
        if rate is None:
            return None
        burst = self.limits.burst or default_burst(rate)
        if bucket is None:
            return Bucket(self._key(key), self.slot, word, rate, burst)
        bucket.configure(rate, burst)
        return bucket

    def take_slot(self, slot: Slot) -> None:
        """Go on with another slot: the one before may belong to another subject."""
        self.slot = slot
        for bucket in (self.up, self.down):
            if bucket is not None:
                bucket.take_slot(slot)

    def has_recovered(self, now: float) -> bool:
        """Return whether nothing would be different if the subject were new."""
        opened = self._opened
        if opened is not None and self._allows(opened, now) < opened.burst:
            return False
        return all(bucket is None or bucket.is_full(now) for bucket in (self.up, self.down))

    def reached(self, network: str, is_new: bool = True) -> str:
        """Return the key of the limit that one more flow of a network exceeds, "" if none.

        `is_new`: it counts against the rate of new flows.
        """
        limits, slot = self.limits, self.slot
        if network == "tcp":
            if limits.connections is not None and slot.sum(CONNECTIONS) >= limits.connections:
                return self._key("connections")
        elif limits.sessions is not None and slot.sum(SESSIONS) >= limits.sessions:
            return self._key("sessions")
        if self._opened is not None and is_new:
            if self._allows(self._opened, time.monotonic()) < 1:
                return self._key("connection_rate")
        return ""

    def exceeded(self, network: str, is_new: bool = True) -> str:
        """Return the key of the limit that a flow exceeds which was counted in, "" if none.

        With several processes reached() does not do: all of them may look before the first one
        counts its flow in.  The caller counts the flow out again.
        """
        limits, slot = self.limits, self.slot
        if network == "tcp":
            if limits.connections is not None and slot.sum(CONNECTIONS) > limits.connections:
                return self._key("connections")
        elif limits.sessions is not None and slot.sum(SESSIONS) > limits.sessions:
            return self._key("sessions")
        if self._opened is not None and is_new:
            if self._allows(self._opened, time.monotonic()) < 0:
                return self._key("connection_rate")
            self._opened.note(slot)
        return ""

    def arrive(self) -> bool:
        """Count a new connection, which has no flow yet; return False if the rate refuses it."""
        if self.reached("tcp"):
            return False
        self.slot.add(OPENED, 1)
        if self.slot.is_shared and self.exceeded("tcp"):
            self.slot.add(OPENED, -1)
            return False
        return True

    def _allows(self, opened: Level, now: float) -> float:
        """Return how many new flows the rate allows."""
        total = self.slot.sum(OPENED)
        if self.slot.is_shared:
            return opened.follow(self.slot, total, now)
        return opened.update(total, now)

    def _key(self, limit: str) -> str:
        """Return the key of a limit in the configuration, for records."""
        return _KEYS.get(self.kind) or f"users.{self.name}.limits.{limit}"

    def stats(self) -> SubjectStats:
        """Return what the subject uses."""
        slot = self.slot
        return SubjectStats(
            self.name, slot.sum(CONNECTIONS), slot.sum(SESSIONS), slot.sum(UP), slot.sum(DOWN)
        )
