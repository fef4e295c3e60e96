"""Reads the section `users`: names, passwords and limits.

Passwords are in no message and no repr.
"""

from __future__ import annotations

from netproxy.config.schema import UserConfig
from netproxy.config.tree.node import MapReader, Node, Problems

HASH_PREFIX = "scrypt$"
HOW_TO_HASH = "make a hash of the password with 'netproxyctl hash-password'"
NAME_LIMIT = 255
"""Bytes: RFC 1929 has one byte for the length."""
_NULLS = ("~", "null", "Null", "NULL")
"""What YAML means by no value.  Nobody may log in with such a word by mistake."""
_FOREIGN_HASHES = {
    "$2": "bcrypt",
    "$1$": "md5-crypt",
    "$apr1$": "md5-crypt",
    "$5$": "sha256-crypt",
    "$6$": "sha512-crypt",
    "$7$": "scrypt-crypt",
    "$y$": "yescrypt",
    "$gy$": "yescrypt",
    "$argon2": "Argon2",
    "$pbkdf2": "PBKDF2",
    "pbkdf2:": "PBKDF2",
    "scrypt:": "Werkzeug",
    "{SHA": "LDAP",
    "{SSHA": "LDAP",
    "{MD5}": "LDAP",
    "{SMD5}": "LDAP",
    "{CRYPT}": "LDAP",
}
"""How the hashes of other programs begin, and what they are called."""


def read_users(section: MapReader, problems: Problems) -> dict[str, UserConfig]:
    """Return the users by name."""
    return {
        name: _read_user(name, _user_reader(name, node, problems))
        for name, node in section.rest().items()
    }


def _user_reader(name: str, node: Node, problems: Problems) -> MapReader:
    """Return the reader of one user; says how a user is written if it is a text."""
    path = f"users.{name}"
    if isinstance(node.value, str) and node.value:
        message = f'{path} must be a mapping: write {name}: {{password: "..."}}'
        problems.add(message, node.place)
        return MapReader(node, path, Problems())
    return MapReader(node, path, problems)


def _read_user(name: str, section: MapReader) -> UserConfig:
    password = section.secret("password")
    # HTTP Basic separates name and password by a colon.
    if not 0 < len(name.encode()) <= NAME_LIMIT or ":" in name:
        section.add_error("", "a user's name has 1 to 255 bytes and no ':'")
    if not password:
        section.add_error("password", "is missing or empty")
    elif password in _NULLS:
        section.add_error("password", f"is empty: {password} stands for no value in YAML")
    elif kind := foreign_hash(password):
        message = f"is a hash of the kind {kind}, which NetProxy does not check: {HOW_TO_HASH}"
        section.add_error("password", message)
    elif not password.startswith(HASH_PREFIX):
        section.warn("password", f"is plain text: {HOW_TO_HASH}")
    limits = section.mapping("limits")
    user = UserConfig(password, limits.whole("sessions", None), section.place_of("password"))
    limits.finish()
    section.finish()
    return user


def foreign_hash(password: str) -> str:
    """Return the kind of hash that a password is, "" for a password or a hash of our own."""
    for prefix, kind in _FOREIGN_HASHES.items():
        # "$2" alone may begin a password: a hash has a salt and a digest, each behind a "$".
        dollars = 0 if prefix[0] == "{" else prefix.startswith("$") + 2
        has_parts = password.count("$") >= dollars and password.count("}") >= (not dollars)
        if password.startswith(prefix) and has_parts:
            return kind
    return ""
