"""The sockets that no client may be led back to, as a configuration has them.

access.destinations.OwnSockets keeps them.  Thread: main.
"""

from __future__ import annotations

from netproxy.interfaces.addresses import Address
from netproxy.typed import TYPE_CHECKING, Iterable, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.access.own_sockets import OwnSockets
    from netproxy.config.schema import Config, Place
    from netproxy.listener.tcp import TcpListener
    from netproxy.listener.udp import UdpListener


METRICS, PAC = "the metrics", "pac"


class WantedSocket(NamedTuple):
    """A socket that a configuration would bind."""

    network: str
    address: Address
    owner: str
    """The key and its section's name, for an error; METRICS or PAC."""
    place: Place


def sockets_of(config: Config) -> Iterator[WantedSocket]:
    """Yield the sockets that a configuration would bind, if it tells their ports."""
    for listener in config.listeners:
        for address in listener.addresses:
            if address.port:
                for network in listener.bound_networks:
                    owner = f"listener '{listener.name}'"
                    yield WantedSocket(network, address, owner, listener.place)
    for owner, server in ((METRICS, config.metrics), (PAC, config.pac)):
        if server.address is not None and server.address.port:
            yield WantedSocket("tcp", server.address, owner, server.place)


def wanted_sockets(config: Config) -> list[tuple[str, Address]]:
    """Return network and address of the sockets that a configuration would bind."""
    return [(wanted.network, wanted.address) for wanted in sockets_of(config)]


def own_sockets(
    config: Config, listeners: Sequence[TcpListener | UdpListener]
) -> list[tuple[str, Address]]:
    """Return network and address of the sockets that no client may be led back to.

    The listeners, also by the addresses that are announced for them, as far as these are
    configured: daemon.listening.announcements has those that are found.
    """
    own = [(listener.network, listener.address) for listener in listeners]
    announced = [
        announce.address
        for listener in config.listeners
        for announce in listener.announce
        if announce.address.host
    ]
    return own + [
        (network, Address(address.host, address.port or bound.port))
        for network, bound in own
        for address in announced
    ]


class ExpectedSockets:
    """Own sockets that are about to be bound, until their configuration is in force or fails.

    A PreparedChange.
    """

    def __init__(self, own: OwnSockets, sockets: Iterable[tuple[str, Address]]) -> None:
        self._removals = [own.register(network, address) for network, address in sockets]

    def commit(self) -> None:
        """Leave them to the configuration's own sockets, which are set by now."""
        self.discard()

    def discard(self) -> None:
        """Remove them."""
        for remove in self._removals:
            remove()
