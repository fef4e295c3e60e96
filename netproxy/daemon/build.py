"""Builds a configuration: makes a Plan of it.

Start, reload, netproxyd -t and --explain all build.  Building reads files (certificates,
lists, databases) and makes objects.  It opens nothing, starts nothing and changes nothing
that is running; daemon.plan does that.  Thread: main.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Iterator

from netproxy.access.factory import GrantedLimits, make_binds, make_policies, make_users
from netproxy.access.limits import Admission
from netproxy.access.permission import Permission
from netproxy.config.schema import Config
from netproxy.daemon.checks.configuration import check_configuration, check_requirements
from netproxy.daemon.tunnels.lazy import LazyTunnels
from netproxy.daemon.own_sockets import wanted_sockets
from netproxy.config.used import used_upstreams
from netproxy.daemon.plan import Plan, make_fallbacks
from netproxy.daemon.reachability import Reachability, make_lookups
from netproxy.daemon.runtime import Runtime
from netproxy.daemon.specs import TcpSpec, UdpSpec
from netproxy.daemon.udp_relays import UdpRelays
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.handler.factory import DnsDependencies, HandlerDependencies, make_handler
from netproxy.interfaces.listeners import ALL_CLIENTS, AllowedClients
from netproxy.listener.manager import ListenerSpec
from netproxy.observe.flows import ObserverGroup
from netproxy.router.router import Fallbacks, RuleRouter

if TYPE_CHECKING:
    from netproxy.access.external.logins import ExternalLogins
    from netproxy.resolver.forwarder import DnsForwarder
    from netproxy.router.auto import AutoDialer


def build(config: Config, runtime: Runtime, previous: Plan | None) -> Plan:
    """Return the plan of a configuration.

    `previous`: the running plan, whose dialers, relays and tunnels are kept as far as they are
    the same; None to share nothing.  Its dialer factory keeps what is made here: the next
    commit drops what that plan does not use.  Raises ConfigError.
    """
    return _Builder(config, runtime, runtime.reachability, previous).plan()


def build_for_questions(config: Config, runtime: Runtime) -> Plan:
    """Return a plan to be asked with explain(), as if the daemon ran with it.

    It looks names up and guards destinations by itself: the runtime's resolver, policies and
    own sockets stay what they are.  Raises ConfigError.
    """
    reachability = runtime.separate_reachability()
    plan = _Builder(config, runtime, reachability, None).plan()
    reachability.configure(plan.lookups, plan.policies, wanted_sockets(config))
    return plan


class _Builder:
    """Makes one plan."""

    def __init__(
        self, config: Config, runtime: Runtime, reachability: Reachability, previous: Plan | None
    ) -> None:
        """`reachability`: what the plan's dialers and rules resolve and check targets with."""
        self._config = config
        self._runtime = runtime
        self._reachability = reachability
        self._previous = previous
        self._tunnels = previous.tunnels if previous else LazyTunnels(runtime)
        self._dialers = self._make_dialers()
        self._permissions: list[Permission] = []

    def plan(self) -> Plan:
        """Return the plan.  Raises ConfigError."""
        config, runtime, previous = self._config, self._runtime, self._previous
        check_requirements(config)
        policies = make_policies(config)
        renewal = self._dialers.prepare_renewal(used_upstreams(config))
        forwarder = self._forwarder()
        external = self._external(previous.dependencies.external if previous else None)
        router, autos = self._routing(make_fallbacks(config, self._dialers.dialer, external))
        dependencies = HandlerDependencies(
            router=router,
            users=make_users(config, previous.dependencies.users if previous else None),
            binds=make_binds(config, used_upstreams(config)),
            resolver=self._reachability.resolver,
            timeouts=config.timeouts,
            splice=config.splice,
            counter=runtime.counters,
            observer=ObserverGroup(runtime.flows, autos),
            accounts=runtime.accounts,
            standing=runtime.standing,
            log=runtime.log,
            back_off=runtime.back_off,
            external=external,
            dns=self._dns_dependencies(forwarder),
            bridge=self._tunnels.obtain().bridge if config.tunnel.bridge else None,
        )
        self._check_unused_parts()
        relays = UdpRelays(config, runtime, previous.relays if previous else None)
        admissions = self._admissions()
        return Plan(
            config=config,
            runtime=runtime,
            dialers=self._dialers,
            renewal=renewal,
            lookups=make_lookups(config.dns, forwarder),
            forwarder=forwarder,
            policies=policies,
            router=router,
            dependencies=dependencies,
            relays=relays,
            admissions=admissions,
            specs=list(self._specs(dependencies, relays, admissions)),
            permissions=self._permissions,
            tunnels=self._tunnels,
            warnings=check_configuration(config, self._dialers),
        )

    def _make_dialers(self) -> DialerFactory:
        config, previous = self._config, self._previous
        if previous and previous.config.timeouts.connect == config.timeouts.connect:
            return previous.dialers
        return DialerFactory(
            self._reachability.targets,
            self._runtime.datagrams,
            config.timeouts.connect,
            self._runtime.packet_dependencies,
            tunnel=self._tunnels.dialer,
        )

    def _forwarder(self) -> DnsForwarder | None:
        """Return what asks the configured name servers, None if there are none."""
        dns = self._config.dns
        if not (dns.servers or dns.rules):
            return None
        # late: 0.4 MiB, and few configurations have name servers
        from netproxy.resolver.factory import ResolverDependencies, SystemResolver, make_forwarder
        from netproxy.router.factory import domains

        destinations = self._reachability.destinations
        targets = TargetResolver(SystemResolver(dict(dns.hosts)), destinations)
        # Not the builder, which refers to the plan before: no plan would ever be freed.
        datagrams = self._runtime.datagrams

        def direct(seconds: float) -> DirectDialer:
            return DirectDialer(targets, datagrams, seconds)

        counters = self._runtime.counters
        dependencies = ResolverDependencies(
            direct, self._dialers.dialer, domains, destinations, counters
        )
        return make_forwarder(dns, dependencies)

    def _dns_dependencies(self, forwarder: DnsForwarder | None) -> DnsDependencies | None:
        if forwarder is None:
            return None
        # late: few configurations have name servers
        from netproxy.resolver.answer_cache import AnswerCache

        runtime = self._runtime
        arenas = runtime.datagrams.arenas()
        cache = AnswerCache(self._config.dns.cache, self._config.dns.serve_stale)
        return DnsDependencies(forwarder, cache, runtime.queries, arenas)

    def _external(self, earlier: ExternalLogins | None) -> ExternalLogins | None:
        """Return what checks the logins of unknown users, None without a program or service."""
        if not self._config.auth.is_set:
            return None
        # late: few configurations have an external check
        from netproxy.access.external.factory import ExternalMaker
        from netproxy.config.sections.auth import AnswerReader

        runtime, parser = self._runtime, AnswerReader(self._config.upstreams)
        granted = GrantedLimits(runtime.accounts)
        maker = ExternalMaker(parser, runtime.logins.submit, granted, runtime.log)
        return maker.make(self._config.auth, earlier)

    def _routing(self, fallbacks: Fallbacks) -> tuple[RuleRouter, tuple[AutoDialer, ...]]:
        """Return the router, and its dialers that learn from the connections they made."""
        config, dialers, reachability = self._config, self._dialers, self._reachability
        if not config.rules:
            resolver, guard = reachability.resolver, reachability.destinations
            return RuleRouter((), fallbacks, resolver, guard), ()
        # late: 0.3 MiB, and many configurations have no rules
        from netproxy.router.factory import RoutingDependencies, make_routing

        return make_routing(
            config,
            RoutingDependencies(
                dialers.dialer,
                dialers.direct_within,
                fallbacks,
                reachability.resolver,
                reachability.destinations,
                self._runtime.verdicts,
            ),
        )

    def _check_unused_parts(self) -> None:
        """Make what is only used later, or never, so that its errors are found now."""
        for upstream in self._config.upstreams.values():
            self._dialers.dialer(upstream)
        if self._config.tunnel.agent is not None:
            self._dialers.dialer(self._config.tunnel.agent.upstream)
        self._tunnels.check(self._config)

    def _admissions(self) -> dict[str, Admission]:
        """Return the admissions by listener; a listener that stays counts on."""
        admissions = dict(self._previous.admissions) if self._previous else {}
        for listener in self._config.listeners:
            # A client that comes through a trusted proxy is checked again (handler.sps), once the
            # proxy has said whom it speaks for.
            allowed = AllowedClients(*listener.clients, listener.proxy_protocol)
            limits = listener.limits
            per_client = limits.connections_per_client or 1
            running = admissions.get(listener.name) or Admission(
                ALL_CLIENTS, 0, 0, partial(self._runtime.accounts.refuse_arrival, listener.name)
            )
            admissions[listener.name] = running.with_limits(allowed, limits.connections, per_client)
        return admissions

    def _specs(
        self, dependencies: HandlerDependencies, relays: UdpRelays, admissions: dict[str, Admission]
    ) -> Iterator[ListenerSpec]:
        """Yield the listeners; of one address UDP first, so that it is there for ASSOCIATE."""
        for listener in self._config.listeners:
            for address in listener.addresses:
                state = relays.states.get((listener.name, address))
                handlers = make_handler(listener, state, dependencies)
                if handlers.permission is not None:
                    self._permissions.append(handlers.permission)
                relay = handlers.udp
                if relay is not None and listener.udp.relay_port != "shared":
                    relay.open_port = relays.ports(listener.udp.relay_port).open
                elif "udp" in listener.network and listener.protocol != "http":
                    yield UdpSpec(listener, address, handlers)
                if "tcp" in listener.network:
                    yield TcpSpec(
                        listener,
                        address,
                        handlers,
                        admissions[listener.name],
                        dependencies.timeouts.handshake,
                    )
