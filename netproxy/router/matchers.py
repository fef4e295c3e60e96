"""What the conditions of rules are compiled to: sets of names, of networks and of ports.

Each is built once, of patterns as users write them (patterns.py) or as list files
hold them (lists.py), and only read after that, by any thread.  They know no flow
and no rule, resolve no name and do no I/O.  A wrong pattern is a ValueError.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from typing import Iterable, Iterator

from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.networks import IpNetwork
from netproxy.router.patterns import (
    APEX,
    BELOW,
    KEYWORD,
    PORT_LIMIT,
    REGEX,
    DomainPattern,
    compile_expression,
    parse_domain,
    parse_network,
    parse_ports,
)

_MAPPED = b"\0" * 10 + b"\xff\xff"  # before the four bytes of a v4-mapped address
_MAPPED_PREFIX = 0xFFFF  # the same, as the number before its last 32 bits
_HALF = (1 << 64) - 1


class DomainSet:
    """The names that any of the patterns matches."""

    __slots__ = ("_names", "_depth", "_keywords", "_expressions")

    def __init__(self, patterns: Iterable[str | DomainPattern]) -> None:
        self._names = _Names()
        self._depth = 0  # labels of the deepest name: no longer suffix need be looked for
        keywords: dict[str, None] = {}
        expressions: dict[str, re.Pattern[str]] = {}
        for given in patterns:
            kind, text = parse_domain(given) if isinstance(given, str) else given
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
        """`host` is canonical (protocol.host); a literal address is in no set of names."""
        if ":" in host or pack_ip(host):
            return False
        name = host.encode("ascii") + b"\n"
        start = len(name)
        for _ in range(
            self._depth
        ):  # the last label, the last two, ... and in the end the whole name
            start = name.rfind(b".", 0, start)
            if self._names.bits(name[start + 1 :]) & (BELOW if start >= 0 else APEX):
                return True
            if start < 0:
                break
        return any(keyword in host for keyword in self._keywords) or any(
            expression.search(host) for expression in self._expressions
        )


class _Names:
    """Names with the bits of their patterns, packed: a hash table of places in one text of all names.

    For 200,000 names of 26 letters it takes 7.4 MiB and asks 2.8 us for a name of five labels that is not there.  A dict
    of str would take 23 MiB and ask 2.1 us; sorted hashes, which could err, 3.2 MiB and 4.0 us.  Nothing here counts
    references, so that forked processes share its pages.
    """

    __slots__ = ("_text", "_slots", "_mask", "_count")

    def __init__(self) -> None:
        self._text = bytearray(
            b"\n"
        )  # of each a byte with its bits, its name, and "\n"; place 0 is nobody's
        self._slots = array("I", [0])  # 0 is free, and at least half of them are
        self._mask = 0
        self._count = 0

    def add(self, bits: int, name: str) -> None:
        """Is found after index()."""
        self._text += b"%c%b\n" % (bits, name.encode("ascii"))
        self._count += 1

    def index(self) -> None:
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
        """Of a name with "\\n" behind it; 0 where it is not there."""
        text, slots, slot = self._text, self._slots, hash(name) & self._mask
        while there := slots[slot]:
            if text.startswith(name, there + 1):
                return text[there]
            slot = slot + 1 & self._mask
        return 0


class NetworkSet:
    """The addresses in any of the networks; a v4-mapped address or network is the IPv4 one that it stands for.

    Of each family the edges: where what is in it begins and ends in turn, sorted.  A network takes 8 bytes, 32 in IPv6.
    """

    __slots__ = ("_ipv4", "_high", "_low")

    def __init__(self, networks: Iterable[IpNetwork | str]) -> None:
        ipv4 = array("Q")  # first << 8 | shift: small, and sorts as it should
        ipv6: list[int] = []
        for given in networks:
            size, prefix, shift = parse_network(given) if isinstance(given, str) else given
            first = prefix << shift
            if size == 4:
                ipv4.append(first << 8 | shift)
            elif first >> 32 == _MAPPED_PREFIX:
                ipv4.append((first & 0xFFFFFFFF) << 8 | shift)
            else:
                ipv6.append(first << 8 | shift)
        self._ipv4 = array("I", _edges(_spans(ipv4), 1 << 32))
        self._high, self._low = array("Q"), array("Q")  # the two halves of each edge
        for edge in _edges(_spans(ipv6), 1 << 128):
            self._high.append(edge >> 64)
            self._low.append(edge & _HALF)

    def __contains__(self, host: str) -> bool:
        """`host` is a literal address, its scope ignored; a name is in no network."""
        packed = pack_ip(host.partition("%")[0])
        if packed is None:
            return False
        if packed.startswith(_MAPPED):
            packed = packed[12:]
        address = int.from_bytes(packed, "big")
        if len(packed) == 4:
            return bisect_right(self._ipv4, address) & 1 == 1
        high = address >> 64
        same = (
            bisect_left(self._high, high),
            bisect_right(self._high, high),
        )  # edges that the lower half tells apart
        return bisect_right(self._low, address & _HALF, *same) & 1 == 1


class PortSet:
    """The ports in any of the ranges."""

    __slots__ = ("_edges",)

    def __init__(self, ports: Iterable[str]) -> None:
        spans = sorted((one.start, one.stop) for one in map(parse_ports, ports))
        self._edges = tuple(_edges(spans, PORT_LIMIT + 1))

    def __contains__(self, port: int) -> bool:
        return bisect_right(self._edges, port) & 1 == 1


def _spans(keys: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Of first << 8 | shift: the first address, and that behind the last, in order."""
    return ((key >> 8, (key >> 8) + (1 << (key & 255))) for key in sorted(keys))


def _edges(spans: Iterable[tuple[int, int]], limit: int) -> Iterator[int]:
    """Where sorted spans begin and end, merged; an end at `limit`, behind everything there is, is left out."""
    last = -1
    for start, end in spans:
        if start > last:
            if last >= 0:
                yield last
            yield start
        last = max(last, end)
    if 0 <= last < limit:
        yield last
