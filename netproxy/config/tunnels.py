"""The `tunnel` section: a bridge with the agents that may come, and an agent with what it serves.

Tokens are in no message and no repr.
"""

from __future__ import annotations

import re

from netproxy.config.node import MapReader, Node, Problems
from netproxy.config.schema import (
    AgentConfig,
    BridgeAgentConfig,
    BridgeConfig,
    HopConfig,
    LimitsConfig,
    ListenerConfig,
    PortConfig,
    ServiceConfig,
    TunnelConfig,
    UpstreamTlsConfig,
    UpstreamConfig,
)
from netproxy.config.upstreams import Ways, read_tls, server_name
from netproxy.config.url import AGENT_NAME, parse_host_port, parse_listen
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.networks import IpNetwork

TOKEN_SHORT = 16  # bytes: who sees a handshake can try shorter ones at leisure, and is warned of
PRIVILEGED = 1024  # ports below are only had one by one
SERVICES_LIMIT = 1000  # what a REGISTER of the protocol holds
KEEPALIVE = 15.0  # seconds: shorter than what a NAT forgets a quiet connection after
LOOPBACK = "127.0.0.1"
NAME = "tunnel"  # of the listener that agents dial
_PORT = r"(?:(?:\[([^\]]*)\]|([0-9.]+)):)?(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp))?\Z"


class Tunnels:
    def __init__(self, section: MapReader, problems: Problems, warnings: list[str]) -> None:
        self._problems = problems
        self._warnings = warnings
        self._place = section.place
        self._bridge, self._agent = _given(section, "bridge"), _given(section, "agent")
        self.agents = self._read_agents(self._bridge.mapping("agents")) if self._bridge else {}
        section.finish()

    def read(self, ways: Ways) -> TunnelConfig:
        return TunnelConfig(
            BridgeConfig(self.agents) if self._bridge else None,
            self._read_agent(self._agent, ways) if self._agent else None,
        )

    # -- a bridge

    def listener(self, others: tuple[ListenerConfig, ...]) -> ListenerConfig | None:
        """What agents dial, where `listen` says so; else they must come by one of the others."""
        section = self._bridge
        if section is None:
            if any(one.protocol == NAME for one in others):
                self._problems.add(
                    "tunnel.bridge: is missing, and a listener is for its agents", self._place
                )
            return None
        if not self.agents:
            section.wrong("agents", "names nobody")
        listen = section.read("listen", _listen, None)
        tls = read_tls(section.mapping("tls"))
        clients = tuple(section.texts("clients", IpNetwork.parse)) or None
        section.finish()
        if listen is None:
            if not any(one.tls and one.protocol in (NAME, "sps") for one in others):
                section.wrong("listen", "is missing, and no listener with tls takes agents")
            return None
        addresses, plain = listen
        if plain and tls:
            section.wrong("tls", "tcp:// has none: leave it away")
        elif plain:
            self._warnings.append(
                f"{section.path}.listen: agents come without TLS: what they carry can be read on its way"
            )
        elif not tls:
            section.wrong("tls", "is missing: write listen: tcp://... for a bridge without TLS")
        if any(one.name == NAME for one in others):
            section.wrong("listen", f"a listener has the name '{NAME}' already")
        limits = LimitsConfig()
        return ListenerConfig(
            NAME,
            addresses,
            NAME,
            ("tcp",),
            clients=clients,
            tls=tls,
            limits=limits._replace(connections_per_client=limits.connections),
        )

    def _read_agents(self, section: MapReader) -> dict[str, BridgeAgentConfig]:
        agents = {}
        for name, node in section.rest().items():
            one = MapReader(node, f"{section.path}.{name}", self._problems)
            if not re.match(AGENT_NAME, name):
                one.wrong("", "an agent's name has 1 to 63 letters, digits, '-' and '_'")
            agents[name] = BridgeAgentConfig(
                self._token(one), tuple(one.texts("ports", parse_port))
            )
            one.finish()
        return agents

    def _token(self, section: MapReader) -> str:
        token = section.text("token")
        if not token:
            section.wrong("token", "is missing or empty")
        elif len(token.encode()) < TOKEN_SHORT:
            self._warnings.append(
                f"{section.path}.token is shorter than {TOKEN_SHORT} bytes and can be guessed: "
                "make one with 'head -c 32 /dev/urandom | base64'"
            )
        return token

    # -- an agent

    def _read_agent(self, section: MapReader, ways: Ways) -> AgentConfig:
        named = section.has("bridge")
        bridge = section.read("bridge", _bridge, None)
        if not named:
            section.wrong("bridge", "is missing: tls://host:port")
        server, plain = bridge or (Address("", 0), False)
        named = section.has("name")
        name = section.read("name", _agent_name, "")
        if not named:
            section.wrong("name", "is missing")
        given = section.has("tls")
        tls = self._agent_tls(section.mapping("tls"))
        if plain and given:
            section.wrong("tls", "a bridge at tcp:// has none")
        if plain:
            self._warnings.append(
                f"{section.path}.bridge: without TLS what is carried can be read, and changed, on its way"
            )
        node = section.take("upstream")
        upstream = (
            ways.read(node, f"{section.path}.upstream")
            if node
            else UpstreamConfig((HopConfig("direct", keepalive=KEEPALIVE),))
        )
        agent = AgentConfig(
            server,
            name,
            self._token(section),
            None if plain else tls,
            upstream,
            section.flag("exit", False),
            self._services(section.mapping("services")),
        )
        if not agent.services and not agent.exit:
            section.wrong("services", "none, and no exit: there is nothing to do")
        section.finish()
        return agent

    @staticmethod
    def _agent_tls(section: MapReader) -> UpstreamTlsConfig:
        tls = UpstreamTlsConfig(
            section.text("ca"),
            section.text("certificate"),
            section.text("key"),
            section.read("server_name", server_name, ""),
        )
        if tls.key and not tls.certificate:
            section.wrong("certificate", "is missing")
        section.finish()
        return tls

    def _services(self, section: MapReader) -> tuple[ServiceConfig, ...]:
        found = {}
        for key, node in section.rest().items():
            try:
                port = parse_port(key)
                if port.first != port.last or port.host != LOOPBACK or ":" in key:
                    raise ValueError(f"'{key}' is no port of the bridge: write 8022 or 8053/udp")
            except ValueError as error:
                section.wrong(key, str(error), node.key_place)
                continue
            service = self._service(section, key, node, port)
            if (
                service is not None
                and found.setdefault((port.network, port.first), service) is not service
            ):
                section.wrong(key, "is given twice", node.key_place)
        if len(found) > SERVICES_LIMIT:
            section.wrong("", f"more than {SERVICES_LIMIT} services")
        return tuple(found.values())

    def _service(
        self, section: MapReader, key: str, node: Node, port: PortConfig
    ) -> ServiceConfig | None:
        given = node if isinstance(node.value, dict) else Node({"target": node}, node.place)
        one = MapReader(given, f"{section.path}.{key}", self._problems)
        aimed = one.has("target")
        target = one.read("target", parse_host_port, None)
        header = one.flag("proxy_protocol", False)
        if not aimed:
            one.wrong("target", "is missing")
        if header and port.network == "udp":
            one.wrong("proxy_protocol", "is for TCP")
        one.finish()
        return ServiceConfig(port.network, port.first, target, header) if target else None


