"""Opens the public ports of the bridge: listeners that agents ask for, each for one service.

They are opened and closed by threads of the connection pool, and outlive reloads.
"""

from __future__ import annotations

import threading
from functools import partial

from netproxy.access.limits import Admission
from netproxy.config.sections.listeners import SESSIONS_PER_CLIENT
from netproxy.config.schema import UdpConfig
from netproxy.errors import ListenError
from netproxy.handler.forward import TcpForward, UdpForward
from netproxy.handler.outbound import Outbound
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import is_loopback
from netproxy.interfaces.routing import Route
from netproxy.relay.nat import NatTable
from netproxy.relay.table.policy import NatPolicy
from netproxy.relay.pipe import PipeLimits
from netproxy.relay.quota import SessionLimits
from netproxy.tunnel.dialer import TunnelDialer
from netproxy.typed import TYPE_CHECKING, Iterable, NamedTuple

if TYPE_CHECKING:
    from netproxy.daemon.runtime import Runtime
    from netproxy.handler.factory import HandlerDependencies
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer, Router
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.protocol.tunnel import BridgePort
    from netproxy.tunnel.ports import PortRange
    from netproxy.tunnel.control.sessions import AgentSessions


class FixedRouter:
    """A Router with one upstream, which takes targets as they are."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer

    def named(self, flow: Flow) -> Flow:
        """Return the flow as it is."""
        return flow

    def route(self, flow: Flow) -> Route:
        """Return the upstream."""
        return Route(self._dialer, flow)

    def route_without_blocking(self, flow: Flow) -> Route | None:
        """Return the upstream."""
        return Route(self._dialer, flow)

    def candidates(self, flow: Flow) -> Iterable[Dialer]:
        """Return the upstream alone."""
        return (self._dialer,)


class PortTarget(NamedTuple):
    """Where a public port leads to."""

    name: str
    """Of the listener, in records and rules: the agent and the port."""
    target: Address
    """In records: the agent's name and the port."""
    router: Router


class PublicPorts:
    """The public ports of all agents (tunnel.ports.PortOpener)."""

    def __init__(self, runtime: Runtime, sessions: AgentSessions) -> None:
        """Begin without ports: configure() must come before the first is opened."""
        self.runtime = runtime
        self._sessions = sessions
        # Guards all below.  A TCP port is configured under it, so that none misses a reload.
        self._lock = threading.Lock()
        self._dependencies: HandlerDependencies
        self._open: list[TcpPort] = []
        self._retired: list[TcpPort] = []
        """Closed, but their connections may still be running."""

    def configure(self, dependencies: HandlerDependencies) -> None:
        """Apply a configuration to all open ports, and to those that are opened later."""
        with self._lock:
            self._dependencies = dependencies
            for port in self._open:
                port.configure(dependencies)

    def open(self, agent: str, port: BridgePort, allowed: PortRange) -> TcpPort | UdpPort:
        """Listen on a port that leads to the agent.  Raises ListenError."""
        dialer = TunnelDialer(
            agent, self._sessions, self._dependencies.timeouts.connect, self.runtime.counters, port
        )
        target = PortTarget(f"{agent}-{port.port}", Address(agent, port.port), FixedRouter(dialer))
        address = Address(allowed.host, port.port)
        opened: TcpPort | UdpPort
        if port.network == "tcp":
            opened = TcpPort(self, address, target, allowed)
        else:
            opened = UdpPort(self.runtime, address, target, allowed.clients)
        try:
            opened.start()
        except RuntimeError as error:
            # No thread is left.
            opened.close()
            raise ListenError(f"cannot start a listener: {error}") from error
        return opened

    def add(self, port: TcpPort) -> None:
        """Configure a port, now and at each reload."""
        with self._lock:
            port.configure(self._dependencies)
            self._open.append(port)

    def limit(self, port: TcpPort, allowed: PortRange) -> None:
        """Apply the clients and limits of its range to an open port."""
        connections, per_client, port.handshakes = allowed.limits
        with self._lock:
            port.admission = port.admission.with_limits(allowed.clients, connections, per_client)
            port.configure(self._dependencies)

    def retire(self, port: TcpPort) -> None:
        """Keep a port that was closed until its connections have ended."""
        with self._lock:
            self._open.remove(port)
            self._retired = [*(retired for retired in self._retired if retired.live), port]

    @property
    def live(self) -> int:
        """TCP connections that have not ended."""
        return sum(port.live for port in self._all())

    def abort(self) -> None:
        """Shut all TCP connections down."""
        for port in self._all():
            port.abort()

    def _all(self) -> list[TcpPort]:
        with self._lock:
            return [*self._open, *self._retired]


