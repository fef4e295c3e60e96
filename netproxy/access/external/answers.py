"""Remembers what a program or a service has said about logins, in memory only.

An answer is for a user, a password, the client's host and the listener: the program decides with
all four.  While it is fresh, the same login from the same host to the same listener is not
checked again.

A positive answer also grants the user and password what outlives it: the associations and
connections that began with them may open new flows.  The grant is of user and password alone.  It
ends when the host and listener that got the latest positive answer get a negative one, or when
the user is forgotten.  A negative answer for another host or listener does not end it: such an
answer may be about the place.  Passwords are kept as keyed digests.

Several workers tell each other of their answers, so that a login is checked once.  The digests of
all of them have the same key, which depends on what is asked: an answer of the program or service
of another configuration is recognized and ignored.
"""

from __future__ import annotations

import threading
from _blake2 import blake2b  # built in: hashlib would load libcrypto, which costs 4 MiB

from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple

if TYPE_CHECKING:
    from netproxy.access.login import Credentials

USERS_LIMIT = 16384
"""Users remembered, some 400 bytes each.  The one whose last check is oldest is forgotten."""
PASSWORDS_LIMIT = 8
"""Passwords remembered of a user: services may give each device of a user its own."""
FRESH_LIMIT = 16384
"""Fresh answers, some 200 bytes each.  A login whose answer is forgotten is checked again."""
REFUSED_LIMIT = 4096
"""Refused logins remembered.  The oldest is forgotten: clients choose what they try."""


class LoginKey(NamedTuple):
    """A login as it is remembered: without its password."""

    user: str
    stamp: bytes
    """The keyed digest of user and password."""
    place: bytes
    """The keyed digest of all that the answer depends on: user, password, host and listener."""


class _Grant(NamedTuple):
    """What was granted to a user."""

    passwords: dict[bytes, bytes]
    """The stamps of the accepted passwords, each with the place of its latest positive answer;
    oldest first."""
    upstream: str


class Answer(NamedTuple):
    """What a program or a service has said about a login."""

    key: LoginKey
    is_right: bool
    until: float
    """Monotonic seconds: it counts until then."""
    upstream: str = ""
    """The name of the upstream that comes with a positive answer, "" for none."""


