"""Lists of targets and of clients, as gost and goproxy write them: conditions of rules.  Pure."""

from __future__ import annotations

import re

from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.terms.conditions import Match, wanting
from netproxy.ctl.convert.terms.patterns import from_wildcards
from netproxy.typed import Iterable, NamedTuple

_NAME = re.compile(r"(?:\*|\.|\*\.)?[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\Z")
_WILDCARDS = re.compile(r"[A-Za-z0-9_.*?\[\]!-]+\Z")


class Targets(NamedTuple):
    """The conditions of a list, and the elements that are none."""

    matches: list[Match]
    unknown: list[str]


def parse_targets(texts: Iterable[str]) -> Targets:
    """Return the conditions of addresses, networks, ranges, names and patterns, with ports."""
    by_port: dict[str, tuple[list[str], list[str]]] = {}
    unknown: list[str] = []
    for text in texts:
        try:
            is_expression = text.startswith("regex:")
            host, port = (text, "") if is_expression else _split_port(text)
            networks_of = [] if is_expression else parse_networks(host)
            addresses, names = by_port.setdefault(port, ([], []))
            addresses += networks_of
            if not networks_of:
                names.append(host if is_expression else parse_name(host))
        except ValueError:
            unknown.append(text)
    matches = []
    for port, (addresses, names) in by_port.items():
        parts = [wanting("ip", addresses)] if addresses else []
        parts += [wanting("domain", names)] if names else []
        for part in parts:
            matches.append(Match({**part.wanted, "port": (port,)}) if port else part)
    return Targets(matches, unknown)


def parse_networks(text: str) -> list[str]:
    """Return the networks of an address, a network, a range or "192.168.*.*"; [] for a name.

    Raises ValueError for a range that is none.
    """
    if networks.is_network(text):
        return [networks.parse_network(text)]
    first, dash, last = text.partition("-")
    if dash and networks.is_host(first.strip()):
        return networks.parse_span(first, last)
    numbers = text.split(".")
    is_open = len(numbers) == 4 and "*" in numbers
    if is_open and re.fullmatch(r"(?:[0-9]{1,3}\.){1,3}\*(?:\.\*)*", text):
        fixed = numbers.index("*")
        return [networks.parse_network(f"{text.replace('*', '0')}/{8 * fixed}")]
    return []


def parse_name(text: str) -> str:
    """Return the pattern of rules for a name or a pattern.  Raises ValueError."""
    lower = text.lower()
    if re.fullmatch(r"[0-9.*?]+", lower):
        raise ValueError(f"'{text}' is not an address that a rule can have")
    if lower.startswith("*.") and _NAME.match(lower):
        return lower
    if _NAME.match(lower) and "*" not in lower:
        return lower
    if not _WILDCARDS.match(lower):
        raise ValueError(f"'{text}' is not a name")
    return from_wildcards(lower)


def _split_port(text: str) -> tuple[str, str]:
    """Return the host and the ports of "example.com:80", "[::1]:80-90" or "example.com"."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]+(?:-[0-9]+)?)", text.strip())
    if not match:
        return text.strip().strip("[]"), ""
    ports = networks.parse_port_range(match[3])
    every = len(ports) >= networks.LAST_PORT
    return match[1] or match[2], "" if every else networks.port_text(ports)
