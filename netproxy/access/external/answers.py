"""Remembers what a program or a service has said about logins.

Keeps a keyed digest of user and password, in memory only.  A positive answer has two lives.
While it is fresh, the same login is not checked again.  Afterwards it still tells that a login
was accepted, for associations and connections that began with it, until a newer check says no
or the user is forgotten.  Then they get nothing new.
"""

from __future__ import annotations

import os
import threading
from _blake2 import blake2b  # built in: hashlib would load libcrypto, which costs 4 MiB

USERS_LIMIT = 16384
"""Users remembered, some 400 bytes each.  The one whose last check is oldest is forgotten."""
PASSWORDS_LIMIT = 8
"""Passwords remembered of a user: services may give each device of a user its own."""
REFUSED_LIMIT = 4096
"""Refused logins remembered.  The oldest is forgotten: clients choose what they try."""


class _Grant:
    """What was granted to a user."""

    __slots__ = ("passwords", "upstream")

    def __init__(self, passwords: dict[bytes, float], upstream: str) -> None:
        self.passwords = passwords
        """Digests of the accepted passwords, oldest first, and until when each is fresh."""
        self.upstream = upstream


class Answers:
    """The remembered answers.  Thread: any; nothing here waits.  Times are monotonic seconds."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        # Guards changes of both dictionaries.  Lookups take no lock: a grant is replaced as a
        # whole, except that a password is removed from it.
        self._lock = threading.Lock()
        self._grants: dict[str, _Grant] = {}
        """By user, oldest first."""
        self._refused: dict[bytes, float] = {}
        """Digests of refused logins, oldest first, and until when each counts."""

    def __len__(self) -> int:
        return len(self._grants) + len(self._refused)

    def digest(self, user: str, password: bytes) -> bytes:
        """Return the keyed digest of a login."""
        name = user.encode(errors="replace")
        return blake2b(
            b"%d:%b%b" % (len(name), name, password), key=self._key, digest_size=32
        ).digest()

    def find(self, user: str, digest: bytes, now: float) -> bool | None:
        """Return whether a login is right, None if it must be checked."""
        grant = self._grants.get(user)
        if grant is not None and grant.passwords.get(digest, 0.0) > now:
            return True
        return False if self._refused.get(digest, 0.0) > now else None

    def recall(self, user: str, password: bytes) -> bool | None:
        """Return whether a password was accepted before; None if none of the user was."""
        grant = self._grants.get(user)
        return None if grant is None else self.digest(user, password) in grant.passwords

    def is_valid(self, user: str, digest: object) -> bool:
        """Return whether a login was accepted, and not refused since."""
        grant = self._grants.get(user)
        return grant is not None and digest in grant.passwords

    def upstream(self, user: str) -> str:
        """Return the name of the upstream that the last answer gave a user, "" for none."""
        grant = self._grants.get(user)
        return "" if grant is None else grant.upstream

    def allow(self, user: str, digest: bytes, upstream: str, until: float) -> None:
        """Remember a positive answer, which is fresh until then."""
        with self._lock:
            self._refused.pop(digest, None)
            before = self._grants.pop(user, None)
            passwords = dict(before.passwords) if before is not None else {}
            passwords.pop(digest, None)
            while len(passwords) >= PASSWORDS_LIMIT:
                del passwords[next(iter(passwords))]
            while len(self._grants) >= USERS_LIMIT:
                del self._grants[next(iter(self._grants))]
            self._grants[user] = _Grant({**passwords, digest: until}, upstream)

    def refuse(self, user: str, digest: bytes, until: float) -> None:
        """Remember a negative answer, which counts until then; it ends a positive one."""
        with self._lock:
            grant = self._grants.get(user)
            if grant is not None and grant.passwords.pop(digest, None) is not None:
                if not grant.passwords:
                    del self._grants[user]
            self._refused.pop(digest, None)
            while len(self._refused) >= REFUSED_LIMIT:
                del self._refused[next(iter(self._refused))]
            self._refused[digest] = until
