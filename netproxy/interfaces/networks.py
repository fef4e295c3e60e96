"""IP networks in CIDR notation, and sets of them.  Pure."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from socket import AF_INET, AF_INET6, inet_ntop

from netproxy.interfaces.addresses import UNIX_PREFIX, V4_MAPPED_PREFIX, ip_text, pack_ip
from netproxy.typed import Iterable, Iterator, NamedTuple, Protocol, Sequence

_EXPECTED = "(expected an address or CIDR, such as 10.0.0.0/8)"
_V4_MAPPED = int.from_bytes(V4_MAPPED_PREFIX, "big")
_HALF = (1 << 64) - 1


class HostSet(Protocol):
    """A set of hosts: names, literal addresses, or both."""

    def __contains__(self, host: str, /) -> bool:
        """Return whether a host is in the set."""


class IpNetwork(NamedTuple):
    """A network: the first bits of its addresses as a number, and how many bits follow."""

    size: int
    """Bytes of an address: 4 or 16."""
    prefix: int
    shift: int
    """Bits behind the prefix."""

    @classmethod
    def parse(cls, text: str) -> IpNetwork:
        """Parse "10.0.0.0/8" or a single address.

        A network of v4-mapped addresses becomes the network of these IPv4 addresses.
        Raises ValueError for anything else, and if bits behind the prefix are set.
        """
        host, slash, bits_text = text.partition("/")
        packed = pack_ip(host) if host.isprintable() else None
        is_number = bits_text.isascii() and bits_text.isdigit() and len(bits_text) < 4
        if packed is None or (slash and not is_number):
            raise ValueError(f"'{text}' is not a valid network {_EXPECTED}")
        size = len(packed)
        shift = size * 8 - (int(bits_text) if slash else size * 8)
        if shift < 0:
            raise ValueError(
                f"'{text}' is not a valid network: the prefix is longer than {size * 8} bits"
            )
        value = int.from_bytes(packed, "big")
        prefix = value >> shift
        if prefix << shift != value:
            network = (prefix << shift).to_bytes(size, "big")
            first = inet_ntop(AF_INET if size == 4 else AF_INET6, network)
            raise ValueError(
                f"'{text}' is not a valid network: bits behind the prefix are set"
                f" (write {first}/{bits_text})"
            )
        if packed.startswith(V4_MAPPED_PREFIX) and shift <= 32:
            return cls(4, (value & 0xFFFFFFFF) >> shift, shift)
        return cls(size, prefix, shift)

    def __str__(self) -> str:
        packed = (self.prefix << self.shift).to_bytes(self.size, "big")
        return f"{ip_text(packed)}/{self.size * 8 - self.shift}"

    def address(self, number: int) -> str:
        """Return the text of an address of the network: 0 is the first, 1 the next."""
        return ip_text(((self.prefix << self.shift) + number).to_bytes(self.size, "big"))

    def holds(self, host: str) -> bool:
        """Return whether a literal address is in the network.  Its scope is ignored."""
        return any_holds((self,), host)


def any_holds(networks: Iterable[IpNetwork], host: str) -> bool:
    """Return whether a literal address is in one of the networks; a name never is.

    The scope of the address is ignored.
    """
    packed = pack_ip(host.partition("%")[0])
    if packed is None:
        return False
    size, value = len(packed), int.from_bytes(packed, "big")
    return any(
        network.size == size and value >> network.shift == network.prefix for network in networks
    )


class NetworkSet:
    """A set of networks.  A v4-mapped address or network counts as the IPv4 one it stands for.

    If networks are excluded, the network with the longest prefix decides for an address; with
    exclusions alone, all other addresses are in the set.

    The set keeps the sorted edges of each family: the addresses at which it begins and
    ends, in turn.  A lookup is one binary search, however many networks there are.  A
    network takes 8 bytes, an IPv6 network 32.  Immutable; any thread.
    """

    __slots__ = ("_ipv4", "_high", "_low")

    def __init__(self, networks: Iterable[IpNetwork], excluded: Sequence[IpNetwork] = ()) -> None:
        ipv4, ipv6 = _keys(networks)
        edges4, edges6 = span_edges(_spans(ipv4), 1 << 32), span_edges(_spans(ipv6), 1 << 128)
        if excluded:
            without4, without6 = _keys(excluded)
            others = not ipv4 and not ipv6
            edges4 = _nested_edges(ipv4, without4, 1 << 32, others)
            edges6 = _nested_edges(ipv6, without6, 1 << 128, others)
        self._ipv4 = array("I", edges4)
        # The upper and lower 64 bits of each IPv6 edge.
        self._high, self._low = array("Q"), array("Q")
        for edge in edges6:
            self._high.append(edge >> 64)
            self._low.append(edge & _HALF)

    def __contains__(self, host: str) -> bool:
        """Return whether a literal address is in one of the networks; a name never is.

        The scope of the address is ignored.
        """
        packed = pack_ip(host.partition("%")[0])
        if packed is None:
            return False
        if packed.startswith(V4_MAPPED_PREFIX):
            packed = packed[12:]
        address = int.from_bytes(packed, "big")
        if len(packed) == 4:
            return bisect_right(self._ipv4, address) & 1 == 1
        high = address >> 64
        # The edges with the same upper half differ in the lower half alone.
        first, behind = bisect_left(self._high, high), bisect_right(self._high, high)
        return bisect_right(self._low, address & _HALF, first, behind) & 1 == 1


def _keys(networks: Iterable[IpNetwork]) -> tuple[Sequence[int], Sequence[int]]:
    """Return each IPv4 and each IPv6 network as first << 8 | shift, which sorts by the first."""
    ipv4 = array("Q")
    ipv6: list[int] = []
    for size, prefix, shift in networks:
        first = prefix << shift
        if size == 4:
            ipv4.append(first << 8 | shift)
        elif first >> 32 == _V4_MAPPED:
            ipv4.append((first & 0xFFFFFFFF) << 8 | shift)
        else:
            ipv6.append(first << 8 | shift)
    return ipv4, ipv6


def _nested_edges(
    included: Iterable[int], excluded: Iterable[int], limit: int, others: bool
) -> Iterator[int]:
    """Yield where the addresses begin and end whose longest network is an included one.

    The networks are keys (_keys); `others`: whether addresses in no network count as well.
    """
    # The widest first of those that begin at one place.
    networks = [(key >> 8, -(key & 255), True) for key in included]
    networks += [(key >> 8, -(key & 255), False) for key in excluded]
    # Whether the addresses from a place on are in the set, in the order of the places.
    states = {0: others}
    # The networks around the place, with their ends: networks are nested or apart.
    around = [(limit, others)]
    for first, minus_shift, is_included in (*sorted(networks), (limit, 0, others)):
        while around and around[-1][0] <= first:
            end, _ = around.pop()
            states[end] = around[-1][1] if around else others
        states[first] = is_included
        around.append((first + (1 << -minus_shift), is_included))
    before = False
    for place, state in states.items():
        if state != before and place < limit:
            yield place
        before = state


def span_edges(spans: Iterable[tuple[int, int]], limit: int) -> Iterator[int]:
    """Yield where the union of spans begins and ends, in turn.

    `spans` are sorted (start, end) pairs; the end is exclusive.  An end at `limit`, which
    is greater than every member, is left out.
    """
    last = -1
    for start, end in spans:
        if start > last:
            if last >= 0:
                yield last
            yield start
        last = max(last, end)
    if 0 <= last < limit:
        yield last


def _spans(keys: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the spans of networks, sorted.  A key is first << 8 | shift."""
    return ((key >> 8, (key >> 8) + (1 << (key & 255))) for key in sorted(keys))


_LOOPBACK = (IpNetwork.parse("127.0.0.0/8"), IpNetwork.parse("::1"))


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, or a UNIX socket, of this machine."""
    return host.startswith(UNIX_PREFIX) or any_holds(_LOOPBACK, host)
