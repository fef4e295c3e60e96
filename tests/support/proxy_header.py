"""Encodes PROXY headers of version 1, as a proxy in front of NetProxy sends them.

NetProxy itself only reads this version.
"""

from __future__ import annotations

import ipaddress

from netproxy.interfaces.addresses import Address


def encode_v1(source: Address, destination: Address) -> bytes:
    """Encode a header; beside an IPv6 address, an IPv4 address goes v4-mapped.

    Raises ValueError if a host is a name.
    """
    hosts = []
    for address in (source, destination):
        try:
            hosts.append(ipaddress.ip_address(address.host.partition("%")[0]))
        except ValueError as error:
            raise ValueError("a PROXY protocol header takes addresses, not names") from error
    version = max(host.version for host in hosts)
    fields = [f"PROXY TCP{version}"]
    fields += [str(host) if host.version == version else _map(host) for host in hosts]
    fields += [str(source.port), str(destination.port)]
    return " ".join(fields).encode("ascii") + b"\r\n"


def _map(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    # Section 2.1 has groups of hexadecimal digits and no dots in IPv6 addresses.
    return "::ffff:" + host.packed.hex(":", 2)
