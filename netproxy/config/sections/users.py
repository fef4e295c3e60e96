"""Reads the sections `users` (names, passwords and limits) and `penalty`.

Passwords are in no message and no repr.
"""

from __future__ import annotations

import re
import time

from netproxy.config.schema import PenaltyConfig, QuotaConfig, UserConfig, UserLimitsConfig
from netproxy.config.sections.binds import read_bind
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.units import (
    parse_frequency,
    parse_rate,
    parse_size,
    parse_whole,
    parse_whole_limit,
)
from netproxy.interfaces.listeners import HASH_PREFIX

HOW_TO_HASH = "make a hash of the password with 'netproxyctl hash-password'"
DATE = "%Y-%m-%d"
NAME_LIMIT = 255
"""Bytes: RFC 1929 has one byte for the length."""
FAILURES_LIMIT = 1000
"""The limit of penalty.after: the time of each failure is remembered, for 1024 addresses."""
_CRYPT64, _BASE64, _HEX = "[./A-Za-z0-9]", "[A-Za-z0-9+/]", "[0-9a-f]"
"""The alphabets of digests."""
_NULLS = ("~", "null", "Null", "NULL")
"""What YAML means by no value.  Nobody may log in with such a word by mistake."""
_FOREIGN_HASHES = {
    "bcrypt": rf"\$2[abxy]?\$[0-9]{{2}}\${_CRYPT64}{{53}}",
    "md5-crypt": rf"\$(1|apr1)\$[^$]{{0,8}}\${_CRYPT64}{{22}}",
    "sha256-crypt": rf"\$5\$(rounds=[0-9]+\$)?[^$]{{0,16}}\${_CRYPT64}{{43}}",
    "sha512-crypt": rf"\$6\$(rounds=[0-9]+\$)?[^$]{{0,16}}\${_CRYPT64}{{86}}",
    "scrypt-crypt": rf"\$7\${_CRYPT64}{{11}}[^$]*\${_CRYPT64}{{43}}",
    "yescrypt": rf"\$g?y\${_CRYPT64}+\${_CRYPT64}*\${_CRYPT64}{{43}}",
    "Argon2": r"\$argon2(d|i|id)\$(v=[0-9]+\$)?m=[0-9]+,t=[0-9]+,p=[0-9]+"
    rf"\${_BASE64}+\${_BASE64}{{16,}}",
    "PBKDF2": rf"\$pbkdf2(-sha[0-9]+)?\$[0-9]+\${_CRYPT64}*\${_CRYPT64}{{27,86}}"
    rf"|pbkdf2:[a-z0-9]+(:[0-9]+)?\$[^$]+\${_HEX}{{32,128}}",
    "Werkzeug": rf"scrypt:[0-9]+:[0-9]+:[0-9]+\$[^$]+\${_HEX}{{128}}",
    # MD5 has 16 bytes, SHA at least 20; a salt may follow.
    "LDAP": rf"\{{S?MD5\}}{_BASE64}{{22,}}={{0,2}}|\{{S?SHA[0-9]*\}}{_BASE64}{{27,}}={{0,2}}"
    rf"|\{{CRYPT\}}[./A-Za-z0-9$=,]{{13,}}",
}
"""The hashes of other programs: regular expressions with the length and alphabet of the digest.
Text, because `re` compiles it."""
_FOREIGN_BEGINS = ("$", "{", "pbkdf2:", "scrypt:")
"""How these hashes begin.  Other text is not compared: a file may have 100,000 lines."""


def read_users(
    section: MapReader, upstreams: UpstreamReader, problems: Problems
) -> dict[str, UserConfig]:
    """Return the users by name."""
    return {
        name: read_user(name, _user_reader(name, node, problems), upstreams)
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


def read_user(name: str, section: MapReader, upstreams: UpstreamReader) -> UserConfig:
    """Return one user."""
    if ":" in name:
        # What follows the colon is probably a password.
        section.path = f"users.{name.partition(':')[0]}"
    password = section.secret("password")
    # HTTP Basic separates name and password by a colon.
    if not 0 < len(name.encode()) <= NAME_LIMIT or ":" in name:
        section.add_error("", "a user's name has 1 to 255 bytes and no ':'")
    if not password:
        section.add_error("password", "is missing or empty")
    elif password in _NULLS:
        section.add_error("password", f"is empty: {password} stands for no value in YAML")
    elif password.startswith(HASH_PREFIX):
        pass  # netproxy.access.users checks it
    elif kind := foreign_hash(password):
        message = f"is a hash of the kind {kind}, which NetProxy does not check: {HOW_TO_HASH}"
        section.add_error("password", message)
    else:
        section.warn("password", f"is plain text: {HOW_TO_HASH}")
    place = section.place_of("password")
    limits = read_user_limits(section.mapping("limits"))
    expires, node = section.read("expires", _date, ""), section.take("upstream")
    upstream = upstreams.read(node, f"{section.path}.upstream") if node else None
    user = UserConfig(password, limits, expires, upstream, place, read_bind(section))
    section.finish()
    return user


def read_user_limits(section: MapReader) -> UserLimitsConfig:
    """Return the limits of a user.  `rate` is short for rate_up and rate_down."""
    both = section.read("rate", parse_rate, None)
    limits = UserLimitsConfig(
        section.read("connections", parse_whole_limit, None),
        section.read("sessions", parse_whole_limit, None),
        section.read("connection_rate", parse_frequency, None),
        section.read("rate_up", parse_rate, both),
        section.read("rate_down", parse_rate, both),
        section.read("burst", parse_size, None),
        _quota(section),
    )
    section.finish()
    return limits


def _quota(limits: MapReader) -> QuotaConfig:
    """Return the quota; a single size is the total."""
    node = limits.peek("quota")
    if node is not None and isinstance(node.value, str):
        return QuotaConfig(total=limits.read("quota", parse_size, None))
    section = limits.mapping("quota")
    quota = QuotaConfig(
        section.read("day", parse_size, None),
        section.read("month", parse_size, None),
        section.read("total", parse_size, None),
    )
    section.finish()
    return quota


def read_penalty(section: MapReader) -> PenaltyConfig:
    """Return what failed logins lead to.  `after: 0` switches penalties off."""
    defaults = PenaltyConfig()
    penalty = PenaltyConfig(
        section.read("after", _failures, defaults.after),
        section.duration("for", defaults.duration),
        section.duration("longest", defaults.longest),
    )
    if penalty.longest < penalty.duration:
        section.add_error("longest", "is shorter than for, the first penalty")
    section.finish()
    return penalty


def _failures(text: str) -> int:
    """Parse a number of failures, 0 for no penalty.  Raises ValueError."""
    if text == "0":
        return 0
    try:
        failures = parse_whole(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a whole number (0 switches penalties off)") from None
    if failures > FAILURES_LIMIT:
        raise ValueError(f"'{text}' is above {FAILURES_LIMIT} (0 switches penalties off)")
    return failures


def _date(text: str) -> str:
    try:
        return time.strftime(DATE, time.strptime(text, DATE))
    except ValueError:
        raise ValueError(f"'{text}' is not a date (expected 2027-01-31)") from None


def foreign_hash(password: str) -> str:
    """Return the kind of hash that a password is, "" for a plain password."""
    if not password.startswith(_FOREIGN_BEGINS):
        return ""
    for kind, pattern in _FOREIGN_HASHES.items():
        if re.fullmatch(pattern, password):
            return kind
    return ""
