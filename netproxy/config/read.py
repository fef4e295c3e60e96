"""From the raw tree to the schema: every key, its type, and what must fit together.

All that is wrong is found before anything is refused.  Nothing is bound,
resolved or written here.
"""

from __future__ import annotations

from typing import Any

from netproxy.config.node import MapReader, Node, Problems
from netproxy.config.schema import (
    AnnounceConfig,
    Config,
    LimitsConfig,
    ListenerConfig,
    LogConfig,
    MetricsConfig,
    TimeoutsConfig,
    TunnelConfig,
    UdpConfig,
    UserConfig,
    UpstreamConfig,
)
from netproxy.config.upstreams import Ways, read_tls
from netproxy.config.url import parse_announce, parse_host_port, parse_listen
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.interfaces.networks import IpNetwork, is_loopback

# and the networks each can serve; http's datagrams come within its connections
PROTOCOLS = {
    "sps": ("tcp", "udp"),
    "socks5": ("tcp", "udp"),
    "http": ("tcp", "udp"),
    "tcp": ("tcp",),
    "udp": ("udp",),
    "dns": ("tcp", "udp"),
    "tunnel": ("tcp",),
}
WITHOUT_LOGIN = ("tcp", "udp", "dns", "tunnel")  # agents of a tunnel have tokens
MEANINGLESS = {
    "dns": ("announce", "upstream", "udp"),
    "tunnel": ("announce", "upstream", "udp"),
}  # keys that a protocol has no use for
FILTERS = ("endpoint-independent", "address-dependent", "address-and-port-dependent")
SOCKET_PATH_LIMIT = 107  # bytes: what sockaddr_un holds, less its NUL
TOKEN_LEAST = 16  # characters: it can be guessed at without limit
UDP_IDLE_FLOOR = 120.0  # RFC 4787 REQ-5: a shorter one breaks clients, and is warned of


def read_config(root: Node, problems: Problems) -> Config:
    """The configuration in a tree.  Where `problems` has found any it must not be used."""
    return _Reading(problems).read(root)


def check(config: Config, problems: Problems) -> Config:
    """The same configuration, or all that was found as one ConfigError, a line each."""
    if problems.found:
        raise ConfigError("\n".join(map(str, problems.found)))
    return config


