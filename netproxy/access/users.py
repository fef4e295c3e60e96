"""Users and their passwords: scrypt hashes (RFC 7914), or plain text for a test setup.

A check takes as long for an unknown user as for a wrong password.  scrypt is slow on purpose,
so a password that was right is remembered as a keyed digest, in memory only.  recall() asks only
what is remembered, and is fast.

libcrypto is loaded at the first check: it costs 4 MiB, which a daemon without users saves.  It is
used through _hashlib: hashlib and hmac ignore an ImportError of _hashlib and then have no scrypt
until the process ends, but _hashlib itself is imported again at the next check.

All checks of first logins together use at most MEMORY_LIMIT bytes, and those of suspects as much
again (access.checks.lanes).  A check for which too little memory is left waits until others end.
"""

from __future__ import annotations

import binascii
import os

from netproxy.access.checks.memory_share import MemoryShare
from netproxy.errors import LoginUnavailable
from netproxy.interfaces.listeners import HASH_PREFIX
from netproxy.typed import Callable, Mapping, NamedTuple

COST, BLOCK, PARALLEL = 16384, 8, 1
"""scrypt's N, r and p for interactive logins: 16 MiB and some 50 ms."""
SALT_BYTES = 16
HASH_BYTES = 32
SHORTEST_HASH_BYTES = 16
COST_LIMIT = 1 << 20
"""The limit of N * r * p in a hash from the configuration: a check takes less than a GiB."""
OPENSSL_BYTES = 1 << 20
"""Memory that OpenSSL uses beyond what scrypt needs."""
MEMORY_LIMIT = 24 << 20
"""Bytes that checks take at the same time: one of the default cost, or four of cost 4096.  A single
check that needs more gets it while no first login is checked, and no other one that needs more."""
LOWEST_COST = 1024
"""The lowest N of a new hash: it takes 1 MiB, and a cheaper one is guessed too easily."""
HIGHEST_COST = COST_LIMIT // BLOCK
_INVALID = "not a hash made by 'netproxyctl hash-password'"


Announce = Callable[[str, bytes, bytes], None]
"""Tells of a right login: the user, the key of the digest and the digest of the password, b"" for
a password in plain text."""


class _Hash(NamedTuple):
    """A parsed scrypt hash."""

    cost: int
    block: int
    parallel: int
    salt: bytes
    digest: bytes


_DEFAULT_DECOY = _Hash(COST, BLOCK, PARALLEL, b"", b"")


