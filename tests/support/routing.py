"""Builds a router from the text of a configuration.

The dialers are real, but no test dials them; the resolver counts lookups.  Flows are
written as "udp alice@192.168.1.5 -> example.com:443 on main", or with http or bind first.
"""

from __future__ import annotations

import re
import time
from typing import Callable, Mapping, Sequence

from netproxy.access.destinations import Destinations
from netproxy.access.own_sockets import OwnSockets
from netproxy.access.factory import make_policies
from netproxy.config.schema import Config, UpstreamConfig
from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import DialError, Reason
from netproxy.daemon.plan import make_fallbacks
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.flows import COMMANDS, Flow
from netproxy.interfaces.routing import (
    ANY_ROUTE,
    DestinationGuard,
    Dialer,
    Resolver,
    RouteSelectors,
)
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.protocol.host import parse_host
from netproxy.router.auto import Verdicts
from netproxy.router.factory import Routing, RoutingDependencies, make_routing
from tests.support.doubles import Counts, Lines, no_packets
from tests.support.relays import configuration

_FLOW = re.compile(r"(tcp|udp|http|bind) (?:([^@ ]+)@)?(\S+) -> (\S+):(\d+) on (\S+)\Z")


def flow(text: str) -> Flow:
    """Parse a flow.  The host becomes canonical, as codecs make it, whatever the spelling."""
    match = _FLOW.match(text)
    assert match, text
    word, user, client, host, port, listener = match.groups("")
    target = Address(parse_host(host.encode()), int(port))
    is_command = word in COMMANDS and word != "udp"
    network, command = ("tcp", word) if is_command else (word, "connect")
    return Flow(network, Address(client, 50000), target, listener, user, command=command)


class StubResolver:
    """A Resolver that knows the addresses of some names and records its lookups."""

    def __init__(self, hosts: Mapping[str, Sequence[str] | None]) -> None:
        """Find `hosts`, addresses by name; None is a name server that is silent."""
        self.hosts = dict(hosts)
        # The names that were looked up, in order.
        self.lookups: list[str] = []
        # The names that known() answers without a lookup.
        self.cached: set[str] = set()

    def resolve(self, target: Address, client: str = "", seconds: float = 0.0) -> list[Address]:
        """Return the addresses of a target and record the lookup.  Raises DialError."""
        if pack_ip(target.host) is not None:
            return [target]
        self.lookups.append(target.host)
        return self._look_up(target)

    def known(self, target: Address) -> list[Address] | None:
        """Return the addresses of a literal or a cached name, else None."""
        if pack_ip(target.host) is not None:
            return [target]
        return self._look_up(target) if target.host in self.cached else None

    def _look_up(self, target: Address) -> list[Address]:
        hosts = self.hosts.get(target.host, ())
        if not hosts:
            raise DialError(Reason.TIMEOUT if hosts is None else Reason.NAME, target.host)
        return [target._replace(host=host) for host in hosts]


class LocalAddresses:
    """Knows a machine's addresses (access.destinations.IsLocal)."""

    def __init__(self, hosts: Sequence[str] = ()) -> None:
        self.hosts = tuple(hosts)

    def __call__(
        self, network: str, address: Address, selectors: RouteSelectors = ANY_ROUTE
    ) -> bool:
        return address.host in self.hosts


def make_guard(
    config: Config, own: Sequence[tuple[str, Address]] = (), local: Sequence[str] = ()
) -> Destinations:
    """Return the guard of a daemon with `own` sockets on a machine with `local` addresses."""
    sockets = OwnSockets(LocalAddresses(local))
    sockets.set(own)
    guard = Destinations(sockets)
    guard.configure(make_policies(config))
    return guard


def routing(
    config: Config | str,
    resolver: Resolver | None = None,
    guard: DestinationGuard | None = None,
    dialer: Callable[[UpstreamConfig], Dialer] | None = None,
    verdicts: Verdicts | None = None,
    clock: Callable[[], time.struct_time] = time.localtime,
) -> Routing:
    """Build the router of a configuration.  `dialer` makes dialers in place of real ones."""
    config = configuration(config) if isinstance(config, str) else config
    resolver, guard = resolver or StubResolver({}), guard or make_guard(config)
    dialers = DialerFactory(
        TargetResolver(resolver, guard),
        UdpSocketFactory(Counts(), Lines(), "single"),
        5.0,
        no_packets(),
    )
    return make_routing(
        config,
        RoutingDependencies(
            dialer or dialers.dialer,
            dialers.direct_within,
            make_fallbacks(config, dialer or dialers.dialer),
            resolver,
            guard,
            verdicts or Verdicts(60.0, 100),
            clock=clock,
        ),
    )
