"""BND.ADDR, the address that replies announce to clients (RFC 1928 section 6).

BND.ADDR is the announced address for the client, else the local address of the control
connection.  It is never unspecified, and always of the connection's address family.
"""

from __future__ import annotations

from netproxy.errors import DialError, StreamError
from netproxy.interfaces.addresses import Address, UnixAddress, pack_ip
from netproxy.net.address import is_ipv6, is_unspecified
from netproxy.net.local.interfaces import source_address
from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.routing import Resolver


class AddressSource(Protocol):
    """Where an announced address comes from.  Thread: any."""

    @property
    def may_block(self) -> bool:
        """True if addresses() may block."""

    def addresses(self, local: Address) -> Sequence[Address]:
        """Return the addresses to announce, of any family; port 0 stands for the real port.

        `local` is the address that the client has connected to.
        """


class ConfiguredAddress:
    """An address, or a name that is looked up for each reply.  An AddressSource."""

    def __init__(self, address: Address, resolver: Resolver) -> None:
        """Port 0 of `address` stands for the real port."""
        self._address = address
        self._resolver = resolver
        self.may_block = pack_ip(address.host) is None

    def addresses(self, local: Address) -> Sequence[Address]:
        """Return the address, or those of the name; none if it is not found."""
        if not self.may_block:
            return (self._address,)
        try:
            return self._resolver.resolve(self._address)
        except DialError:
            return ()


class Announcement(NamedTuple):
    """An address to announce to some clients."""

    clients: HostSet | None
    """The clients that are told it; None for all."""
    source: AddressSource


class Announcer:
    """The announcements of a listener.  Thread: any."""

    def __init__(self, announcements: Sequence[Announcement]) -> None:
        """Choose the first announcement for a client."""
        self._announcements = announcements
        self.may_block = any(source.may_block for _, source in announcements)
        """True if bound() may block."""

    def bound(self, client: Address, local: Address, port: int, shared: bool = True) -> Address:
        """Return BND for a control connection from `client` to `local`; see `may_block`.

        `port` is the port that listens.  An announced port stands for the relay port that all
        clients share; `shared` tells whether `port` is that port.
        """
        for clients, source in self._announcements:
            if clients is None or client.host in clients:
                for host, announced_port in source.addresses(local):
                    if is_ipv6(host) == is_ipv6(local.host) and not is_unspecified(host):
                        return Address(host, announced_port if shared and announced_port else port)
        return Address(local.host.partition("%")[0], port)


def public_addresses(
    announcer: Announcer | None, client: Address, stream: Stream, bound: Sequence[Address]
) -> list[Address]:
    """Return the addresses that targets of a client see, at most one of each family.

    `bound` is what the packet connection knows (PacketConn.bound), `stream` the client's.  An
    unknown host is the announced one, else the local address of the stream or, in the other
    family, that of the default route; without one the family is left out.  May block.
    """
    try:
        local = stream.local_address()
    except StreamError:
        return []
    addresses: list[Address] = []
    for address in bound:
        host, port = address
        if not is_unspecified(host):
            addresses.append(address)
            continue
        own = local.host.partition("%")[0]
        if isinstance(local, UnixAddress) or is_ipv6(own) != is_ipv6(host):
            own = source_address(is_ipv6(host))
        if announcer is not None and own:
            own = announcer.bound(client, Address(own, port), port, shared=False).host
        if own:
            addresses.append(Address(own, port))
    return addresses
