"""Between sockaddr tuples, as the kernel gives them, and Address.

A v4-mapped IPv6 address is the IPv4 address it stands for wherever it meets a
rule, a log or a limit; it stays mapped only towards a dual-stack socket.  Pure, but for is_local().
"""

from __future__ import annotations

import socket
import struct
from typing import Callable, Sequence

from netproxy.interfaces.addresses import Address, ip_text, pack_ip
from netproxy.interfaces.datagrams import Span

MAPPED = "::ffff:"
SOURCES_LIMIT = 4096  # sources remembered a connection: a proxy may name as many as it likes


def from_sockaddr(sockaddr: tuple) -> Address:
    """Address of an AF_INET or AF_INET6 sockaddr; the scope of a link-local one is kept as %N."""
    host = sockaddr[0]
    if ":" in host:
        if host.startswith(MAPPED):
            return Address(
                host[7:] if "." in host else ip_text(socket.inet_pton(socket.AF_INET6, host)),
                sockaddr[1],
            )
        if len(sockaddr) > 3 and sockaddr[3] and "%" not in host:
            return Address(f"{host}%{sockaddr[3]}", sockaddr[1])
    return Address(host, sockaddr[1])


def to_sockaddr(address: Address, family: int) -> tuple:
    """The sockaddr of a literal address for a socket of `family`; ValueError for a name or the wrong family."""
    host, _, scope = address.host.partition("%")
    packed = pack_ip(host)
    if packed is None or (len(packed) == 16 and family == socket.AF_INET):
        raise ValueError(f"{address.host} is no address of that family")
    if family == socket.AF_INET:
        return (host, address.port)
    if len(packed) == 4:
        return (MAPPED + host, address.port, 0, 0)
    return (host, address.port, 0, int(scope) if scope.isdigit() else 0)


def pack_sockaddr(sockaddr: tuple) -> bytes:
    """The kernel's form (struct sockaddr_in, sockaddr_in6) of a sockaddr tuple."""
    port = sockaddr[1].to_bytes(2, "big")
    if len(sockaddr) == 2:
        return (
            struct.pack("=H", socket.AF_INET)
            + port
            + socket.inet_pton(socket.AF_INET, sockaddr[0])
            + bytes(8)
        )
    return (
        struct.pack("=H", socket.AF_INET6)
        + port
        + struct.pack("=I", socket.htonl(sockaddr[2]))
        + socket.inet_pton(socket.AF_INET6, sockaddr[0])
        + struct.pack("=I", sockaddr[3])
    )


def unpack_sockaddr(name: bytes) -> tuple:
    """The sockaddr tuple of the kernel's form: 16 bytes of IPv4 or 28 of IPv6."""
    port = int.from_bytes(name[2:4], "big")
    if len(name) == 16:
        return socket.inet_ntop(socket.AF_INET, name[4:8]), port
    flow, scope = struct.unpack_from("=I", name, 4)[0], struct.unpack_from("=I", name, 24)[0]
    return socket.inet_ntop(socket.AF_INET6, name[8:24]), port, socket.ntohl(flow), scope


class Sources:
    """Addresses of datagrams by their raw bytes, as a proxy names them: bounded, but those of one batch stay together.

    `parse` raises ProtocolError.
    """

    __slots__ = ("_parse", "_known")

    def __init__(self, parse: Callable[[bytes], Address]) -> None:
        self._parse = parse
        self._known: dict[bytes, Address] = {}

    def __getitem__(self, raw: bytes) -> Address:
        return self._known[raw]

    def learn(self, raw: bytes, batch: Sequence[Span]) -> None:
        """Makes an address known; those that are peers in `batch`, which will be asked for, are not forgotten for it."""
        if raw in self._known:
            return
        address = self._parse(raw)
        if len(self._known) >= SOURCES_LIMIT:
            kept = {peer for _, _, _, peer in batch}
            self._known = {key: value for key, value in self._known.items() if key in kept}
        self._known[raw] = address


def is_local(host: str) -> bool:
    """Whether a literal address is one of this machine's: then the kernel would send to it from itself."""
    family = socket.AF_INET6 if is_ipv6(host) else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(to_sockaddr(Address(host, 9), family))  # sends nothing
            own = from_sockaddr(probe.getsockname()).host.partition("%")[0]
    except (OSError, ValueError):
        return False
    return own == host or host.startswith("127.") or is_unspecified(host)


def is_unspecified(host: str) -> bool:
    """Whether it means "every address", in whatever spelling."""
    packed = pack_ip(host)
    return not host or (packed is not None and not any(packed))


def is_ipv6(host: str) -> bool:
    return ":" in host
