"""The daemon: applies a configuration, reloads it, drains what lives and stops.

The only module that knows everyone; what outlives a configuration is machinery's and
relays'.  Its methods run on the main thread.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Callable, Iterator, Sequence

from netproxy.interfaces.networks import NetworkList
from netproxy.access.factory import make_policies, make_users
from netproxy.access.limits import Admission
from netproxy.config.schema import Config, ListenerConfig, TunnelConfig, UpstreamConfig
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.factory import DialerFactory, udp_warnings
from netproxy.errors import ListenError
from netproxy.handler.factory import (
    ListenerHandler,
    NameService,
    HandlerDependencies,
    make_handler,
    secure,
)
from netproxy.admin.commands import Admin
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.interfaces.services import DaemonState
from netproxy.listener.manager import ListenerManager, ListenerSpec
from netproxy.listener.tcp import TcpListener
from netproxy.listener.udp import UdpListener
from netproxy.daemon.runtime import STOP_SECONDS, Runtime, room_for
from netproxy.observe.flows import ObserverGroup
from netproxy.observe.log import Log
from netproxy.daemon.udp_relays import UdpRelays, States
from netproxy.resolver.resolver import Plan, ask_system
from netproxy.router.router import RuleRouter

STOP_STEP = 0.01  # seconds between two looks at whether all connections have ended


class Daemon:
    def __init__(self, log: Log) -> None:
        self._log = log
        self._runtime = runtime = Runtime(log)
        self.counters, self.flows, self.pools = runtime.counters, runtime.flows, runtime.pools
        self.verdicts = runtime.verdicts
        self._udp_relays = UdpRelays(runtime)
        self._manager = ListenerManager(
            {
                "tcp": runtime.listener,
                "udp": lambda address: UdpListener(
                    runtime.concrete(address), runtime.datagrams, self.counters, log
                ),
            }
        )
        self._dialers: DialerFactory | None = None
        self._dial_seconds = 0.0
        self._named_ways: dict[str, UpstreamConfig] = {}
        self.state = DaemonState.STARTING
        self._admin = Admin(self, log)
        self.way_out = ""  # of what has no upstream of its own, for one line of a log
        self._named_by: Any = None  # resolver.forwarder.Forwarder
        self._tunnels: Any = None  # tunnels.Tunnels, once a configuration has one
        self._router: Any = None  # router.router.RuleRouter
        self._places: dict[str, str] = {}  # where flows come in, for explain()
        self._admissions: dict[str, Admission] = {}  # by listener's name
        self._retired: list[TcpListener] = []  # stopped, with connections that may still live

    # -- life

    def start(self, config: Config) -> None:
        """Listens and serves; ConfigError or ListenError, and then nothing is left open."""
        self._runtime.start(config.batching)
        self._admin.apply(config, partial(self._apply, config))
        self._runtime.run()
        self.state = DaemonState.SERVING

    def reload(self, config: Config) -> None:
        """The new configuration for whatever comes from now on; on ConfigError or ListenError nothing has changed."""
        self._admin.apply(config, partial(self._apply, config))

    def begin_reload(self) -> Callable[[list[str]], None]:
        """Before one; gives back what has to be told its errors, none for success."""
        return self._admin.begin_reload()

    def stop_accepting(self) -> None:
        """No new connections; those that live, and their datagrams, go on."""
        self.state = DaemonState.DRAINING
        self._retired += self._manager.stop(("tcp",))
        if self._tunnels is not None:
            self._tunnels.stop_accepting()
        self._runtime.poller.release_idle()

    def stop(self) -> None:
        """Ends everything that lives."""
        self.stop_accepting()
        for listener in self._retired:
            listener.abort()
        if self._tunnels is not None:
            self._tunnels.stop()
        self._udp_relays.close()
        self._admin.stop()
        deadline = time.monotonic() + STOP_SECONDS
        while self.live and time.monotonic() < deadline:
            time.sleep(STOP_STEP)  # what was parked wakes up to end
        self._runtime.poller.stop()
        self._runtime.connections.stop(STOP_SECONDS)
        self._manager.stop()
        self._runtime.stop()
        if self._named_by is not None:
            self._named_by.close()

    # -- what it is like

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        tcp = [listener for listener in self._manager.listeners if listener.network == "tcp"]
        return sum(listener.live for listener in tcp + self._retired) + (
            self._tunnels.live if self._tunnels is not None else 0
        )

    def dead_thread(self) -> str:
        """The name of a thread that must live but does not, "" while all is well."""
        threads = [self._runtime.janitor.thread, self._runtime.poller.thread, *self._admin.threads]
        for thread in [*threads, *(listener.thread for listener in self._manager.listeners)]:
            if not thread.is_alive():
                return thread.name
        return self._tunnels.dead_thread() if self._tunnels is not None else ""

    def listening(self) -> list[dict[str, Any]]:
        """Each listener, with its figures."""
        return _report().listening(self._manager.listeners, self._admissions)

    def upstreams(self) -> list[dict[str, Any]]:
        """Each way out, with its figures."""
        return (
            _report().upstreams(self._dialers, self._named_ways)
            if self._dialers is not None
            else []
        )

    def tunnels(self) -> dict[str, Any]:
        """Agents that are connected, and how the daemon's own is."""
        return (
            self._tunnels.describe() if self._tunnels is not None else {"agents": [], "agent": None}
        )

    def summary(self) -> str:
        """What listens, for one line of a log."""
        return (
            ", ".join(
                f"{listener.network} {listener.address}" for listener in self._manager.listeners
            )
            or "nothing"
        )

    def status(self) -> Iterator[str]:
        """For the log, a line each."""
        yield (
            f"connections={self.live} parked={len(self._runtime.poller)} threads={self._runtime.connections.threads} "
            f"listeners: {self.summary()}"
        )
        yield from self._udp_relays.status()
        if self._tunnels is not None:
            yield from self._tunnels.summary()
        for name, reason, value in self.counters.items():
            yield f"{name}{{{reason}}}={value}"

    def describe(self, config: Config) -> list[str]:
        """What would listen, and what each way out can carry; ConfigError.  Opens nothing."""
        dialers = self._factory(config)
        self._surroundings(config, dialers, self._forwarder(config, dialers))
        if config.tunnel.agent:
            self._reverse().read(config)
        make_policies(config)
        for one in config.listeners:
            if one.tls:
                secure(one.tls)
        return _report().plan(config, dialers)

    def explain(self, flow: str, config: Config | None = None) -> list[str]:
        """What becomes of a flow, in lines; with a configuration, of one that has not been applied.  ConfigError, FlowError."""
        if config is None:
            assert self._dialers is not None  # it has started
            return list(_report().explain(flow, self._router, self._dialers, self._places))
        dialers = self._factory(config)
        forwarder = self._forwarder(config, dialers)
        self._runtime.resolver.configure(_plan(config, forwarder))
        self._runtime.destinations.configure(make_policies(config))
        self._runtime.own.set(_wanted_sockets(config))
        router = self._surroundings(config, dialers, forwarder).router
        return list(_report().explain(flow, router, dialers, _places(config)))

    # -- building

    def _factory(self, config: Config) -> DialerFactory:
        runtime = self._runtime
        reach = TargetResolver(runtime.resolver, runtime.destinations)
        return DialerFactory(
            reach,
            runtime.datagrams,
            config.timeouts.connect,
            runtime.services,
            tunnel=lambda agent, seconds: self._reverse().dialer(agent, seconds),
        )

    def _reverse(self) -> Any:
        """The tunnels, made where a configuration first has one."""
        if self._tunnels is None:
            from netproxy.daemon.tunnels import Tunnels  # late: most daemons have none

            self._tunnels = Tunnels(self._runtime)
        return self._tunnels

    def _apply(self, config: Config, inside: list[tuple[str, Address]]) -> None:
        """`inside`: what listens for whoever looks into the daemon."""
        dialers = self._dialers
        if dialers is None or self._dial_seconds != config.timeouts.connect:
            dialers = self._factory(config)
        policies = make_policies(config)
        adopt = dialers.renewal(
            _ways(config)
        )  # of what is there already; the rest is read as it is made
        forwarder = self._forwarder(config, dialers)
        dependencies = self._surroundings(config, dialers, forwarder)
        states: States = {}
        wanted = [
            one
            for listener in config.listeners
            for address in listener.addresses
            for one in self._wanted(listener, address, states, dependencies)
        ]
        before_udp = [listener for listener in self._manager.listeners if listener.network == "udp"]
        reverse = (
            self._reverse().prepare(config, dependencies, dialers)
            if config.tunnel != TunnelConfig() or self._tunnels
            else None
        )
        before = self._runtime.connections.limit
        self._runtime.connections.limit = max(before, room_for(config))
        try:
            gone = self._manager.replace(wanted)
        except ListenError:
            self._runtime.connections.limit = before
            if reverse is not None:
                reverse.abandon()
            raise
        adopt()
        self._router, self._places = dependencies.router, _places(config)
        self._adopt_names(config, forwarder)
        self._runtime.adopt(policies, config, self._own_sockets(config) + inside)
        self._runtime.connections.limit = room_for(config)
        self._dialers, self._dial_seconds = dialers, config.timeouts.connect
        self.way_out = config.default.text
        self._named_ways = {} if config.default.name else {"default": config.default}
        self._named_ways.update(config.upstreams)
        dialers.forget_all_but(_ways(config))
        self._runtime.health.checks = [
            check for group in dialers.groups() for check in group.checks
        ]
        fresh = [
            listener
            for listener in self._manager.listeners
            if listener.network == "udp" and listener not in before_udp
        ]
        self._retire(gone, fresh)
        self._udp_relays.adopt(states, config)
        if reverse is not None:
            reverse.adopt()
        for text in udp_warnings(config, dialers):
            self._log.warning("%s", text)

    def _forwarder(self, config: Config, dialers: DialerFactory) -> Any:
        """resolver.forwarder.Forwarder; None where the system is asked for names."""
        if not (config.dns.servers or config.dns.rules):
            return None
        from netproxy.resolver.factory import (
            Means,
            SystemNames,
            make_forwarder,
        )  # late: 0.4 MiB, and few have servers
        from netproxy.router.factory import domains

        runtime = self._runtime
        direct = partial(
            DirectDialer,
            TargetResolver(SystemNames(dict(config.dns.hosts)), runtime.destinations),
            runtime.datagrams,
        )
        return make_forwarder(config.dns, Means(direct, dialers.dialer, domains, runtime.destinations))

    def _adopt_names(self, config: Config, forwarder: Any) -> None:
        self._runtime.resolver.configure(_plan(config, forwarder))
        before, self._named_by = self._named_by, forwarder
        if forwarder is not None:
            self._runtime.janitor.register(forwarder)
        if before is not None:
            self._runtime.janitor.unregister(before)
            before.close()

    def _own_sockets(self, config: Config) -> list[tuple[str, Address]]:
        """What no client may be led to, by the addresses that are announced for it as well."""
        own = [(listener.network, listener.address) for listener in self._manager.listeners]
        announced = [one.address for listener in config.listeners for one in listener.announce]
        return own + [
            (network, Address(address.host, address.port or bound.port))
            for network, bound in own
            for address in announced
        ]

    def _retire(self, gone: list[Any], fresh: list[Any]) -> None:
        for listener in gone:
            if listener.network == "udp":
                self._runtime.janitor.unregister(listener)
        for listener in fresh:
            self._runtime.janitor.register(listener)
        self._retired = [listener for listener in self._retired if listener.live]
        self._retired += [
            listener for listener in gone if listener.network == "tcp" and listener.live
        ]

    def _surroundings(
        self, config: Config, dialers: DialerFactory, forwarder: Any
    ) -> HandlerDependencies:
        users = make_users(config)
        for way in (
            config.upstreams.values()
        ):  # those in use only, but what is wrong with any is found now
            dialers.dialer(way)
        runtime = self._runtime
        router, autos = self._routing(config, dialers)
        observer = ObserverGroup(self.flows, autos)
        names = (
            NameService(forwarder, config.dns.cache, runtime.queries, runtime.datagrams.arenas())
            if forwarder
            else None
        )
        return HandlerDependencies(
            router,
            users,
            runtime.resolver,
            config.timeouts,
            config.splice,
            self.counters,
            observer,
            self._log,
            names,
            self._reverse().bridge if config.tunnel.bridge else None,
        )

    def _routing(self, config: Config, dialers: DialerFactory) -> tuple[RuleRouter, Sequence[Any]]:
        """The router, and its autos (router.auto.AutoDialer)."""
        runtime = self._runtime
        if not config.rules:
            by_listener = {
                one.name: dialers.dialer(one.upstream) for one in config.listeners if one.upstream
            }
            return RuleRouter(
                (), dialers.dialer(config.default), by_listener, runtime.resolver, runtime.destinations
            ), ()
        from netproxy.router.factory import (
            Means,
            make_routing,
        )  # late: 0.3 MiB, and many have no rules

        return make_routing(
            config,
            Means(
                dialers.dialer,
                dialers.impatient,
                runtime.resolver,
                runtime.destinations,
                runtime.verdicts,
            ),
        )

    def _wanted(
        self,
        config: ListenerConfig,
        address: Address,
        states: States,
        dependencies: HandlerDependencies,
    ) -> Iterator[ListenerSpec]:
        """The sockets of one listening address; the packet side first, so that it is there before the first ASSOCIATE."""
        state = None
        if "udp" in config.network and config.protocol != "dns":
            state = states[config.name, address] = self._udp_relays.state(address, config)
        made = make_handler(config, state, dependencies)
        group = f"{config.name} {address}"
        if (
            config.protocol != "http"
            and "udp" in config.network
            and (made.udp is None or config.udp.relay_port == "shared")
        ):
            yield ListenerSpec("udp", address, group, partial(_equip_udp, made, config.name))
        elif made.udp is not None:
            made.udp.open_port = partial(self._udp_relays.open_port, _ports(config.udp.relay_port))
        if "tcp" in config.network:
            yield ListenerSpec(
                "tcp",
                address,
                group,
                partial(self._equip_tcp, made, config, dependencies.timeouts.handshake),
            )

    def _equip_tcp(
        self, made: ListenerHandler, config: ListenerConfig, handshake: float, listener: TcpListener
    ) -> None:
        """One admission for all addresses of a listener; a reload does not forget who is in."""
        # who comes in by a proxy is looked at once it has said for whom it speaks
        limits = (
            NetworkList(config.clients + config.proxy_protocol) if config.clients else None,
            config.limits.connections,
            config.limits.connections_per_client or 1,
        )
        admission = self._admissions.get(config.name)
        if admission is None:
            admission = self._admissions[config.name] = Admission(*limits)
        admission.configure(*limits)
        listener.name = config.name
        listener.configure(made.handler, admission, handshake)


