"""Special names, which no server is asked for, and the names of addresses.

Special are localhost and invalid (RFC 6761), resolver.arpa (RFC 9462), and the reverse names
of private and other local addresses (RFC 6303, RFC 7793).  Asking servers for these tells
strangers of the local network, and has no useful answer.  Pure; any thread.
"""

from __future__ import annotations

from socket import AF_INET6, inet_pton

from netproxy.interfaces.addresses import ip_text, pack_ip
from netproxy.typed import Iterator

# The addresses of localhost, which is never looked up (RFC 6761 section 6.3).
LOCALHOST_ADDRESSES = ("127.0.0.1", "::1")

LOCALHOST, INVALID, RESOLVER = "localhost", "invalid", "resolver.arpa"
_IPV4_ZONE, _IPV6_ZONE = ".in-addr.arpa", ".ip6.arpa"
_HEX_DIGITS = frozenset("0123456789abcdef")


def _reverse_zones() -> Iterator[str]:
    """Yield the zones of RFC 6303 section 4 and RFC 7793."""
    networks = ("0", "10", "127", "254.169", "168.192", "2.0.192", "100.51.198", "113.0.203")
    yield from (network + _IPV4_ZONE for network in networks)
    yield "255.255.255.255" + _IPV4_ZONE
    yield from (f"{second}.172{_IPV4_ZONE}" for second in range(16, 32))
    yield from (f"{second}.100{_IPV4_ZONE}" for second in range(64, 128))
    prefixes = (".".join("0" * 32), ".".join("1" + "0" * 31), "8.b.d.0.1.0.0.2")
    yield from (prefix + _IPV6_ZONE for prefix in prefixes)
    yield from (prefix + _IPV6_ZONE for prefix in ("d.f", "8.e.f", "9.e.f", "a.e.f", "b.e.f"))


_ZONES = frozenset((LOCALHOST, INVALID, RESOLVER, *_reverse_zones()))
_TOP_LABELS = frozenset(zone.rpartition(".")[2] for zone in _ZONES)


def special_zone(name: str) -> str | None:
    """Return the special zone of a name in lower case, None if it is in none."""
    if name.rpartition(".")[2] not in _TOP_LABELS:
        return None
    while name not in _ZONES:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return name


def is_reverse_zone(zone: str) -> bool:
    """Return whether a special zone has the names of addresses."""
    return zone.endswith((_IPV4_ZONE, _IPV6_ZONE))


def is_localhost(host: str) -> bool:
    """Return whether a name is localhost, or a name below it."""
    return special_zone(host) == LOCALHOST


def has_no_address(host: str) -> bool:
    """Return whether a name is special and has no address."""
    return special_zone(host) not in (None, LOCALHOST)


def reverse_name(address: str) -> str:
    """Return the name that a literal address has in in-addr.arpa or ip6.arpa."""
    if ":" not in address:
        return ".".join(reversed(address.split("."))) + _IPV4_ZONE
    return ".".join(reversed(inet_pton(AF_INET6, address).hex())) + _IPV6_ZONE


def parse_reverse_name(name: str) -> str:
    """Return the address whose reverse_name() a name in lower case is, "" for other names."""
    if name.endswith(_IPV4_ZONE):
        address = ".".join(reversed(name.removesuffix(_IPV4_ZONE).split(".")))
        return address if pack_ip(address) is not None else ""
    digits = name.removesuffix(_IPV6_ZONE).split(".")
    if not name.endswith(_IPV6_ZONE) or len(digits) != 32 or not _HEX_DIGITS.issuperset(digits):
        return ""
    return ip_text(bytes.fromhex("".join(reversed(digits))))
