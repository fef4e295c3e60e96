"""Reads the section `tunnel`: a bridge with its agents, and an agent with its services.

Tokens are in no message and no repr.
"""

from __future__ import annotations

import re

from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import (
    AgentConfig,
    BridgeAgentConfig,
    BridgeConfig,
    HopConfig,
    LimitsConfig,
    ListenerConfig,
    Place,
    PortConfig,
    ServiceConfig,
    TunnelConfig,
    UpstreamConfig,
)
from netproxy.config.sections.clients import read_clients, read_limits
from netproxy.config.sections.tls import read_client_tls, read_tls
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.sections.tunnel.tunnel_values import (
    AGENT_NAME_ERROR,
    BridgeListen,
    BridgeUrl,
    parse_agent_name,
    parse_bridge_listen,
    parse_bridge_url,
    parse_path_listen,
    parse_port,
    parse_service_port,
)
from netproxy.config.url import AGENT_NAME, parse_target
from netproxy.interfaces.addresses import ActivationAddress, Address, UnixAddress
from netproxy.typed import Iterable

TOKEN_FLOOR = 16
"""Bytes.  A shorter token can be guessed from a recorded handshake."""
SERVICES_LIMIT = 1000
"""Services that a REGISTER message of the protocol holds."""
NEEDS_UDP = "needs datagrams, whose packets show the bridge where they come from"
KEEPALIVE = 15.0
"""Seconds: shorter than the time after which a NAT forgets a silent connection."""
NAME, DATAGRAMS = "tunnel", "tunnel-datagrams"
"""The protocol of listeners for agents, and the name of the one that the bridge adds; the name of
the one for datagrams alone."""


