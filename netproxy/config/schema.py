"""The configuration as the program knows it: frozen, complete and checked.

Every default stands here and in the other modules of the schema (access_schema.py, admin_schema.py,
routing_schema.py, tunnel_schema.py), and nowhere else; times are seconds.
read.py makes these objects from the file.  Passwords and tokens are left out of every repr.

The classes are NamedTuples: the dataclasses module costs 1.3 MiB, a tenth of an idle daemon.
`place` is "file:line:column", for errors that are found after the file was read.
"""

from __future__ import annotations

from netproxy.config.access_schema import AuthConfig as AuthConfig
from netproxy.config.access_schema import ClientsConfig as ClientsConfig
from netproxy.config.access_schema import DestinationsConfig as DestinationsConfig
from netproxy.config.access_schema import LimitsConfig as LimitsConfig
from netproxy.config.access_schema import NetworkList as NetworkList
from netproxy.config.access_schema import PenaltyConfig as PenaltyConfig
from netproxy.config.access_schema import QuotaConfig as QuotaConfig
from netproxy.config.access_schema import SocketFileConfig as SocketFileConfig
from netproxy.config.access_schema import UserConfig as UserConfig
from netproxy.config.access_schema import UserLimitsConfig as UserLimitsConfig
from netproxy.config.admin_schema import MetricsConfig as MetricsConfig
from netproxy.config.admin_schema import PacConfig as PacConfig
from netproxy.config.routing_schema import AutoConfig as AutoConfig
from netproxy.config.routing_schema import ConditionsConfig as ConditionsConfig
from netproxy.config.routing_schema import DnsConfig as DnsConfig
from netproxy.config.routing_schema import DnsRuleConfig as DnsRuleConfig
from netproxy.config.routing_schema import FakeConfig as FakeConfig
from netproxy.config.routing_schema import GroupConfig as GroupConfig
from netproxy.config.routing_schema import HealthConfig as HealthConfig
from netproxy.config.routing_schema import HopConfig as HopConfig
from netproxy.config.routing_schema import MemberConfig as MemberConfig
from netproxy.config.routing_schema import NameServerConfig as NameServerConfig
from netproxy.config.routing_schema import Place as Place
from netproxy.config.routing_schema import RuleConfig as RuleConfig
from netproxy.config.routing_schema import SERVER_FIRST_PORTS as SERVER_FIRST_PORTS
from netproxy.config.routing_schema import SniffConfig as SniffConfig
from netproxy.config.routing_schema import UpstreamConfig as UpstreamConfig
from netproxy.config.routing_schema import UpstreamTlsConfig as UpstreamTlsConfig
from netproxy.config.tunnel_schema import AgentConfig as AgentConfig
from netproxy.config.tunnel_schema import BridgeAgentConfig as BridgeAgentConfig
from netproxy.config.tunnel_schema import BridgeConfig as BridgeConfig
from netproxy.config.tunnel_schema import PortConfig as PortConfig
from netproxy.config.tunnel_schema import ServiceConfig as ServiceConfig
from netproxy.config.tunnel_schema import TunnelConfig as TunnelConfig
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.services import RemoteList
from netproxy.interfaces.networks import IpNetwork, is_loopback
from netproxy.interfaces.routing import Bind
from netproxy.interfaces.services import NO_ACCESS_FILE, AccessFileName
from netproxy.typed import NamedTuple

TRANSPARENT = ("redirect", "tproxy")
"""Protocols whose clients know of no proxy: rules of the kernel lead them here."""


class UdpConfig(NamedTuple):
    """UDP sessions of one listener."""

    relay_port: str = "shared"
    """ "shared" (the listener's port), "any" (a free port) or a range, "FIRST-LAST"."""
    idle_timeout: float = 300.0
    """Seconds.  RFC 4787 REQ-5 recommends 300 or more and requires at least 120."""
    mapping: str = "endpoint-independent"
    """RFC 4787 section 4.1: "endpoint-independent" or "symmetric"."""
    filtering: str = "endpoint-independent"
    """RFC 4787 section 5: also "address-dependent" or "address-and-port-dependent"."""
    max_sessions: int = 4096
    max_sessions_per_client: int | None = None
    """None: 64, or max_sessions if the listener is on loopback.  The reader fills it in."""


