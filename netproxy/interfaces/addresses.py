"""Addresses: targets, where to listen, and their packed form.  Pure.

The address of a peer stays the raw sockaddr tuple that the kernel gave; an
Address is a target, its host in canonical text (protocol.host).
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from netproxy.typed import NamedTuple

V4_MAPPED_PREFIX = b"\0" * 10 + b"\xff\xff"
"""The first 12 bytes of a v4-mapped IPv6 address (RFC 4291 section 2.5.5.2)."""


class Address(NamedTuple):
    """A target: `host` is a canonical IP literal or a lower-case name; `port` is 0-65535."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


UNSPECIFIED_ADDRESS = Address("0.0.0.0", 0)
"""Stands in a reply or a request where no address is known."""


class ActivationAddress(Address):
    """A socket that the service manager has bound: `host` is "systemd:NAME", `port` is 0."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name of the socket unit's file descriptor."""
        return self.host.partition(":")[2]

    def __str__(self) -> str:
        return self.host


UNIX_PREFIX = "unix:"
SOCKET_PATH_LIMIT = 107
"""Bytes of the path of a UNIX socket: sockaddr_un holds 108, with the NUL at the end."""


class UnixAddress(Address):
    """A UNIX socket of this machine: `host` is "unix:/path", `port` is 0.

    "unix:@name" is a socket without a file (an abstract one).
    """

    __slots__ = ()

    @classmethod
    def of(cls, path: object) -> UnixAddress:
        """Return the address of a path."""
        return cls(f"{UNIX_PREFIX}{path}", 0)

    @property
    def path(self) -> str:
        """The path of the socket's file; "" for a client."""
        return self.host.removeprefix(UNIX_PREFIX)

    @property
    def sockaddr(self) -> str:
        """What connect(2) takes: the path, or the name behind a NUL."""
        path = self.path
        return f"\0{path[1:]}" if path.startswith("@") else path

    def __str__(self) -> str:
        return self.host


UNIX_CLIENT = UnixAddress(UNIX_PREFIX, 0)
"""Every client of a UNIX socket: none of them has an address of its own."""


def ip_text(packed: bytes) -> str:
    """Return the text of a packed address of 4 or 16 bytes; a v4-mapped one as IPv4."""
    if len(packed) == 16 and packed.startswith(V4_MAPPED_PREFIX):
        packed = packed[12:]
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def pack_ip(host: str) -> bytes | None:
    """Return the 4 or 16 bytes of a canonical literal without scope, None for a name."""
    try:
        if ":" in host:
            return inet_pton(AF_INET6, host)
        # A canonical host that ends in a digit is an address: parse_host has refused the others.
        return inet_pton(AF_INET, host) if host[-1:].isdigit() else None
    except (OSError, ValueError):
        # ValueError: a NUL or a lone surrogate.
        return None