class TcpPort:
    """A public TCP port (tunnel.ports.OpenPort)."""

    def __init__(
        self, ports: PublicPorts, address: Address, target: PortTarget, allowed: PortRange
    ) -> None:
        """Bind the port.  Raises ListenError."""
        self._ports = ports
        self._runtime = runtime = ports.runtime
        self._target = target
        self._listener = runtime.tcp_listener(address)
        self._listener.name = target.name
        connections, per_client, self.handshakes = allowed.limits
        """The last one: unfinished handshakes."""
        refuse_arrival = partial(runtime.accounts.refuse_arrival, target.name)
        shared = runtime.counting.connections(target.name)
        self.admission = Admission(allowed.clients, connections, per_client, refuse_arrival, shared)
        """Replaced under the lock of PublicPorts."""
        # No client of a proxy listener may be led to this port, from now until it is closed.
        self._unregister = runtime.own.register_everywhere(
            "tcp", self._listener.address, of_agent=True
        )
        ports.add(self)

    def start(self) -> None:
        """Start to accept.  Raises RuntimeError if there is no thread."""
        self._listener.start()

    def configure(self, dependencies: HandlerDependencies) -> None:
        """Apply a configuration.  Called under the lock of PublicPorts."""
        connector = Outbound(
            self._target.router,
            pipe_limits(dependencies),
            self._runtime.counters,
            dependencies.observer,
            dependencies.accounts,
        )
        handler = TcpForward(self._target.name, connector, self._target.target)
        seconds = dependencies.timeouts.handshake
        self._listener.configure(handler, self.admission, seconds, self.handshakes)

    def configure_range(self, allowed: PortRange) -> None:
        """Apply the clients and limits of the range that has the port, from now on."""
        self._ports.limit(self, allowed)

    def close(self) -> None:
        """Stop to accept; running connections continue."""
        self._listener.stop()
        self._unregister()
        self._ports.retire(self)

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        return self._listener.live

    def abort(self) -> None:
        """Shut the connections down."""
        self._listener.abort()


class UdpPort:
    """A public UDP port (tunnel.ports.OpenPort), with the sessions of its clients."""

    def __init__(
        self, runtime: Runtime, address: Address, target: PortTarget, clients: AllowedClients
    ) -> None:
        """Bind the port.  Raises ListenError."""
        self._runtime = runtime
        self._listener = runtime.udp_listener(address)
        self._table = nat_table(runtime, None if is_loopback(address.host) else SESSIONS_PER_CLIENT)
        self._forward = self._listener.handler = UdpForward(
            target.name, target.router, self._table, target.target, clients, runtime.counters
        )
        # As for a TCP port.
        self._unregister = runtime.own.register_everywhere(
            "udp", self._listener.address, of_agent=True
        )
        runtime.janitor.register(self._listener)
        runtime.janitor.register(self._table)

    def start(self) -> None:
        """Start to receive.  Raises RuntimeError if there is no thread."""
        self._listener.start()

    def configure_range(self, allowed: PortRange) -> None:
        """Let the clients of the range that has the port begin sessions from now on."""
        self._forward.clients = allowed.clients

    def close(self) -> None:
        """Stop to receive, and end the sessions."""
        self._listener.stop()
        self._unregister()
        self._runtime.janitor.unregister(self._listener)
        self._runtime.janitor.unregister(self._table)
        self._table.close()


def nat_table(runtime: Runtime, per_client: int | None = None) -> NatTable:
    """Return a new NAT table with the defaults of a listener.

    `per_client`: sessions of one client address at the same time, None for no limit of their own.
    """
    udp = UdpConfig()
    limits = SessionLimits(udp.max_sessions, per_client or udp.max_sessions)
    policy = NatPolicy(limits, udp.idle_timeout)
    return NatTable(policy, runtime.nat_dependencies())


def pipe_limits(dependencies: HandlerDependencies) -> PipeLimits:
    """Return the limits of a configuration's TCP relays."""
    return PipeLimits(
        dependencies.timeouts.tcp_idle, dependencies.timeouts.half_close, dependencies.splice
    )
