"""Finds the addresses of targets, and decides which of them may be dialled.

Thread: main configures; any thread asks.
"""

from __future__ import annotations

from netproxy.access.destinations import DestinationPolicy, Destinations
from netproxy.access.own_sockets import OwnSockets
from netproxy.dialer.direct import TargetResolver
from netproxy.resolver.nat64 import Nat64
from netproxy.resolver.resolver import LookupPlan, Resolver, ask_system
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import DnsConfig
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.fairness import FairSubmit
    from netproxy.interfaces.networks import IpNetwork
    from netproxy.interfaces.services import Counter
    from netproxy.net.local.routes import KernelRoutes
    from netproxy.resolver.forwarder import DnsForwarder


class Reachability:
    """Names, destination policies, own sockets and NAT64 of one configuration after another.

    The runtime has one for everything that runs.  A plan that is only asked (netproxyd -t,
    --explain) has one of its own, so that the question changes nothing.
    """

    def __init__(self, submit: FairSubmit, counter: Counter, routes: KernelRoutes) -> None:
        """Look names up on threads of `submit`."""
        self.own = OwnSockets(routes.is_local)
        self.destinations = Destinations(self.own)
        self.resolver = Resolver(submit, counter)
        self.nat64 = Nat64(self.resolver, routes.has_route)
        self.targets = TargetResolver(self.resolver, self.destinations, self.nat64)

    def configure(
        self,
        lookups: LookupPlan,
        policies: Mapping[str, DestinationPolicy],
        own: Iterable[tuple[str, Address]],
        fake: Sequence[IpNetwork],
    ) -> None:
        """Apply a configuration: how names are looked up, and what each listener may reach.

        `policies`: by the listener's name.  `own`: network and address of the daemon's sockets.
        `fake`: the networks of fake addresses.
        """
        self.resolver.configure(lookups)
        self.nat64.configure(lookups.nat64, lookups.find_nat64)
        self.destinations.configure(policies, fake)
        self.own.set(own)


def make_lookups(dns: DnsConfig, forwarder: DnsForwarder | None) -> LookupPlan:
    """Return how names are looked up: by the forwarder, or without one by the system."""
    if forwarder is not None:
        # late, as the forwarder: few configurations have name servers
        from netproxy.resolver.factory import make_lookup_plan

        return make_lookup_plan(dns, forwarder)
    return LookupPlan(
        ask_system,
        dict(dns.hosts),
        dns.prefer,
        dns.cache,
        dns.serve_stale,
        dns.nat64,
        dns.find_nat64,
    )
