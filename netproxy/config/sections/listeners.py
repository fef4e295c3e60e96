"""Reads the section `listeners`: where clients connect, and what must fit together there.

Binds nothing; names are not resolved.
"""

from __future__ import annotations

from typing import NamedTuple

from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import AnnounceConfig, LimitsConfig, ListenerConfig, Place, UdpConfig
from netproxy.config.sections.binds import read_bind
from netproxy.config.sections.clients import read_clients
from netproxy.config.sections.tls import read_tls
from netproxy.config.units import parse_frequency, parse_network, parse_rate
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.url import parse_announce, parse_host_port, parse_listen
from netproxy.interfaces.addresses import ActivationAddress, Address, pack_ip
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.interfaces.networks import IpNetwork, is_loopback

PROTOCOLS = {
    "sps": ("tcp", "udp"),
    "socks5": ("tcp", "udp"),
    "http": ("tcp", "udp"),
    "tcp": ("tcp",),
    "udp": ("udp",),
    "dns": ("tcp", "udp"),
    "tunnel": ("tcp",),
}
"""The networks that each protocol can serve.  The UDP of http comes within its connections."""
WITH_ASSOCIATE = ("sps", "socks5")
"""Protocols whose clients are told a UDP port."""
WITHOUT_LOGIN = ("tcp", "udp", "dns", "tunnel")
"""Protocols without users; a tunnel's agents have tokens."""
_FOR_ROUTED = ("announce", "upstream", "udp", "bind")
UNUSED_KEYS = {"dns": _FOR_ROUTED, "tunnel": _FOR_ROUTED}
"""Keys that a protocol has no use for."""
FILTERS = ("endpoint-independent", "address-dependent", "address-and-port-dependent")
TCP_LIMITS = ("connections", "connections_per_client", "connection_rate_per_client", "handshakes")
"""The limits that are not for UDP."""
CONNECTIONS_PER_CLIENT, SESSIONS_PER_CLIENT = 256, 64
"""Defaults of listeners that other machines can reach."""
UDP_IDLE_FLOOR = 120.0
"""Seconds.  RFC 4787 REQ-5: a shorter timeout breaks clients, and gets a warning."""


class _Presence(NamedTuple):
    """What the mapping of a listener says beyond the values in its ListenerConfig."""

    has_target: bool
    has_clients: bool
    allow_open: bool


