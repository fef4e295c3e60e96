"""Builds a configuration: makes a Plan of it.

Start, reload, netproxyd -t and --explain all build.  Building reads files (certificates,
lists, databases) and makes objects.  It opens nothing, starts nothing and changes nothing
that is running; daemon.plan does that.  Thread: main.
"""

from __future__ import annotations

from functools import partial

from netproxy.access.factory import GrantedLimits, make_binds, make_policies, make_users
from netproxy.access.limits import Admission
from netproxy.config.schema import Config
from netproxy.daemon.listening.announcements import Announcements
from netproxy.daemon.checks.configuration import check_configuration, check_requirements
from netproxy.daemon.tunnels.lazy import LazyTunnels
from netproxy.daemon.names import make_dns_dependencies, make_fakes, make_named_flows
from netproxy.daemon.own_sockets import wanted_sockets
from netproxy.config.used import fixed_targets, used_upstreams
from netproxy.daemon.plan import Plan, make_fallbacks
from netproxy.daemon.reachability import Reachability, make_lookups
from netproxy.daemon.runtime import Runtime
from netproxy.daemon.listening.specs import RouteRouters, listener_specs, make_handlers
from netproxy.daemon.listening.udp_relays import UdpRelays
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import ConfigError, for_all
from netproxy.handler.factory import HandlerDependencies, make_tls_handshake
from netproxy.interfaces.addresses import UnixAddress
from netproxy.interfaces.listeners import ALL_CLIENTS, AgentPackets, AllowedClients
from netproxy.observe.flows import ObserverGroup
from netproxy.router.router import Fallbacks, RuleRouter
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.access.checks.passwords import PasswordChecks
    from netproxy.access.checks.known_users import KnownUsers
    from netproxy.interfaces.routing import Dialer
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
    own, fake = wanted_sockets(config), config.dns.fake.networks
    reachability.configure(plan.lookups, plan.policies, own, fake)
    return plan


def _password_checks(users: KnownUsers, runtime: Runtime) -> PasswordChecks:
    # late: many configurations have no hashed passwords
    from netproxy.access.checks.lanes import PasswordLanes
    from netproxy.access.checks.passwords import PasswordChecks

    if runtime.passwords is None:
        clean, suspect = runtime.clean.submit, runtime.suspect.submit
        runtime.passwords = PasswordLanes(clean, suspect, runtime.back_off)
    return PasswordChecks(users, runtime.passwords)


