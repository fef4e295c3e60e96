"""The configuration as the program knows it: frozen, complete, checked.

Every default stands here and nowhere else; times are seconds.  read.py makes
these from what the user wrote.  Passwords are left out of every repr.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork

# NamedTuples, because the dataclasses module costs 1.3 MiB: a tenth of what an idle daemon has.


class UdpConfig(NamedTuple):
    relay_port: str = "shared"  # shared | any | FIRST-LAST
    idle_timeout: float = 300.0  # RFC 4787 REQ-5 recommends five minutes and forbids less than two
    mapping: str = "endpoint-independent"  # or symmetric
    filtering: str = "endpoint-independent"  # or address-dependent, address-and-port-dependent
    max_sessions: int = 4096
    max_sessions_per_client: int | None = (
        None  # None: 64, or max_sessions where all clients are this machine
    )


class TlsConfig(NamedTuple):
    certificate: str  # a PEM file, its chain with it
    key: str = ""  # a PEM file; none: in the certificate's
    client_ca: str = ""  # clients must show a certificate of its; none: they need not
    place: str = ""


class LimitsConfig(NamedTuple):
    connections: int = 1024
    connections_per_client: int | None = (
        None  # None: 256, or connections where all clients are this machine
    )


class AnnounceConfig(NamedTuple):
    address: Address  # port 0: the port that listens
    clients: tuple[IpNetwork, ...] = ()  # none: everybody


class UpstreamTlsConfig(NamedTuple):
    ca: str = ""  # a PEM file of authorities in place of the system's
    certificate: str = ""  # a PEM file to show, its chain with it
    key: str = ""  # a PEM file; none: in the certificate's
    server_name: str = ""  # what its certificate is for; none: the host
    insecure: bool = False  # whoever answers is believed


class HopConfig(NamedTuple):
    scheme: str  # direct | block | socks4 | socks4a | socks5 | socks5h | http | https | socks5+tls | tunnel ...
    server: Address = Address("", 0)  # of a tunnel: its agent's name
    user: str = ""
    password: str = ""
    udp: str = "auto"  # auto: as the scheme has it | uot | none
    timeout: float | None = (
        None  # for its handshake, and to connect to a first hop; None: timeouts.connect
    )
    bind: str = ""  # the address or the interface that a first hop is reached from
    mark: int = 0  # SO_MARK of what goes to a first hop
    keepalive: float | None = None  # seconds, 0 for none; None: the default
    tls: UpstreamTlsConfig = UpstreamTlsConfig()

    def __repr__(self) -> str:
        return f"HopConfig({self.scheme!r}, {self.server!r}, {self.user!r})"

    @property
    def url(self) -> str:
        """Without secrets."""
        if self.scheme == "tunnel":
            return f"tunnel://{self.server.host}"
        return f"{self.scheme}://{self.server}" if self.server.host else self.scheme

    @property
    def has_tls(self) -> bool:
        return self.scheme == "https" or self.scheme.endswith("+tls")


class HealthConfig(NamedTuple):
    target: Address | None = (
        None  # reached through each member; None: the member's own server, without a handshake
    )
    path: str = ""  # asked for there by HTTP: its answer must be 2xx or 3xx
    interval: float = 30.0
    timeout: float = 5.0


class MemberConfig(NamedTuple):
    upstream: UpstreamConfig
    weight: int = 1


class GroupConfig(NamedTuple):
    name: str
    members: tuple[MemberConfig, ...]
    balance: str = "round-robin"
    health: HealthConfig | None = None  # None: members are only judged by what is dialled


class UpstreamConfig(NamedTuple):
    """A way out: hops and groups, the first one first."""

    steps: tuple[HopConfig | GroupConfig, ...] = (HopConfig("direct"),)
    name: str = ""  # in `upstreams`

    @property
    def text(self) -> str:
        """In the order it is gone, without secrets."""
        return " -> ".join(_step_text(step) for step in self.steps)

    @property
    def hops(self) -> Iterator[HopConfig]:
        """All of them, those of groups' members too."""
        for step in self.steps:
            if isinstance(step, HopConfig):
                yield step
            else:
                for member in step.members:
                    yield from member.upstream.hops


def _step_text(step: HopConfig | GroupConfig) -> str:
    if isinstance(step, GroupConfig):
        members = ", ".join(member.upstream.name or member.upstream.text for member in step.members)
        return f"{step.balance} of ({members})"
    return step.url


class ListenerConfig(NamedTuple):
    protocol: str  # sps | socks5 | http | tcp | udp | dns | tunnel
    addresses: tuple[Address, ...]
    name: str
    network: tuple[str, ...] = ("tcp", "udp")
    announce: tuple[AnnounceConfig, ...] = ()
    auth: str = "none"  # required | optional | none
    clients: tuple[IpNetwork, ...] | None = None  # None: everybody
    target: Address | None = None  # tcp, udp: where everything goes
    upstream: UpstreamConfig | None = None  # None: the default way out
    udp: UdpConfig = UdpConfig()
    limits: LimitsConfig = LimitsConfig()
    tls: TlsConfig | None = None
    proxy_protocol: tuple[IpNetwork, ...] = ()  # peers that must begin with a PROXY header