class TlsConfig(NamedTuple):
    """TLS of a listener.  Paths name PEM files."""

    certificate: str
    """The server's certificate, with its chain."""
    key: str = ""
    """The private key; "" if it is in the certificate's file."""
    client_ca: str = ""
    """Clients must present a certificate of one of these authorities; "" if they need not."""
    place: Place = Place()


class AnnounceConfig(NamedTuple):
    """The address that some clients are told in SOCKS5 replies."""

    address: Address
    """Port 0: the port that really listens, or that was found.  Without a host for the address of
    an interface, and for the public one."""
    clients: tuple[IpNetwork, ...] = ()
    """The clients that are told it; () for all."""
    interface: str = ""
    """Has the address; "" for a configured or the public one."""

    @property
    def is_found(self) -> bool:
        """True if the address is found while the daemon runs."""
        return not self.address.host

    @property
    def is_auto(self) -> bool:
        """True if it is the public address."""
        return self.is_found and not self.interface


class SniRouteConfig(NamedTuple):
    """Where an sni listener leads the connections that match.

    Every condition that is given must hold, for any of its values.  Patterns are as written:
    router.patterns parses them.
    """

    sni: tuple[str, ...] = ()
    """Patterns of the name in a TLS ClientHello."""
    alpn: tuple[str, ...] = ()
    """Application protocols that a TLS ClientHello offers."""
    host: tuple[str, ...] = ()
    """Patterns of the host in the first HTTP request."""
    protocol: tuple[str, ...] = ()
    """What the first byte tells: values of handler.sps.ClientProtocol."""
    target: Address | None = None
    """None if `listener` is given."""
    via: UpstreamConfig | None = None
    """None: the rules decide, or the upstream of the sni listener."""
    send_proxy: str = ""
    """The PROXY header that the target gets, "v1" or "v2"; "" for none."""
    listener: str = ""
    """The name of the listener whose handler serves the connections; "" if `target` is given."""
    path: str = ""
    """The route in the file: "listeners[0].routes[2]"."""
    place: Place = Place()
    listener_place: Place = Place()
    """Where `listener` is written."""

    @property
    def protocols(self) -> tuple[str, ...]:
        """What clients may speak, as all conditions say; () for anything."""
        if self.sni or self.alpn:
            return ("tls",)
        return ("http",) if self.host else self.protocol


