"""Runs the daemon's own agent: dials the bridge, and serves the bridge's requests.

Built in two steps, so that a configuration with an error changes nothing: prepare() may fail,
PreparedAgent.commit() cannot.  Thread: main.
"""

from __future__ import annotations

from netproxy.daemon.runtime import STOP_SECONDS
from netproxy.daemon.tunnels.connector import bridge_connector
from netproxy.daemon.tunnels.paths import path_services
from netproxy.daemon.tunnels.ports import FixedRouter, nat_table, pipe_limits
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.handler.outbound import Outbound
from netproxy.handler.datagrams.stream_udp import StreamUdpRelay
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address, UnixAddress
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Route
from netproxy.listener.handshake_driver import Connection
from netproxy.protocol.tunnel import BridgePort
from netproxy.tunnel.agent import Agent
from netproxy.tunnel.control.handshake import AgentIdentity
from netproxy.tunnel.streams.relays import FlowRelays
from netproxy.tunnel.work import LocalService, Offer, WorkServer
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import DirectRow, JsonValue
    from netproxy.config.schema import AgentConfig
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.tunnels.connector import BridgeConnector, BridgeTrust
    from netproxy.dialer.factory import DialerFactory
    from netproxy.handler.factory import HandlerDependencies
    from netproxy.interfaces.routing import Dialer, Resolver, Router, RouteSelectors
    from netproxy.relay.nat import NatTable
    from netproxy.tunnel.work import WorkConnection


