"""Reads the section `listeners`: where clients connect, and what must fit together there.

Binds nothing; names are not resolved.
"""

from __future__ import annotations

from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import TRANSPARENT, ListenerConfig, Place, SniRouteConfig, UdpConfig
from netproxy.config.sections import socket_files
from netproxy.config.sections.binds import read_bind
from netproxy.config.sections.clients import read_clients, read_limits
from netproxy.config.sections.hops import PROXY_HEADERS
from netproxy.config.sections.listener.announce import (
    PORT_MAPPINGS,
    WITH_ASSOCIATE,
    check_announcements,
    read_announcements,
    read_servers,
)
from netproxy.config.sections.listener.sniff import read_sniff
from netproxy.config.sections.tls import read_tls
from netproxy.config.units import parse_network, parse_relay_port
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.url import parse_target
from netproxy.interfaces.addresses import ActivationAddress, Address, UnixAddress, pack_ip
from netproxy.interfaces.flows import TUNNEL_AGENT, TUNNEL_DIRECT
from netproxy.interfaces.networks import IpNetwork, is_loopback
from netproxy.typed import NamedTuple

PROTOCOLS = {
    "sps": ("tcp", "udp"),
    "socks5": ("tcp", "udp"),
    "http": ("tcp", "udp"),
    "tcp": ("tcp",),
    "udp": ("udp",),
    "dns": ("tcp", "udp"),
    "tunnel": ("tcp",),
    "redirect": ("tcp",),
    "tproxy": ("tcp", "udp"),
    "sni": ("tcp",),
}
"""The networks that each protocol can serve.  The UDP of http comes within its connections."""
WITHOUT_LOGIN = ("tcp", "udp", "dns", "tunnel", "sni", *TRANSPARENT)
"""Protocols without users; a tunnel's agents have tokens."""
_FOR_ROUTED = ("announce", "upstream", "udp", "bind")
_FOR_ANSWERS = ("announce", "port_mapping", "tls", "proxy_protocol")
UNUSED_KEYS = {
    **{"dns": _FOR_ROUTED, "tunnel": _FOR_ROUTED, "tproxy": _FOR_ANSWERS},
    **{"redirect": (*_FOR_ANSWERS, "udp"), "sni": ("announce", "udp")},
}
"""Keys that a protocol has no use for."""
CLOSED = ("tunnel", "sni")
"""Protocols that lead nobody to a target of his choice, without a login."""
FILTERS = ("endpoint-independent", "address-dependent", "address-and-port-dependent")
CONNECTIONS_PER_CLIENT, SESSIONS_PER_CLIENT = 256, 64
"""Defaults of listeners that other machines can reach."""
UDP_IDLE_FLOOR = 120.0
"""Seconds.  RFC 4787 REQ-5: a shorter timeout breaks clients, and gets a warning."""


class _Presence(NamedTuple):
    """What the mapping of a listener says beyond the values in its ListenerConfig."""

    has_target: bool
    has_clients: bool


