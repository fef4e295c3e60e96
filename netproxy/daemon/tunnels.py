"""Reverse tunnels of a daemon: its bridge with the ports that agents have opened, its own agent, and what both are built on.

Made when a configuration first has a tunnel, and kept over reloads, so that agents and
what they carry go on.  On the main thread, but for open_port().
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from netproxy.access.limits import Admission
from netproxy.config.schema import (
    AgentConfig,
    Config,
    LimitsConfig,
    UdpConfig,
    UpstreamTlsConfig,
    UpstreamConfig,
)
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.hop import Hop
from netproxy.errors import ConfigError, ListenError
from netproxy.handler.outbound import Connector
from netproxy.handler.factory import HandlerDependencies
from netproxy.handler.forward import TcpForward, UdpForward
from netproxy.handler.stream_udp import StreamUdpRelay
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Resolver, Route, Router
from netproxy.listener.serving import Connection
from netproxy.listener.tcp import TcpListener
from netproxy.listener.udp import UdpListener
from netproxy.daemon.runtime import STOP_SECONDS, Runtime
from netproxy.net.stream import Stream
from netproxy.protocol.tunnel import Service
from netproxy.relay.quota import SessionLimits
from netproxy.relay.nat import NatPolicy, NatTable
from netproxy.relay.pipe import PipeLimits
from netproxy.tunnel.agent import Agent, Identity
from netproxy.tunnel.bridge import Bridge, PortRange, Rights
from netproxy.tunnel.dialer import UNSPECIFIED_ADDRESS, TunnelDialer
from netproxy.tunnel.sessions import AgentSessions
from netproxy.tunnel.work import Offer, Target, Ways, Work


class Prepared(NamedTuple):
    """A configuration's tunnels, of which one or the other becomes."""

    adopt: Callable[[], None]  # they count from now on; cannot fail
    abandon: Callable[[], None]