class _Reading:
    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._warnings: list[str] = []
        self._users: dict[str, UserConfig] = {}
        self._ways: Ways

    def read(self, root: Node) -> Config:
        top = MapReader(root, "", self._problems)
        self._users = self._read_users(top.mapping("users"))
        tunnels = self._tunnels(top) if top.has("tunnel") else None
        self._ways = Ways(
            top.mapping("upstreams").rest(),
            self._problems,
            self._warnings,
            tunnels.agents if tunnels else {},
        )
        upstreams = self._ways.read_all()
        default = top.take("default")
        listeners = self._read_listeners(top)
        if tunnels is None and any(one.protocol == "tunnel" for one in listeners):
            tunnels = self._tunnels(top)  # which says what is missing
        bridge = tunnels.listener(listeners) if tunnels else None
        config = Config(
            listeners=listeners + ((bridge,) if bridge else ()),
            upstreams=upstreams,
            tunnel=tunnels.read(self._ways) if tunnels else TunnelConfig(),
            default=self._ways.read(default, "default") if default else UpstreamConfig(),
            geoip_database=top.text("geoip_database"),
            users=self._users,
            timeouts=self._read_timeouts(top.mapping("timeouts")),
            log=self._read_log(top.mapping("log")),
            batching=self._read_batching(top.mapping("udp")),
            splice=self._read_splice(top.mapping("tcp")),
            control=top.read("control", _control, ""),
            metrics=self._read_metrics(top),
        )
        config = self._with_routing(top, self._with_names(top, config))
        top.finish()
        return config._replace(warnings=tuple(self._warnings))

    def _tunnels(self, top: MapReader) -> Any:
        """config.tunnels.Tunnels"""
        from netproxy.config.tunnels import Tunnels  # late: 0.1 MiB, and most have none

        return Tunnels(top.mapping("tunnel"), self._problems, self._warnings)

    def _with_routing(self, top: MapReader, config: Config) -> Config:
        """Rules, and what belongs to them."""
        if not any([top.has("rules"), top.has("auto"), top.has("destinations")]):
            return config
        from netproxy.config.rules import (
            read_auto,
            read_destinations,
            read_rules,
        )  # late: 0.1 MiB, and many have none

        names = frozenset((TUNNEL_AGENT, *(one.name for one in config.listeners)))
        rules = read_rules(top.items("rules"), self._ways, names, self._problems)
        auto = read_auto(top.mapping("auto")) if top.has("auto") else config.auto
        destinations = (
            read_destinations(top.mapping("destinations")) if top.has("destinations") else None
        )
        return config._replace(rules=rules, auto=auto, destinations=destinations)

    def _with_names(self, top: MapReader, config: Config) -> Config:
        asking = [one for one in config.listeners if one.protocol == "dns"]
        if not asking and not top.has("dns"):
            return config
        from netproxy.config.names import read_dns  # late, likewise

        return config._replace(dns=read_dns(top.mapping("dns"), self._ways, asking, self._warnings))

    # -- sections

    def _read_users(self, section: MapReader) -> dict[str, UserConfig]:
        users = {}
        for name, node in section.rest().items():
            user = MapReader(node, f"users.{name}", self._problems)
            password = user.text("password")
            if not 0 < len(name.encode()) < 256 or ":" in name:
                user.wrong("", "a user's name has 1 to 255 bytes and no ':'")
            if not password:
                user.wrong("password", "is missing or empty")
            elif not password.startswith("scrypt$"):
                self._warnings.append(
                    f"users.{name}.password is plain text: make a hash with 'netproxyctl hash-password'"
                )
            limits = user.mapping("limits")
            users[name] = UserConfig(password, limits.whole("sessions", 0) or None, node.place)
            limits.finish()
            user.finish()
        return users

    def _read_timeouts(self, section: MapReader) -> TimeoutsConfig:
        given = TimeoutsConfig()
        names = ("handshake", "connect", "tcp_idle", "half_close", "drain")
        values = {name: section.duration(name, getattr(given, name)) for name in names}
        section.finish()
        return TimeoutsConfig(**values)

    def _read_log(self, section: MapReader) -> LogConfig:
        log = LogConfig(
            section.choice("level", ("debug", "info", "warning", "error"), "info"),
            section.choice("format", ("text", "json"), "text"),
            section.flag("access", True),
        )
        section.finish()
        return log

    def _read_batching(self, section: MapReader) -> str:
        batching = section.choice("batching", ("auto", "mmsg", "trains", "single"), "auto")
        section.finish()
        return batching

    @staticmethod
    def _read_metrics(top: MapReader) -> MetricsConfig:
        address = top.read("metrics", _one_address, None)
        metrics = MetricsConfig(
            address, top.read("metrics_token", _token, ""), top.flag("status_page", False)
        )
        if metrics.page and not metrics.token:
            top.wrong(
                "status_page", "needs a metrics_token, for whoever sees it sees who talks to whom"
            )
        if (metrics.page or metrics.token) and address is None:
            top.wrong(
                "status_page" if metrics.page else "metrics_token",
                "is for the metrics listener, and there is none: set metrics",
            )
        if address is not None and not is_loopback(address.host) and not metrics.token:
            top.wrong(
                "metrics", f"{address} can be reached from other machines: set a metrics_token"
            )
        return metrics

    @staticmethod
    def _read_splice(section: MapReader) -> bool:
        splice = section.flag("splice", True)
        section.finish()
        return splice

    # -- listeners

    def _read_listeners(self, top: MapReader) -> tuple[ListenerConfig, ...]:
        listeners: list[ListenerConfig] = []
        for at, node in enumerate(top.items("listeners")):
            section = MapReader(node, f"listeners[{at}]", self._problems)
            named = section.has("name")
            listener = self._read_listener(section)
            section.finish()
            if listener is None:
                continue
            if not named and any(listener.name == other.name for other in listeners):
                listener = listener._replace(name=f"{listener.protocol}-{listener.addresses[0]}")
            if listener.name == TUNNEL_AGENT:
                section.wrong("name", f"'{TUNNEL_AGENT}' is what a tunnel's agent is asked for")
            for other in listeners:
                if listener.name == other.name:
                    section.wrong("name", f"'{listener.name}' is the name of another listener")
                shared = set(_sockets(listener)) & set(_sockets(other))
                for network, address in sorted(shared):
                    section.wrong(
                        "listen", f"{network} {address} is taken by listener '{other.name}'"
                    )
            listeners.append(listener)
        return tuple(listeners)

    def _read_listener(self, section: MapReader) -> ListenerConfig | None:
        protocol = section.choice("protocol", tuple(PROTOCOLS), "sps")
        for key in filter(section.has, MEANINGLESS.get(protocol, ())):
            section.wrong(key, f"means nothing to {protocol}")
        node = section.take("listen")
        way = section.take("upstream")
        restricted = section.has("clients")
        aimed = section.has("target")
        nobody = section.empty("clients")
        network = tuple(section.texts("network", _network)) or PROTOCOLS[protocol]
        listener = ListenerConfig(
            protocol=protocol,
            addresses=self._addresses(section, node),
            network=network,
            name=section.text("name"),
            announce=self._announcements(section),
            auth=self._auth(section, protocol),
            clients=tuple(section.texts("clients", IpNetwork.parse)) or None,
            target=section.read("target", parse_host_port, None),
            upstream=self._ways.read(way, f"{section.path}.upstream") if way else None,
            udp=self._read_udp(section.mapping("udp"), protocol),
            limits=self._read_limits(section.mapping("limits")),
            tls=read_tls(section.mapping("tls")),
            proxy_protocol=tuple(section.texts("proxy_protocol", IpNetwork.parse)),
        )
        allow_open = section.flag("allow_open", False)
        if not listener.addresses:
            return None
        if wrong := set(network) - set(PROTOCOLS[protocol]):
            section.wrong("network", f"{protocol} is not served on {', '.join(wrong)}")
        if aimed != (protocol in ("tcp", "udp")):
            section.wrong(
                "target", f"{protocol} has none: its clients name theirs" if aimed else "is missing"
            )
        if "tcp" not in network and (listener.tls or listener.proxy_protocol):
            section.wrong(
                "tls" if listener.tls else "proxy_protocol",
                "is for connections, and this listener has none",
            )
        if nobody:
            section.wrong("clients", "names no network")
        if protocol == "tunnel" and not listener.tls:
            section.wrong(
                "tls", "is missing; a bridge without TLS is said by tunnel.bridge.listen: tcp://..."
            )
        if listener.auth != "none" and protocol in WITHOUT_LOGIN:
            section.wrong("auth", f"{protocol} has no login: set clients, or auth: none")
        if network == ("udp",) and protocol not in ("udp", "dns"):
            section.wrong("network", f"datagrams of {protocol} need its TCP connections: add tcp")
        if not restricted:
            self._check_open(section, listener, allow_open)
        return self._completed(listener)

    def _addresses(self, section: MapReader, node: Node | None) -> tuple[Address, ...]:
        if node is None:
            section.wrong("listen", "is missing")
            return ()
        try:
            if isinstance(node.value, str):
                return parse_listen(node.value)
            raise ValueError("must be a single value")
        except ValueError as error:
            section.wrong("listen", str(error), node.place)
            return ()

    def _auth(self, section: MapReader, protocol: str) -> str:
        default = "required" if self._users and protocol not in WITHOUT_LOGIN else "none"
        auth = section.choice("auth", ("required", "optional", "none"), default)
        if auth != "none" and not self._users:
            section.wrong("auth", "there are no users")
        return auth

    def _announcements(self, section: MapReader) -> tuple[AnnounceConfig, ...]:
        found = []
        for at, node in enumerate(section.items("announce")):
            if isinstance(node.value, dict):
                inner = MapReader(node, f"{section.path}.announce[{at}]", self._problems)
                clients = tuple(inner.texts("clients", IpNetwork.parse))
                if not inner.has("address"):
                    section.wrong(f"announce[{at}]", "names no address", node.place)
                address = inner.read("address", parse_announce, None)
                inner.finish()
            else:
                clients, address = (
                    (),
                    MapReader(
                        Node({"announce": node}, node.place), section.path, self._problems
                    ).read("announce", parse_announce, None),
                )
            if address is not None:
                found.append(AnnounceConfig(address, clients))
        return tuple(found)

    def _read_udp(self, section: MapReader, protocol: str) -> UdpConfig:
        # nobody logs in to a fixed target's port: there only the target may answer
        given = UdpConfig(filtering=FILTERS[1] if protocol == "udp" else FILTERS[0])
        udp = UdpConfig(
            section.read("relay_port", _relay_port, given.relay_port),
            section.duration("idle_timeout", given.idle_timeout),
            section.choice("mapping", ("endpoint-independent", "symmetric"), given.mapping),
            section.choice("filtering", FILTERS, given.filtering),
            section.whole("max_sessions", given.max_sessions),
            section.whole("max_sessions_per_client", 0) or None,
        )
        section.finish()
        if udp.idle_timeout < UDP_IDLE_FLOOR:
            self._warnings.append(
                f"{section.path}.idle_timeout is under {UDP_IDLE_FLOOR:.0f}s, which RFC 4787 forbids"
            )
        return udp

    def _read_limits(self, section: MapReader) -> LimitsConfig:
        limits = LimitsConfig(
            section.whole("connections", LimitsConfig().connections),
            section.whole("connections_per_client", 0) or None,
        )
        section.finish()
        return limits

    def _check_open(self, section: MapReader, listener: ListenerConfig, allow_open: bool) -> None:
        """HAZARDS: a proxy that anybody may use is found within hours."""
        outside = [address for address in listener.addresses if not is_loopback(address.host)]
        if outside and listener.auth != "required" and listener.protocol != "tunnel":
            if allow_open:
                self._warnings.append(f"{section.path} on {outside[0]} lets everybody in")
            else:
                section.wrong(
                    "listen",
                    f"{outside[0]} would let everybody in: set auth, clients, or allow_open: true",
                )

    def _completed(self, listener: ListenerConfig) -> ListenerConfig:
        local = all(is_loopback(address.host) for address in listener.addresses)
        udp, limits = listener.udp, listener.limits
        return listener._replace(
            name=listener.name or f"{listener.protocol}-{_place_name(listener.addresses[0])}",
            udp=udp._replace(
                max_sessions_per_client=udp.max_sessions_per_client
                or (udp.max_sessions if local else 64)
            ),
            limits=limits._replace(
                connections_per_client=limits.connections_per_client
                or (limits.connections if local else 256)
            ),
        )