def _call(make: Callable[[], object]) -> object:
    return make()


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
        self._fakes = make_fakes(config, runtime)

    def plan(self) -> Plan:
        """Return the plan.  Raises ConfigError with all errors that are found."""
        try:
            return self._plan()
        except ConfigError:
            # The plan is made part by part: the parts behind that one may have errors as well.
            for_all(_call, self._parts())
            raise

    def _parts(self) -> tuple[Callable[[], object], ...]:
        """Return what makes the parts of a plan whose errors do not depend on each other."""
        config, dialer = self._config, self._dialers.dialer
        listeners = (listener.tls for listener in config.listeners if listener.tls is not None)
        return (
            lambda: make_policies(config),
            self._forwarder,
            self._check_unused_parts,
            lambda: self._routing(make_fallbacks(config, dialer)),
            lambda: make_users(config),
            *(partial(make_tls_handshake, tls) for tls in listeners),
            self._check_port_routes,
        )

    def _check_port_routes(self) -> None:
        routes = [listener.routes for listener in self._config.listeners if listener.routes]
        if routes:
            from netproxy.router.port_routes.factory import make_port_routes  # late: few have any

            for_all(make_port_routes, routes)

    def _plan(self) -> Plan:
        config, runtime, previous = self._config, self._runtime, self._previous
        check_requirements(config)
        policies = make_policies(config)
        renewal = self._dialers.prepare_renewal(used_upstreams(config))
        forwarder = self._forwarder()
        external = self._external(previous.dependencies.external if previous else None)
        router, autos = self._routing(make_fallbacks(config, self._dialers.dialer, external))
        users = make_users(config, previous.dependencies.users if previous else None)
        dependencies = HandlerDependencies(
            router=router,
            users=users,
            passwords=_password_checks(users, runtime) if users.are_hashed else None,
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
            is_own=self._reachability.own.holds,
            external=external,
            dns=make_dns_dependencies(config, runtime, forwarder),
            bridge=self._tunnels.obtain().bridge if config.tunnel.bridge else None,
            paths=self._paths(),
            introducer=self._tunnels.introducer(config),
        )
        self._check_unused_parts()
        relays = UdpRelays(config, runtime, previous.relays if previous else None)
        announcements = Announcements(config, runtime, previous.announcements if previous else None)
        admissions = self._admissions()
        routers = RouteRouters(router, self._dialers)
        handlers = make_handlers(config, relays, announcements, dependencies, routers)
        given = [handler.permission for handler in handlers.values()]
        return Plan(
            config=config,
            runtime=runtime,
            dialers=self._dialers,
            renewal=renewal,
            lookups=make_lookups(config.dns, forwarder),
            forwarder=forwarder,
            policies=policies,
            fakes=self._fakes,
            router=router,
            dependencies=dependencies,
            relays=relays,
            announcements=announcements,
            admissions=admissions,
            specs=list(listener_specs(config, runtime, relays, handlers, admissions)),
            permissions=[permission for permission in given if permission is not None],
            tunnels=self._tunnels,
            warnings=check_configuration(config, self._dialers),
        )

    def _make_dialers(self) -> DialerFactory:
        config, previous = self._config, self._previous
        if previous and previous.config.timeouts.connect == config.timeouts.connect:
            return previous.dialers
        runtime, targets = self._runtime, self._reachability.targets
        parts = (targets, runtime.datagrams, config.timeouts.connect, runtime.packet_dependencies)
        tunnel, command = self._tunnels.dialer, runtime.commands.dialer
        dialers = DialerFactory(*parts, tunnel=tunnel, command=command)
        dialers.direct_client = self._tunnels.with_direct
        return dialers

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
            direct, self._dialers.dialer, domains, destinations, counters, self._fakes
        )
        return make_forwarder(dns, dependencies)

    def _external(self, earlier: ExternalLogins | None) -> ExternalLogins | None:
        """Return what checks the logins of unknown users, None without a program or service."""
        if not self._config.auth.is_set:
            return None
        # late: few configurations have an external check
        from netproxy.access.external.factory import ExternalMaker
        from netproxy.config.sections.auth import AnswerReader

        runtime, parser = self._runtime, AnswerReader(self._config.upstreams)
        granted, resolver = GrantedLimits(runtime.accounts), self._reachability.resolver
        submit, log, key = runtime.logins.submit, runtime.log, runtime.login_key
        maker = ExternalMaker(parser, submit, granted, resolver, log, key)
        return maker.make(self._config.auth, earlier)

    def _routing(self, fallbacks: Fallbacks) -> tuple[RuleRouter, tuple[AutoDialer, ...]]:
        """Return the router, and its dialers that learn from the connections they made."""
        config, dialers, reachability = self._config, self._dialers, self._reachability
        names = make_named_flows(config, self._runtime, self._fakes)
        sockets = self._to_sockets()
        if not config.rules:
            resolver, guard = reachability.resolver, reachability.destinations
            return RuleRouter((), fallbacks, resolver, guard, names, sockets), ()
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
                names,
                sockets,
            ),
        )

    def _to_sockets(self) -> Dialer | None:
        """Return what connects to targets that are UNIX sockets, None without such targets."""
        config = self._config
        if not any(isinstance(target, UnixAddress) for target, _ in fixed_targets(config)):
            return None
        from netproxy.dialer.plain.unix import UnixDialer  # late: few have such targets

        return UnixDialer(config.timeouts.connect, is_hop=False)

    def _paths(self) -> AgentPackets | None:
        """Return what takes the datagrams of agents, None if the bridge offers them no path."""
        bridge = self._config.tunnel.bridge
        is_offered = bridge is not None and bridge.datagrams
        return self._tunnels.obtain().obtain_paths() if is_offered else None

    def _check_unused_parts(self) -> None:
        """Make what is only used later, or never, so that its errors are found now."""
        for_all(self._dialers.dialer, self._config.upstreams.values())
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
            running = admissions.get(listener.name) or self._admission(listener.name)
            admissions[listener.name] = running.with_limits(allowed, limits.connections, per_client)
        return admissions

    def _admission(self, listener: str) -> Admission:
        """Return the admission of a new listener, without its limits."""
        runtime = self._runtime
        refuse_arrival = partial(runtime.accounts.refuse_arrival, listener)
        shared = runtime.counting.connections(listener)
        return Admission(ALL_CLIENTS, 0, 0, refuse_arrival, shared)
