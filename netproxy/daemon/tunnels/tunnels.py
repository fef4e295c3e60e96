"""Builds and runs the reverse tunnels of a daemon: its bridge with public ports, its own agent.

Created when a configuration first has a tunnel and kept over reloads, so that agents and their
streams continue.  Thread: main, except where agents open ports (daemon.tunnels.ports).
"""

from __future__ import annotations

from netproxy.access.backoff import AGENT_SECONDS, BackOff
from netproxy.config.sections.listeners import CONNECTIONS_PER_CLIENT
from netproxy.daemon.tunnels.agent import DaemonAgent
from netproxy.daemon.tunnels.paths import bridge_paths
from netproxy.daemon.tunnels.ports import PublicPorts
from netproxy.errors import ConfigError
from netproxy.interfaces.listeners import AllowedClients
from netproxy.interfaces.networks import is_loopback
from netproxy.listener.udp import UdpListener
from netproxy.protocol.tunnel import BridgePort
from netproxy.tunnel.bridge import Bridge
from netproxy.tunnel.dialer import TunnelDialer
from netproxy.tunnel.ports import AgentRights, PortLimits, PortRange
from netproxy.tunnel.control.sessions import AgentSessions
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import DirectRow
    from netproxy.config.schema import BridgeAgentConfig, Config, PortConfig, UpstreamTlsConfig
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.tunnels.agent import PreparedAgent
    from netproxy.daemon.tunnels.connector import BridgeTrust
    from netproxy.dialer.factory import DialerFactory
    from netproxy.handler.factory import HandlerDependencies
    from netproxy.daemon.tunnels.direct import DirectUpstreams
    from netproxy.dialer.hop import ProxyDialer
    from netproxy.interfaces.addresses import Address
    from netproxy.tunnel.direct.bridge import DirectOffers
    from netproxy.tunnel.path.bridge import BridgePaths


class PreparedTunnels:
    """The tunnels of a configuration that is not in effect yet.

    Call commit() or discard() once.
    """

    def __init__(
        self,
        tunnels: Tunnels,
        rights: Mapping[str, AgentRights],
        dependencies: HandlerDependencies,
        agent: PreparedAgent,
        is_direct: bool,
    ) -> None:
        self._tunnels = tunnels
        self._rights = rights
        self._dependencies = dependencies
        self._agent = agent
        self._is_direct = is_direct

    def commit(self) -> None:
        """Let the configuration take effect.  Cannot fail."""
        if self._tunnels.direct is not None:
            self._tunnels.direct.enabled = self._is_direct
        self._tunnels.apply(self._dependencies, self._rights)
        self._agent.commit()

    def discard(self) -> None:
        """Undo what Tunnels.prepare() did."""
        self._agent.discard()