class Tunnels:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sessions = AgentSessions()
        self._ports = _Ports(runtime, self._sessions)
        self.bridge = Bridge(self._sessions, self._ports.open, runtime.counters, runtime.log)
        self._work = Work(self._begin, runtime.counters)
        self._table: NatTable | None = None  # of the agent's datagrams
        self._agent: Agent | None = None
        self._agent_of: AgentConfig | None = (
            None  # what it was made from; another one is made where that changes
        )
        self._calling: _Calling  # of its next dials; replaced whole
        runtime.janitor.register(self._sessions)

    def dialer(self, agent: str, seconds: float) -> TunnelDialer:
        """For tunnel://NAME."""
        return TunnelDialer(agent, self._sessions, seconds, self._runtime.counters)

    @staticmethod
    def read(config: Config) -> Any:
        """How a configuration's agent knows its bridge, None for one without TLS; ConfigError where a file cannot be used."""
        agent = config.tunnel.agent
        return (
            _trust(agent.tls, agent.bridge.host)
            if agent is not None and agent.tls is not None
            else None
        )

    def prepare(
        self, config: Config, dependencies: HandlerDependencies, dialers: DialerFactory
    ) -> Prepared:
        """ConfigError; ListenError where the thread of another agent cannot be had."""
        bridge, agent = self.read(config), config.tunnel.agent
        made_from: AgentConfig | None = None
        fresh: Agent | None = None
        if agent is not None:
            dialers.dialer(agent.upstream)
            made_from = agent._replace(services=(), exit=False)
            if made_from != self._agent_of:
                fresh = self._make_agent(agent)
                fresh.prepare()

        def adopt() -> None:
            if made_from != self._agent_of:
                self._end_agent()  # before another one of the same name comes
                self._agent, self._agent_of = fresh, made_from
            self._adopt(config, dependencies, dialers, bridge)

        return Prepared(adopt, lambda: fresh.stop(STOP_SECONDS) if fresh is not None else None)

    def _adopt(
        self, config: Config, dependencies: HandlerDependencies, dialers: DialerFactory, bridge: Any
    ) -> None:
        tunnel = config.tunnel
        self._ports.adopt(dependencies)
        self.bridge.configure(
            {name: _rights(one.token, one.ports) for name, one in tunnel.bridge.agents.items()}
            if tunnel.bridge
            else {}
        )
        if tunnel.agent is not None and self._agent is not None:
            self._calling = _calling(tunnel.agent, dialers, dependencies.timeouts.handshake, bridge)
            self._agent.configure(
                self._offer(tunnel.agent, dependencies, dialers), tunnel.agent.exit
            )
            self._agent.start()  # of one that lives already that changes nothing

    # -- its ends

    def stop_accepting(self) -> None:
        """Agents and the bridge are told; what they carry goes on."""
        self.bridge.stop()
        self._end_agent()

    def stop(self) -> None:
        self._ports.abort()
        self._work.abort()
        if self._table is not None:
            self._table.close()

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        return self._ports.live + self._work.live

    def dead_thread(self) -> str:
        return (
            self._agent.thread.name
            if self._agent is not None and not self._agent.thread.is_alive()
            else ""
        )

    def describe(self) -> dict[str, Any]:
        return {
            "agents": self.bridge.describe(),
            "agent": self._agent.describe() if self._agent is not None else None,
        }

    def summary(self) -> Iterable[str]:
        """What agents have opened, for a log."""
        for one in self.bridge.describe():
            yield (
                f"tunnel {one['name']} {one['client']}: streams={one['streams']} idle={one['idle']} "
                f"ports: {', '.join(one['ports']) or 'none'}"
            )

    # -- an agent

    def _make_agent(self, config: AgentConfig) -> Agent:
        return Agent(
            Identity(config.name, config.token.encode()),
            lambda greet: self._calling.dial(greet),
            self._runtime.dials,
            self._work.serve,
            self._runtime.log,
        )

    def _offer(
        self, config: AgentConfig, dependencies: HandlerDependencies, dialers: DialerFactory
    ) -> Sequence[Service]:
        """Services, and what leads to them; what an exit is asked for obeys the rules."""
        runtime = self._runtime
        services = {
            Service(one.network, one.port): Target(one.target, one.proxy_protocol)
            for one in config.services
        }
        local = _ToServices(dialers.dialer(UpstreamConfig()), runtime.resolver)
        self._work.configure(
            Offer(services, config.exit),
            self._ways(local, dependencies),
            self._ways(dependencies.router, dependencies),
        )
        return list(services)

    def _ways(self, router: Router, dependencies: HandlerDependencies) -> Ways:
        runtime = self._runtime
        arenas = runtime.datagrams.arenas()
        if self._table is None:
            self._table = _table(runtime)
            runtime.janitor.register(self._table)
        return Ways(
            Connector(router, _limits(dependencies), runtime.counters, dependencies.observer),
            StreamUdpRelay(
                router,
                self._table,
                arenas,
                runtime.counters,
                dependencies.observer,
                dependencies.timeouts.tcp_idle,
            ),
        )

    def _begin(
        self, stream: Stream, ended: Callable[[], None], go_on: Callable[[], Wait | None]
    ) -> None:
        self._runtime.serving.begin(
            Connection(stream, UNSPECIFIED_ADDRESS, lambda connection: ended()), go_on
        )

    def _end_agent(self) -> None:
        if self._agent is not None:
            self._agent.stop(STOP_SECONDS)
            self._agent = self._agent_of = None


class _Calling(NamedTuple):
    """How an agent's bridge is dialled, as one configuration has it."""

    hop: Hop
    bridge: Any  # net.tls.TlsClient with it, None for one without TLS

    def dial(self, greet: Callable[[Stream], None]) -> Stream:
        stream = self.hop.open(Flow("tcp", UNSPECIFIED_ADDRESS, self.hop.server, "", ""), greet)
        if self.bridge is not None:
            self.bridge.keep_session(stream)
        return stream


def _calling(config: AgentConfig, dialers: DialerFactory, seconds: float, bridge: Any) -> _Calling:
    """`seconds` for the bridge's handshake.

    Each configuration begins with a new acquaintance: a bridge that was believed before is looked at anew, by what counts now,
    and a session of an earlier connection spares that only among those that this one has verified.
    """
    secure = bridge.connect if bridge is not None else None
    return _Calling(
        Hop(
            "tunnel",
            f"bridge {config.bridge}",
            config.bridge,
            dialers.dialer(config.upstream),
            seconds,
            secure=secure,
        ),
        bridge,
    )


