"""Reads the section `tunnel`: a bridge with its agents, and an agent with its services.

Tokens are in no message and no repr.
"""

from __future__ import annotations

import re
from typing import Iterable, NamedTuple

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
from netproxy.config.sections.clients import read_clients
from netproxy.config.sections.listeners import read_limits
from netproxy.config.sections.tls import read_client_tls, read_tls
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.url import AGENT_NAME, parse_host_port, parse_listen
from netproxy.interfaces.addresses import Address, pack_ip

TOKEN_FLOOR = 16
"""Bytes.  A shorter token can be guessed from a recorded handshake."""
PRIVILEGED_LIMIT = 1024
"""Ports below must be named one by one, and not as part of a range."""
SERVICES_LIMIT = 1000
"""Services that a REGISTER message of the protocol holds."""
KEEPALIVE = 15.0
"""Seconds: shorter than the time after which a NAT forgets a silent connection."""
LOOPBACK = "127.0.0.1"
NAME = "tunnel"
"""The protocol of listeners for agents, and the name of the listener that the bridge adds."""
_PORT = r"(?:(?:\[([^\]]*)\]|([0-9.]+)):)?([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp))?\Z"
_AGENT_NAME_ERROR = "an agent's name has 1 to 63 letters, digits, '-' and '_'"


class _Listen(NamedTuple):
    addresses: tuple[Address, ...]
    is_plain: bool
    """True if the URL says that there is no TLS."""


class _Bridge(NamedTuple):
    server: Address
    is_plain: bool


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
        section.finish()

    def read(self, upstreams: UpstreamReader) -> TunnelConfig:
        """Return the section's configuration."""
        return TunnelConfig(
            BridgeConfig(self.agents) if self._bridge else None,
            self._read_agent(self._agent, upstreams) if self._agent else None,
        )

    # -- a bridge

    def read_listener(self, others: tuple[ListenerConfig, ...]) -> ListenerConfig | None:
        """Return the listener that `tunnel.bridge.listen` adds; None if agents use another one."""
        section = self._bridge
        if section is None:
            if any(listener.protocol == NAME for listener in others):
                message = f"tunnel.bridge: is missing, but a listener has the protocol {NAME}"
                self._problems.add(message, self._place)
            return None
        if not self.agents:
            section.add_error("agents", "names no agent")
        listen = section.read("listen", _parse_listen, None)
        tls = read_tls(section.mapping("tls"))
        clients = read_clients(section)
        section.finish()
        if listen is None:
            if not any(other.tls and other.protocol in (NAME, "sps") for other in others):
                message = f"is missing, and no listener with tls has the protocol {NAME} or sps"
                section.add_error("listen", message)
            return None
        self._check_listener(section, listen, bool(tls), others)
        limits = LimitsConfig()
        limits = limits._replace(connections_per_client=limits.connections)
        return ListenerConfig(
            NAME,
            listen.addresses,
            NAME,
            ("tcp",),
            clients=clients,
            tls=tls,
            limits=limits,
            place=Place(section.place_of("listen")),
        )

    def _check_listener(
        self, section: MapReader, listen: _Listen, has_tls: bool, others: Iterable[ListenerConfig]
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
                agent.add_error("", _AGENT_NAME_ERROR)
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
            section.warn(
                "token",
                f"is shorter than {TOKEN_FLOOR} bytes and can be guessed: "
                "make one with 'head -c 32 /dev/urandom | base64'",
            )
        return token

    # -- an agent

    def _read_agent(self, section: MapReader, upstreams: UpstreamReader) -> AgentConfig:
        if not section.has("bridge"):
            section.add_error("bridge", "is missing (expected tls://host:port)")
        if not section.has("name"):
            section.add_error("name", "is missing")
        has_tls = section.has("tls")
        bridge = section.read("bridge", _parse_bridge, None) or _Bridge(Address("", 0), False)
        name = section.read("name", _agent_name, "")
        tls = read_client_tls(section.mapping("tls"), may_be_insecure=False)
        if bridge.is_plain and has_tls:
            section.add_error("tls", "a bridge at tcp:// has no TLS: remove this key")
        if bridge.is_plain:
            section.warn(
                "bridge", "without TLS the traffic can be read, and changed, on the network"
            )
        agent = AgentConfig(
            bridge.server,
            name,
            self._token(section),
            None if bridge.is_plain else tls,
            self._agent_upstream(section, upstreams),
            section.flag("exit", False),
            self._services(section.mapping("services")),
        )
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
                port = _parse_service_port(key)
            except ValueError as error:
                section.add_error(key, str(error), node.key_place)
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
        target = section.read("target", parse_host_port, None)
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


def parse_port(text: str) -> PortConfig:
    """Return the ports of "8022", "8053/udp", "0.0.0.0:8443", "[::1]:8000-8010/tcp".

    Without address they are on 127.0.0.1, without network TCP.  Raises ValueError.
    """
    match = re.match(_PORT, text)
    host = match and (match[1] or match[2] or LOOPBACK)
    if not match or not host or pack_ip(host) is None:
        expected = "(expected 8022, 8053/udp, 0.0.0.0:8443 or 8000-8010)"
        raise ValueError(f"'{text}' is not a port {expected}")
    first = int(match[3])
    last = int(match[4] or first)
    if not 0 < first <= last < 65536:
        raise ValueError(f"'{text}' is not a port or a range of ports between 1 and 65535")
    if first < last and first < PRIVILEGED_LIMIT:
        raise ValueError(f"'{text}': ports below {PRIVILEGED_LIMIT} must be named one by one")
    return PortConfig(match[5] or "tcp", host, first, last)


def _parse_service_port(text: str) -> PortConfig:
    """Return the port of a service: a single port, without address.  Raises ValueError."""
    port = parse_port(text)
    if port.first != port.last or port.host != LOOPBACK or ":" in text:
        raise ValueError(f"'{text}' is not a port of the bridge (expected 8022 or 8053/udp)")
    return port


def _parse_listen(text: str) -> _Listen:
    is_plain = text.startswith("tcp://")
    return _Listen(parse_listen(text.removeprefix("tcp://")), is_plain)


def _parse_bridge(text: str) -> _Bridge:
    scheme, separator, server = text.partition("://")
    if not separator or scheme not in ("tls", "tcp"):
        raise ValueError(f"'{text}' is not a bridge (expected tls://host:port)")
    return _Bridge(parse_host_port(server), scheme == "tcp")


def _agent_name(text: str) -> str:
    if not re.match(AGENT_NAME, text):
        raise ValueError(_AGENT_NAME_ERROR)
    return text
