"""Opens and closes the public ports of an agent session, as far as the agent may have them.

How a port is opened is the daemon's part (PortOpener).  Ports are opened and closed under a
lock, which never waits for a peer.  Any thread.
"""

from __future__ import annotations

import threading

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.listeners import ALL_CLIENTS
from netproxy.protocol import tunnel
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.interfaces.services import Log
    from netproxy.protocol.tunnel import BridgePort
    from netproxy.tunnel.control.connection import ControlConnection


class PortLimits(NamedTuple):
    """The connections of a public TCP port at the same time."""

    connections: int = 1024
    per_client: int = 256
    handshakes: int = 256
    """Connections whose clients have sent nothing yet."""


class PortRange(NamedTuple):
    """Ports that an agent may have, and the address that the bridge binds them on."""

    network: str
    """ "tcp" or "udp"."""
    host: str
    first: int
    last: int
    """Included."""
    limits: PortLimits = PortLimits()
    clients: AllowedClients = ALL_CLIENTS


class AgentRights(NamedTuple):
    """What the bridge's configuration says of one agent."""

    token: bytes
    ports: Sequence[PortRange] = ()

    def __repr__(self) -> str:
        return f"AgentRights({self.ports!r})"

    def range_of(self, port: BridgePort) -> PortRange | None:
        """Return the first range that has a port, None if the agent may not have it."""
        for allowed in self.ports:
            if allowed.network == port.network and allowed.first <= port.port <= allowed.last:
                return allowed
        return None


class RightsTable:
    """The rights of all agents, replaced as a whole on reload."""

    def __init__(self) -> None:
        self._agents: Mapping[str, AgentRights] = {}

    def get(self, agent: str) -> AgentRights | None:
        """Return the rights of an agent, None if it is not configured."""
        return self._agents.get(agent)

    def replace(self, agents: Mapping[str, AgentRights]) -> Mapping[str, AgentRights]:
        """Apply a new configuration; return the one before."""
        before, self._agents = self._agents, agents
        return before


class OpenPort(Protocol):
    """A public port that listens."""

    def configure_range(self, allowed: PortRange) -> None:
        """Apply the clients and limits of the range that has the port, from now on."""

    def close(self) -> None:
        """Stop listening; connections that are running continue."""


class PortOpener(Protocol):
    """Opens public ports that lead to an agent."""

    def open(self, agent: str, port: BridgePort, allowed: PortRange) -> OpenPort:
        """Listen on a port of the range `allowed`.  Raises ListenError."""


class SessionPorts:
    """The public ports of one agent session: those that are open, and those that were refused."""

    def __init__(
        self,
        agent: str,
        control: ControlConnection,
        rights: RightsTable,
        opener: PortOpener,
        log: Log,
    ) -> None:
        """Start without ports.  The agent learns through `control` which ports are served."""
        self._agent = agent
        self._control = control
        self._rights = rights
        self._opener = opener
        self._log = log
        # Guards all below, also while a port is bound (which does not wait).
        self._lock = threading.Lock()
        self._open: dict[BridgePort, tuple[PortRange, OpenPort]] = {}
        """With the range that each is in."""
        self._refused: dict[BridgePort, int] = {}
        """With an outcome (tunnel.OUTCOMES) other than SERVED."""
        self._closed = False

    def use_control(self, control: ControlConnection) -> None:
        """Tell the agent through another control connection from now on."""
        with self._lock:
            self._control = control

    def serve(self, wanted: Iterable[BridgePort]) -> None:
        """Serve these ports and no others, as far as the agent may have them; tell it which."""
        with self._lock:
            self._update(dict.fromkeys(wanted))

    def apply_rights(self) -> None:
        """Serve what the agent asked for last, after its rights have changed."""
        with self._lock:
            self._update(dict.fromkeys((*self._open, *self._refused)))

    def close(self) -> None:
        """Close all ports, for good."""
        with self._lock:
            self._closed = True
            ports = [port for _, port in self._open.values()]
            self._open.clear()
        for port in ports:
            port.close()

    def served(self) -> list[str]:
        """Return the ports that are open, such as "127.0.0.1:8022/tcp"."""
        with self._lock:
            return [
                f"{Address(self._open[port][0].host, port.port)}/{port.network}"
                for port in sorted(self._open)
            ]

    def refused(self) -> dict[str, str]:
        """Return the ports that are not served, each with the reason in words."""
        with self._lock:
            return {
                str(port): tunnel.OUTCOMES[outcome]
                for port, outcome in sorted(self._refused.items())
            }

    def _update(self, wanted: Mapping[BridgePort, None]) -> None:
        """Called under the lock."""
        # Read under the lock: a reload replaces the rights first and then takes the lock.
        rights = self._rights.get(self._agent) or AgentRights(b"")
        for port, (before, opened) in list(self._open.items()):
            allowed = rights.range_of(port) if port in wanted else None
            if allowed is None or allowed.host != before.host:
                self._open.pop(port)[1].close()
            elif allowed is not before:
                opened.configure_range(allowed)
                self._open[port] = allowed, opened
        outcomes = {port: self._outcome(port, rights.range_of(port)) for port in wanted}
        self._refused = {
            port: outcome for port, outcome in outcomes.items() if outcome != tunnel.SERVED
        }
        # Sent under the lock, so that the last message tells the current state; never blocks.
        self._control.send(tunnel.encode_registered(outcomes.items()))

    def _outcome(self, port: BridgePort, allowed: PortRange | None) -> int:
        """Open a port unless it is open; return a key of tunnel.OUTCOMES."""
        if port in self._open:
            return tunnel.SERVED
        log_key = ("tunnel port", self._agent, port)
        if allowed is None:
            self._log.limited(
                log_key, "tunnel: agent '%s' is not allowed to have port %s", self._agent, port
            )
            return tunnel.NOT_ALLOWED
        if self._closed:
            return tunnel.CANNOT_LISTEN
        try:
            self._open[port] = allowed, self._opener.open(self._agent, port, allowed)
        except ListenError as error:
            self._log.limited(
                log_key, "tunnel: cannot open port %s of agent '%s': %s", port, self._agent, error
            )
            return tunnel.CANNOT_LISTEN
        return tunnel.SERVED
