"""Accounts: counts flows against the limits of their user, client and listener.

Every flow opens an account before it is dialled, and closes it at its end.  The counts are in
the ledger; pacing.py divides the rates.  Limits change at once, also for flows that run.
Thread: any; nothing here blocks.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Callable, Iterable, Mapping, NamedTuple, Sequence

from netproxy.access.ledger import (
    CONNECTIONS,
    DOWN,
    LEASED_DOWN,
    LEASED_UP,
    OPENED,
    SESSIONS,
    UP,
    Ledger,
    LedgerFull,
    Slot,
)
from netproxy.access.pacing import Bucket, LeasedPace, Level, default_burst
from netproxy.errors import DialError, Reason
from netproxy.interfaces.bounded import BoundedDict
from netproxy.interfaces.fairness import client_key

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow, LiveFlow

USER, CLIENT, LISTENER, CLIENT_OF_LISTENER = "user", "client", "listener", "client of listener"
"""The kinds of subjects."""
IDLE_LIMIT = 4096
"""Subjects without flows whose rates are remembered until they have recovered."""


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


class Usage(NamedTuple):
    """What a subject uses at the moment, and has moved while it was in the ledger."""

    name: str
    connections: int
    sessions: int
    up: int
    down: int


class Subject:
    """A user, a client or a listener with running flows.  Accounts guards everything."""

    __slots__ = ("kind", "name", "prefix", "slot", "accounts", "limits", "up", "down", "_opened")

    def __init__(self, kind: str, name: str, prefix: str, slot: Slot, limits: Limits) -> None:
        """`prefix` is what the keys of its limits begin with, for records."""
        self.kind, self.name, self.prefix, self.slot = kind, name, prefix, slot
        self.accounts: dict[FlowAccount, None] = {}
        self.limits = NO_LIMITS
        self.up: Bucket | None = None
        self.down: Bucket | None = None
        # The rate of new connections.
        self._opened: Level | None = None
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
            self._opened = Level(rate, burst, self.slot.sum(OPENED), time.monotonic())
        self._opened.rate, self._opened.burst = rate, burst

    def _bucket(
        self, bucket: Bucket | None, key: str, word: int, rate: int | None
    ) -> Bucket | None:
        if rate is None:
            return None
        burst = self.limits.burst or default_burst(rate)
        if bucket is None:
            # Listeners have one rate for each direction, users have two.
            key = f"{self.prefix}.{key}" if self.kind == USER else self.prefix
            return Bucket(key, self.slot, word, rate, burst)
        bucket.configure(rate, burst)
        return bucket

    def take_slot(self, slot: Slot) -> None:
        """Go on with another slot: the one before may belong to another subject."""
        self.slot = slot
        for bucket in (self.up, self.down):
            if bucket is not None:
                bucket.slot = slot

    def has_recovered(self, now: float) -> bool:
        """Return whether nothing would be different if the subject were new."""
        opened = self._opened
        if opened is not None and opened.update(self.slot.sum(OPENED), now) < opened.burst:
            return False
        return all(bucket is None or bucket.is_full(now) for bucket in (self.up, self.down))

    def reached(self, network: str) -> str:
        """Return the key of the limit that one more flow of a network exceeds, "" if none."""
        limits, slot = self.limits, self.slot
        if network == "tcp":
            if limits.connections is not None and slot.sum(CONNECTIONS) >= limits.connections:
                return f"{self.prefix}.connections"
        elif limits.sessions is not None and slot.sum(SESSIONS) >= limits.sessions:
            return f"{self.prefix}.sessions"
        if self._opened is not None:
            if self._opened.update(slot.sum(OPENED), time.monotonic()) < 1:
                return f"{self.prefix}.connection_rate"
        return ""

    def usage(self) -> Usage:
        """Return what the subject uses."""
        slot = self.slot
        return Usage(
            self.name, slot.sum(CONNECTIONS), slot.sum(SESSIONS), slot.sum(UP), slot.sum(DOWN)
        )


class FlowAccount:
    """One flow's part of its subjects (interfaces.accounts.Account)."""

    __slots__ = ("up", "down", "live", "_owner", "_word", "subjects", "_sent", "_received")

    def __init__(self, owner: AccountBook, lock: threading.Lock, word: int) -> None:
        """`lock` is the owner's.  `word`: CONNECTIONS or SESSIONS, where the flow counts."""
        self._owner = owner
        self._word = word
        self.subjects: Sequence[Subject] = ()
        self.up, self.down = LeasedPace(lock), LeasedPace(lock)
        self.live: LiveFlow | None = None
        # What has been added to the ledger so far.
        self._sent = self._received = 0

    def attach(self, live: LiveFlow) -> None:
        """Note the flow, which runs from now on."""
        self.live = live

    def close(self) -> None:
        """Count the flow out."""
        self._owner.close(self)

    # -- AccountBook holds its lock

    def enter(self, subjects: Sequence[Subject]) -> None:
        """Count the flow in for the subjects that it has not been counted for yet."""
        for subject in subjects:
            if self not in subject.accounts:
                subject.accounts[self] = None
                subject.slot.add(self._word, 1)
                subject.slot.add(OPENED, 1)
        self.subjects = subjects
        self.configure()

    def settle(self) -> tuple[int, int]:
        """Add to the ledger what has been moved since the last time; return it."""
        if self.live is None:
            return 0, 0
        traffic = self.live.traffic()
        sent, received = traffic.sent - self._sent, traffic.received - self._received
        if sent or received:
            self._sent, self._received = traffic.sent, traffic.received
            for subject in self.subjects:
                subject.slot.add(UP, sent)
                subject.slot.add(DOWN, received)
        return sent, received

    def configure(self) -> None:
        """Follow the rates of the subjects."""
        self.up.configure([subject.up for subject in self.subjects if subject.up])
        self.down.configure([subject.down for subject in self.subjects if subject.down])

    def leave(self) -> Sequence[Subject]:
        """Count the flow out; return the subjects that it had."""
        left, self.subjects, self.live = self.subjects, (), None
        self.up.close(self._sent)
        self.down.close(self._received)
        for subject in left:
            del subject.accounts[self]
            subject.slot.add(self._word, -1)
        return left


