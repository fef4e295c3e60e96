"""The configuration as the program knows it: frozen, complete and checked.

Every default stands here and in the other modules of the schema (access_schema.py,
routing_schema.py, tunnel_schema.py), and nowhere else; times are seconds.
read.py makes these objects from the file.  Passwords and tokens are left out of every repr.

The classes are NamedTuples: the dataclasses module costs 1.3 MiB, a tenth of an idle daemon.
`place` is "file:line:column", for errors that are found after the file was read.
"""

from typing import NamedTuple

from netproxy.config.access_schema import AuthConfig as AuthConfig
from netproxy.config.access_schema import ClientsConfig as ClientsConfig
from netproxy.config.access_schema import LimitsConfig as LimitsConfig
from netproxy.config.access_schema import NetworkList as NetworkList
from netproxy.config.access_schema import PenaltyConfig as PenaltyConfig
from netproxy.config.access_schema import QuotaConfig as QuotaConfig
from netproxy.config.access_schema import UserConfig as UserConfig
from netproxy.config.access_schema import UserLimitsConfig as UserLimitsConfig
from netproxy.config.routing_schema import AutoConfig as AutoConfig
from netproxy.config.routing_schema import ConditionsConfig as ConditionsConfig
from netproxy.config.routing_schema import DestinationsConfig as DestinationsConfig
from netproxy.config.routing_schema import GroupConfig as GroupConfig
from netproxy.config.routing_schema import HealthConfig as HealthConfig
from netproxy.config.routing_schema import HopConfig as HopConfig
from netproxy.config.routing_schema import MemberConfig as MemberConfig
from netproxy.config.routing_schema import Place as Place
from netproxy.config.routing_schema import RuleConfig as RuleConfig
from netproxy.config.routing_schema import UpstreamConfig as UpstreamConfig
from netproxy.config.routing_schema import UpstreamTlsConfig as UpstreamTlsConfig
from netproxy.config.tunnel_schema import AgentConfig as AgentConfig
from netproxy.config.tunnel_schema import BridgeAgentConfig as BridgeAgentConfig
from netproxy.config.tunnel_schema import BridgeConfig as BridgeConfig
from netproxy.config.tunnel_schema import PortConfig as PortConfig
from netproxy.config.tunnel_schema import ServiceConfig as ServiceConfig
from netproxy.config.tunnel_schema import TunnelConfig as TunnelConfig
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import Bind


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
    """Port 0: the port that really listens."""
    clients: tuple[IpNetwork, ...] = ()
    """The clients that are told it; () for all."""


class ListenerConfig(NamedTuple):
    """Where clients connect, and what they may do there."""

    protocol: str
    """One of netproxy.config.sections.listeners.PROTOCOLS."""
    addresses: tuple[Address, ...]
    name: str
    network: tuple[str, ...] = ("tcp", "udp")
    announce: tuple[AnnounceConfig, ...] = ()
    auth: str = "none"
    """ "required", "optional" or "none"."""
    clients: ClientsConfig = ClientsConfig()
    target: Address | None = None
    """Where all traffic goes; only for the protocols tcp and udp."""
    upstream: UpstreamConfig | None = None
    """None: Config.default."""
    udp: UdpConfig = UdpConfig()
    limits: LimitsConfig = LimitsConfig()
    tls: TlsConfig | None = None
    proxy_protocol: tuple[IpNetwork, ...] = ()
    """Peers whose connections must begin with a PROXY protocol header."""
    bind: Bind | None = None
    """Where direct connections of its clients leave from; None: the system chooses."""
    place: Place = Place()

    @property
    def bound_networks(self) -> tuple[str, ...]:
        """The networks of its sockets: the datagrams of http come within its connections."""
        return ("tcp",) if self.protocol == "http" else self.network

    @property
    def accepts(self) -> str:
        """The networks for people: "tcp+connect-udp" for http, which has no UDP port."""
        text = "+".join(self.network)
        return text.replace("udp", "connect-udp") if self.protocol == "http" else text


class NameServerConfig(NamedTuple):
    """One DNS server."""

    scheme: str
    """ "udp", "tcp", "tls" (RFC 7858) or "https" (RFC 8484)."""
    server: Address
    path: str = ""
    """The path of the URL; only for https."""
    upstream: UpstreamConfig | None = None
    """None: the server is dialled directly."""
    tls: UpstreamTlsConfig = UpstreamTlsConfig()
    place: str = ""


class DnsRuleConfig(NamedTuple):
    """Names that are looked up at other servers, or blocked."""

    domain: tuple[str, ...]
    domain_file: tuple[str, ...]
    servers: tuple[NameServerConfig, ...]
    """() if the names are blocked."""
    place: str = ""


class DnsConfig(NamedTuple):
    """How names are looked up."""

    servers: tuple[NameServerConfig, ...] = ()
    """() for the system's resolver."""
    rules: tuple[DnsRuleConfig, ...] = ()
    cache: int = 4096
    """Names that are cached, and as many answers of each dns listener; 0 for none."""
    prefer: str = ""
    """The addresses that are tried first: "ipv4", "ipv6", or "" for the order of the answer."""
    hosts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Names with their addresses, sorted; a name without addresses does not exist."""
    serve_stale: float = 86400.0
    """Seconds that a cached answer may be used after its TTL if no server answers; 0 for never."""
    nat64: IpNetwork | None = None
    """The prefix of the network's NAT64."""
    find_nat64: bool = True
    """True if the prefix is looked up when an IPv4 target has no route."""
    place: str = ""


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


class MetricsConfig(NamedTuple):
    """The HTTP listener for metrics."""

    address: Address | None = None
    """None for no listener."""
    token: str = ""
    """What a request must present; "" for nothing."""
    page: bool = False
    """True if there is a status page."""
    place: Place = Place()

    def __repr__(self) -> str:
        return f"MetricsConfig({self.address!r}, page={self.page!r})"


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
    batching: str = "auto"
    """ "auto", "mmsg", "trains" or "single": see net.datagram."""
    splice: bool = True
    """True if TCP bytes may pass from socket to socket within the kernel."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    log: LogConfig = LogConfig()
    tunnel: TunnelConfig = TunnelConfig()
    control: str = ""
    """The path of the control socket; "" for none."""
    metrics: MetricsConfig = MetricsConfig()
    metrics_users: bool = False
    """True if metrics name users."""
    warnings: tuple[str, ...] = ()
    """What is allowed but should be reported, each with its place."""
