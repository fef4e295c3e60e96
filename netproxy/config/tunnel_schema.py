"""The schema of reverse tunnels.  schema.py has everything else and explains the form."""

from __future__ import annotations

from netproxy.config.access_schema import ClientsConfig, LimitsConfig
from netproxy.config.routing_schema import Place, UpstreamConfig, UpstreamTlsConfig
from netproxy.interfaces.addresses import Address
from netproxy.typed import NamedTuple


class PortConfig(NamedTuple):
    """Ports that an agent may have opened on its bridge, first to last inclusive."""

    network: str
    host: str
    """The address that the ports are bound on."""
    first: int
    last: int
    clients: ClientsConfig = ClientsConfig()
    limits: LimitsConfig = LimitsConfig()
    """`connections_per_client` None: 256, or connections on loopback."""


class BridgeAgentConfig(NamedTuple):
    """An agent that may connect to this bridge."""

    token: str
    ports: tuple[PortConfig, ...] = ()

    def __repr__(self) -> str:
        return f"BridgeAgentConfig({self.ports!r})"


class BridgeConfig(NamedTuple):
    """The bridge that this daemon is: its agents by name."""

    agents: dict[str, BridgeAgentConfig]
    datagrams: bool = False
    """True if agents may send datagrams to the UDP ports of its listeners."""
    place: Place = Place()
    """Of the key `datagrams`."""
    direct: bool = False
    """True if clients and agents may talk directly."""


class ServiceConfig(NamedTuple):
    """A port of the bridge, and the target in the agent's network that it leads to."""

    network: str
    port: int
    target: Address
    proxy_protocol: bool = False
    """True if the target is told the client in a PROXY protocol header."""


class AgentConfig(NamedTuple):
    """The bridge that this daemon is an agent of, and what it serves there."""

    bridge: Address
    name: str
    token: str
    tls: UpstreamTlsConfig | None
    """None: without TLS."""
    upstream: UpstreamConfig
    """How the bridge is reached."""
    exit: bool = False
    """True if the bridge may ask for connections to any target."""
    services: tuple[ServiceConfig, ...] = ()
    datagrams: bool = False
    """True if datagrams go by UDP where the bridge offers it."""
    place: Place = Place()
    """Of the key `datagrams`."""
    direct: bool = False
    """True if clients of the bridge may send datagrams directly."""

    def __repr__(self) -> str:
        return f"AgentConfig({self.bridge!r}, {self.name!r})"


class TunnelConfig(NamedTuple):
    """This daemon's parts in reverse tunnels."""

    bridge: BridgeConfig | None = None
    agent: AgentConfig | None = None