class Users:
    """All users and their passwords.  Thread: any; only its memory of right passwords changes."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        """`passwords`: name -> "scrypt$N$r$p$salt$hash" (salt and hash in base64) or plain text.

        Raises ValueError for an invalid hash.
        """
        self._plain: dict[str, bytes] = {}
        self._hashed: dict[str, _Hash] = {}
        for name, value in passwords.items():
            if value.startswith(HASH_PREFIX):
                self._hashed[name] = _parse(value)
            else:
                self._plain[name] = value.encode()
        # Checked for unknown users, so that they take as long as the others.
        costliest = max(self._hashed.values(), key=_work, default=None) or _DEFAULT_DECOY
        self._decoy = costliest._replace(salt=bytes(SALT_BYTES), digest=bytes(HASH_BYTES))
        self._memory, self._of_suspects = MemoryShare(MEMORY_LIMIT), MemoryShare(MEMORY_LIMIT)
        self._seen: dict[str, bytes] = {}
        """Keyed digests of passwords that were right, by user.  Assignments are atomic."""
        self._seen_plain: set[str] = set()
        """Users who have logged in with a password in plain text."""
        self._key = os.urandom(32)
        self.announce: Announce | None = None
        """Tells other processes of a first right login; None if there are none."""

    def __len__(self) -> int:
        return len(self._plain) + len(self._hashed)

    @property
    def are_hashed(self) -> bool:
        """True if any password is hashed: every check takes time then."""
        return bool(self._hashed)

    def stamp(self, user: str) -> object:
        """Return a number that depends on a user's password, None for an unknown user.

        It is for comparisons: a login is valid while its stamp is the same.
        """
        password = self._hashed.get(user) or self._plain.get(user)
        return None if password is None else hash(password)

    def check(self, name: bytes, password: bytes, is_suspect: bool = False) -> str | None:
        """Return the user's name if the password is right, else None.

        `is_suspect`: the check may not hold the memory that first logins wait for.
        Blocks for some 50 ms if any password is hashed, longer if other checks are running.
        Raises LoginUnavailable if there is no memory for the check.
        """
        user = name.decode("utf-8", "replace")
        try:
            # If any user has a hash, every check computes one: the time must not tell who has none.
            right = self._check_hash(user, password, is_suspect) if self._hashed else False
            import hmac  # late: it brings libcrypto
        except (ImportError, OSError, MemoryError) as error:
            raise LoginUnavailable(f"no memory to check the password ({error})") from error

        if user in self._plain or not self._hashed:
            expected = self._plain.get(user, b"")
            right = hmac.compare_digest(expected, password) and user in self._plain
            if right:
                if self.announce is not None and user not in self._seen_plain:
                    self.announce(user, self._key, b"")
                self._seen_plain.add(user)
        return user if right else None

    def recall(self, user: str, password: bytes) -> bool | None:
        """Return whether a password was right before; None if none of the user was."""
        if user not in self._seen_plain and user not in self._seen:
            return None
        import hmac  # late, and loaded by check(), which has remembered the user

        if user in self._seen_plain:
            return hmac.compare_digest(self._plain[user], password)
        return hmac.compare_digest(self._seen[user], self._digest(user, password))

    def take_over(self, earlier: Users) -> None:
        """Remember what another object does of users whose password is the same here.

        Before the first check.
        """
        self._key = earlier._key
        self._seen = {
            user: digest
            for user, digest in list(earlier._seen.items())
            if self._hashed.get(user) == earlier._hashed[user]
        }
        self._seen_plain = {
            user
            for user in list(earlier._seen_plain)
            if self._plain.get(user) == earlier._plain[user]
        }

    def _digest(self, user: str, password: bytes) -> bytes:
        """Return the keyed digest of a password and of the hash that it was checked against.

        Without the hash, a process that still has another configuration could tell of a password
        that is not valid any more.
        """
        from _hashlib import hmac_digest  # late: as in check()

        hashed = self._hashed.get(user, self._decoy)
        return hmac_digest(self._key, hashed.salt + hashed.digest + password, "sha256")

    def _check_hash(self, user: str, password: bytes, is_suspect: bool) -> bool:
        seen = self._digest(user, password)  # before hmac, which then uses OpenSSL as well
        import hmac

        # Without the lock: a known user does not wait behind clients that guess passwords.
        if hmac.compare_digest(self._seen.get(user, bytes(32)), seen):
            return True
        expected = self._hashed.get(user, self._decoy)
        needed = _needed_memory(expected)
        own = is_suspect and needed <= MEMORY_LIMIT
        with (self._of_suspects if own else self._memory).of(needed):
            digest = _scrypt(password, expected)
        right = hmac.compare_digest(digest, expected.digest) and user in self._hashed
        if right:
            self._seen[user] = seen
            if self.announce is not None:
                self.announce(user, self._key, seen)
        return right

    def learn(self, user: str, key: bytes, seen: bytes) -> None:
        """Remember a login that was right in another process, which announce() has told of.

        A process that was started later has another key, and has to check for itself.
        """
        if not seen and user in self._plain:
            self._seen_plain.add(user)
        elif key == self._key and user in self._hashed:
            self._seen[user] = seen


def hash_password(password: str, cost: int = COST) -> str:
    """Return a new hash of a password, for the configuration.  Takes some 50 ms.

    `cost`: scrypt's N, a power of two; a check takes N KiB.
    """
    template = _Hash(cost, BLOCK, PARALLEL, os.urandom(SALT_BYTES), bytes(HASH_BYTES))
    digest = _scrypt(password.encode(), template)
    salt_text, digest_text = (
        binascii.b2a_base64(part, newline=False).decode() for part in (template.salt, digest)
    )
    return f"{HASH_PREFIX}{cost}${BLOCK}${PARALLEL}${salt_text}${digest_text}"


def users_file_line(name: str, hashed: str) -> str:
    """Return a line of a users file.  Raises ValueError for a name that no line can hold."""
    if not 0 < len(name.encode(errors="replace")) < 256 or ":" in name or name.startswith("#"):
        raise ValueError("a user's name has 1 to 255 bytes, no ':' and no '#' at its begin")
    if name != name.strip() or not name.isprintable():
        raise ValueError("a user's name has no blank at its begin or end, and no control character")
    return f"{name}:{hashed}"


def parse_cost(text: str) -> int:
    """Return the cost of a new hash.  Raises ValueError."""
    cost = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
    if cost & (cost - 1) or not LOWEST_COST <= cost <= HIGHEST_COST:
        raise ValueError(f"'{text}' is not a power of two from {LOWEST_COST} to {HIGHEST_COST}")
    return cost


def check_password(value: str) -> None:
    """Raise ValueError if a password of the configuration is an invalid hash."""
    if value.startswith(HASH_PREFIX):
        _parse(value)


def _scrypt(password: bytes, parameters: _Hash) -> bytes:
    """Return the hash of a password.  Raises LoginUnavailable if there is no memory for it."""
    needed = _needed_memory(parameters)
    try:
        from _hashlib import scrypt  # late: as in Users.check()

        return scrypt(
            password,
            salt=parameters.salt,
            n=parameters.cost,
            r=parameters.block,
            p=parameters.parallel,
            dklen=len(parameters.digest),
            maxmem=needed,
        )
    # OpenSSL reports a failed allocation as ValueError, the loader of libcrypto as ImportError or,
    # without a descriptor, as OSError.
    except (MemoryError, ValueError, ImportError, OSError) as error:
        raise LoginUnavailable(
            f"no memory to check the password ({needed >> 20} MiB): "
            "make cheaper hashes with 'netproxyctl hash-password --cost 4096'"
        ) from error


def _work(parameters: _Hash) -> int:
    return parameters.cost * parameters.block * parameters.parallel


def _needed_memory(parameters: _Hash) -> int:
    """Return the bytes that scrypt may use: what RFC 7914 section 6 needs, and OpenSSL's own."""
    blocks = parameters.cost + parameters.parallel + 2
    return 128 * parameters.block * blocks + OPENSSL_BYTES


