"""BND.ADDR, the address that replies announce to clients (RFC 1928 section 6).

BND.ADDR is the configured address for the client, else the local address of the control
connection.  It is never unspecified, and always of the connection's address family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Sequence

from netproxy.errors import DialError
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.net.address import is_ipv6, is_unspecified

if TYPE_CHECKING:
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.routing import Resolver


class Announcement(NamedTuple):
    """An address to announce to some clients."""

    clients: HostSet | None
    """The clients that are told it; None for all."""
    address: Address
    """A literal address or a name.  Port 0 stands for the real port."""


class Announcer:
    """The announcements of a listener.  Thread: any."""

    def __init__(self, announcements: Sequence[Announcement], resolver: Resolver) -> None:
        """Choose the first announcement for a client; look names up for each reply."""
        self._announcements = announcements
        self._resolver = resolver
        # True if bound() looks names up, and may block.
        self.resolves_names = any(
            pack_ip(address.host) is None for _, address in self._announcements
        )

    def bound(self, client: Address, local: Address, port: int, shared: bool = True) -> Address:
        """Return BND for a control connection from `client` to `local`; may block.

        `port` is the port that listens.  An announced port stands for the relay port that all
        clients share; `shared` tells whether `port` is that port.
        """
        for clients, address in self._announcements:
            if clients is None or client.host in clients:
                for host in self._hosts(address):
                    if is_ipv6(host) == is_ipv6(local.host) and not is_unspecified(host):
                        return Address(host, address.port if shared and address.port else port)
        return Address(local.host.partition("%")[0], port)

    def _hosts(self, address: Address) -> list[str]:
        if pack_ip(address.host) is not None:
            return [address.host]
        try:
            return [resolved.host for resolved in self._resolver.resolve(address)]
        except DialError:
            return []
