"""The addresses that a plan's listeners announce and that are found while the daemon runs.

A listening address that a new configuration keeps keeps what it has found.  Most daemons
announce nothing that has to be found, and map no port: they load nothing of
netproxy.public_address.  Thread: main, except expire() and rows().
"""

from __future__ import annotations

import time

from netproxy.handler.announce import Announcement, Announcer, ConfiguredAddress
from netproxy.interfaces.networks import NetworkSet
from netproxy.typed import TYPE_CHECKING, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig
    from netproxy.daemon.listening.finding import Finding
    from netproxy.daemon.listening.udp_relays import Key
    from netproxy.daemon.runtime import Runtime
    from netproxy.handler.announce import AddressSource
    from netproxy.handler.socks.socks5_udp import Socks5UdpRelay
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.answers import MappingRow
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.routing import Resolver
    from netproxy.listener.manager import ListenerSpec
    from netproxy.listener.tcp import TcpListener
    from netproxy.listener.udp import UdpListener
    from netproxy.public_address.listening import ListeningAddress

    Pairs = Sequence[tuple[ListenerSpec, TcpListener | UdpListener]]


class FoundRows(NamedTuple):
    """What was found for one listener, for people."""

    announced: Sequence[str] = ()
    """Its public addresses, as they are announced."""
    mappings: Sequence[MappingRow] = ()


class Announcements:
    """What a configuration's listeners announce."""

    def __init__(self, config: Config, runtime: Runtime, previous: Announcements | None) -> None:
        """Take over what `previous` has found for the same listeners and addresses."""
        self._janitor = runtime.janitor
        self._finding: Finding | None = None
        before = previous._finding if previous else None
        if any(map(finds, config.listeners)) or (before is not None and not before.is_done):
            # late: few daemons announce what has to be found
            from netproxy.daemon.listening.finding import Finding

            self._finding = Finding(config, runtime, before)

    def announcer(
        self, listener: ListenerConfig, address: Address, resolver: Resolver
    ) -> Announcer:
        """Return what chooses the address that a client of a listening address is told."""
        announcements = []
        for announce in listener.announce:
            clients: HostSet | None = NetworkSet(announce.clients) if announce.clients else None
            source: AddressSource = ConfiguredAddress(announce.address, resolver)
            if announce.is_found:
                assert self._finding is not None  # see __init__()
                listening = self._finding.addresses[listener.name, address]
                source = listening.source(announce.interface, announce.address.port)
                if announce.is_auto and clients is None:
                    # Who comes with a private address is on this side of the NAT.
                    clients = self._finding.outside
            announcements.append(Announcement(clients, source))
        return Announcer(announcements)

    def attach(self, relay: Socks5UdpRelay | None, listener: str, address: Address) -> None:
        """Give a relay what takes the answers to our own questions from its socket."""
        if relay is not None and self._finding is not None:
            listening = self._finding.addresses.get((listener, address))
            relay.answers = listening.stun if listening is not None else None

    def commit(self, previous: Announcements, pairs: Pairs) -> None:
        """Put the announcements into force; `pairs` are the running listeners.  Cannot fail."""
        before, finding = previous._finding, self._finding
        if before is not None:
            self._janitor.unregister(before)
        if finding is not None:
            finding.commit(before, pairs)
            self._janitor.register(finding)

    def stop(self) -> None:
        """Release the port mappings; blocks for a moment."""
        if self._finding is not None:
            self._finding.stop()

    @property
    def found(self) -> Mapping[Key, ListeningAddress]:
        """The listening addresses that announce what is found.  Thread: any."""
        return self._finding.addresses if self._finding is not None else {}

    def rows(self) -> Mapping[str, FoundRows]:
        """Return what was found, by the listener's name.  Thread: any."""
        return self._finding.rows(time.monotonic()) if self._finding is not None else {}


def finds(listener: ListenerConfig) -> bool:
    """Return whether something has to be found for a listener."""
    is_mapped = listener.port_mapping != "off"
    return is_mapped or any(announce.is_found for announce in listener.announce)
