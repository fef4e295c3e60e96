"""Reverse tunnels of a daemon: its bridge with the ports that agents have opened, its own agent, and what both are built on.

Made when a configuration first has a tunnel, and kept over reloads, so that agents and
what they carry go on.  On the main thread, but for open_port().
"""
from __future__ import annotations

import threading
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from netproxy.access.limits import Admission
from netproxy.config.schema import AgentConfig, Config, LimitsConfig, UdpConfig, UpstreamTlsConfig, WayConfig
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.hop import Hop
from netproxy.errors import ConfigError, ListenError
from netproxy.handler.connector import Connector
from netproxy.handler.factory import Surroundings
from netproxy.handler.forward import TcpForward, UdpForward
from netproxy.handler.stream_udp import StreamUdpRelay
from netproxy.interfaces import Address, Dialer, Flow, Pause, Resolver, Route, Router
from netproxy.listener.serving import Connection
from netproxy.listener.tcp import TcpListener
from netproxy.listener.udp import UdpListener
from netproxy.machinery import STOP_SECONDS, Machinery
from netproxy.net.stream import Stream
from netproxy.protocol.tunnel import Service
from netproxy.relay.capacity import Caps
from netproxy.relay.nat import NatPolicy, NatTable
from netproxy.relay.pipe import PipeLimits
from netproxy.tunnel.agent import Agent, Identity
from netproxy.tunnel.bridge import Bridge, PortRange, Rights
from netproxy.tunnel.dialer import NOWHERE, TunnelDialer
from netproxy.tunnel.links import Links
from netproxy.tunnel.work import Offer, Target, Ways, Work


class Prepared(NamedTuple):
    """A configuration's tunnels, of which one or the other becomes."""

    adopt: Callable[[], None]       # they count from now on; cannot fail
    abandon: Callable[[], None]