class ListenerConfig(NamedTuple):
    """Where clients connect, and what they may do there."""

    protocol: str
    """One of netproxy.config.sections.listeners.PROTOCOLS."""
    addresses: tuple[Address, ...]
    name: str
    network: tuple[str, ...] = ("tcp", "udp")
    announce: tuple[AnnounceConfig, ...] = ()
    stun: tuple[Address, ...] = ()
    """The servers that are asked for the public address of `announce: auto`."""
    port_mapping: str = "off"
    """How the router is asked to map the ports: "pcp", "nat-pmp" or "off"."""
    auth: str = "none"
    """ "required", "optional" or "none"."""
    clients: ClientsConfig = ClientsConfig()
    target: Address | None = None
    """Where all traffic goes; only for the protocols tcp and udp."""
    routes: tuple[SniRouteConfig, ...] = ()
    """Where connections go by their first bytes; only for the protocol sni."""
    is_led_to: bool = False
    """True if a route leads clients of other machines here."""
    allow_open: bool = False
    """True if everybody may use it, on purpose."""
    upstream: UpstreamConfig | None = None
    """None: Config.default."""
    udp: UdpConfig = UdpConfig()
    limits: LimitsConfig = LimitsConfig()
    tls: TlsConfig | None = None
    proxy_protocol: tuple[IpNetwork, ...] = ()
    """Peers whose connections must begin with a PROXY protocol header."""
    send_proxy: str = ""
    """The PROXY header that its target gets, "v1" or "v2"; "" for none.  Only for tcp."""
    bind: Bind | None = None
    """Where direct connections of its clients leave from; None: the system chooses."""
    sniff: SniffConfig = SniffConfig()
    socket_file: SocketFileConfig = SocketFileConfig()
    """Only for UNIX sockets."""
    place: Place = Place()

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach it, by its addresses and by routes.

        Other machines' packets are led to tproxy.
        """
        hosts = [address.host for address in self.addresses]
        elsewhere = self.is_led_to or self.protocol == "tproxy"
        return not elsewhere and all(map(is_loopback, hosts))

    @property
    def is_auto(self) -> bool:
        """True if it announces its public address to some clients."""
        return any(announce.is_auto for announce in self.announce)

    @property
    def announced_interfaces(self) -> tuple[str, ...]:
        """The interfaces whose addresses it announces, each once."""
        interfaces = (announce.interface for announce in self.announce)
        return tuple(dict.fromkeys(filter(None, interfaces)))

    @property
    def bound_networks(self) -> tuple[str, ...]:
        """The networks of its sockets: the datagrams of http come within its connections."""
        return ("tcp",) if self.protocol == "http" else self.network

    @property
    def accepts(self) -> str:
        """The networks for people: "tcp+connect-udp" for http, which has no UDP port."""
        text = "+".join(self.network)
        return text.replace("udp", "connect-udp") if self.protocol == "http" else text


class TimeoutsConfig(NamedTuple):
    """Time limits in seconds."""

    handshake: float = 10.0
    """From a client's connection to its complete request."""
    connect: float = 10.0
    """To resolve and connect to a target or a first hop; again for the reply of each proxy."""
    tcp_idle: float = 7440.0
    """Without a byte in either direction.  RFC 5382 REQ-5 requires at least 2 hours 4 minutes."""
    half_close: float = 300.0
    """Without a byte, for a connection that has ended in one direction."""
    drain: float = 30.0
    """How long running connections may continue when the daemon stops."""


class LogConfig(NamedTuple):
    """What is logged, and how."""

    level: str = "info"
    """ "debug", "info", "warning" or "error"."""
    format: str = "text"
    """ "text" or "json"."""
    access: bool = True
    """True if every finished flow gets a record."""
    queue: int = 8192
    """Records that may wait for the reader of the log."""
    file: AccessFileName = NO_ACCESS_FILE
    """Where the records of finished flows go."""


class Config(NamedTuple):
    """A whole configuration."""

    listeners: tuple[ListenerConfig, ...]
    upstreams: dict[str, UpstreamConfig] = {}
    default: UpstreamConfig = UpstreamConfig()
    """The upstream of flows that neither a rule nor their listener decides."""
    rules: tuple[RuleConfig, ...] = ()
    auto: AutoConfig = AutoConfig()
    geoip_database: str = ""
    """The path of a database in MaxMind's format; "" for none."""
    geoip_place: Place = Place()
    """Where `geoip_database` is written."""
    dns: DnsConfig = DnsConfig()
    destinations: DestinationsConfig | None = None
    """None: the default of each listener."""
    users: dict[str, UserConfig] = {}
    auth: AuthConfig = AuthConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    end_on_removal: bool = False
    """True if what a user has open ends when a reload removes the user or the password."""
    state: str = ""
    """The folder of what is kept across restarts; "" for the service manager's, if there is one."""
    state_place: Place = Place()
    """Where `state` is written."""
    workers: int = 1
    """Processes that share the listeners."""
    batching: str = "auto"
    """ "auto", "mmsg", "trains" or "single": see net.datagram."""
    splice: bool = True
    """True if TCP bytes may pass from socket to socket within the kernel."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    lists: tuple[RemoteList, ...] = ()
    """The lists of rules that are fetched from elsewhere."""
    lists_folder: str = ""
    """Where copies of such lists are; "" for nowhere."""
    log: LogConfig = LogConfig()
    tunnel: TunnelConfig = TunnelConfig()
    control: str = ""
    """The path of the control socket; "" for none."""
    control_required: bool = True
    """False if the daemon serves without that socket if it cannot be bound."""
    metrics: MetricsConfig = MetricsConfig()
    pac: PacConfig = PacConfig()
    metrics_users: bool = False
    """True if metrics name users."""
    warnings: tuple[str, ...] = ()
    """What is allowed but should be reported, each with its place."""