class AccountBook:
    """Opens the accounts of all flows (interfaces.accounts.Accounts)."""

    def __init__(self) -> None:
        # Guards everything below, the ledger, and all subjects, accounts, buckets and shares.
        self._lock = threading.Lock()
        self._ledger = Ledger()
        self._subjects: dict[tuple[str, str], Subject] = {}
        self._idle: BoundedDict[tuple[str, str], Subject] = BoundedDict(IDLE_LIMIT)
        self._users: Mapping[str, Limits] = {}
        self._listeners: Mapping[str, ListenerRates] = {}
        # What takes the place of a user's configured limits until the daemon ends.
        self._overrides: dict[str, Limits] = {}

    def configure(
        self, users: Mapping[str, Limits], listeners: Mapping[str, ListenerRates]
    ) -> None:
        """Apply the limits of a configuration, by name, to running flows as well."""
        with self._lock:
            moved_flows = listeners != self._listeners
            self._users, self._listeners = users, listeners
            if moved_flows:
                self._regroup()
            for (kind, name), subject in self._subjects.items():
                self._apply(subject, self._limits(kind, name))
            for (kind, name), subject in self._idle.items():
                subject.configure(self._limits(kind, name))

    def override(self, user: str, limits: Limits | None) -> None:
        """Apply limits to a user in place of the configured ones; None: the configured ones."""
        with self._lock:
            self._overrides.pop(user, None)
            if limits is not None:
                self._overrides[user] = limits
            subject = self._subjects.get((USER, user)) or self._idle.get((USER, user))
            if subject is not None:
                self._apply(subject, self._limits(USER, user))

    def limits(self, user: str) -> Limits:
        """Return the limits in force for a user."""
        with self._lock:
            return self._limits(USER, user)

    def open(self, flow: Flow) -> FlowAccount:
        """Count a new flow in.  Raises DialError(LIMIT)."""
        account = FlowAccount(self, self._lock, CONNECTIONS if flow.network == "tcp" else SESSIONS)
        with self._lock:
            try:
                subjects = [self._subject(*key) for key in self._keys(flow)]
            except LedgerFull:
                raise DialError(Reason.LIMIT, str(flow.target), decided="the ledger") from None
            for subject in subjects:
                if subject.limits is not NO_LIMITS and (key := subject.reached(flow.network)):
                    self._retire(subjects)
                    raise DialError(Reason.LIMIT, str(flow.target), decided=key)
            account.enter(subjects)
        return account

    def reached(self, user: str) -> str:
        """Return the key of the limit of UDP sessions that a user has reached, "" if none."""
        if not user:
            return ""
        with self._lock:
            subject = self._subjects.get((USER, user)) or self._idle.get((USER, user))
            return subject.reached("udp") if subject is not None else ""

    def close(self, account: FlowAccount) -> None:
        """Count a flow out."""
        with self._lock:
            if account.subjects:
                account.settle()
                self._retire(account.leave())

    def usage(self, kind: str) -> list[Usage]:
        """Return what the subjects of a kind use, those without flows left out."""
        with self._lock:
            subjects = [subject for subject in self._subjects.values() if subject.kind == kind]
            for subject in subjects:
                for account in subject.accounts:
                    account.settle()
            return [subject.usage() for subject in subjects]

    def flows(self, kind: str, name: str) -> list[LiveFlow]:
        """Return the running flows of a subject."""
        with self._lock:
            subject = self._subjects.get((kind, name))
            accounts = list(subject.accounts) if subject is not None else []
        return [account.live for account in accounts if account.live is not None]

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Forget subjects whose rates have recovered; return nothing to do."""
        with self._lock:
            idle = self._idle
            for key in [key for key, subject in idle.items() if subject.has_recovered(now)]:
                del idle[key]
        return ()

    # -- under the lock

    def _keys(self, flow: Flow) -> Iterable[tuple[str, str]]:
        client = client_key(flow.client.host)
        keys = [(CLIENT, client)]
        if flow.user:
            keys.append((USER, flow.user))
        rates = self._listeners.get(flow.listener)
        if rates is not None:
            if rates.rate is not None:
                keys.append((LISTENER, flow.listener))
            if rates.rate_per_client is not None:
                keys.append((CLIENT_OF_LISTENER, f"{flow.listener} {client}"))
        return keys

    def _limits(self, kind: str, name: str) -> Limits:
        if kind == USER:
            return self._overrides.get(name) or self._users.get(name, NO_LIMITS)
        if kind == CLIENT:
            return NO_LIMITS
        rates = self._listeners.get(name.partition(" ")[0], ListenerRates())
        rate = rates.rate if kind == LISTENER else rates.rate_per_client
        return Limits(rate_up=rate, rate_down=rate)

    def _subject(self, kind: str, name: str) -> Subject:
        """Return a subject that is to get a flow.  Raises LedgerFull."""
        key = kind, name
        subject = self._subjects.get(key)
        if subject is None:
            slot = self._ledger.slot(kind, name)
            subject = self._idle.pop(key, None)
            if subject is None:
                subject = Subject(kind, name, _prefix(kind, name), slot, self._limits(kind, name))
            else:
                subject.take_slot(slot)
            self._subjects[key] = subject
        return subject

    def _retire(self, subjects: Iterable[Subject]) -> None:
        """Set subjects without flows aside until their rates have recovered."""
        for subject in subjects:
            if not subject.accounts:
                key = subject.kind, subject.name
                del self._subjects[key]
                if subject.limits is not NO_LIMITS:
                    self._idle.put(key, subject)

    def _apply(self, subject: Subject, limits: Limits) -> None:
        """Apply limits to a subject and to its running flows."""
        if limits != subject.limits:
            subject.configure(limits)
            for account in subject.accounts:
                account.configure()

    def _regroup(self) -> None:
        """Count running flows for the listeners and clients that have rates by now."""
        accounts = {
            account: None for subject in self._subjects.values() for account in subject.accounts
        }
        for account in accounts:
            if account.live is not None:
                try:
                    account.enter([self._subject(*key) for key in self._keys(account.live.flow)])
                except LedgerFull:
                    continue


def _prefix(kind: str, name: str) -> str:
    """Return what the keys of a subject's limits begin with; of a listener, the whole key."""
    if kind == USER:
        return f"users.{name}.limits"
    return "limits.rate" if kind == LISTENER else "limits.rate_per_client"
