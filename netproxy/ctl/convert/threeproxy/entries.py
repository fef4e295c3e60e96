"""Entries of 3proxy's access lists, as conditions of rules.

An entry has the lists users, sources, targets, ports, operations, weekdays and times; "*" or
nothing is all of them.
"""

from __future__ import annotations

import re

from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.terms.conditions import ANY, CannotCombine, Match, every, wanting
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive
    from netproxy.ctl.convert.threeproxy.lines import Command

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HTTP = {"HTTP_GET", "HTTP_PUT", "HTTP_POST", "HTTP_HEAD", "HTTP_OTHER"}
_OPERATIONS = {
    "http": {"HTTP": "http", "HTTPS": "connect", "HTTP_CONNECT": "connect"},
    "socks5": {"CONNECT": "connect", "BIND": "bind", "UDPASSOC": "udp"},
    "tcp": {"CONNECT": "connect"},
    "udp": {"UDPASSOC": "udp"},
    "sps": {
        **{"HTTP": "http", "HTTPS": "connect", "HTTP_CONNECT": "connect"},
        **{"CONNECT": "connect", "BIND": "bind", "UDPASSOC": "udp"},
    },
}
"""The operations of each protocol of listeners, and the commands that they are."""
LOCAL_USER = "-"
"""The name that 3proxy gives to a client without a login."""


class Parent(NamedTuple):
    """A proxy that an entry leads to."""

    directive: Directive
    weight: int
    kind: str
    host: str
    port: int
    user: str
    password: str


class Entry(NamedTuple):
    """An entry of an access list."""

    directive: Directive
    allows: bool
    users: tuple[str, ...]
    """() for all."""
    fields: tuple[str, ...]
    """The other lists as they are written."""
    parents: list[Parent]

    def field(self, at: int) -> list[str]:
        """Return the values of a list, [] for all: 0 sources, 1 targets, 2 ports and so on."""
        text = self.fields[at] if at < len(self.fields) else "*"
        values = [value for value in text.split(",") if value]
        return [] if "*" in values else values


def read_entry(command: Command, allows: bool, skipped: int = 0) -> Entry:
    """Return the entry of a command; `skipped`: the words before its lists."""
    users, *fields = [*command.words[skipped:], "*"]
    names = tuple(name for name in users.split(",") if name)
    is_any = "*" in names or not command.words[skipped:]
    return Entry(command.directive, allows, () if is_any else names, tuple(fields), [])


def entry_matches(entry: Entry, protocol: str) -> list[Match]:
    """Return the matches of an entry at a listener, without its users; [] if it never matches.

    Raises CannotCombine.
    """
    parts = [_sources(entry), _ports(entry), _hours(entry)]
    commands = _commands(entry, protocol)
    if commands is None:
        return []
    found = []
    for target in _targets(entry):
        match = every([*parts, target, commands])
        if match is not None:
            found.append(match)
    return found


def _sources(entry: Entry) -> Match:
    found = [network for value in entry.field(0) for network in _networks(value)]
    return wanting("client", found) if found else ANY


def _networks(text: str) -> list[str]:
    """Return the networks of an address, a network or a range.  Raises CannotCombine."""
    first, dash, last = text.partition("-")
    try:
        return networks.parse_span(first, last) if dash else [networks.parse_network(text)]
    except ValueError:
        raise CannotCombine(f"'{text}' is not a network") from None


def _targets(entry: Entry) -> list[Match]:
    hosts: list[str] = []
    names: list[str] = []
    for value in entry.field(1):
        if re.fullmatch(r"[0-9a-fA-F.:/-]*[0-9a-fA-F]", value) and re.match(
            r"[\d:]|[\da-fA-F]+:", value
        ):
            hosts += _networks(value)
        else:
            names.append(_pattern(value))
    matches = [wanting("ip", hosts)] if hosts else []
    matches += [wanting("domain", names)] if names else []
    return matches or [ANY]


def _pattern(name: str) -> str:
    """Return the pattern of a name with "*" at its ends.  Raises CannotCombine."""
    bare = name.strip("*").lower()
    if not re.fullmatch(r"[\w.-]+", bare):
        raise CannotCombine(f"'{name}' is not a name")
    escaped = re.escape(bare)
    if name.startswith("*") and name.endswith("*"):
        return f"keyword:{bare}"
    if name.startswith("*."):
        return f"*{bare}"
    if name.startswith("*"):
        return f"regex:.{escaped}$"
    return f"regex:^{escaped}" if name.endswith("*") else bare


def _ports(entry: Entry) -> Match:
    values = entry.field(2)
    try:
        spans = [networks.parse_port_range(value) for value in values]
    except ValueError as error:
        raise CannotCombine(str(error)) from error
    return wanting("port", map(networks.port_text, spans)) if spans else ANY


def _commands(entry: Entry, protocol: str) -> Match | None:
    """Return the match of the operations; None if none of them is of this protocol."""
    asked = {value.upper() for value in entry.field(3)}
    if not asked:
        return ANY
    if asked & _HTTP and protocol in ("http", "sps"):
        if not _HTTP <= asked and "HTTP" not in asked:
            raise CannotCombine("the methods of requests are not told apart, except CONNECT")
        asked.add("HTTP")
    known = _OPERATIONS.get(protocol, {})
    commands = list(dict.fromkeys(known[name] for name in known if name in asked))
    if set(commands) == set(known.values()):
        return ANY
    return wanting("command", commands) if commands else None


def _hours(entry: Entry) -> Match:
    days = [_day_range(value) for value in entry.field(4)]
    times = [_time_range(value) for value in entry.field(5)]
    if not days and not times:
        return ANY
    shown = [",".join(days)] if days else [""]
    return wanting("hours", [f"{d} {t}".strip() for d in shown for t in times or [""]])


def _day_range(text: str) -> str:
    first, dash, last = text.partition("-")
    if not re.fullmatch(r"[0-7](-[0-7])?", text):
        raise CannotCombine(f"'{text}' is not a day of the week")
    return f"{_DAYS[int(first)]}-{_DAYS[int(last)]}" if dash else _DAYS[int(first)]


def _time_range(text: str) -> str:
    match = re.fullmatch(r"(\d\d?):(\d\d)(?::(\d\d))?-(\d\d?):(\d\d)(?::(\d\d))?", text)
    if not match:
        raise CannotCombine(f"'{text}' is not a time of the day")
    begin_hour, begin_minute, _, end_hour, end_minute, seconds = match.groups()
    begin = int(begin_hour) * 60 + int(begin_minute)
    # The last second of a minute is its end.
    end = int(end_hour) * 60 + int(end_minute) + (seconds == "59")
    if begin >= end or end > 24 * 60:
        raise CannotCombine(f"'{text}' is not a time of the day")
    return f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"


def subject(entry: Entry) -> Sequence[str] | None:
    """Return the users that an entry is about alone, () for everybody; None if more is asked."""
    others = any(entry.field(at) for at in range(6))
    return None if others else entry.users