def _parse(value: str) -> _Hash:
    """Parse "scrypt$N$r$p$salt$hash".  Raises ValueError."""
    try:
        cost_text, block_text, parallel_text, salt, digest = value[len(HASH_PREFIX) :].split("$")
        parsed = _Hash(
            int(cost_text), int(block_text), int(parallel_text), _decoded(salt), _decoded(digest)
        )
    except ValueError as error:
        raise ValueError(_INVALID) from error
    cost, block, parallel = parsed[:3]
    # RFC 7914 section 2: N is a power of two greater than 1 and less than 2^(128 * r / 8).
    if (
        min(cost, block, parallel) < 1
        or cost < 2
        or cost & (cost - 1)
        or cost.bit_length() - 1 >= 16 * block
        or len(parsed.digest) < SHORTEST_HASH_BYTES
    ):
        raise ValueError(_INVALID)
    if cost * block * parallel > COST_LIMIT:
        raise ValueError(
            f"the hash costs too much to check: N * r * p is above {COST_LIMIT} (make another one "
            f"with 'netproxyctl hash-password --cost', which takes at most {HIGHEST_COST})"
        )
    return parsed


def _decoded(text: str) -> bytes:
    """Decode base64.  Raises ValueError, also for characters that are not base64."""
    decoded = binascii.a2b_base64(text)
    if binascii.b2a_base64(decoded, newline=False) != text.encode("ascii"):
        raise ValueError("not base64")
    return decoded
