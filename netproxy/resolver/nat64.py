"""NAT64 of an IPv6-only network: the IPv6 addresses that lead to IPv4 addresses (RFC 6052).

The prefix is configured, or found by the well-known name ipv4only.arpa, whose addresses name
servers of such networks translate (RFC 7050).  The resolver caches that name as any other.
An address is translated if the kernel has no route to it.  Thread: any.
"""

from __future__ import annotations

import time

from netproxy.errors import DialError
from netproxy.interfaces.addresses import Address, ip_text, pack_ip
from netproxy.interfaces.networks import IpNetwork, any_holds
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Sequence, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.routing import Resolver, RouteSelectors

# RFC 7050 section 2.2: the name, and the addresses that it has.
WELL_KNOWN_NAME = Address("ipv4only.arpa", 0)
WELL_KNOWN_ADDRESSES = (b"\xc0\0\0\xaa", b"\xc0\0\0\xab")
# Seconds, at most, that a dial waits for the prefix.
SECONDS = 5.0
# An address that only a default route leads to: a.root-servers.net.  Nothing is sent to it.
GLOBAL_IPV4 = Address("198.41.0.4", 9)
# Seconds until the kernel is asked again whether it has a default route for IPv4.
ROUTE_SECONDS = 5.0
# Where the octets of an IPv4 address stand behind a prefix of so many bits, RFC 6052 section
# 2.2.  Octet 8 is zero.  The most common length is first.
OCTETS = {
    96: (12, 13, 14, 15),
    64: (9, 10, 11, 12),
    56: (7, 9, 10, 11),
    48: (6, 7, 9, 10),
    40: (5, 6, 7, 9),
    32: (4, 5, 6, 7),
}
_WELL_KNOWN_PREFIX = pack_ip("64:ff9b::")
# The most common of those below: a target on this machine costs no question to the kernel.
_LOOPBACK = "127."
# Addresses of this machine and of its links, which no NAT64 reaches.
_LOCAL = tuple(map(IpNetwork.parse, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")))
# Addresses that the well-known prefix must not stand for, RFC 6052 section 3.1.
_NOT_GLOBAL = tuple(
    map(
        IpNetwork.parse,
        ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16"),
    )
)


HasRoute: TypeAlias = "Callable[[Address, RouteSelectors], bool]"


class Nat64Prefix(NamedTuple):
    """The prefix of a NAT64."""

    packed: bytes
    """16 bytes, those behind the prefix zero."""
    bits: int

    @classmethod
    def of_network(cls, network: IpNetwork) -> Nat64Prefix:
        """Return the prefix of an IPv6 network whose length is in OCTETS."""
        packed = (network.prefix << network.shift).to_bytes(16, "big")
        return cls(packed, 128 - network.shift)

    def translate(self, host: str) -> str:
        """Return the IPv6 address for an IPv4 address, or the address itself if it has none."""
        packed = pack_ip(host)
        if packed is None or len(packed) != 4 or any_holds(_LOCAL, host):
            return host
        if self.packed == _WELL_KNOWN_PREFIX and any_holds(_NOT_GLOBAL, host):
            return host
        translated = bytearray(self.packed)
        for index, octet in zip(OCTETS[self.bits], packed, strict=True):
            translated[index] = octet
        return ip_text(bytes(translated))


def find_prefix(addresses: Sequence[str]) -> Nat64Prefix | None:
    """Return the prefix that addresses of WELL_KNOWN_NAME show, RFC 7050 section 3."""
    for address in addresses:
        packed = pack_ip(address)
        if packed is None or len(packed) != 16:
            continue
        for bits, indexes in OCTETS.items():
            octets = bytes(packed[index] for index in indexes)
            if octets in WELL_KNOWN_ADDRESSES and (bits == 96 or not packed[8]):
                return Nat64Prefix(packed[: bits // 8] + bytes(16 - bits // 8), bits)
    return None


class Nat64:
    """Translates addresses of targets (interfaces.routing.Nat64)."""

    def __init__(self, resolver: Resolver, has_route: HasRoute) -> None:
        """Look the prefix up with `resolver`, once configure() has switched that on.

        `has_route(address, selectors)` asks the kernel; it does not block.
        """
        self._resolver = resolver
        self._has_route = has_route
        self._prefix: Nat64Prefix | None = None
        self._is_on = False
        # Whether there is a default route for IPv4, and until when the answer holds (monotonic
        # seconds).  Replaced as a whole: any recent answer is good enough.
        self._defaults: dict[RouteSelectors, tuple[bool, float]] = {}

    def configure(self, prefix: IpNetwork | None, find: bool) -> None:
        """Use this prefix; without one find it, or translate nothing."""
        self._prefix = None if prefix is None else Nat64Prefix.of_network(prefix)
        self._is_on = find or prefix is not None
        self._defaults = {}

    def translate(
        self, addresses: Sequence[Address], selectors: RouteSelectors, seconds: float
    ) -> Sequence[Address]:
        """Return the addresses to dial; blocks for at most `seconds` and SECONDS."""
        known = self.translate_now(addresses, selectors)
        if known is not None:
            return known
        try:
            found = self._resolver.resolve(WELL_KNOWN_NAME, "", min(seconds, SECONDS))
        except DialError:
            return addresses
        return _translate(addresses, find_prefix([address.host for address in found]))

    def translate_now(
        self, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> Sequence[Address] | None:
        """Return the addresses to dial, None if the prefix must be looked up first."""
        if not self._is_on or addresses[0].host.startswith(_LOOPBACK):
            return addresses
        if self._can_dial(addresses, selectors):
            return addresses
        prefix = self._prefix
        if prefix is None:
            try:
                known = self._resolver.known(WELL_KNOWN_NAME)
            except DialError:
                known = ()
            if known is None:
                return None
            prefix = find_prefix([address.host for address in known])
        return _translate(addresses, prefix)

    def _can_dial(self, addresses: Sequence[Address], selectors: RouteSelectors) -> bool:
        """Return whether any address can be dialled as it is."""
        now = time.monotonic()
        has_default, until = self._defaults.get(selectors, (False, 0.0))
        if now >= until:
            has_default = self._has_route(GLOBAL_IPV4, selectors)
            self._defaults = {**self._defaults, selectors: (has_default, now + ROUTE_SECONDS)}
        return has_default or any(
            ":" in address.host or self._has_route(address, selectors) for address in addresses
        )


def _translate(addresses: Sequence[Address], prefix: Nat64Prefix | None) -> Sequence[Address]:
    if prefix is None:
        return addresses
    return tuple(address._replace(host=prefix.translate(address.host)) for address in addresses)
