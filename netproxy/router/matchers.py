"""Sets of names, of ports and of times, which the conditions of rules are compiled to.

A set is built once, from patterns as users write them (patterns.py) or as list files hold
them (lists.py), and only read afterwards, by any thread.  The sets know no flows and no
rules; they resolve no names and do no I/O.  Sets of networks are in interfaces.networks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.networks import span_edges
from netproxy.interfaces.flows import WEEK_MINUTES
from netproxy.router.patterns import (
    APEX,
    BELOW,
    KEYWORD,
    PORT_LIMIT,
    REGEX,
    DomainPattern,
    compile_expression,
    parse_domain,
    parse_ports,
)
from netproxy.typed import TYPE_CHECKING, Iterable

if TYPE_CHECKING:
    import re


class DomainSet:
    """The names that match any of the patterns."""

    __slots__ = ("_names", "_depth", "_keywords", "_expressions")

    def __init__(self, patterns: Iterable[str | DomainPattern]) -> None:
        """Compile the patterns; raises ValueError for a wrong text."""
        self._names = _NameTable()
        # Labels of the deepest name: no longer suffix needs a lookup.
        self._depth = 0
        keywords: dict[str, None] = {}
        expressions: dict[str, re.Pattern[str]] = {}
        for pattern in patterns:
            kind, text = parse_domain(pattern) if isinstance(pattern, str) else pattern
            if kind == KEYWORD:
                keywords[text] = None
            elif kind == REGEX:
                expressions[text] = compile_expression(text)
            else:
                self._names.add(kind, text)
                self._depth = max(self._depth, text.count(".") + 1)
        self._names.index()
        self._keywords = tuple(keywords)
        self._expressions = tuple(expressions.values())

    def __contains__(self, host: str) -> bool:
        """Return whether a canonical name (protocol.host) matches; an address never does."""
        if ":" in host or pack_ip(host):
            return False
        name = host.encode("ascii") + b"\n"
        start = len(name)
        # Look up the last label, the last two, and so on up to the whole name.
        for _ in range(self._depth):
            start = name.rfind(b".", 0, start)
            if self._names.bits(name[start + 1 :]) & (BELOW if start >= 0 else APEX):
                return True
            if start < 0:
                break
        return any(keyword in host for keyword in self._keywords) or any(
            expression.search(host) for expression in self._expressions
        )


class _NameTable:
    """A packed map of names to the bits of their patterns.

    All names stand in one text; a hash table holds their places in it.  For 200,000 names
    of 26 letters the table takes 7.4 MiB and needs 2.8 us for a name of five labels that is
    not in it.  A dict of str would take 23 MiB and 2.1 us; sorted hashes, which could
    collide, 3.2 MiB and 4.0 us.  No reference counts are written, so that forked processes
    share the pages.
    """

    __slots__ = ("_text", "_slots", "_mask", "_count")

    def __init__(self) -> None:
        # For each name: a byte with its bits, the name, and "\n".  Place 0 belongs to no name.
        self._text = bytearray(b"\n")
        # Places in the text; 0 is a free slot.  At least half of the slots are free.
        self._slots = array("I", [0])
        self._mask = 0
        self._count = 0

    def add(self, bits: int, name: str) -> None:
        """Add a name, which bits() sees after index()."""
        self._text += b"%c%b\n" % (bits, name.encode("ascii"))
        self._count += 1

    def index(self) -> None:
        """Build the hash table."""
        self._slots = array("I", bytes(8 << self._count.bit_length()))
        self._mask = len(self._slots) - 1
        place = 1
        while place < len(self._text):
            end = self._text.index(b"\n", place + 1) + 1
            self._insert(place, bytes(self._text[place + 1 : end]))
            place = end

    def _insert(self, place: int, name: bytes) -> None:
        text, slots, slot = self._text, self._slots, hash(name) & self._mask
        while there := slots[slot]:
            if text.startswith(name, there + 1):
                text[there] |= text[place]
                return
            slot = slot + 1 & self._mask
        slots[slot] = place

    def bits(self, name: bytes) -> int:
        """Return the bits of a name, which ends with "\\n"; 0 if it is not in the table."""
        text, slots, slot = self._text, self._slots, hash(name) & self._mask
        while there := slots[slot]:
            if text.startswith(name, there + 1):
                return text[there]
            slot = slot + 1 & self._mask
        return 0


class PortSet:
    """The ports in any of the ranges."""

    __slots__ = ("_edges",)

    def __init__(self, texts: Iterable[str]) -> None:
        """Compile texts such as "443" and "8000-8100"; raises ValueError."""
        self._edges = _edges(map(parse_ports, texts), PORT_LIMIT + 1)

    def __contains__(self, port: int) -> bool:
        """Return whether a port is in one of the ranges."""
        return bisect_right(self._edges, port) & 1 == 1


class MinuteSet:
    """The minutes of the week in any of the ranges, counted from Monday 00:00."""

    __slots__ = ("_edges",)

    def __init__(self, spans: Iterable[range]) -> None:
        self._edges = _edges(spans, WEEK_MINUTES)

    def __contains__(self, minute: int) -> bool:
        """Return whether a minute is in one of the ranges."""
        return bisect_right(self._edges, minute) & 1 == 1


def _edges(ranges: Iterable[range], limit: int) -> tuple[int, ...]:
    """Return where the union of ranges of numbers below `limit` begins and ends, in turn."""
    return tuple(span_edges(sorted((span.start, span.stop) for span in ranges), limit))
