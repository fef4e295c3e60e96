"""Checks a list that was fetched, before it replaces the one before.

Its author must not be able to slow the daemon down: every flow is compared with all keywords and
expressions, and one expression may take seconds.  Names and networks cost the same in any number.
"""

from __future__ import annotations

from netproxy.errors import ConfigError
from netproxy.interfaces.services import DOMAINS
from netproxy.router.lists import read_domains, read_networks
from netproxy.router.patterns import KEYWORD, REGEX, excerpt


def count_entries(kind: str, path: str) -> int:
    """Read a list of a kind (interfaces.services); return its entries.  Raises ConfigError."""
    if kind != DOMAINS:
        return sum(1 for _ in read_networks(path))
    entries = 0
    for pattern in read_domains(path):
        if pattern.kind & (KEYWORD | REGEX):
            message = f"'{excerpt(pattern.text)}' is a keyword or an expression: write it in a rule"
            raise ConfigError(message, path)
        entries += 1
    return entries