class ListenerReader:
    """Reads listeners.  `has_users`: whether anybody may log in."""

    def __init__(self, upstreams: UpstreamReader, has_users: bool, problems: Problems) -> None:
        self._upstreams = upstreams
        self._has_users = has_users
        self._problems = problems

    def read(self, nodes: list[Node]) -> tuple[ListenerConfig, ...]:
        """Return the listeners in the order of the file, without those that have no address."""
        listeners: list[ListenerConfig] = []
        for index, node in enumerate(nodes):
            section = MapReader(node, f"listeners[{index}]", self._problems)
            has_name = section.has("name")
            listener = self._listener(section)
            section.finish()
            if listener is None:
                continue
            if not has_name and any(listener.name == other.name for other in listeners):
                listener = listener._replace(name=f"{listener.protocol}-{listener.addresses[0]}")
            _check_against_others(section, listener, listeners)
            listeners.append(listener)
        return tuple(listeners)

    def _listener(self, section: MapReader) -> ListenerConfig | None:
        protocol = section.choice("protocol", tuple(PROTOCOLS), "sps")
        for key in filter(section.has, UNUSED_KEYS.get(protocol, ())):
            section.add_error(key, f"has no meaning for the protocol {protocol}")
        presence = _Presence(
            section.has("target"), section.has("clients"), section.flag("allow_open", False)
        )
        upstream = section.take("upstream")
        listener = ListenerConfig(
            protocol=protocol,
            addresses=self._addresses(section),
            network=section.values("network", parse_network) or PROTOCOLS[protocol],
            name=section.text("name"),
            announce=self._announcements(section),
            auth=self._auth(section, protocol),
            clients=read_clients(section),
            target=section.read("target", parse_host_port, None),
            upstream=self._upstreams.read(upstream, f"{section.path}.upstream")
            if upstream
            else None,
            udp=self._udp(section.mapping("udp"), protocol),
            limits=read_limits(section),
            tls=read_tls(section.mapping("tls")),
            proxy_protocol=section.values("proxy_protocol", IpNetwork.parse),
            bind=read_bind(section),
            place=Place(section.place_of("listen")),
        )
        if not listener.addresses:
            return None
        _check_protocol(section, listener, presence)
        excluded_alone = listener.clients.allow.excluded and not listener.clients.allow.networks
        if not presence.has_clients or excluded_alone:
            self._check_open(section, listener, presence.allow_open)
        return _with_defaults(listener)

    def _addresses(self, section: MapReader) -> tuple[Address, ...]:
        if not section.has("listen"):
            section.add_error("listen", "is missing")
        return section.read("listen", parse_listen, ())

    def _auth(self, section: MapReader, protocol: str) -> str:
        default = "required" if self._has_users and protocol not in WITHOUT_LOGIN else "none"
        auth = section.choice("auth", ("required", "optional", "none"), default)
        if auth != "none" and not self._has_users:
            section.add_error("auth", "there are no users: add users, users_file or auth")
        return auth

    def _announcements(self, section: MapReader) -> tuple[AnnounceConfig, ...]:
        announcements = []
        for index, node in enumerate(section.items("announce")):
            if isinstance(node.value, dict):
                inner = MapReader(node, f"{section.path}.announce[{index}]", self._problems)
                clients = inner.values("clients", IpNetwork.parse)
                if not inner.has("address"):
                    section.add_error(f"announce[{index}]", "has no address", node.place)
                address = inner.read("address", parse_announce, None)
                inner.finish()
            else:
                clients = ()
                alone = MapReader(
                    Node({"announce": node}, node.place), section.path, self._problems
                )
                address = alone.read("announce", parse_announce, None)
            if address is not None:
                announcements.append(AnnounceConfig(address, clients))
        return tuple(announcements)

    def _udp(self, section: MapReader, protocol: str) -> UdpConfig:
        # The UDP port of a fixed target has no login: only the target may send to its clients.
        defaults = UdpConfig(filtering=FILTERS[1] if protocol == "udp" else FILTERS[0])
        if section.has("relay_port") and protocol not in WITH_ASSOCIATE:
            message = f"has no meaning for the protocol {protocol}: it has no UDP ASSOCIATE"
            section.add_error("relay_port", message)
        udp = UdpConfig(
            section.read("relay_port", _relay_port, defaults.relay_port),
            section.duration("idle_timeout", defaults.idle_timeout),
            section.choice("mapping", ("endpoint-independent", "symmetric"), defaults.mapping),
            section.choice("filtering", FILTERS, defaults.filtering),
            section.whole("max_sessions", defaults.max_sessions),
            section.whole("max_sessions_per_client", None),
        )
        section.finish()
        if udp.idle_timeout < UDP_IDLE_FLOOR:
            section.warn("idle_timeout", f"is under {UDP_IDLE_FLOOR:.0f}s, which RFC 4787 forbids")
        return udp

    def _check_open(self, section: MapReader, listener: ListenerConfig, allow_open: bool) -> None:
        """Hazard 80: a proxy that anybody may use is found, and abused, within hours."""
        outside = [address for address in listener.addresses if not is_loopback(address.host)]
        if not outside or listener.auth == "required" or listener.protocol == "tunnel":
            return
        if allow_open:
            section.warn("listen", f"{outside[0]} lets everybody in{_name_hint(outside[0])}")
        else:
            section.add_error(
                "listen",
                f"{outside[0]} would let everybody in{_name_hint(outside[0])}: "
                "set auth, clients, or allow_open: true",
            )


def _check_against_others(
    section: MapReader, listener: ListenerConfig, others: list[ListenerConfig]
) -> None:
    """Report names and sockets that are taken."""
    if listener.name == TUNNEL_AGENT:
        message = f"'{TUNNEL_AGENT}' is reserved for what a bridge asks its agent for"
        section.add_error("name", message)
    for other in others:
        if listener.name == other.name:
            section.add_error("name", f"'{listener.name}' is the name of another listener")
        for network, address in sorted(_sockets(listener) & _sockets(other)):
            message = f"{network} {address} is already used by listener '{other.name}'"
            section.add_error("listen", message)


