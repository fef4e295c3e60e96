"""Builds and runs the reverse tunnels of a daemon: its bridge with public ports, its own agent.

Created when a configuration first has a tunnel and kept over reloads, so that agents and their
streams continue.  Thread: main, except where agents open ports (daemon.tunnels.ports).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Mapping

from netproxy.access.backoff import AGENT_SECONDS, BackOff
from netproxy.config.sections.listeners import CONNECTIONS_PER_CLIENT
from netproxy.daemon.tunnels.agent import DaemonAgent
from netproxy.daemon.tunnels.ports import PublicPorts
from netproxy.errors import ConfigError
from netproxy.interfaces.listeners import AllowedClients
from netproxy.interfaces.networks import is_loopback
from netproxy.tunnel.bridge import Bridge
from netproxy.tunnel.dialer import TunnelDialer
from netproxy.tunnel.ports import AgentRights, PortLimits, PortRange
from netproxy.tunnel.sessions import AgentSessions

if TYPE_CHECKING:
    from netproxy.config.schema import BridgeAgentConfig, Config, PortConfig, UpstreamTlsConfig
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.tunnels.agent import BridgeTrust, PreparedAgent
    from netproxy.dialer.factory import DialerFactory
    from netproxy.handler.factory import HandlerDependencies


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
    ) -> None:
        self._tunnels = tunnels
        self._rights = rights
        self._dependencies = dependencies
        self._agent = agent

    def commit(self) -> None:
        """Let the configuration take effect.  Cannot fail."""
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
        self.ports = PublicPorts(runtime, self._sessions)
        self.bridge = Bridge(
            self._sessions, self.ports, BackOff(AGENT_SECONDS), runtime.counters, runtime.log
        )
        self.agent = DaemonAgent(runtime)
        self._in_force = False
        """True once a configuration with a tunnel has taken effect."""

    def dialer(self, agent: str, seconds: float) -> TunnelDialer:
        """Return the upstream tunnel://AGENT; `seconds` are for each dial."""
        return TunnelDialer(agent, self._sessions, seconds, self._runtime.counters)

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
        trust = self.read(config)
        agent = self.agent.prepare(config.tunnel.agent, trust, dependencies, dialers)
        return PreparedTunnels(self, rights, dependencies, agent)

    def apply(self, dependencies: HandlerDependencies, rights: Mapping[str, AgentRights]) -> None:
        """Let a configuration of the bridge take effect.  Cannot fail."""
        if not self._in_force:
            self._in_force = True
            self._runtime.janitor.register(self._sessions)
        self.ports.configure(dependencies)
        self.bridge.configure(rights)

    # -- the end

    def stop_accepting(self) -> None:
        """Tell agents and bridge, and close all ports; running streams continue."""
        self.bridge.stop()
        self.agent.stop_accepting()

    def stop(self) -> None:
        """Shut the running streams down."""
        self.ports.abort()
        self.agent.stop()

    # -- state

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        return self.ports.live + self.agent.live

    def dead_thread(self) -> str:
        """Return the name of a thread that should run but does not, "" if all is well."""
        return self.agent.dead_thread()

    def describe(self) -> dict[str, object]:
        """Return the connected agents and the daemon's own agent for netproxyctl."""
        return {"agents": self.bridge.describe(), "agent": self.agent.describe()}

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