def _sockets(listener: ListenerConfig) -> list[tuple[str, Address]]:
    """What a listener binds, where it says so exactly."""
    networks = ("tcp",) if listener.protocol == "http" else listener.network
    return [
        (network, address)
        for address in listener.addresses
        for network in networks
        if address.port or isinstance(address, ActivationAddress)
    ]


def _place_name(address: Address) -> str:
    return address.name if isinstance(address, ActivationAddress) else str(address.port)


def _control(text: str) -> str:
    scheme, _, path = text.partition(":")
    if scheme != "unix" or not path.startswith("/") or len(path.encode()) > SOCKET_PATH_LIMIT:
        raise ValueError(f"'{text}' is no control socket: write unix:/run/netproxy/control.sock")
    return path


def _one_address(text: str) -> Address:
    addresses = parse_listen(text)
    if len(addresses) != 1 or isinstance(addresses[0], ActivationAddress):
        raise ValueError("must be a single port")
    return addresses[0]


def _token(text: str) -> str:
    if not (len(text) >= TOKEN_LEAST and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError(
            f"must have at least {TOKEN_LEAST} letters or digits: openssl rand -hex 16 makes one"
        )
    return text


def _network(text: str) -> str:
    if text not in ("tcp", "udp"):
        raise ValueError(f"'{text}' is neither tcp nor udp")
    return text


def _relay_port(text: str) -> str:
    if text in ("shared", "any"):
        return text
    first, _, last = text.partition("-")
    if first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536:
        return text
    raise ValueError(f"'{text}' is none of shared, any or FIRST-LAST")