class Tunnels:
    """The bridge and the agent of a daemon, either of which may be unused."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sessions = AgentSessions()
        self._sessions.elsewhere = runtime.agents_elsewhere
        self.ports = PublicPorts(runtime, self._sessions)
        self.bridge = Bridge(
            self._sessions, self.ports, BackOff(AGENT_SECONDS), runtime.counters, runtime.log
        )
        self.agent = DaemonAgent(runtime)
        self.paths: BridgePaths | None = None
        """The bridge's side of datagram paths; kept once a configuration has had any."""
        self.direct: DirectOffers | None = None
        """The bridge's part in direct paths, kept as well."""
        self.upstreams: DirectUpstreams | None = None
        """The upstreams with direct paths, kept as well."""
        self._in_force = False
        """True once a configuration with a tunnel has taken effect."""

    def dialer(self, agent: Address, seconds: float) -> TunnelDialer:
        """Return the upstream tunnel://AGENT; `seconds` are for each dial.

        With a port it is tunnel://AGENT/PORT: all connections go to the agent's service there.
        """
        service = BridgePort("tcp", agent.port) if agent.port else None
        return TunnelDialer(agent.host, self._sessions, seconds, self._runtime.counters, service)

    @staticmethod
    def read(config: Config) -> BridgeTrust | None:
        """Read the files by which the agent trusts its bridge; return None without TLS.

        Raises ConfigError if a file cannot be used.
        """
        agent = config.tunnel.agent
        if agent is None or agent.tls is None:
            return None
        return _read_trust(agent.tls, agent.bridge.host)

    def prepare(
        self, config: Config, dependencies: HandlerDependencies, dialers: DialerFactory
    ) -> PreparedTunnels:
        """Build what a configuration needs.

        Raises ConfigError, and ListenError if there is no thread for another agent.
        """
        bridge = config.tunnel.bridge
        rights = {name: _rights(agent) for name, agent in bridge.agents.items()} if bridge else {}
        if bridge is not None and bridge.datagrams:
            self.obtain_paths()
        trust = self.read(config)
        agent = self.agent.prepare(config.tunnel.agent, trust, dependencies, dialers)
        is_direct = bridge is not None and bridge.direct
        return PreparedTunnels(self, rights, dependencies, agent, is_direct)

    def apply(self, dependencies: HandlerDependencies, rights: Mapping[str, AgentRights]) -> None:
        """Let a configuration of the bridge take effect.  Cannot fail."""
        if not self._in_force:
            self._in_force = True
            self._runtime.janitor.register(self._sessions)
        self.ports.configure(dependencies)
        self.bridge.paths, self.bridge.direct = self.paths, self.direct
        self.bridge.configure(rights)

    def obtain_paths(self) -> BridgePaths:
        """Return the bridge's side of datagram paths; make it if need be."""
        if self.paths is None:
            self.paths = bridge_paths(self._runtime)
        return self.paths

    def obtain_direct(self) -> DirectOffers:
        """Return the bridge's part in direct paths; make it if need be."""
        if self.direct is None:
            from netproxy.daemon.tunnels.direct import direct_offers  # late: few need it

            self.direct = direct_offers(self._runtime, self.obtain_paths(), self._sessions)
            self._runtime.janitor.register(self.direct)
        return self.direct

    def with_direct(self, plain: ProxyDialer) -> ProxyDialer:
        """Return a dialer like `plain` whose datagrams may go directly to agents behind it."""
        if self.upstreams is None:
            from netproxy.daemon.tunnels.direct import DirectUpstreams  # late: as above

            self.upstreams = DirectUpstreams(self._runtime)
        return self.upstreams.with_direct(plain)

    def use_listeners(self, listeners: Iterable[object]) -> None:
        """Offer agents paths to those of a configuration's listeners, from apply() on."""
        if self.paths is not None:
            udp = [listener for listener in listeners if isinstance(listener, UdpListener)]
            self.paths.sockets = [
                listener.local for listener in udp if self.paths.has(listener.handler)
            ]

    # -- the end

    def stop_accepting(self) -> None:
        """Tell agents and bridge, and close all ports; running streams continue."""
        self.bridge.stop()
        self.agent.stop_accepting()

    def stop(self) -> None:
        """Shut the running streams down."""
        self.ports.abort()
        self.agent.stop()
        if self.upstreams is not None:
            self.upstreams.stop()
        if self.paths is not None:
            self.paths.stop()

    # -- state

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        return self.ports.live + self.agent.live

    def obstacle(self, agent: Address) -> str | None:
        """Return why tunnel://AGENT would fail at once, "" if it would not.

        None if no agent can be connected yet, because no configuration has taken effect.
        """
        if not self._in_force:
            return None
        return self._sessions.obstacle(agent.host, not agent.port)

    def dead_thread(self) -> str:
        """Return the name of a thread that should run but does not, "" if all is well."""
        return self.agent.dead_thread()

    def describe(self) -> dict[str, object]:
        """Return the connected agents and the daemon's own agent for netproxyctl."""
        direct = self._direct_paths(self.direct, self.upstreams)
        return {"agents": self.bridge.describe(), "agent": self.agent.describe(), "direct": direct}

    def direct_paths(self) -> Sequence[DirectRow]:
        """Return the direct paths, as the bridge or as one of the two sides."""
        return self._direct_paths(self.direct, self.upstreams, self.agent)

    @staticmethod
    def _direct_paths(
        *parts: DirectOffers | DirectUpstreams | DaemonAgent | None,
    ) -> list[DirectRow]:
        return [row for part in parts if part is not None for row in part.describe_direct()]

    def summary(self) -> Iterable[str]:
        """Return one line of the log for each connected agent."""
        return [session.summary() for session in self._sessions.all()]


def _read_trust(config: UpstreamTlsConfig, server: str) -> BridgeTrust:
    # Imported late: ssl costs 3 MiB.
    from netproxy.net import tls

    try:
        context = tls.client_context(config.ca, config.certificate, config.key)
    except ValueError as error:
        raise ConfigError(f"tunnel.agent.tls: {error}", config.place) from error
    return tls.TlsClient(context, config.server_name or server)


def _rights(agent: BridgeAgentConfig) -> AgentRights:
    return AgentRights(agent.token.encode(), tuple(map(_range, agent.ports)))


def _range(port: PortConfig) -> PortRange:
    limits = port.limits
    # As for a listener: on loopback all clients share one address.
    default = limits.connections if is_loopback(port.host) else CONNECTIONS_PER_CLIENT
    per_client = limits.connections_per_client or default
    return PortRange(
        port.network,
        port.host,
        port.first,
        port.last,
        PortLimits(limits.connections, per_client, limits.handshakes),
        AllowedClients(*port.clients),
    )
