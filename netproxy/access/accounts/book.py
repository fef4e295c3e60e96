"""Opens the account of each flow, and counts it against the limits that it falls under.

Every flow opens an account before it is dialled, and closes it at its end.  The counts are in
the ledger; pacing.py divides the rates.  Limits change at once, also for flows that run.
Thread: any; nothing here blocks.
"""

from __future__ import annotations

import threading
from functools import partial

from netproxy.access.accounts.account import FlowAccount
from netproxy.access.accounts.ledger import Ledger, LedgerFull
from netproxy.access.accounts.limits_in_force import LimitsInForce, SubjectKey
from netproxy.access.accounts.subject import (
    CLIENT,
    NO_LIMITS,
    USER,
    ARRIVALS,
    Limits,
    ListenerRates,
    Subject,
    SubjectStats,
)
from netproxy.errors import FlowRefused, Reason
from netproxy.interfaces.accounts import refused_by
from netproxy.interfaces.bounded import BoundedDict
from netproxy.interfaces.fairness import client_key
from netproxy.interfaces.listeners import CLIENT_RATE, decided_by
from netproxy.typed import TYPE_CHECKING, Callable, Iterable, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.access.accounts.standing import Standing
    from netproxy.interfaces.accounts import UserUsage
    from netproxy.interfaces.flows import Flow, LiveFlow

SETTLED_AT_ONCE = 128
"""Flows whose bytes are counted without a break: a tenth of a millisecond."""
IDLE_LIMIT = 4096
"""Subjects without flows whose rates are remembered until they have recovered."""