class _Ports:
    """Public ports: listeners that agents have asked for."""

    def __init__(self, runtime: Runtime, sessions: AgentSessions) -> None:
        self._runtime = runtime
        self._sessions = sessions
        self._dependencies: HandlerDependencies  # guarded by _lock, too, but for a look at it
        self._lock = (
            threading.Lock()
        )  # guards all below; a listener is equipped under it, so that none misses a configuration
        self._equip: dict[TcpListener, Callable[[], None]] = {}  # those that are open
        self._retired: list[TcpListener] = []  # stopped, with connections that may still live

    def adopt(self, dependencies: HandlerDependencies) -> None:
        with self._lock:
            self._dependencies = dependencies
            for configure in self._equip.values():
                configure()

    def open(self, agent: str, service: Service, host: str) -> Callable[[], None]:
        """On a thread of the connection pool; ListenError.  The call closes it."""
        name = f"{agent}-{service.port}"
        dialer = TunnelDialer(
            agent,
            self._sessions,
            self._dependencies.timeouts.connect,
            self._runtime.counters,
            service,
        )
        forward = self._forward_tcp if service.network == "tcp" else self._forward_udp
        try:
            return forward(
                name, Address(agent, service.port), Address(host, service.port), _Only(dialer)
            )
        except RuntimeError as error:  # can't start new thread
            raise ListenError(f"cannot start a listener: {error}") from error

    def _forward_tcp(
        self, name: str, target: Address, address: Address, router: Router
    ) -> Callable[[], None]:
        runtime = self._runtime
        listener = TcpListener(runtime.concrete(address), runtime.serving)
        limits = LimitsConfig()
        admission = Admission(None, limits.connections, limits.connections)

        def configure() -> None:
            dependencies = self._dependencies
            connector = Connector(
                router, _limits(dependencies), runtime.counters, dependencies.observer
            )
            listener.configure(
                TcpForward(name, connector, target), admission, dependencies.timeouts.handshake
            )

        def close() -> None:
            listener.stop()
            take_back()
            with self._lock:
                self._equip.pop(listener, None)
                self._retired = [*(one for one in self._retired if one.live), listener]

        with self._lock:
            configure()
            self._equip[listener] = configure
        take_back = runtime.own.register("tcp", listener.address)
        try:
            listener.start()
        except RuntimeError:
            close()
            raise
        return close

    def _forward_udp(
        self, name: str, target: Address, address: Address, router: Router
    ) -> Callable[[], None]:
        runtime = self._runtime
        listener = UdpListener(
            runtime.concrete(address), runtime.datagrams, runtime.counters, runtime.log
        )
        table = _table(runtime)
        listener.handler = UdpForward(name, router, table, target, None, runtime.counters)
        take_back = runtime.own.register("udp", listener.address)
        try:
            listener.start()
        except RuntimeError:
            listener.stop()
            take_back()
            raise
        for one in (listener, table):
            runtime.janitor.register(one)

        def close() -> None:
            listener.stop()
            take_back()
            for one in (listener, table):
                runtime.janitor.forget(one)
            table.close()

        return close

    @property
    def live(self) -> int:
        return sum(listener.live for listener in self._listeners())

    def abort(self) -> None:
        for listener in self._listeners():
            listener.abort()

    def _listeners(self) -> list[TcpListener]:
        with self._lock:
            return [*self._equip, *self._retired]


class _Only:
    """A Router with one way out, which takes targets as they are."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer

    def route(self, flow: Flow) -> Route:
        return Route(self._dialer, flow)

    route_without_blocking = route

    def candidates(self, flow: Flow) -> Iterable[Dialer]:
        return (self._dialer,)


class _ToServices(_Only):
    """Wherever a service was configured to be, this machine's own loopback and ports included."""

    def __init__(self, direct: Dialer, resolver: Resolver) -> None:
        super().__init__(direct)
        self._resolver = resolver

    def route(self, flow: Flow) -> Route:
        return Route(
            self._dialer, flow._replace(addresses=tuple(self._resolver.resolve(flow.target)))
        )

    def route_without_blocking(self, flow: Flow) -> Route | None:
        found = self._resolver.known(flow.target)
        return None if found is None else Route(self._dialer, flow._replace(addresses=tuple(found)))


def _trust(config: UpstreamTlsConfig, server: str) -> Any:
    from netproxy.net import tls  # late: ssl costs 3 MiB, and few need it

    try:
        context = tls.client_context(config.ca, config.certificate, config.key)
    except ValueError as error:
        raise ConfigError(f"tunnel.agent.tls: {error}") from error
    return tls.TlsClient(context, config.server_name or server)


def _limits(dependencies: HandlerDependencies) -> PipeLimits:
    return PipeLimits(
        dependencies.timeouts.tcp_idle, dependencies.timeouts.half_close, dependencies.splice
    )


def _table(runtime: Runtime) -> NatTable:
    udp = UdpConfig()
    policy = NatPolicy(SessionLimits(udp.max_sessions, udp.max_sessions, {}), udp.idle_timeout)
    return NatTable(
        policy,
        runtime.datagrams.arenas(),
        runtime.workers,
        runtime.counters,
        runtime.flows,
        runtime.log,
    )


def _rights(token: str, ports: Iterable[Any]) -> Rights:
    return Rights(token.encode(), tuple(PortRange(*port) for port in ports))
