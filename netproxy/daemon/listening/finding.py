"""Finds addresses to announce, and maps ports: what netproxy.public_address needs of a daemon.

Thread: main, except expire() and rows().
"""

from __future__ import annotations

import os
from functools import partial

from netproxy.access.destinations import parse_networks
from netproxy.config.sections.listener.announce import can_be_mapped
from netproxy.daemon.listening.announcements import FoundRows, finds
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import NetworkSet, is_loopback
from netproxy.listener.udp import UdpListener
from netproxy.net.address import is_unspecified
from netproxy.net.local.router_socket import RouterSocket
from netproxy.protocol.port_mapping import pcp
from netproxy.public_address.changes import Bound, Observers
from netproxy.public_address.dialects import Port
from netproxy.public_address.listening import ListeningAddress, Settings
from netproxy.public_address.mapper import MapperDependencies, PortMapper
from netproxy.public_address.mapping import WantedPort
from netproxy.public_address.public import PublicAddressDependencies
from netproxy.public_address.servers import Servers
from netproxy.typed import TYPE_CHECKING, Callable, Iterator, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig
    from netproxy.daemon.listening.announcements import Pairs
    from netproxy.daemon.listening.udp_relays import Key
    from netproxy.daemon.runtime import Runtime
    from netproxy.interfaces.answers import MappingRow
    from netproxy.public_address.mapping import MappingState

MACHINE_ID = "/etc/machine-id"
"""A secret of this machine that outlives the daemon (machine-id(5))."""
ANYCAST = Address("192.0.0.9", pcp.PORT)
"""Of PCP (RFC 7723): what leads there is the default gateway."""
INSIDE = ("private", "loopback", "link-local")
"""The ranges of access.destinations that are on this side of a NAT."""

_MapperKey = tuple[str, str]
"""The source address, "" for all, and the protocol."""


class Finding:
    """What is found for a configuration.  An Expirable."""

    def __init__(self, config: Config, runtime: Runtime, previous: Finding | None) -> None:
        """Take over what `previous` has for the same listener and address; make the rest."""
        self._config = config
        self._runtime = runtime
        outside = NetworkSet((), parse_networks(INSIDE))
        self.outside = outside
        """The hosts that are on the other side of a NAT."""
        self._dependencies = PublicAddressDependencies(
            outside, partial(runtime.routes.is_local, "udp")
        )
        self._observers = Observers(runtime.own.register_everywhere, runtime.log, runtime.counters)
        self._for_mappers: MapperDependencies = (
            previous._for_mappers if previous else self._mapper_dependencies()
        )
        self._mappers: dict[_MapperKey, PortMapper] = dict(previous._mappers) if previous else {}
        self.addresses: dict[Key, ListeningAddress] = {}
        running = previous.addresses if previous else {}
        for listener in config.listeners:
            if finds(listener):
                for address in listener.addresses:
                    key = listener.name, address
                    self.addresses[key] = running.get(key) or self._make(key)

    @property
    def is_done(self) -> bool:
        """True if nothing is announced, mapped or to be released."""
        return not self.addresses and all(mapper.is_done for mapper in self._mappers.values())

    @property
    def _leads(self) -> bool:
        """True if this process asks servers and routers: the first of several workers."""
        hand_overs = self._runtime.hand_overs
        return hand_overs is None or hand_overs.is_own(0)

    def commit(self, previous: Finding | None, pairs: Pairs) -> None:
        """Announce and map what the configuration says; `pairs` are the running listeners."""
        wanted: dict[_MapperKey, list[WantedPort]] = {key: [] for key in self._mappers}
        for listener in self._config.listeners:
            for address in listener.addresses:
                listening = self.addresses.get((listener.name, address))
                if listening is None:
                    continue
                settings = self._settings(listener, address, pairs)
                listening.commit(settings)
                if listener.port_mapping != "off" and can_be_mapped(address) and self._leads:
                    host = "" if is_unspecified(address.host) else address.host
                    of_host = wanted.setdefault((host, listener.port_mapping), [])
                    of_host += _wanted(listener.name, settings.bound, listening)
        for key, ports in wanted.items():
            mapper = self._mappers.get(key) or PortMapper(*key, self._for_mappers)
            self._mappers[key] = mapper
            mapper.want(ports)
        for place, gone in (previous.addresses if previous else {}).items():
            if self.addresses.get(place) is not gone:
                gone.close()

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Ask what is due; nothing expires.  Thread: the janitor's."""
        for listening in self.addresses.values():
            listening.tick(now)
        for mapper in self._mappers.values():
            mapper.expire(now)
        return ()

    def stop(self) -> None:
        """Release the port mappings; blocks for a moment."""
        for mapper in self._mappers.values():
            mapper.stop()

    def rows(self, now: float) -> Mapping[str, FoundRows]:
        """Return what was found, by the listener's name.  Thread: any."""
        mappings: dict[str, list[MappingRow]] = {}
        for mapper in self._mappers.values():
            for state in mapper.states(now):
                mappings.setdefault(state.listener, []).append(_row(state))
        rows = {}
        for listener in self._config.listeners:
            announced = [
                str(announced)
                for address in listener.addresses
                if (listening := self.addresses.get((listener.name, address)))
                for announced in listening.announced()
            ]
            rows[listener.name] = FoundRows(announced, mappings.get(listener.name, ()))
        return rows

    # -- making

    def _make(self, key: Key) -> ListeningAddress:
        hand_overs, sharing = self._runtime.hand_overs, None
        if hand_overs is not None:
            # late: for several workers alone
            from netproxy.daemon.listening.notices import SharedAddress

            sharing = SharedAddress(hand_overs, *key, self._runtime.counters)
        return ListeningAddress(key[0], self._observers, self._dependencies, sharing)

    def _settings(self, listener: ListenerConfig, address: Address, pairs: Pairs) -> Settings:
        running = [
            bound
            for spec, bound in pairs
            if bound.name == listener.name and spec.address == address
        ]
        local = next((bound.local for bound in running if isinstance(bound, UdpListener)), None)
        is_auto = listener.is_auto and not is_loopback(address.host)
        servers = None
        if is_auto and listener.stun:
            resolver = self._runtime.resolver
            servers = Servers(listener.stun, resolver, self._runtime.checks.submit)
        return Settings(
            Bound([bound.network for bound in running], running[0].address.port if running else 0),
            set(listener.announced_interfaces),
            is_auto,
            servers,
            local,
        )

    def _mapper_dependencies(self) -> MapperDependencies:
        runtime = self._runtime
        return MapperDependencies(
            partial(runtime.routes.gateway_to, ANYCAST),
            connect_router,
            runtime.checks.submit,
            machine_key(),
            runtime.log,
            runtime.counters,
        )


def connect_router(router: str, source: str) -> RouterSocket:
    """Return what asks a router.  Raises DialError."""
    return RouterSocket(Address(router, pcp.PORT), source)


def machine_key() -> bytes:
    """Return a secret that a restarted daemon has again, if the machine has an id."""
    try:
        with open(MACHINE_ID, "rb") as file:
            identity = file.read(64).strip()
    except OSError:
        identity = b""
    return identity or os.urandom(32)


def _wanted(listener: str, bound: Bound, follower: ListeningAddress) -> Iterator[WantedPort]:
    for network in bound.networks:
        yield WantedPort(Port(network, bound.port), listener, follower)


def _row(state: MappingState) -> MappingRow:
    return {
        "network": state.port.network,
        "port": state.port.number,
        "external": str(state.external) if state.external else "",
        "how": state.how,
        "left": round(state.left, 1),
        "fault": state.fault,
    }