def _given(section: MapReader, key: str) -> MapReader | None:
    there = section.has(key)
    inner = section.mapping(key)
    return inner if there else None


def parse_port(text: str) -> PortConfig:
    """8022, 8053/udp, 0.0.0.0:8443, [::1]:8000-8010/tcp: a port, or ports, that an agent may have; ValueError."""
    match = re.match(_PORT, text)
    host = match and (match[1] or match[2] or LOOPBACK)
    if not match or not host or pack_ip(host) is None:
        raise ValueError(f"'{text}' is no port: write 8022, 8053/udp, 0.0.0.0:8443 or 8000-8010")
    first = int(match[3])
    last = int(match[4] or first)
    if not 0 < first <= last < 65536:
        raise ValueError(f"'{text}' names no ports between 1 and 65535")
    if first < last and first < PRIVILEGED:
        raise ValueError(f"'{text}': ports below {PRIVILEGED} are named one by one")
    return PortConfig(match[5] or "tcp", host, first, last)


def _listen(text: str) -> tuple[tuple[Address, ...], bool]:
    """Addresses, and whether without TLS."""
    plain = text.startswith("tcp://")
    return parse_listen(text[len("tcp://") :] if plain else text), plain


def _bridge(text: str) -> tuple[Address, bool]:
    scheme, separator, server = text.partition("://")
    if not separator or scheme not in ("tls", "tcp"):
        raise ValueError(f"'{text}' is no bridge: write tls://host:port")
    return parse_host_port(server), scheme == "tcp"


def _agent_name(text: str) -> str:
    if not re.match(AGENT_NAME, text):
        raise ValueError("1 to 63 letters, digits, '-' and '_'")
    return text