class Tunnels:
    def __init__(self, machinery: Machinery) -> None:
        self._machinery = machinery
        self._links = Links()
        self._ports = _Ports(machinery, self._links)
        self.bridge = Bridge(self._links, self._ports.open, machinery.counters, machinery.log)
        self._work = Work(self._begin, machinery.counters)
        self._table: NatTable | None = None         # of the agent's datagrams
        self._agent: Agent | None = None
        self._agent_of: AgentConfig | None = None   # what it was made from; another one is made where that changes
        self._calling: _Calling                     # of its next dials; replaced whole
        machinery.janitor.register(self._links)

    def dialer(self, agent: str, seconds: float) -> TunnelDialer:
        """For tunnel://NAME."""
        return TunnelDialer(agent, self._links, seconds, self._machinery.counters)

    @staticmethod
    def read(config: Config) -> Any:
        """How a configuration's agent knows its bridge, None for one without TLS; ConfigError where a file cannot be used."""
        agent = config.tunnel.agent
        return _trust(agent.tls, agent.bridge.host) if agent is not None and agent.tls is not None else None

    def prepare(self, config: Config, around: Surroundings, dialers: DialerFactory) -> Prepared:
        """ConfigError; ListenError where the thread of another agent cannot be had."""
        bridge, agent = self.read(config), config.tunnel.agent
        made_from: AgentConfig | None = None
        fresh: Agent | None = None
        if agent is not None:
            dialers.way(agent.upstream)
            made_from = agent._replace(services=(), exit=False)
            if made_from != self._agent_of:
                fresh = self._make_agent(agent)
                fresh.prepare()

        def adopt() -> None:
            if made_from != self._agent_of:
                self._end_agent()       # before another one of the same name comes
                self._agent, self._agent_of = fresh, made_from
            self._adopt(config, around, dialers, bridge)
        return Prepared(adopt, lambda: fresh.stop(STOP_SECONDS) if fresh is not None else None)

    def _adopt(self, config: Config, around: Surroundings, dialers: DialerFactory, bridge: Any) -> None:
        tunnel = config.tunnel
        self._ports.adopt(around)
        self.bridge.configure({name: _rights(one.token, one.ports) for name, one in tunnel.bridge.agents.items()} if tunnel.bridge else {})
        if tunnel.agent is not None and self._agent is not None:
            self._calling = _calling(tunnel.agent, dialers, around.timeouts.handshake, bridge)
            self._agent.configure(self._offer(tunnel.agent, around, dialers), tunnel.agent.exit)
            self._agent.start()         # of one that lives already that changes nothing

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
        return self._agent.thread.name if self._agent is not None and not self._agent.thread.is_alive() else ""

    def describe(self) -> dict[str, Any]:
        return {"agents": self.bridge.describe(), "agent": self._agent.describe() if self._agent is not None else None}

    def summary(self) -> Iterable[str]:
        """What agents have opened, for a log."""
        for one in self.bridge.describe():
            yield (f"tunnel {one['name']} {one['client']}: streams={one['streams']} idle={one['idle']} "
                   f"ports: {', '.join(one['ports']) or 'none'}")

    # -- an agent

    def _make_agent(self, config: AgentConfig) -> Agent:
        return Agent(Identity(config.name, config.token.encode()), lambda greet: self._calling.dial(greet), self._machinery.dials,
                     self._work.serve, self._machinery.log)

    def _offer(self, config: AgentConfig, around: Surroundings, dialers: DialerFactory) -> Sequence[Service]:
        """Services, and what leads to them; what an exit is asked for obeys the rules."""
        machinery = self._machinery
        services = {Service(one.network, one.port): Target(one.target, one.proxy_protocol) for one in config.services}
        local = _ToServices(dialers.way(WayConfig()), machinery.resolver)
        self._work.configure(Offer(services, config.exit), self._ways(local, around), self._ways(around.router, around))
        return list(services)

    def _ways(self, router: Router, around: Surroundings) -> Ways:
        machinery = self._machinery
        arenas = machinery.datagrams.arenas()
        if self._table is None:
            self._table = _table(machinery)
            machinery.janitor.register(self._table)
        return Ways(Connector(router, _limits(around), machinery.counters, around.observer),
                    StreamUdpRelay(router, self._table, arenas, machinery.counters, around.observer, around.timeouts.tcp_idle))

    def _begin(self, stream: Stream, ended: Callable[[], None], go_on: Callable[[], Pause | None]) -> None:
        self._machinery.serving.begin(Connection(stream, NOWHERE, lambda connection: ended()), go_on)

    def _end_agent(self) -> None:
        if self._agent is not None:
            self._agent.stop(STOP_SECONDS)
            self._agent = self._agent_of = None


class _Calling(NamedTuple):
    """How an agent's bridge is dialled, as one configuration has it."""

    hop: Hop
    bridge: Any         # net.tls.Acquaintance with it, None for one without TLS

    def dial(self, greet: Callable[[Stream], None]) -> Stream:
        stream = self.hop.open(Flow("tcp", NOWHERE, self.hop.server, "", ""), greet)
        if self.bridge is not None:
            self.bridge.remember(stream)
        return stream


def _calling(config: AgentConfig, dialers: DialerFactory, seconds: float, bridge: Any) -> _Calling:
    """`seconds` for the bridge's handshake.

    Each configuration begins with a new acquaintance: a bridge that was believed before is looked at anew, by what counts now,
    and a session of an earlier connection spares that only among those that this one has verified.
    """
    secure = bridge.connect if bridge is not None else None
    return _Calling(Hop("tunnel", f"bridge {config.bridge}", config.bridge, dialers.way(config.upstream), seconds, secure=secure), bridge)