class ServiceGuard:
    """The DestinationGuard of services: permits what the file names.

    That may be a listener of the daemon's own.
    """

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        """Return all addresses."""
        return tuple(addresses)

    def is_own_port(self, flow: Flow) -> bool:
        """Return False: no connection needs a check."""
        return False

    def without_own(
        self, flow: Flow, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> tuple[Address, ...]:
        """Return all addresses."""
        return tuple(addresses)


class ServiceRouter(FixedRouter):
    """Routes to the services without rules and destination policies: the file names them."""

    def __init__(self, direct: Dialer, resolver: Resolver, sockets: Dialer | None) -> None:
        """`sockets` connects to services that are UNIX sockets; None if there are none."""
        super().__init__(direct)
        self._resolver = resolver
        self._sockets = sockets

    def route(self, flow: Flow) -> Route:
        """Resolve the service's name; may block.  Raises DialError."""
        if isinstance(flow.target, UnixAddress):
            return self._to_socket(flow)
        addresses = tuple(self._resolver.resolve(flow.target, flow.client.host))
        return super().route(flow._replace(addresses=addresses))

    def route_without_blocking(self, flow: Flow) -> Route | None:
        """Return None if the name must be looked up first.  Raises DialError."""
        if isinstance(flow.target, UnixAddress):
            return self._to_socket(flow)
        addresses = self._resolver.known(flow.target)
        if addresses is None:
            return None
        return super().route(flow._replace(addresses=tuple(addresses)))

    def _to_socket(self, flow: Flow) -> Route:
        assert self._sockets is not None
        return Route(self._sockets, flow)


class AgentSettings(NamedTuple):
    """What a configuration says of the agent, with what was built for it."""

    identity: AgentConfig
    """Without services and exit: any other change needs a new agent."""
    connector: BridgeConnector
    offer: Offer
    table: NatTable
    to_services: FlowRelays
    to_targets: FlowRelays


class PreparedAgent:
    """The agent of a configuration that is not in effect yet.  Call commit() or discard() once."""

    def __init__(
        self, owner: DaemonAgent, settings: AgentSettings | None, fresh: Agent | None
    ) -> None:
        """`settings` is None without an agent; `fresh` is a new one if the present cannot stay."""
        self._owner = owner
        self._settings = settings
        self._fresh = fresh

    def commit(self) -> None:
        """Let the configuration take effect.  Cannot fail."""
        self._owner.apply(self._settings, self._fresh)

    def discard(self) -> None:
        """Undo what prepare() did."""
        if self._fresh is not None:
            self._fresh.stop(STOP_SECONDS)


class DaemonAgent:
    """Keeps or replaces the agent as each configuration says; without one nothing is dialled."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._work = WorkServer(_WorkStarter(runtime), runtime.counters)
        self._table: NatTable | None = None
        """Of the agent's datagrams; kept once it was needed."""
        self._agent: Agent | None = None
        self._identity: AgentConfig | None = None
        """What the agent was made from."""
        self.connector: BridgeConnector | None = None
        """Of the configuration in effect."""
        self._targets = TargetResolver(runtime.resolver, ServiceGuard())
        self._direct: dict[float, DirectDialer] = {}
        """Of services, by seconds to connect: UDP sessions, which belong to a dialer, go on."""

    def prepare(
        self,
        config: AgentConfig | None,
        trust: BridgeTrust | None,
        dependencies: HandlerDependencies,
        dialers: DialerFactory,
    ) -> PreparedAgent:
        """Build what a configuration needs.

        Raises ConfigError, and ListenError if there is no thread for another agent.
        """
        if config is None:
            return PreparedAgent(self, None, None)
        settings = self._settings(config, trust, dependencies, dialers)
        if settings.identity == self._identity:
            return PreparedAgent(self, settings, None)
        identity = AgentIdentity(config.name, config.token.encode())
        paths = path_services(self._runtime) if config.datagrams else None
        paths = paths and paths._replace(is_direct=config.direct)
        fresh = Agent(identity, self._runtime.dials, self._work, self._runtime.log, paths)
        fresh.prepare()
        return PreparedAgent(self, settings, fresh)

    def apply(self, settings: AgentSettings | None, fresh: Agent | None) -> None:
        """Let prepared settings take effect.  Cannot fail."""
        if settings is None or settings.identity != self._identity:
            # The old agent leaves first: the new one may have the same name.
            self.stop_accepting()
            self._agent = fresh
        if settings is None or self._agent is None:
            return
        self._identity = settings.identity
        self.connector = settings.connector
        if self._table is None:
            self._table = settings.table
            self._runtime.janitor.register(self._table)
        self._work.configure(settings.offer, settings.to_services, settings.to_targets)
        services = list(settings.offer.services)
        self._agent.configure(settings.connector, services, settings.offer.is_exit)
        # Changes nothing if the agent runs already.
        self._agent.start()

    def stop_accepting(self) -> None:
        """End the session with the bridge; running streams continue."""
        if self._agent is not None:
            self._agent.stop(STOP_SECONDS)
            self._agent = self._identity = self.connector = None

    def stop(self) -> None:
        """Shut the running streams down."""
        self._work.abort()
        if self._table is not None:
            self._table.close()

    @property
    def live(self) -> int:
        """Streams that have not ended."""
        return self._work.live

    def dead_thread(self) -> str:
        """Return the name of the agent's thread if it has died, else ""."""
        if self._agent is None or self._agent.thread.is_alive():
            return ""
        return self._agent.thread.name

    def describe(self) -> dict[str, object] | None:
        """Return the agent's state for netproxyctl, None without an agent."""
        return None if self._agent is None else self._agent.describe()

    def describe_direct(self) -> list[DirectRow]:
        """Return the agent's direct paths to clients of the bridge."""
        state = self.describe()
        rows: JsonValue = state.get("direct") if state is not None else None
        return rows or []

    def _settings(
        self,
        config: AgentConfig,
        trust: BridgeTrust | None,
        dependencies: HandlerDependencies,
        dialers: DialerFactory,
    ) -> AgentSettings:
        via = dialers.dialer(config.upstream)
        seconds = dependencies.timeouts.connect
        direct = self._direct.get(seconds)
        if direct is None:
            direct = DirectDialer(self._targets, self._runtime.datagrams, seconds)
            self._direct = {seconds: direct}
        services = {
            BridgePort(service.network, service.port): LocalService(
                service.target, service.proxy_protocol
            )
            for service in config.services
        }
        table = nat_table(self._runtime) if self._table is None else self._table
        sockets = _socket_dialer(config, seconds)
        to_services = ServiceRouter(direct, self._runtime.resolver, sockets)
        return AgentSettings(
            config._replace(services=(), exit=False),
            bridge_connector(config, via, dependencies.timeouts.handshake, trust),
            Offer(services, config.exit),
            table,
            self._relays(to_services, dependencies, table),
            self._relays(dependencies.router, dependencies, table),
        )

    def _relays(
        self, router: Router, dependencies: HandlerDependencies, table: NatTable
    ) -> FlowRelays:
        counters, observer = self._runtime.counters, dependencies.observer
        arenas = self._runtime.datagrams.arenas
        idle = dependencies.timeouts.tcp_idle
        return FlowRelays(
            Outbound(router, pipe_limits(dependencies), counters, observer, dependencies.accounts),
            StreamUdpRelay(router, table, arenas, counters, observer, idle, None),
        )


def _socket_dialer(config: AgentConfig, seconds: float) -> Dialer | None:
    """Return what connects to services that are UNIX sockets, None without such services."""
    if not any(isinstance(service.target, UnixAddress) for service in config.services):
        return None
    from netproxy.dialer.plain.unix import UnixDialer  # late: few services are such

    return UnixDialer(seconds, is_hop=False)


class _WorkStarter:
    """Runs work connections as a listener's connections are run (tunnel.work.WorkStarter)."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def begin(self, work: WorkConnection) -> None:
        self._runtime.counters.count("connections", "accepted")
        self._runtime.serving.begin(_ServedWork(work), work.handshake())


class _ServedWork(Connection):
    """A work connection that is driven by listener.handshake_driver."""

    __slots__ = ("_work",)

    def __init__(self, work: WorkConnection) -> None:
        super().__init__(work.stream, UNSPECIFIED_ADDRESS)
        self._work = work

    def ended(self) -> None:
        self._work.end()