class ListenerReader:
    """Reads listeners.  `has_users`: whether anybody may log in."""

    def __init__(self, upstreams: UpstreamReader, has_users: bool, problems: Problems) -> None:
        self._upstreams = upstreams
        self._has_users = has_users
        self._problems = problems
        self.are_all_known = True
        """False if read() has left a listener out, or a name: others may refer to it."""

    def read(self, nodes: list[Node]) -> tuple[ListenerConfig, ...]:
        """Return the listeners in the order of the file, without those that have no address."""
        listeners: list[ListenerConfig] = []
        for index, node in enumerate(nodes):
            section = MapReader(node, f"listeners[{index}]", self._problems)
            has_name = section.has("name")
            listener = self._listener(section)
            section.finish()
            is_known = listener is not None and not self._problems.is_unread(f"{section.path}.name")
            self.are_all_known &= is_known
            if listener is None:
                continue
            if not has_name and any(listener.name == other.name for other in listeners):
                listener = listener._replace(name=f"{listener.protocol}-{listener.addresses[0]}")
            _check_against_others(section, listener, listeners)
            listeners.append(listener)
        exposed = [listener for listener in listeners if not listener.is_local]
        led_to = {route.listener for listener in exposed for route in listener.routes}
        return tuple(
            _with_shares(listener._replace(is_led_to=listener.name in led_to))
            for listener in listeners
        )

    def _listener(self, section: MapReader) -> ListenerConfig | None:
        protocol = section.choice("protocol", tuple(PROTOCOLS), "sps")
        for key in filter(section.has, UNUSED_KEYS.get(protocol, ())):
            section.add_error(key, f"has no meaning for the protocol {protocol}")
        presence = _Presence(section.has("target"), section.has("clients"))
        given = frozenset(filter(section.has, socket_files.SOCKET_KEYS))
        upstream = section.take("upstream")
        listener = ListenerConfig(
            protocol=protocol,
            addresses=self._addresses(section),
            network=section.values("network", parse_network) or PROTOCOLS[protocol],
            name=section.text("name"),
            announce=read_announcements(section, self._problems),
            stun=read_servers(section),
            port_mapping=section.choice("port_mapping", PORT_MAPPINGS, "off"),
            auth=self._auth(section, protocol),
            clients=read_clients(section),
            target=section.read("target", parse_target, None),
            routes=self._routes(section, protocol),
            allow_open=section.flag("allow_open", False),
            upstream=self._upstreams.read(upstream, f"{section.path}.upstream")
            if upstream
            else None,
            udp=self._udp(section.mapping("udp"), protocol),
            limits=read_limits(section),
            tls=read_tls(section.mapping("tls")),
            proxy_protocol=section.values("proxy_protocol", IpNetwork.parse),
            send_proxy=section.choice("send_proxy", PROXY_HEADERS, ""),
            bind=read_bind(section),
            sniff=read_sniff(section, protocol),
            socket_file=socket_files.read_socket_file(section),
            place=Place(section.place_of("listen")),
        )
        if not listener.addresses:
            return None
        listener = socket_files.with_socket_file(section, listener, given)
        _check_protocol(section, listener, presence)
        check_announcements(section, listener)
        excluded_alone = listener.clients.allow.excluded and not listener.clients.allow.networks
        if not presence.has_clients or excluded_alone:
            _check_open(section, listener)
        return _with_name(listener)

    def _addresses(self, section: MapReader) -> tuple[Address, ...]:
        if not section.has("listen"):
            section.add_error("listen", "is missing")
        return section.read("listen", socket_files.parse_listen_or_path, ())

    def _routes(self, section: MapReader, protocol: str) -> tuple[SniRouteConfig, ...]:
        if protocol != "sni" and not section.has("routes"):
            return ()
        from netproxy.config.sections.listener.routes import read_routes  # late: few have them

        return read_routes(section, protocol, self._upstreams)

    def _auth(self, section: MapReader, protocol: str) -> str:
        default = "required" if self._has_users and protocol not in WITHOUT_LOGIN else "none"
        auth = section.choice("auth", ("required", "optional", "none"), default)
        if auth != "none" and not self._has_users:
            section.add_error("auth", "there are no users: add users, users_file or auth")
        return auth

    def _udp(self, section: MapReader, protocol: str) -> UdpConfig:
        # The UDP port of a fixed target has no login: only the target may send to its clients.
        defaults = UdpConfig(filtering=FILTERS[1] if protocol == "udp" else FILTERS[0])
        if section.has("relay_port") and protocol not in WITH_ASSOCIATE:
            message = f"has no meaning for the protocol {protocol}: it has no UDP ASSOCIATE"
            section.add_error("relay_port", message)
        udp = UdpConfig(
            section.read("relay_port", parse_relay_port, defaults.relay_port),
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


def _check_against_others(
    section: MapReader, listener: ListenerConfig, others: list[ListenerConfig]
) -> None:
    """Report names and sockets that are taken."""
    if listener.name in (TUNNEL_AGENT, TUNNEL_DIRECT):
        message = f"'{listener.name}' is reserved for what comes or goes by a tunnel"
        section.add_error("name", message)
    for other in others:
        if listener.name == other.name:
            section.add_error("name", f"'{listener.name}' is the name of another listener")
        for network, address in sorted(_sockets(listener) & _sockets(other)):
            message = f"{network} {address} is already used by listener '{other.name}'"
            section.add_error("listen", message)


def _check_open(section: MapReader, listener: ListenerConfig) -> None:
    """Hazard 80: a proxy that anybody may use is found, and abused, within hours."""
    outside = [address for address in listener.addresses if not is_loopback(address.host)]
    if not outside or listener.auth == "required" or listener.protocol in CLOSED:
        return
    if listener.allow_open:
        section.warn("listen", f"{outside[0]} lets everybody in{_name_hint(outside[0])}")
    else:
        section.add_error(
            "listen",
            f"{outside[0]} would let everybody in{_name_hint(outside[0])}: "
            "set auth, clients, or allow_open: true",
        )


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
    if isinstance(listener.target, UnixAddress):
        _check_unix_target(section, listener)
    if listener.send_proxy and protocol != "tcp":
        section.add_error("send_proxy", f"has no meaning for the protocol {protocol}")
    if "tcp" not in network and (listener.tls or listener.proxy_protocol):
        key = "tls" if listener.tls else "proxy_protocol"
        section.add_error(key, "needs the network tcp", given=("network",))
    if protocol == "tunnel" and not listener.tls:
        message = "is missing (for a bridge without TLS write tunnel.bridge.listen: tcp://...)"
        section.add_error("tls", message)
    if protocol == "tproxy" and listener.bind is not None and listener.bind.incoming:
        section.add_error("bind", "incoming: its clients connect to the addresses of their targets")
    if listener.auth != "none" and protocol in WITHOUT_LOGIN:
        message = f"the protocol {protocol} has no login: set clients, or auth: none"
        section.add_error("auth", message)
    if network == ("udp",) and protocol not in ("udp", "dns", "tproxy"):
        message = f"the UDP of the protocol {protocol} needs its TCP connections: add tcp"
        section.add_error("network", message)


def _check_unix_target(section: MapReader, listener: ListenerConfig) -> None:
    """Report keys that do not fit a target that is a UNIX socket."""
    if listener.protocol == "udp":
        section.add_error("target", "a UNIX socket takes no datagrams of clients (protocol: tcp)")
    for key, value in (("upstream", listener.upstream), ("bind", listener.bind)):
        if value is not None:
            section.add_error(key, "has no meaning: this machine itself connects to a UNIX socket")


def _name_hint(address: Address) -> str:
    """Return what a name to listen on stands for, "" for an address."""
    if isinstance(address, ActivationAddress) or pack_ip(address.host) is not None:
        return ""
    return " (a name is looked up at the start, and counts as an address for other machines)"


def _with_name(listener: ListenerConfig) -> ListenerConfig:
    """Return the listener with a name."""
    address = listener.addresses[0]
    place = address.name if isinstance(address, ActivationAddress) else str(address.port)
    if isinstance(address, UnixAddress):
        place = address.path.rpartition("/")[2]
    return listener._replace(name=listener.name or f"{listener.protocol}-{place}")


def _with_shares(listener: ListenerConfig) -> ListenerConfig:
    """Return the listener with limits for each client.

    All clients of a listener on loopback share one address: there the limit is the total.  The
    connections that a route leads there count where they were accepted.
    """
    udp, limits = listener.udp, listener.limits
    has_local_sockets = listener._replace(is_led_to=False).is_local
    sessions = udp.max_sessions if listener.is_local else SESSIONS_PER_CLIENT
    connections = limits.connections if has_local_sockets else CONNECTIONS_PER_CLIENT
    return listener._replace(
        udp=udp._replace(max_sessions_per_client=udp.max_sessions_per_client or sessions),
        limits=limits._replace(connections_per_client=limits.connections_per_client or connections),
    )


def _sockets(listener: ListenerConfig) -> set[tuple[str, Address]]:
    """Return the networks and addresses that a listener binds, except addresses with port 0."""
    return {
        (network, address)
        for address in listener.addresses
        for network in listener.bound_networks
        if address.port or isinstance(address, (ActivationAddress, UnixAddress))
    }
