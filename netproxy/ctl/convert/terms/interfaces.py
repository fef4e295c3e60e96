"""Finds the addresses of this machine's interfaces, which some configurations name.

Asks the kernel alone; opens no network connection.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
from pathlib import Path

from netproxy.typed import NamedTuple

# Of <linux/sockios.h>.
SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B
_INET6 = Path("/proc/net/if_inet6")


class Interface(NamedTuple):
    """An interface and its addresses, the first one first."""

    name: str
    addresses: tuple[str, ...]
    networks: tuple[str, ...]
    """The networks that its addresses are in."""


LOOPBACK = Interface("lo", ("127.0.0.1", "::1"), ("127.0.0.0/8", "::1"))
"""It is the same on every machine."""


def find_interface(name: str) -> Interface | None:
    """Return an interface of this machine; None if there is none of the name."""
    if name in ("lo", "lo0"):
        return LOOPBACK
    if name not in (known for _, known in socket.if_nameindex()):
        return None
    found: list[ipaddress.IPv4Interface | ipaddress.IPv6Interface] = [*_ipv4(name), *_ipv6(name)]
    networks = tuple(str(address.network) for address in found)
    return Interface(name, tuple(str(address.ip) for address in found), networks)


def _ipv4(name: str) -> list[ipaddress.IPv4Interface]:
    request = name.encode()[:15].ljust(256, b"\0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            address, mask = (
                socket.inet_ntoa(fcntl.ioctl(asking, number, request)[20:24])
                for number in (SIOCGIFADDR, SIOCGIFNETMASK)
            )
        except OSError:
            return []
    return [ipaddress.IPv4Interface(f"{address}/{mask}")]


def _ipv6(name: str) -> list[ipaddress.IPv6Interface]:
    found = []
    for line in _INET6.read_text().splitlines() if _INET6.exists() else []:
        digits, _, length, _, _, device = line.split()
        if device == name:
            address = ipaddress.IPv6Address(int(digits, 16))
            found.append(ipaddress.IPv6Interface(f"{address}/{int(length, 16)}"))
    return found
