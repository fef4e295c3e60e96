"""A router made from the text of a configuration, with real ways out that nobody dials and a resolver that counts.

Flows are written as people say them: "udp alice@192.168.1.5 -> example.com:443 on main".
"""

from __future__ import annotations

import re
from typing import Callable, Mapping, Sequence

from netproxy.access.destinations import Destinations, OwnSockets
from netproxy.access.factory import make_policies
from netproxy.config.schema import Config
from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import DestinationGuard, Dialer, Resolver
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.protocol.host import parse_host
from netproxy.router.auto import Verdicts
from netproxy.router.factory import Means, Routing, make_routing
from tests.support.doubles import Counts, Lines, no_services
from tests.support.relays import configuration

_FLOW = re.compile(r"(tcp|udp) (?:([^@ ]+)@)?(\S+) -> (\S+):(\d+) on (\S+)\Z")


def flow(text: str) -> Flow:
    """What a codec makes of a request: the host is canonical, whatever the spelling."""
    found = _FLOW.match(text)
    assert found, text
    network, user, client, host, port, listener = found.groups("")
    return Flow(
        network,
        Address(client, 50000),
        Address(parse_host(host.encode()), int(port)),
        listener,
        user,
    )


class Names:
    """A Resolver: `there` are names with their addresses; None is a name server that is silent.  `asked` counts."""

    def __init__(self, there: Mapping[str, Sequence[str] | None]) -> None:
        self.there = dict(there)
        self.asked: list[str] = []
        self.cached: set[str] = (
            set()
        )  # what known() knows; a name that is not there is known not to be

    def resolve(self, target: Address, seconds: float = 0.0) -> list[Address]:
        if pack_ip(target.host) is not None:
            return [target]
        self.asked.append(target.host)
        return self._found(target)

    def known(self, target: Address) -> list[Address] | None:
        if pack_ip(target.host) is not None:
            return [target]
        return self._found(target) if target.host in self.cached else None

    def _found(self, target: Address) -> list[Address]:
        hosts = self.there.get(target.host, ())
        if not hosts:
            raise DialError(Reason.TIMEOUT if hosts is None else Reason.NAME, target.host)
        return [target._replace(host=host) for host in hosts]


def make_guard(
    config: Config, own: Sequence[tuple[str, Address]] = (), local: Sequence[str] = ()
) -> Destinations:
    """As the daemon has it; `own` sockets, `local` addresses of the machine."""
    sockets = OwnSockets(lambda host: host in local)
    sockets.set(own)
    guard = Destinations(sockets)
    guard.configure(make_policies(config))
    return guard


def routing(
    config: Config | str,
    resolver: Resolver | None = None,
    guard: DestinationGuard | None = None,
    way: Callable[..., Dialer] | None = None,
    verdicts: Verdicts | None = None,
) -> Routing:
    """`way` in place of real ways out."""
    config = configuration(config) if isinstance(config, str) else config
    resolver, guard = resolver or Names({}), guard or make_guard(config)
    dialers = DialerFactory(
        TargetResolver(resolver, guard),
        UdpSocketFactory(Counts(), Lines(), "single"),
        5.0,
        no_services(),
    )
    return make_routing(
        config,
        Means(
            way or dialers.dialer,
            dialers.impatient,
            resolver,
            guard,
            verdicts or Verdicts(60.0, 100),
        ),
    )
