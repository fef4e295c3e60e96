"""Who may begin nothing new: banned users and clients, expired users, users without quota left.

Bans are made over the control socket and last until the daemon ends.  Thread: any; nothing
here blocks.
"""

from __future__ import annotations

import threading
import time

from netproxy.access.accounts.subject import CLIENT, USER
from netproxy.interfaces.bounded import BoundedDict
from netproxy.interfaces.fairness import client_key
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import UserUsage

BANNED_USER, BANNED_CLIENT = "user banned", "client banned"
USER_EXPIRED = "user expired"
QUOTA_USED_UP = "quota used up"
BANS_LIMIT = 4096
"""Bans of one kind; the oldest is forgotten.  A firewall is the place for more."""
FOR_EVER = float("inf")


class Terms(NamedTuple):
    """How long and how much a user may use the daemon.  None: no limit."""

    expires: str = ""
    """The last day, "2027-01-31", in the system's time zone; "" for no end."""
    day: int | None = None
    """Bytes of a day, both directions together."""
    month: int | None = None
    total: int | None = None

    @property
    def quotas(self) -> tuple[int | None, int | None, int | None]:
        """The limits of bytes, in the order of UsageBook.of()."""
        return self.day, self.month, self.total

    @property
    def has_quota(self) -> bool:
        """True if there is a limit of bytes."""
        return self.quotas != (None, None, None)


class Ban(NamedTuple):
    """A ban in force."""

    name: str
    """The user, or the client: an IPv4 address or an IPv6 network."""
    until: float
    """Seconds since the epoch; FOR_EVER without an end."""


class Standing:
    """Decides whether a user and a client may begin anything new."""

    def __init__(self, usage: UserUsage, clock: Callable[[], float] = time.time) -> None:
        """`usage` knows what users have moved.  `clock` returns seconds since the epoch."""
        self.usage = usage
        self._clock = clock
        # Guards the bans, the terms and `restricts`.  Readers look names up without it.
        self._lock = threading.Lock()
        self._users: BoundedDict[str, float] = BoundedDict(BANS_LIMIT)
        self._clients: BoundedDict[str, float] = BoundedDict(BANS_LIMIT)
        self._terms: Mapping[str, Terms] = {}
        """By user; replaced as a whole."""
        self.restricts = False
        """False if nobody is restricted: then refusal() need not be asked."""

    def configure(self, terms: Mapping[str, Terms]) -> None:
        """Apply the terms of a configuration, by user."""
        with self._lock:
            self._terms = terms
            self._note_restrictions()

    @property
    def restricted(self) -> Mapping[str, Terms]:
        """The users with terms."""
        return self._terms

    def refusal(self, user: str, client: str) -> str:
        """Return why a user and a client get nothing new, "" if they do.

        `client` is a client_key(), "" if only the user matters.
        """
        if self._clients and self._is_banned(self._clients, client):
            return BANNED_CLIENT
        if not user:
            return ""
        if self._users and self._is_banned(self._users, user):
            return BANNED_USER
        terms = self._terms.get(user)
        return "" if terms is None else self._refusal_by(terms, user)

    def refusal_of(self, kind: str, name: str) -> str:
        """Return why a user or a client gets nothing new, "" if it does."""
        return self.refusal(name, "") if kind == USER else self.refusal("", name)

    def restricted_subjects(self) -> list[tuple[str, str]]:
        """Return kind and name of all users and clients who may get nothing new."""
        users, clients = self.bans()
        names = dict.fromkeys((*self._terms, *(ban.name for ban in users)))
        return [(USER, name) for name in names] + [(CLIENT, ban.name) for ban in clients]

    def has_quota(self, user: str) -> bool:
        """Return whether a quota counts the bytes of a user."""
        terms = self._terms.get(user)
        return terms is not None and terms.has_quota

    def _refusal_by(self, terms: Terms, user: str) -> str:
        if terms.expires:
            today = time.strftime("%Y-%m-%d", time.localtime(self._clock()))
            # Dates of this form are in the order of their texts.
            if today > terms.expires:
                return USER_EXPIRED
        if terms.has_quota and self.usage.used_up(user, terms.quotas):
            return QUOTA_USED_UP
        return ""

    def ban_user(self, user: str, seconds: float = FOR_EVER) -> None:
        """Refuse a user for so many seconds."""
        with self._lock:
            self._users.put(user, self._clock() + seconds)
            self._note_restrictions()

    def ban_client(self, client: str, seconds: float = FOR_EVER) -> None:
        """Refuse a client for so many seconds: an address, which stands for its client_key()."""
        with self._lock:
            self._clients.put(client_key(client), self._clock() + seconds)
            self._note_restrictions()

    def unban(self, name: str) -> bool:
        """Take the bans of a user or of a client address back; return whether there was one."""
        with self._lock:
            of_user = self._users.pop(name, None)
            of_client = self._clients.pop(client_key(name), None) or self._clients.pop(name, None)
            self._note_restrictions()
        return not (of_user is None and of_client is None)

    def bans(self) -> tuple[list[Ban], list[Ban]]:
        """Return the bans in force, of users and of clients."""
        now = self._clock()
        with self._lock:
            users, clients = (
                [Ban(name, until) for name, until in bans.items() if until > now]
                for bans in (self._users, self._clients)
            )
        return users, clients

    def _note_restrictions(self) -> None:
        """Note whether anybody is restricted; under the lock."""
        self.restricts = bool(self._terms or self._users or self._clients)

    def _is_banned(self, bans: Mapping[str, float], name: str) -> bool:
        until = bans.get(name)
        return until is not None and until > self._clock()
