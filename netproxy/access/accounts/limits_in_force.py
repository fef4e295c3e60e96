"""Which limits are in force for which subject.

The limits of a user are, in this order: those that netproxyctl has set, those of the
configuration, those of an external check of logins.  Thread: AccountBook calls everything here
under its lock.
"""

from __future__ import annotations

from netproxy.access.accounts.subject import (
    ARRIVALS,
    CLIENT,
    CLIENT_OF_LISTENER,
    LISTENER,
    NO_LIMITS,
    USER,
    Limits,
    ListenerRates,
)
from netproxy.interfaces.bounded import BoundedDict
from netproxy.typed import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow

GRANTS_LIMIT = 16384
"""Users whose limits an external check of logins has set: as many as it remembers."""

SubjectKey = tuple[str, str]
"""The kind and the name of a subject."""


class LimitsInForce:
    """The limits of users and listeners, by name."""

    def __init__(self) -> None:
        self.listeners: Mapping[str, ListenerRates] = {}
        """Those with a rate; of the configuration."""
        self._users: Mapping[str, Limits] = {}
        self.overrides: BoundedDict[str, Limits] = BoundedDict(GRANTS_LIMIT)
        """Set by netproxyctl, until the daemon ends."""
        self._granted: BoundedDict[str, Limits] = BoundedDict(GRANTS_LIMIT)

    def configure(
        self, users: Mapping[str, Limits], listeners: Mapping[str, ListenerRates]
    ) -> bool:
        """Take the limits of a configuration; return whether those of listeners are others."""
        before, self._users, self.listeners = self.listeners, users, listeners
        return before != listeners

    def override(self, user: str, limits: Limits | None) -> None:
        """Take limits in place of the configured ones; None: the configured ones again."""
        self.overrides.pop(user, None)
        if limits is not None:
            self.overrides.put(user, limits)

    def grant(self, user: str, limits: Limits) -> None:
        """Take the limits that an external check of logins sets."""
        self._granted.pop(user, None)
        if limits != NO_LIMITS:
            self._granted.put(user, limits)

    def of_user(self, user: str) -> Limits:
        """Return the limits of a user."""
        return self.overrides.get(user) or self._users.get(user) or self.granted(user)

    def granted(self, user: str) -> Limits:
        """Return the limits that an external check of logins has set for a user."""
        return self._granted.get(user, NO_LIMITS)

    def of(self, kind: str, name: str) -> Limits:
        """Return the limits of a subject."""
        if kind == CLIENT:
            return NO_LIMITS
        limits = self._of(kind, name)
        # One object, which is told apart without a comparison.
        return NO_LIMITS if limits == NO_LIMITS else limits

    def _of(self, kind: str, name: str) -> Limits:
        if kind == USER:
            return self.of_user(name)
        listener = name if kind == LISTENER else name.rpartition(" ")[0]
        rates = self.listeners.get(listener, ListenerRates())
        if kind == ARRIVALS:
            return Limits(connection_rate=rates.connections_per_client)
        rate = rates.rate if kind == LISTENER else rates.rate_per_client
        return Limits(rate_up=rate, rate_down=rate)

    def subjects_of(self, flow: Flow, client: str) -> list[SubjectKey]:
        """Return what a flow counts for; `client` is its client_key()."""
        keys = [(CLIENT, client)]
        if flow.user:
            keys.append((USER, flow.user))
        rates = self.listeners.get(flow.listener)
        if rates is not None:
            if rates.rate is not None:
                keys.append((LISTENER, flow.listener))
            if rates.rate_per_client is not None:
                keys.append((CLIENT_OF_LISTENER, f"{flow.listener} {client}"))
        return keys