class AccountBook:
    """Opens the accounts of all flows (interfaces.accounts.Accounts)."""

    def __init__(self, usage: UserUsage, standing: Standing, ledger: Ledger | None = None) -> None:
        """`usage` is told what users have moved; `standing` decides who gets nothing new.

        `ledger`: that of several processes, None for one of this process alone.
        """
        self._usage = usage
        self._standing = standing
        # Guards everything below, the ledger, and all subjects, accounts, buckets and shares.
        self._lock = threading.Lock()
        self._ledger = ledger or Ledger()
        self._subjects: dict[tuple[str, str], Subject] = {}
        self._idle: BoundedDict[tuple[str, str], Subject] = BoundedDict(IDLE_LIMIT)
        self._limits = LimitsInForce()

    def become_worker(self, index: int, usage: UserUsage) -> None:
        """Count in the table of a worker from now on."""
        self._ledger.use_table(index)
        self._usage = usage

    def configure(
        self, users: Mapping[str, Limits], listeners: Mapping[str, ListenerRates]
    ) -> None:
        """Apply the limits of a configuration, by name, to running flows as well."""
        with self._lock:
            if self._limits.configure(users, listeners):
                self._regroup()
            for key, subject in self._subjects.items():
                self._apply(subject, self._limits.of(*key))
            for key, subject in self._idle.items():
                subject.configure(self._limits.of(*key))

    def override(self, user: str, limits: Limits | None) -> None:
        """Apply limits to a user in place of the configured ones; None: the configured ones."""
        with self._lock:
            self._limits.override(user, limits)
            self._renew_user(user)

    def grant(self, user: str, limits: Limits) -> None:
        """Apply the limits that a check of logins sets for a user without configured ones."""
        with self._lock:
            self._limits.grant(user, limits)
            self._renew_user(user)

    def limits(self, user: str, granted: bool = False) -> Limits:
        """Return the limits in force for a user, or those that a check of logins has `granted`."""
        with self._lock:
            return self._limits.granted(user) if granted else self._limits.of_user(user)

    def open(self, flow: Flow, is_new: bool = True) -> FlowAccount:
        """Count a flow in.  Raises FlowRefused.

        `is_new`: it counts as a new connection or session; False for a further request on a
        connection.
        """
        network, user, client = flow.network, flow.user, client_key(flow.client.host)
        standing = self._standing
        if standing.restricts and (refusal := standing.refusal(user, client)):
            raise FlowRefused(Reason.DENIED, said=refusal, decided=decided_by(refusal, user))
        account = FlowAccount(flow, self._lock, self.close)
        with self._lock:
            # Few calls: every connection passes here.
            keys = [(CLIENT, client)]
            if user or self._limits.listeners:
                keys = self._limits.subjects_of(flow, client)
            subjects, is_limited = self._find(keys), False
            for subject in subjects:
                if subject.limits is not NO_LIMITS:
                    is_limited = True
                    if key := subject.reached(network, is_new):
                        self._retire(subjects)
                        raise refused_by(key)
            account.enter(subjects, is_new)
            if is_limited:
                if self._ledger.is_shared and (key := account.exceeded(is_new)):
                    self._retire(account.leave())
                    raise refused_by(key)
                account.configure()
        return account

    def refuse_arrival(self, listener: str, host: str) -> str:
        """Count a new connection of a host to a listener; return why it is refused, "" if not."""
        standing = self._standing
        if standing.restricts and (refusal := standing.refusal("", client_key(host))):
            return refusal
        rates = self._limits.listeners.get(listener)
        if rates is None or rates.connections_per_client is None:
            return ""
        key = ARRIVALS, f"{listener} {client_key(host)}"
        with self._lock:
            try:
                subject = self._subject(*key)
            except LedgerFull:
                return CLIENT_RATE
            is_admitted = subject.arrive()
            self._retire((subject,))
        return "" if is_admitted else CLIENT_RATE

    def is_overridden(self, user: str) -> bool:
        """Return whether a user has other limits than the configured ones."""
        with self._lock:
            return user in self._limits.overrides

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
                self._note(account)
                self._retire(account.leave())

    def stats(self, kind: str) -> list[SubjectStats]:
        """Return what the subjects of a kind use, those without flows left out."""
        subjects = [
            subject for (of_kind, _), subject in list(self._subjects.items()) if of_kind == kind
        ]
        for subject in subjects:
            self._settle(subject)
        with self._lock:
            return [subject.stats() for subject in subjects if subject.accounts]

    def count(self, kind: str) -> int:
        """Return how many subjects of a kind have flows here, and in no table before this one."""
        subjects = list(self._subjects.items())
        return sum(key[0] == kind and subject.slot.is_first() for key, subject in subjects)

    def flows(self, kind: str, name: str) -> list[LiveFlow]:
        """Return the running flows of a subject."""
        with self._lock:
            subject = self._subjects.get((kind, name))
            accounts = list(subject.accounts) if subject is not None else []
        return [account.live for account in accounts if account.live is not None]

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Forget subjects whose rates have recovered; count what is about to be saved.

        The janitor calls it before that of the usage.  Returns the calls that end flows of users
        and clients who get nothing new: also what was being dialled when they were banned.
        """
        restricted, idle = self._standing.restricted_subjects(), self._idle
        with self._lock:
            for key in [key for key, subject in idle.items() if subject.has_recovered(now)]:
                del idle[key]
            known = [subject for key in restricted if (subject := self._subjects.get(key))]
        for subject in known:
            self._settle(subject)
        if self._usage.is_due(now):
            self.settle()
        return [
            partial(account.live.kill, refusal)
            for subject in known
            if (refusal := self._standing.refusal_of(subject.kind, subject.name))
            for account in list(subject.accounts)
            if account.live is not None
        ]

    def settle(self) -> None:
        """Tell the usage what the running flows of users have moved."""
        for (kind, _), subject in list(self._subjects.items()):
            if kind == USER:
                self._settle(subject)

    def _settle(self, subject: Subject) -> None:
        """Count what the flows of a subject have moved.

        The lock is free in between: new flows and datagrams wait for it.
        """
        accounts = list(subject.accounts)
        for start in range(0, len(accounts), SETTLED_AT_ONCE):
            with self._lock:
                for account in accounts[start : start + SETTLED_AT_ONCE]:
                    self._note(account)

    # -- under the lock

    def _find(self, keys: Iterable[SubjectKey]) -> list[Subject]:
        """Return what a flow counts for.

        Without room for it in the ledger, a subject without limits is left out.  Raises
        FlowRefused for another one.
        """
        known, subjects = self._subjects, []
        for key in keys:
            try:
                subjects.append(known.get(key) or self._subject(*key))
            except LedgerFull:
                if self._limits.of(*key) is not NO_LIMITS:
                    self._retire(subjects)
                    full = "no room to count the client"
                    raise FlowRefused(Reason.LIMIT, said=full, decided="the ledger") from None
        return subjects

    def _renew_user(self, user: str) -> None:
        """Apply the limits in force to a user's flows."""
        subject = self._subjects.get((USER, user)) or self._idle.get((USER, user))
        if subject is not None:
            self._apply(subject, self._limits.of(USER, user))

    def _note(self, account: FlowAccount) -> None:
        """Count what a flow has moved since the last time."""
        sent, received = account.settle()
        user = account.flow.user
        if user and (sent or received):
            self._usage.moved(user, sent, received)

    def _subject(self, kind: str, name: str) -> Subject:
        """Return a subject that is to get a flow.  Raises LedgerFull."""
        key = kind, name
        subject = self._subjects.get(key)
        if subject is None:
            slot = self._ledger.slot(kind, name)
            subject = self._idle.pop(key, None)
            if subject is None:
                subject = Subject(kind, name, slot, self._limits.of(kind, name))
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
            flow = account.flow
            keys = self._limits.subjects_of(flow, client_key(flow.client.host))
            try:
                self._retire(account.enter(self._find(keys)))
            except FlowRefused:
                continue  # the flow runs without the new limit
            account.configure()