def _wanted_sockets(config: Config) -> list[tuple[str, Address]]:
    """What a configuration would listen on, as far as it tells ports."""
    own = [
        (network, address)
        for one in config.listeners
        for address in one.addresses
        for network in one.network
        if address.port
    ]
    return own + [("tcp", config.metrics.address)] if config.metrics.address else own


def _places(config: Config) -> dict[str, str]:
    """Listeners by name, and what a tunnel's exit is asked for; each with why no rule is asked there, "" where rules are."""
    agent = config.tunnel.agent
    exit_ = (
        {}
        if agent is None
        else {
            TUNNEL_AGENT: ""
            if agent.exit
            else "the agent is no exit, and leads to its services alone"
        }
    )
    return {**{one.name: "" for one in config.listeners}, **exit_}


def _report() -> Any:
    from netproxy.admin import explain  # late: few daemons are ever asked

    return explain


def _plan(config: Config, forwarder: Any) -> Plan:
    """How names are looked up."""
    if forwarder is None:
        return Plan(ask_system, dict(config.dns.hosts), config.dns.prefer, config.dns.cache)
    from netproxy.resolver.factory import make_plan  # late, as above

    return make_plan(config.dns, forwarder)


def _ways(config: Config) -> list[UpstreamConfig]:
    ruled = [way for rule in config.rules for way in (rule.via, rule.upstream)]
    servers = (
        *config.dns.servers,
        *(server for rule in config.dns.rules for server in rule.servers),
    )
    agent = [config.tunnel.agent.upstream] if config.tunnel.agent else []
    named = (
        config.default,
        *config.upstreams.values(),
        *(one.upstream for one in (*config.listeners, *servers)),
        *ruled,
        *agent,
    )
    return [way for way in named if way]


def _equip_udp(made: ListenerHandler, name: str, listener: UdpListener) -> None:
    listener.name = name
    if made.udp is not None:
        made.udp.shared = listener.local
    listener.handler = made.handler


def _ports(relay_port: str) -> range:
    if relay_port == "any":
        return range(1)  # 0: the kernel chooses
    first, _, last = relay_port.partition("-")
    return range(int(first), int(last) + 1)
