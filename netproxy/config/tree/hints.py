"""Guesses what a user has meant: words spelled nearly alike, and keys in another section.

Pure.  Used only for errors.
"""

from __future__ import annotations

import re

_NO_SPACE = r"([A-Za-z_][A-Za-z0-9_-]*):(?!//)[^\s]"
"""A key and its value without a space between them."""
NO_VALUE = "unknown key without a value (a text with a comma is written in quotes)"
EDITS_LIMIT = 2
"""Edits between a word and the known word that is suggested for it."""
SECTIONS = {
    "listeners[]": (
        *("protocol", "listen", "network", "announce", "clients", "allow_open", "target"),
        *("clients_deny", "limits", "proxy_protocol", "mode", "owner", "routes"),
        *("stun", "port_mapping"),
    ),
    "listeners[].routes[]": ("alpn",),
    "listeners[].udp": (
        *("relay_port", "idle_timeout", "mapping", "filtering"),
        *("max_sessions", "max_sessions_per_client"),
    ),
    "listeners[].limits": ("connections", "connections_per_client", "handshakes"),
    "listeners[].tls": ("certificate", "key", "client_ca"),
    "rules[]": (
        *("via", "domain", "domain_file", "ip", "ip_file", "geoip", "port", "client", "user"),
        *("listener", "hours", "command", "not"),
    ),
    "upstreams.NAME": (
        *("url", "timeout", "bind", "mark", "keepalive", "members", "balance", "health_check"),
        "processes",
    ),
    "upstreams.NAME.tls": ("ca", "server_name", "insecure"),
    "auto": ("deadline", "remember", "entries"),
    "destinations": ("deny", "allow"),
    "dns": ("servers", "cache", "serve_stale", "prefer", "nat64", "hosts"),
    "tunnel.bridge": ("agents",),
    "tunnel.agent": ("bridge", "exit", "services"),
    "users.NAME": ("password",),
    "auth": ("cache_failures",),
    "users.NAME.limits": ("sessions",),
    "penalty": ("after", "for", "longest"),
    "udp": ("batching",),
    "tcp": ("splice",),
    "timeouts": ("handshake", "connect", "tcp_idle", "half_close", "drain"),
    "log": ("level", "format", "access", "queue", "file", "access_format"),
}
"""The keys that tell where they belong, by section; a key of several is listed in the usual one."""
SYNONYMS = {"cert": "certificate", "check": "health_check", "country": "geoip"}
"""Words of other programs that are not spelled like the key, and the key."""
LOGIN_KEYS = ("user", "username", "login", "password", "pass", "auth")
"""What other programs call the login of a proxy; here it stands in the URL."""


def joined_key(text: str) -> str:
    """Return the key of "key:value", which lacks a space; "" for any other text."""
    match = re.match(_NO_SPACE, text)
    return match[1] if match else ""


def mapping_hint(value: object) -> str:
    """Return what a value that should be a mapping probably lacks.  Repeats no value."""
    if isinstance(value, list):
        return " (write the keys without '- ' before them)"
    if isinstance(value, str) and (key := joined_key(value)):
        return f" (there is no space after '{key}:')"
    return ""


def misplaced(key: str, known: tuple[str, ...]) -> str:
    """Return " here (it belongs to dns)" if the key is known in another section, else "".

    `known`: keys of the section where it was found.
    """
    for section, keys in SECTIONS.items():
        if key in keys and not set(keys) & set(known):
            return f" here (it belongs to {section})"
    return ""


def synonym(key: str, known: tuple[str, ...]) -> str:
    """Return what a word of other programs is called here, " (did you mean 'x'?)", else ""."""
    if SYNONYMS.get(key) in known:
        return f" (did you mean '{SYNONYMS[key]}'?)"
    # These keys are together in upstreams and their hops alone.
    if key in LOGIN_KEYS and {"url", "udp"} <= set(known):
        return " (a login is part of the url: USER:PASSWORD and an @ before the host)"
    return ""


def suggestion(word: str, known: tuple[str, ...], edits: int | None = None) -> str:
    """Return " (did you mean 'x'?)" if a known word is spelled nearly like this one, else "".

    With `edits`, the known word must be at most so many edits away, and at most half of its
    length: "ssh" is not a misspelled "sps".
    """
    import difflib  # late: only needed for an error

    for near in difflib.get_close_matches(word, known):
        if edits is None or edit_distance(word, near) <= min(edits, len(near) // 2):
            return f" (did you mean '{near}'?)"
    return ""


def edit_distance(first: str, second: str) -> int:
    """Return how many letters to insert, delete or replace to get from one word to the other."""
    row = list(range(len(second) + 1))
    for index, letter in enumerate(first, 1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(second, 1):
            replaced = diagonal + (letter != other)
            diagonal, row[column] = row[column], min(replaced, row[column] + 1, row[column - 1] + 1)
    return row[-1]