class _Ports:
    """Public ports: listeners that agents have asked for."""

    def __init__(self, machinery: Machinery, links: Links) -> None:
        self._machinery = machinery
        self._links = links
        self._around: Surroundings          # guarded by _lock, too, but for a look at it
        self._lock = threading.Lock()       # guards all below; a listener is equipped under it, so that none misses a configuration
        self._equip: dict[TcpListener, Callable[[], None]] = {}     # those that are open
        self._retired: list[TcpListener] = []       # stopped, with connections that may still live

    def adopt(self, around: Surroundings) -> None:
        with self._lock:
            self._around = around
            for equip in self._equip.values():
                equip()

    def open(self, agent: str, service: Service, host: str) -> Callable[[], None]:
        """On a thread of the connection pool; ListenError.  The call closes it."""
        name = f"{agent}-{service.port}"
        dialer = TunnelDialer(agent, self._links, self._around.timeouts.connect, self._machinery.counters, service)
        forward = self._forward_tcp if service.network == "tcp" else self._forward_udp
        try:
            return forward(name, Address(agent, service.port), Address(host, service.port), _Only(dialer))
        except RuntimeError as error:       # can't start new thread
            raise ListenError(f"cannot start a listener: {error}") from error

    def _forward_tcp(self, name: str, target: Address, address: Address, router: Router) -> Callable[[], None]:
        machinery = self._machinery
        listener = TcpListener(machinery.concrete(address), machinery.serving)
        limits = LimitsConfig()
        admission = Admission(None, limits.connections, limits.connections)

        def equip() -> None:
            around = self._around
            connector = Connector(router, _limits(around), machinery.counters, around.observer)
            listener.equip(TcpForward(name, connector, target), admission, around.timeouts.handshake)

        def close() -> None:
            listener.stop()
            take_back()
            with self._lock:
                self._equip.pop(listener, None)
                self._retired = [*(one for one in self._retired if one.live), listener]

        with self._lock:
            equip()
            self._equip[listener] = equip
        take_back = machinery.own.lend("tcp", listener.address)
        try:
            listener.start()
        except RuntimeError:
            close()
            raise
        return close

    def _forward_udp(self, name: str, target: Address, address: Address, router: Router) -> Callable[[], None]:
        machinery = self._machinery
        listener = UdpListener(machinery.concrete(address), machinery.datagrams, machinery.counters, machinery.log)
        table = _table(machinery)
        listener.handler = UdpForward(name, router, table, target, None, machinery.counters)
        take_back = machinery.own.lend("udp", listener.address)
        try:
            listener.start()
        except RuntimeError:
            listener.stop()
            take_back()
            raise
        for one in (listener, table):
            machinery.janitor.register(one)

        def close() -> None:
            listener.stop()
            take_back()
            for one in (listener, table):
                machinery.janitor.forget(one)
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

    route_at_once = route

    def ways(self, flow: Flow) -> Iterable[Dialer]:
        return (self._dialer,)


class _ToServices(_Only):
    """Wherever a service was configured to be, this machine's own loopback and ports included."""

    def __init__(self, direct: Dialer, resolver: Resolver) -> None:
        super().__init__(direct)
        self._resolver = resolver

    def route(self, flow: Flow) -> Route:
        return Route(self._dialer, flow._replace(addresses=tuple(self._resolver.resolve(flow.target))))

    def route_at_once(self, flow: Flow) -> Route | None:
        found = self._resolver.known(flow.target)
        return None if found is None else Route(self._dialer, flow._replace(addresses=tuple(found)))


def _trust(config: UpstreamTlsConfig, server: str) -> Any:
    from netproxy.net import tls    # late: ssl costs 3 MiB, and few need it
    try:
        context = tls.client_context(config.ca, config.certificate, config.key)
    except ValueError as error:
        raise ConfigError(f"tunnel.agent.tls: {error}") from error
    return tls.Acquaintance(context, config.server_name or server)


def _limits(around: Surroundings) -> PipeLimits:
    return PipeLimits(around.timeouts.tcp_idle, around.timeouts.half_close, around.splice)


def _table(machinery: Machinery) -> NatTable:
    udp = UdpConfig()
    policy = NatPolicy(Caps(udp.max_sessions, udp.max_sessions, {}), udp.idle_timeout)
    return NatTable(policy, machinery.datagrams.arenas(), machinery.workers, machinery.counters, machinery.flows, machinery.log)


def _rights(token: str, ports: Iterable[Any]) -> Rights:
    return Rights(token.encode(), tuple(PortRange(*port) for port in ports))