class Answers:
    """The remembered answers.  Thread: any; nothing here waits.  Times are monotonic seconds."""

    def __init__(self, key: bytes, source: object) -> None:
        """`key` is secret; `source` tells what is asked, the program or the service."""
        self._key = blake2b(repr(source).encode(errors="replace"), key=key, digest_size=32).digest()
        self.identity = self._digest(b"")
        """Equal in all processes that ask the same."""
        self.announce: Callable[[Answer], None] | None = None
        """Tells the other workers of an answer; None if there are none."""
        # Guards changes of the dictionaries.  Lookups take no lock: a grant is replaced as a
        # whole, except that a password is removed from it.
        self._lock = threading.Lock()
        self._grants: dict[str, _Grant] = {}
        """By user, oldest first."""
        self._fresh: dict[bytes, float] = {}
        """By place, oldest first: until when a positive answer counts."""
        self._refused: dict[bytes, float] = {}
        """By place, oldest first: until when a negative answer counts."""

    def __len__(self) -> int:
        return len(self._grants) + len(self._fresh) + len(self._refused)

    def key(self, credentials: Credentials) -> LoginKey:
        """Return what a login is remembered under."""
        stamp = self.stamp(credentials.user, credentials.password)
        where = f"{credentials.client} {credentials.listener}".encode(errors="replace")
        return LoginKey(credentials.user, stamp, self._digest(stamp + where))

    def stamp(self, user: str, password: bytes) -> bytes:
        """Return the keyed digest of user and password."""
        name = user.encode(errors="replace")
        return self._digest(b"%d:%b%b" % (len(name), name, password))

    def _digest(self, data: bytes) -> bytes:
        return blake2b(data, key=self._key, digest_size=32).digest()

    def find(self, key: LoginKey, now: float) -> bool | None:
        """Return whether a login is right, None if it must be checked."""
        if self._fresh.get(key.place, 0.0) > now and self.is_valid(key.user, key.stamp):
            return True
        return False if self._refused.get(key.place, 0.0) > now else None

    def recall(self, user: str, password: bytes) -> bool | None:
        """Return whether a password was accepted before; None if none of the user was."""
        grant = self._grants.get(user)
        return None if grant is None else self.stamp(user, password) in grant.passwords

    def is_valid(self, user: str, stamp: object) -> bool:
        """Return whether a login was accepted, and not withdrawn since."""
        grant = self._grants.get(user)
        return grant is not None and stamp in grant.passwords

    def upstream(self, user: str) -> str:
        """Return the name of the upstream that the last answer gave a user, "" for none."""
        grant = self._grants.get(user)
        return "" if grant is None else grant.upstream

    def fields(self, answer: Answer) -> dict[str, object]:
        """Return an answer as JSON values, for other workers."""
        (user, stamp, place), *rest = answer
        return {"identity": self.identity.hex(), "answer": [user, stamp.hex(), place.hex(), *rest]}

    def learn(self, fields: Mapping[str, object]) -> str:
        """Remember an answer of another worker; return its user, "" if it is for another source.

        Raises KeyError, TypeError, ValueError.
        """
        answer = fields["answer"]
        if fields["identity"] != self.identity.hex() or not isinstance(answer, list):
            return ""
        user, stamp, place, *rest = answer
        self.remember(Answer(LoginKey(user, bytes.fromhex(stamp), bytes.fromhex(place)), *rest))
        return str(user)

    def remember(self, answer: Answer) -> None:
        """Remember an answer."""
        if answer.is_right:
            self.allow(answer.key, answer.upstream, answer.until)
        else:
            self.refuse(answer.key, answer.until)

    def allow(self, key: LoginKey, upstream: str, until: float) -> None:
        """Remember a positive answer, which is fresh until then."""
        with self._lock:
            self._refused.pop(key.place, None)
            _put(self._fresh, key.place, until, FRESH_LIMIT)
            before = self._grants.pop(key.user, None)
            passwords = dict(before.passwords) if before is not None else {}
            passwords.pop(key.stamp, None)
            while len(passwords) >= PASSWORDS_LIMIT:
                del passwords[next(iter(passwords))]
            while len(self._grants) >= USERS_LIMIT:
                del self._grants[next(iter(self._grants))]
            self._grants[key.user] = _Grant({**passwords, key.stamp: key.place}, upstream)

    def adopt(self, user: str, stamp: bytes, upstream: str) -> None:
        """Remember what another process was answered for a user: a login there is valid here."""
        with self._lock:
            before = self._grants.pop(user, None)
            passwords = dict(before.passwords) if before is not None else {}
            passwords.setdefault(stamp, b"")
            while len(passwords) > PASSWORDS_LIMIT:
                del passwords[next(iter(passwords))]
            while len(self._grants) >= USERS_LIMIT:
                del self._grants[next(iter(self._grants))]
            self._grants[user] = _Grant(passwords, upstream)

    def refuse(self, key: LoginKey, until: float) -> None:
        """Remember a negative answer, which counts until then.

        It withdraws the grant if the latest positive answer was for the same place.
        """
        with self._lock:
            grant = self._grants.get(key.user)
            if grant is not None and grant.passwords.get(key.stamp) == key.place:
                del grant.passwords[key.stamp]
                if not grant.passwords:
                    del self._grants[key.user]
            self._fresh.pop(key.place, None)
            _put(self._refused, key.place, until, REFUSED_LIMIT)


def _put(table: dict[bytes, float], place: bytes, until: float, limit: int) -> None:
    """Add an answer as the newest one; forget the oldest ones at the limit."""
    table.pop(place, None)
    while len(table) >= limit:
        del table[next(iter(table))]
    table[place] = until
