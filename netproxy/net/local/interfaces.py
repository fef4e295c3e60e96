"""Reads the address that an interface has now: IPv4 by ioctl(2), IPv6 from /proc/net/if_inet6.

Tells as well whether any interface has an address, by bind(2).

Takes two to four system calls, which wait for nothing but the kernel's lock on its interfaces.
So nothing is cached, and an address that DHCP or PPP has changed a moment ago counts.
Thread: any.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct

from netproxy.interfaces.addresses import Address, ip_text
from netproxy.net.address import family_and_sockaddr
from netproxy.typed import NamedTuple

SIOCGIFADDR = 0x8915
"""Returns the first IPv4 address of an interface (netdevice(7))."""
# struct ifreq: the interface's name; then a sockaddr_in: family, port and address.
_REQUEST = struct.Struct("16s24x")
_ADDRESS = slice(20, 24)
IPV6_ADDRESSES = "/proc/net/if_inet6"
_GLOBAL = 0
"""The scope of addresses that other networks reach; those of links have 0x20."""
# IFA_F_* of linux/if_addr.h: not usable yet, or never; not to be used for anything new.
_TEMPORARY, _FAILED, _DEPRECATED, _TENTATIVE = 0x01, 0x08, 0x20, 0x40
# Public addresses for documentation (RFC 5737, RFC 3849): the default route leads there.
_PUBLIC = {False: "192.0.2.1", True: "2001:db8::1"}
_DISCARD_PORT = 9
_LOCAL_FIRST_BYTES = ("fc", "fd")
"""How unique local addresses (RFC 4193) begin."""


def interface_address(interface: str, ipv6: bool) -> str:
    """Return the IPv4 or the IPv6 address of an interface; "" if it has none.

    There may be no such interface.
    """
    return _ipv6_address(interface) if ipv6 else _ipv4_address(interface)


def has_address(host: str) -> bool:
    """Return whether this machine has a literal address; True if that cannot be told."""
    try:
        family, sockaddr = family_and_sockaddr(Address(host, 0))
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind(sockaddr)
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    except ValueError:
        return True
    return True


def source_address(ipv6: bool) -> str:
    """Return the address that this machine sends from to public ones, "" without a route.

    Sends nothing.
    """
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((_PUBLIC[ipv6], _DISCARD_PORT))
            host: str = sock.getsockname()[0]
            return host
    except OSError:
        return ""


def _ipv4_address(interface: str) -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, SIOCGIFADDR, _REQUEST.pack(interface.encode()))
    except OSError:
        # No such interface, no address, or no descriptor left.
        return ""
    return ip_text(answer[_ADDRESS])


def _ipv6_address(interface: str) -> str:
    try:
        with open(IPV6_ADDRESSES, encoding="utf-8", errors="replace") as file:
            return best_ipv6_address(file.read(), interface)
    except OSError:
        # A machine without IPv6, or without /proc.
        return ""


class _Candidate(NamedTuple):
    """An IPv6 address.  The least of several is the best to announce."""

    deprecated: bool
    unique_local: bool
    """True if only this site can reach it."""
    temporary: bool
    """True if it is soon replaced by another one (RFC 8981)."""
    order: int
    address: str


def best_ipv6_address(text: str, interface: str) -> str:
    """Return the address of an interface that suits clients best, by the text of if_inet6.

    Returns "" if it has none.  Each line is about an address::

        20010db8000000000000000000000001 02 40 00 80     eth0
        address                          |  |  |  flags  interface
                                         |  |  scope
                                         |  bits of its prefix
                                         number of the interface
    """
    candidates = []
    for order, line in enumerate(text.splitlines()):
        words = line.split()
        if len(words) != 6 or words[5] != interface or int(words[3], 16) != _GLOBAL:
            continue
        address, flags = words[0], int(words[4], 16)
        if not flags & (_FAILED | _TENTATIVE):
            is_local = address.startswith(_LOCAL_FIRST_BYTES)
            kind = bool(flags & _DEPRECATED), is_local, bool(flags & _TEMPORARY)
            candidates.append(_Candidate(*kind, order, address))
    return ip_text(bytes.fromhex(min(candidates).address)) if candidates else ""