class TunnelReader:
    """Reads the section `tunnel`.

    The names of the agents are read first, because upstreams may use them; the listener comes
    after the other listeners, and the agent after the upstreams.
    """

    def __init__(self, section: MapReader, problems: Problems) -> None:
        self._problems = problems
        self._place = section.place
        self._bridge, self._agent = _optional(section, "bridge"), _optional(section, "agent")
        self.agents: dict[str, BridgeAgentConfig] = {}
        """The agents that may connect to this bridge."""
        if self._bridge:
            self.agents = self._read_agents(self._bridge.mapping("agents"))
        # Of the bridge; known after with_listeners().
        self._datagrams, self._datagrams_place, self._direct = False, Place(), False
        section.finish()

    def read(self, upstreams: UpstreamReader) -> TunnelConfig:
        """Return the section's configuration."""
        paths = (self._datagrams, self._datagrams_place, self._direct)
        return TunnelConfig(
            BridgeConfig(self.agents, *paths) if self._bridge else None,
            self._read_agent(self._agent, upstreams) if self._agent else None,
        )

    # -- a bridge

    def with_listeners(self, others: tuple[ListenerConfig, ...]) -> tuple[ListenerConfig, ...]:
        """Return all listeners: the others, and those that `tunnel.bridge` adds."""
        section = self._bridge
        if section is None:
            if any(listener.protocol == NAME for listener in others):
                message = f"tunnel.bridge: is missing, but a listener has the protocol {NAME}"
                self._problems.add(message, self._place)
            return others
        if not self.agents:
            section.add_error("agents", "names no agent")
        listen = section.read("listen", parse_bridge_listen, None)
        tls = read_tls(section.mapping("tls"))
        limits = LimitsConfig()
        own = ListenerConfig(
            NAME,
            listen.addresses if listen is not None else (),
            NAME,
            ("tcp",),
            clients=read_clients(section),
            tls=tls,
            limits=limits._replace(connections_per_client=limits.connections),
            place=Place(section.place_of("listen")),
        )
        if listen is not None:
            self._check_listener(section, listen, bool(tls), others)
        elif not any(other.tls and other.protocol in (NAME, "sps") for other in others):
            message = f"is missing, and no listener with tls has the protocol {NAME} or sps"
            section.add_error("listen", message)
        listeners = (*others, own) if listen is not None else others
        listeners = self._with_datagrams(section, listeners, own)
        section.finish()
        return listeners

    def _with_datagrams(
        self, section: MapReader, listeners: tuple[ListenerConfig, ...], own: ListenerConfig
    ) -> tuple[ListenerConfig, ...]:
        """Return the listeners with UDP ports for datagrams of agents, if there are to be any.

        `own`: the listener for agents that `tunnel.bridge` adds.
        """
        datagrams = section.read("datagrams", parse_path_listen, None)
        self._direct = section.flag("direct", False)
        if self._direct and datagrams is None:
            section.add_error("direct", NEEDS_UDP, given=("datagrams",))
        if datagrams is None:
            return listeners
        self._datagrams, self._datagrams_place = True, Place(section.place_of("datagrams"))
        if own.addresses and not own.tls:
            message = "needs TLS, in which agents are told the keys"
            section.add_error("datagrams", message, given=("tls",))
        if datagrams.addresses:
            place = self._datagrams_place
            udp = own._replace(name=DATAGRAMS, network=("udp",), tls=None, place=place)
            return (*listeners, udp._replace(addresses=datagrams.addresses))
        if not any(map(_may_have_datagrams, listeners)):
            message = "no listener for agents has a UDP port: write the address of one"
            section.add_error("datagrams", message, given=("listen",))
        return tuple(
            other._replace(network=("tcp", "udp")) if _may_have_datagrams(other) else other
            for other in listeners
        )

    def _check_listener(
        self,
        section: MapReader,
        listen: BridgeListen,
        has_tls: bool,
        others: Iterable[ListenerConfig],
    ) -> None:
        if listen.is_plain and has_tls:
            section.add_error("tls", "a bridge at tcp:// has no TLS: remove this key")
        elif listen.is_plain:
            section.warn(
                "listen", "agents connect without TLS: their traffic can be read on the network"
            )
        elif not has_tls:
            message = "is missing: write listen: tcp://... for a bridge without TLS"
            section.add_error("tls", message)
        if any(listener.name == NAME for listener in others):
            section.add_error("listen", f"another listener already has the name '{NAME}'")

    def _read_agents(self, section: MapReader) -> dict[str, BridgeAgentConfig]:
        agents = {}
        for name, node in section.rest().items():
            path = f"{section.path}.{name.partition(':')[0]}"  # a token may follow the colon
            agent = MapReader(node, path, self._problems)
            if not re.match(AGENT_NAME, name):
                agent.add_error("", AGENT_NAME_ERROR)
            agents[name] = BridgeAgentConfig(self._token(agent), self._ports(agent))
            agent.finish()
        return agents

    def _ports(self, agent: MapReader) -> tuple[PortConfig, ...]:
        """Return the ports of an agent: each a text, or a mapping with `port` and more."""
        node = agent.peek("ports")
        if node is None or not isinstance(node.value, (list, dict)):
            return agent.values("ports", parse_port)
        ports = []
        for index, item in enumerate(agent.items("ports")):
            name = f"ports[{index}]"
            if isinstance(item.value, dict):
                section = MapReader(item, f"{agent.path}.{name}", self._problems)
                if not section.has("port"):
                    section.add_error("port", "is missing")
                port = section.read("port", parse_port, None)
                clients, limits = read_clients(section), read_limits(section, port and port.network)
                section.finish()
                port = port and port._replace(clients=clients, limits=limits)
            else:
                alone = MapReader(Node({name: item}, item.place), agent.path, self._problems)
                port = alone.read(name, parse_port, None)
            if port is not None:
                ports.append(port)
        return tuple(ports)

    def _token(self, section: MapReader) -> str:
        token = section.secret("token")
        if not token:
            section.add_error("token", "is missing or empty")
        elif len(token.encode()) < TOKEN_FLOOR:
            hint = "make one with 'head -c 32 /dev/urandom | base64'"
            section.warn("token", f"is shorter than {TOKEN_FLOOR} bytes and can be guessed: {hint}")
        return token

    # -- an agent

    def _read_agent(self, section: MapReader, upstreams: UpstreamReader) -> AgentConfig:
        if not section.has("bridge"):
            section.add_error("bridge", "is missing (expected tls://host:port)")
        if not section.has("name"):
            section.add_error("name", "is missing")
        has_tls = section.has("tls")
        bridge = section.read("bridge", parse_bridge_url, None) or BridgeUrl(Address("", 0), False)
        name = section.read("name", parse_agent_name, "")
        tls = read_client_tls(section.mapping("tls"), may_be_insecure=False)
        if bridge.is_plain and has_tls:
            section.add_error("tls", "a bridge at tcp:// has no TLS: remove this key")
        if bridge.is_plain:
            message = "without TLS the traffic can be read, and changed, on the network"
            section.warn("bridge", message)
        agent = AgentConfig(
            bridge.server,
            name,
            self._token(section),
            None if bridge.is_plain else tls,
            self._agent_upstream(section, upstreams),
            section.flag("exit", False),
            self._services(section.mapping("services")),
            section.flag("datagrams", False),
            Place(section.place_of("datagrams")),
            section.flag("direct", False),
        )
        if agent.direct and not (agent.datagrams and agent.exit):
            section.add_error("direct", f"{NEEDS_UDP} and exit: true", "", ("datagrams", "exit"))
        if agent.datagrams and bridge.is_plain:
            section.add_error("datagrams", "needs TLS, in which the bridge tells the keys")
        if not agent.services and not agent.exit:
            message = "there are none, and exit is false: the agent would have nothing to do"
            section.add_error("services", message)
        section.finish()
        return agent

    @staticmethod
    def _agent_upstream(section: MapReader, upstreams: UpstreamReader) -> UpstreamConfig:
        node = section.take("upstream")
        if node is None:
            return UpstreamConfig((HopConfig("direct", keepalive=KEEPALIVE),))
        return upstreams.read(node, f"{section.path}.upstream")

    def _services(self, section: MapReader) -> tuple[ServiceConfig, ...]:
        services: dict[tuple[str, int], ServiceConfig] = {}
        for key, node in section.rest().items():
            try:
                port = parse_service_port(key)
            except ValueError as error:
                unread = f"{section.path}.{key}"
                self._problems.add(f"{unread}: {error}", node.key_place, unread)
                continue
            service = self._service(f"{section.path}.{key}", node, port)
            if service is None:
                continue
            if (port.network, port.first) in services:
                section.add_error(key, "is given twice", node.key_place)
            services.setdefault((port.network, port.first), service)
        if len(services) > SERVICES_LIMIT:
            section.add_error("", f"more than {SERVICES_LIMIT} services")
        return tuple(services.values())

    def _service(self, path: str, node: Node, port: PortConfig) -> ServiceConfig | None:
        """Return a service: its target alone, or a mapping with a target."""
        is_mapping = isinstance(node.value, dict)
        mapping = node if is_mapping else Node({"target": node}, node.place)
        section = MapReader(mapping, path, self._problems)
        if not section.has("target"):
            section.add_error("target", "is missing")
        target = section.read("target", parse_target, None)
        if isinstance(target, UnixAddress) and port.network == "udp":
            section.add_error("target", "a UNIX socket takes no datagrams")
        proxy_protocol = section.flag("proxy_protocol", False)
        if proxy_protocol and port.network == "udp":
            section.add_error("proxy_protocol", "is for TCP")
        section.finish()
        return ServiceConfig(port.network, port.first, target, proxy_protocol) if target else None


def _optional(section: MapReader, key: str) -> MapReader | None:
    """Return the reader of a mapping; None if the key is not there."""
    is_given = section.has(key)
    inner = section.mapping(key)
    return inner if is_given else None


def _may_have_datagrams(listener: ListenerConfig) -> bool:
    """Return whether a listener for agents has an address whose UDP port it can have as well."""
    others = (ActivationAddress, UnixAddress)
    is_port = not any(isinstance(address, others) for address in listener.addresses)
    return listener.protocol == NAME and is_port and "tcp" in listener.network