def _check_protocol(section: MapReader, listener: ListenerConfig, presence: _Presence) -> None:
    """Report keys that do not fit the protocol or the network."""
    protocol, network = listener.protocol, listener.network
    if unsupported := set(network) - set(PROTOCOLS[protocol]):
        message = f"the protocol {protocol} does not support {', '.join(unsupported)}"
        section.add_error("network", message)
    if presence.has_target and protocol not in ("tcp", "udp"):
        message = f"the protocol {protocol} has no fixed target: its clients name theirs"
        section.add_error("target", message)
    if not presence.has_target and protocol in ("tcp", "udp"):
        section.add_error("target", "is missing")
    if "tcp" not in network and (listener.tls or listener.proxy_protocol):
        section.add_error("tls" if listener.tls else "proxy_protocol", "needs the network tcp")
    if protocol == "tunnel" and not listener.tls:
        message = "is missing (for a bridge without TLS write tunnel.bridge.listen: tcp://...)"
        section.add_error("tls", message)
    if listener.auth != "none" and protocol in WITHOUT_LOGIN:
        message = f"the protocol {protocol} has no login: set clients, or auth: none"
        section.add_error("auth", message)
    if network == ("udp",) and protocol not in ("udp", "dns"):
        message = f"the UDP of the protocol {protocol} needs its TCP connections: add tcp"
        section.add_error("network", message)


def _name_hint(address: Address) -> str:
    """Return what a name to listen on stands for, "" for an address."""
    if isinstance(address, ActivationAddress) or pack_ip(address.host) is not None:
        return ""
    return " (a name is looked up at the start, and counts as an address for other machines)"


def read_limits(owner: MapReader, network: str | None = None) -> LimitsConfig:
    """Take the limits of a listener, or of a port of an agent.

    `network`: "udp" for a port that has no TCP.
    """
    section = owner.mapping("limits")
    if network == "udp":
        for key in filter(section.has, TCP_LIMITS):
            section.add_error(key, "has no meaning for udp")
    limits = LimitsConfig(
        section.whole("connections", LimitsConfig().connections),
        section.whole("connections_per_client", None),
        section.read("connection_rate_per_client", parse_frequency, None),
        section.read("rate", parse_rate, None),
        section.read("rate_per_client", parse_rate, None),
        section.whole("handshakes", LimitsConfig().handshakes),
    )
    section.finish()
    return limits


def _with_defaults(listener: ListenerConfig) -> ListenerConfig:
    """Return the listener with a name, and limits for each client.

    All clients of a listener on loopback share one address: there the limit is the total.
    """
    is_local = all(is_loopback(address.host) for address in listener.addresses)
    udp, limits = listener.udp, listener.limits
    sessions = udp.max_sessions if is_local else SESSIONS_PER_CLIENT
    connections = limits.connections if is_local else CONNECTIONS_PER_CLIENT
    address = listener.addresses[0]
    place = address.name if isinstance(address, ActivationAddress) else str(address.port)
    return listener._replace(
        name=listener.name or f"{listener.protocol}-{place}",
        udp=udp._replace(max_sessions_per_client=udp.max_sessions_per_client or sessions),
        limits=limits._replace(connections_per_client=limits.connections_per_client or connections),
    )


def _sockets(listener: ListenerConfig) -> set[tuple[str, Address]]:
    """Return the networks and addresses that a listener binds, except addresses with port 0."""
    return {
        (network, address)
        for address in listener.addresses
        for network in listener.bound_networks
        if address.port or isinstance(address, ActivationAddress)
    }


def _relay_port(text: str) -> str:
    if text in ("shared", "any"):
        return text
    first, _, last = text.partition("-")
    if (
        text.isascii()
        and first.isdigit()
        and last.isdigit()
        and 0 < int(first) <= int(last) < 65536
    ):
        return text
    raise ValueError(f"'{text}' is not shared, any or a range of ports FIRST-LAST")