class ConditionsConfig(NamedTuple):
    """Of a rule: each that is given must hold, for any of its values.  As they were written (router.patterns)."""

    domain: tuple[str, ...] = ()
    domain_file: tuple[str, ...] = ()  # either of the two is enough
    ip: tuple[str, ...] = ()
    ip_file: tuple[str, ...] = ()  # either of the three is enough
    geoip: tuple[str, ...] = ()
    port: tuple[str, ...] = ()
    network: tuple[str, ...] = ()  # tcp, udp
    client: tuple[IpNetwork, ...] = ()
    user: tuple[str, ...] = ()
    listener: tuple[str, ...] = ()


class RuleConfig(NamedTuple):
    conditions: ConditionsConfig
    but_not: ConditionsConfig  # none of these may hold
    via: UpstreamConfig | None  # None: auto
    upstream: UpstreamConfig | None  # of auto
    text: str = ""  # for people
    place: str = ""


class AutoConfig(NamedTuple):
    deadline: float = 2.0  # for the direct way, before the upstream is asked
    remember: float = 21600.0  # how long a verdict holds: blocks last for days, outages for minutes
    entries: int = 4096
    direct: tuple[str, ...] = ()  # domains and networks that are always, or never, reached directly
    upstream: tuple[str, ...] = ()
    place: str = ""


class DestinationsConfig(NamedTuple):
    deny: (
        tuple[str, ...] | None
    )  # None: what is usual; names of access.destinations.RANGES, or networks
    allow: tuple[str, ...]
    place: str = ""


class NameServerConfig(NamedTuple):
    scheme: str  # udp | tcp | tls | https
    server: Address
    path: str = ""  # of https
    upstream: UpstreamConfig | None = None  # None: directly
    tls: UpstreamTlsConfig = UpstreamTlsConfig()
    place: str = ""


class DnsRuleConfig(NamedTuple):
    domain: tuple[str, ...]
    domain_file: tuple[str, ...]
    servers: tuple[NameServerConfig, ...]  # none: there are no such names
    place: str = ""


class DnsConfig(NamedTuple):
    servers: tuple[NameServerConfig, ...] = ()  # none: the system is asked
    rules: tuple[DnsRuleConfig, ...] = ()
    cache: int = 4096  # names, and answers of a dns listener
    prefer: str = ""  # ipv4 | ipv6 | "" for the order of the answers
    hosts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    place: str = ""


class TimeoutsConfig(NamedTuple):
    handshake: float = 10.0
    connect: float = 10.0
    tcp_idle: float = 7440.0  # RFC 5382 REQ-5: not under 2 hours 4 minutes
    half_close: float = 300.0
    drain: float = 30.0


class LogConfig(NamedTuple):
    level: str = "info"  # debug | info | warning | error
    format: str = "text"  # text | json
    access: bool = True


class UserConfig(NamedTuple):
    password: str  # a scrypt hash, or plain text
    sessions: int | None = None  # UDP sessions at once, None: no limit of the user's own
    place: str = ""  # where the file says so, for an error

    def __repr__(self) -> str:
        return f"UserConfig(sessions={self.sessions!r})"


class PortConfig(NamedTuple):
    """Ports of a bridge that an agent may have."""

    network: str
    host: str  # that they are bound on
    first: int
    last: int


class BridgeAgentConfig(NamedTuple):
    token: str
    ports: tuple[PortConfig, ...] = ()

    def __repr__(self) -> str:
        return f"BridgeAgentConfig({self.ports!r})"


class BridgeConfig(NamedTuple):
    agents: dict[str, BridgeAgentConfig]


class ServiceConfig(NamedTuple):
    network: str
    port: int  # of the bridge
    target: Address  # in the agent's network
    proxy_protocol: bool = False  # whether the target is told by a PROXY header who comes


class AgentConfig(NamedTuple):
    bridge: Address
    name: str
    token: str
    tls: UpstreamTlsConfig | None  # None: without TLS
    upstream: UpstreamConfig  # by which the bridge is reached
    exit: bool = False  # whether the bridge may have anything dialled
    services: tuple[ServiceConfig, ...] = ()

    def __repr__(self) -> str:
        return f"AgentConfig({self.bridge!r}, {self.name!r})"


class TunnelConfig(NamedTuple):
    bridge: BridgeConfig | None = None
    agent: AgentConfig | None = None


class MetricsConfig(NamedTuple):
    address: Address | None = None  # of the listener for figures, None for none
    token: str = ""  # what its readers must show, "" for nothing
    page: bool = False  # whether there is a status page

    def __repr__(self) -> str:
        return f"MetricsConfig({self.address!r}, page={self.page!r})"


class Config(NamedTuple):
    listeners: tuple[ListenerConfig, ...]
    upstreams: dict[str, UpstreamConfig] = {}
    default: UpstreamConfig = UpstreamConfig()
    rules: tuple[RuleConfig, ...] = ()
    auto: AutoConfig = AutoConfig()
    geoip_database: str = ""  # a file in MaxMind's format
    dns: DnsConfig = DnsConfig()
    destinations: DestinationsConfig | None = None  # None: what is usual for each listener
    users: dict[str, UserConfig] = {}
    batching: str = "auto"  # auto | mmsg | trains | single: see net.datagram
    splice: bool = True  # whether TCP may go from socket to socket within the kernel
    timeouts: TimeoutsConfig = TimeoutsConfig()
    log: LogConfig = LogConfig()
    tunnel: TunnelConfig = TunnelConfig()
    control: str = ""  # the path of the control socket, "" for none
    metrics: MetricsConfig = MetricsConfig()
    warnings: tuple[str, ...] = ()  # what is allowed but should be said
