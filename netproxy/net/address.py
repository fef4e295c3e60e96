"""Conversions between Address and the sockaddr tuples and structs of the kernel.

A v4-mapped IPv6 address (::ffff:a.b.c.d) becomes the IPv4 address it stands for in rules,
logs and limits; it stays mapped only towards a dual-stack socket.
Pure, except what asks the kernel about addresses.  Thread: any.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address, ip_text, pack_ip
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import SocketAddress, Span

NO_IP = "not an IP socket"
V4_MAPPED_TEXT = "::ffff:"
"""How the text of a v4-mapped address begins."""

SOURCE_ADDRESSES_LIMIT = 4096
"""Addresses in a SourceAddresses: a proxy may name as many as it likes."""

IPV4_NAME = 16
"""Bytes of a struct sockaddr_in."""

PRIVILEGED_LIMIT = 1024
"""Ports below need CAP_NET_BIND_SERVICE, unless ip_unprivileged_port_start is lower."""

_FAMILY = struct.Struct("=H")
_NUMBER = struct.Struct("=I")
_UNIX_FAMILY, _IPV4_FAMILY = _FAMILY.pack(socket.AF_UNIX), _FAMILY.pack(socket.AF_INET)


def from_sockaddr(sockaddr: SocketAddress) -> Address:
    """Return the address of an AF_INET or AF_INET6 sockaddr.

    The scope of a link-local address is kept as "%N", the interface's number.
    Raises OSError for that of a UNIX socket, which is a path or empty.
    """
    if not sockaddr or isinstance(sockaddr, (str, bytes)):
        raise OSError(errno.EAFNOSUPPORT, NO_IP)
    host: str = sockaddr[0]
    port: int = sockaddr[1]
    if ":" in host:
        if host.startswith(V4_MAPPED_TEXT):
            is_dotted = "." in host
            return Address(
                host[7:] if is_dotted else ip_text(socket.inet_pton(socket.AF_INET6, host)), port
            )
        if len(sockaddr) > 3 and sockaddr[3] and "%" not in host:
            return Address(f"{host}%{sockaddr[3]}", port)
    return Address(host, port)


def to_sockaddr(address: Address, family: int) -> SocketAddress:
    """Return the sockaddr of a literal address for a socket of `family`.

    Raises ValueError for a name, and for IPv6 on an IPv4 socket.
    """
    host, _, scope = address.host.partition("%")
    packed = pack_ip(host)
    if packed is None or (len(packed) == 16 and family == socket.AF_INET):
        version = "IPv4" if family == socket.AF_INET else "IPv6"
        raise ValueError(f"'{address.host}' is not an {version} address")
    if family == socket.AF_INET:
        return (host, address.port)
    if len(packed) == 4:
        return (V4_MAPPED_TEXT + host, address.port, 0, 0)
    return (host, address.port, 0, int(scope) if scope.isascii() and scope.isdigit() else 0)


def family_and_sockaddr(address: Address) -> tuple[int, SocketAddress]:
    """Return the family of a literal address, and its sockaddr there.  Raises ValueError."""
    family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
    return family, to_sockaddr(address, family)


def pack_sockaddr(sockaddr: SocketAddress) -> bytes:
    """Return a sockaddr tuple as struct sockaddr_in or sockaddr_in6."""
    host: str = sockaddr[0]
    port: int = sockaddr[1]
    packed_port = port.to_bytes(2, "big")
    if len(sockaddr) == 2:
        packed = socket.inet_pton(socket.AF_INET, host)
        return _FAMILY.pack(socket.AF_INET) + packed_port + packed + bytes(8)
    packed = socket.inet_pton(socket.AF_INET6, host)
    flow, scope = _NUMBER.pack(socket.htonl(sockaddr[2])), _NUMBER.pack(sockaddr[3])
    return _FAMILY.pack(socket.AF_INET6) + packed_port + flow + packed + scope


def unpack_sockaddr(name: bytes) -> SocketAddress:
    """Return the tuple of a struct sockaddr_in (16 bytes) or sockaddr_in6 (28 bytes).

    Raises OSError for one of another family, such as that of a UNIX socket.
    """
    if len(name) < IPV4_NAME or name[:2] == _UNIX_FAMILY:
        raise OSError(errno.EAFNOSUPPORT, NO_IP)
    port = int.from_bytes(name[2:4], "big")
    if len(name) == IPV4_NAME:
        return socket.inet_ntop(socket.AF_INET, name[4:8]), port
    (flow,), (scope,) = _NUMBER.unpack_from(name, 4), _NUMBER.unpack_from(name, 24)
    return socket.inet_ntop(socket.AF_INET6, name[8:24]), port, socket.ntohl(flow), scope


def unpack_address(name: bytes) -> Address:
    """Return the address of a struct sockaddr_in or sockaddr_in6.  Raises OSError."""
    if len(name) == IPV4_NAME and name[:2] == _IPV4_FAMILY:
        # A short cut: most connections are IPv4.
        return Address(
            socket.inet_ntop(socket.AF_INET, name[4:8]), int.from_bytes(name[2:4], "big")
        )
    return from_sockaddr(unpack_sockaddr(name))


def pack_address(address: Address, family: int) -> bytes:
    """Return the struct sockaddr of a literal address for a socket of `family`.

    Raises ValueError for a name, and for IPv6 on an IPv4 socket.
    """
    if family == socket.AF_INET:
        try:
            packed = socket.inet_pton(socket.AF_INET, address.host)
        except OSError as error:
            raise ValueError(f"'{address.host}' is not an IPv4 address") from error
        return _IPV4_FAMILY + address.port.to_bytes(2, "big") + packed + bytes(8)
    return pack_sockaddr(to_sockaddr(address, family))


class SourceAddresses:
    """Caches the parsed source addresses of datagrams by their raw bytes.

    Holds SOURCE_ADDRESSES_LIMIT addresses; then it drops all that the current batch does not
    need.  Thread: the one that receives.
    """

    __slots__ = ("_parse", "_known")

    def __init__(self, parse: Callable[[bytes], Address]) -> None:
        """Parse raw addresses with `parse`, which raises ProtocolError."""
        self._parse = parse
        self._known: dict[Hashable, Address] = {}

    def __getitem__(self, raw: Hashable) -> Address:
        """Return an address that learn() has parsed."""
        return self._known[raw]

    def learn(self, raw: bytes, batch: Sequence[Span]) -> None:
        """Parse an address unless it is known.  The peers in `batch` stay known.

        Raises ProtocolError.
        """
        if raw in self._known:
            return
        address = self._parse(raw)
        if len(self._known) >= SOURCE_ADDRESSES_LIMIT:
            needed = {peer for _, _, _, peer in batch}
            self._known = {key: value for key, value in self._known.items() if key in needed}
        self._known[raw] = address


class FramedDestination:
    """A target as a raw address."""

    __slots__ = ("address", "sockaddr")

    def __init__(self, address: bytes, target: Address) -> None:
        """Hold the raw `address` of a target."""
        self.address = address
        self.sockaddr: SocketAddress = (*target,)


def is_unspecified(host: str) -> bool:
    """Return whether a host is the unspecified address (0.0.0.0, ::, empty), in any spelling."""
    packed = pack_ip(host)
    return not host or (packed is not None and not any(packed))


def is_native_ipv6(host: str) -> bool:
    """Return whether a literal address is IPv6 and not v4-mapped."""
    return ":" in host and not host.startswith(V4_MAPPED_TEXT)


def is_ipv6(host: str) -> bool:
    """Return whether a literal address is IPv6."""
    return ":" in host


def listen_error(network: str, address: Address, error: OSError) -> ListenError:
    """Return the error of a socket that cannot be bound, with what to do."""
    hint = ""
    if error.errno == errno.EACCES and 0 < address.port < PRIVILEGED_LIMIT:
        hint = " (ports below 1024 need CAP_NET_BIND_SERVICE)"
    elif error.errno == errno.EADDRINUSE and address.port:
        hint = f" (ss -lnptu 'sport = :{address.port}' tells by which program)"
    return ListenError(f"cannot listen on {network} {address}: {error.strerror}{hint}")


def has_ipv6() -> bool:
    """Return whether this machine has IPv6."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True


def is_abandoned(path: str) -> bool:
    """Return whether there is a UNIX socket at a path at which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
