"""Users and their passwords: scrypt hashes, or plain text for a lab.

A check takes the same way for an unknown user as for a wrong password.  scrypt
is slow on purpose, so that a password that was right is remembered as a keyed
digest, in memory only.  hashlib and hmac are imported when the first password is
checked: libcrypto costs 4 MiB that a daemon without users need not pay.
"""

from __future__ import annotations

import base64
import os
import threading
from typing import Callable, Mapping

from netproxy.interfaces.addresses import Address

COST, BLOCK, PARALLEL = (
    16384,
    8,
    1,
)  # scrypt's N, r, p for interactive logins: 16 MiB and some 50 ms
SALT_BYTES = 16
HASH_BYTES = 32
_COST_LIMIT = 1 << 20  # of N * r * p in a hash that somebody else made: a check stays under a GiB
_PREFIX = "scrypt$"


class Users:
    """Immutable but for what it remembers; used by all connection threads."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        """`passwords`: name -> "scrypt$N$r$p$salt$hash" (base64) or plain text.  ValueError for a broken hash."""
        self._plain = {
            name: value.encode()
            for name, value in passwords.items()
            if not value.startswith(_PREFIX)
        }
        self._hashed = {
            name: _parse(value) for name, value in passwords.items() if value.startswith(_PREFIX)
        }
        self._decoy = (COST, BLOCK, PARALLEL, bytes(SALT_BYTES), bytes(HASH_BYTES))
        self._lock = (
            threading.Lock()
        )  # one scrypt at a time: each takes megabytes; guards writes to _seen
        self._seen: dict[str, bytes] = {}
        self._key = os.urandom(32)

    def __len__(self) -> int:
        return len(self._plain) + len(self._hashed)

    def check(self, name: bytes, password: bytes) -> str | None:
        """The user's name where the password is right, else None."""
        import hmac  # late: it brings libcrypto

        user = name.decode("utf-8", "replace")
        # where anybody has a hash every check takes the time of one, or it would tell who has none
        right = self._check_hash(user, password) if self._hashed else False
        if user in self._plain or not self._hashed:
            right = (
                hmac.compare_digest(self._plain.get(user, b""), password) and user in self._plain
            )
        return user if right else None

    def _check_hash(self, user: str, password: bytes) -> bool:
        import hashlib  # late: see above
        import hmac

        digest = hashlib.blake2b(password, key=self._key, digest_size=32).digest()
        if hmac.compare_digest(self._seen.get(user, bytes(32)), digest):
            return (
                True  # without the lock: who was right before does not wait behind those who guess
            )
        with self._lock:
            cost, block, parallel, salt, expected = self._hashed.get(user, self._decoy)
            made = hashlib.scrypt(
                password,
                salt=salt,
                n=cost,
                r=block,
                p=parallel,
                dklen=len(expected),
                maxmem=_memory(cost, block, parallel),
            )
            right = hmac.compare_digest(made, expected) and user in self._hashed
            if right:
                self._seen[user] = digest
            return right


def hash_password(password: str) -> str:
    """A hash for the configuration."""
    import hashlib

    salt = os.urandom(SALT_BYTES)
    made = hashlib.scrypt(
        password.encode(),
        salt=salt,
        n=COST,
        r=BLOCK,
        p=PARALLEL,
        dklen=HASH_BYTES,
        maxmem=_memory(COST, BLOCK, PARALLEL),
    )
    text = [base64.b64encode(part).decode() for part in (salt, made)]
    return f"{_PREFIX}{COST}${BLOCK}${PARALLEL}${text[0]}${text[1]}"


def check_password(value: str) -> None:
    """ValueError for a broken hash."""
    if value.startswith(_PREFIX):
        _parse(value)


def _memory(cost: int, block: int, parallel: int) -> int:
    """Bytes that scrypt may use: what RFC 7914 needs, and some for OpenSSL's own."""
    return 128 * block * (cost + parallel + 2) + (1 << 20)


def _parse(value: str) -> tuple[int, int, int, bytes, bytes]:
    try:
        cost, block, parallel, salt, expected = value[len(_PREFIX) :].split("$")
        numbers = int(cost), int(block), int(parallel)
        raw = base64.b64decode(salt, validate=True), base64.b64decode(expected, validate=True)
    except ValueError as error:
        raise ValueError("not a hash made by 'netproxyctl hash-password'") from error
    # RFC 7914 section 2: N is a power of two above 1, and below 2 to the 16 r
    if (
        min(numbers) < 1
        or numbers[0] < 2
        or numbers[0] & (numbers[0] - 1)
        or numbers[0].bit_length() - 1 >= 16 * numbers[1]
        or len(raw[1]) < 16
    ):
        raise ValueError("not a hash made by 'netproxyctl hash-password'")
    if numbers[0] * numbers[1] * numbers[2] > _COST_LIMIT:
        raise ValueError("the hash costs too much to check")
    return (*numbers, *raw)


class Login:
    """What one listener asks of its clients: `required`, `optional` or `none`."""

    def __init__(
        self, users: Users, mode: str, refused: Callable[[str, str], None] | None = None
    ) -> None:
        """`refused` is told of each login that was: the client's address, and the user that it claims to be."""
        self._users = users
        self._refused = refused
        self.required = mode == "required"
        self.offered = mode != "none"

    def check(self, name: bytes, password: bytes, client: Address) -> str | None:
        """The user's name where the password is right, else None."""
        user = self._users.check(name, password)
        if user is None and self._refused is not None:
            self._refused(client.host, name.decode("utf-8", "replace"))
        return user
