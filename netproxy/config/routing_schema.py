"""Where flows go: upstreams (hops, groups, chains), rules, names, first bytes.  See schema.py."""

from __future__ import annotations

from netproxy.interfaces.addresses import Address, UnixAddress
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import Bind
from netproxy.typed import Iterator, NamedTuple


class Place(str):
    """Where something is written: "file:line:column".

    All places are equal, so that what has only moved within its file is the same as before.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return 0


class UpstreamTlsConfig(NamedTuple):
    """TLS towards a server: a proxy, a bridge or a name server.  Paths name PEM files."""

    ca: str = ""
    """Certificates of authorities; "" for those of the system."""
    certificate: str = ""
    """The certificate to present, with its chain; "" for none."""
    key: str = ""
    """The private key; "" if it is in the certificate's file."""
    server_name: str = ""
    """The name that the server's certificate must have; "" for the host that is dialled."""
    insecure: bool = False
    """True if the server's certificate is not checked."""
    place: Place = Place()


class HopConfig(NamedTuple):
    """One step of a chain: a proxy, a tunnel agent, a program, or the schemes direct and block."""

    scheme: str
    """One of netproxy.config.url.HOP_SCHEMES, or "command"."""
    server: Address = Address("", 0)
    """The proxy; for a tunnel the agent's name, with the port of a service or with 0."""
    user: str = ""
    password: str = ""
    udp: str = "auto"
    """How it carries UDP: "auto" (as the scheme does), "connect-udp" (with a stream for each
    target), "uot" (UDP over TCP) or "none"."""
    timeout: float | None = None
    """Seconds for its handshake, and for the connection to a first hop; None: timeouts.connect."""
    bind: Bind | None = None
    """Where a first hop is dialled from; None: its user or its listener says, or the system."""
    mark: int = 0
    """SO_MARK of the sockets to a first hop; 0 for none."""
    keepalive: float | None = None
    """Seconds of silence before TCP keep-alive probes a first hop; 0: never; None: the default."""
    send_proxy: str = ""
    """The PROXY header that its connections begin with, "v1" or "v2"; "" for none."""
    tls: UpstreamTlsConfig = UpstreamTlsConfig()
    place: Place = Place()
    command: tuple[str, ...] = ()
    """The program and its arguments; only for the scheme "command"."""
    processes: int = 64
    """Programs that may run at once."""
    direct: bool = False
    """True if datagrams may go directly to an agent of the bridge that the proxy is."""

    def __repr__(self) -> str:
        return f"HopConfig({self.scheme!r}, {self.server!r}, {self.user!r})"

    @property
    def url(self) -> str:
        """The hop as a URL, without user and password."""
        if self.scheme == "command":
            return f"command:{self.command[0]}"
        if self.scheme == "tunnel":
            port = f"/{self.server.port}" if self.server.port else ""
            return f"tunnel://{self.server.host}{port}"
        return f"{self.scheme}://{self.server}" if self.server.host else self.scheme

    @property
    def has_server(self) -> bool:
        """True if this machine connects to a proxy."""
        return self.is_local or (self.server.port > 0 and self.scheme != "tunnel")

    @property
    def is_local(self) -> bool:
        """True if the proxy is reached through a UNIX socket of this machine."""
        return isinstance(self.server, UnixAddress)

    @property
    def has_tls(self) -> bool:
        """True if the scheme speaks to the proxy within TLS."""
        return self.scheme == "https" or self.scheme.endswith("+tls")


class HealthConfig(NamedTuple):
    """How the members of a group are checked."""

    target: Address | None = None
    """Dialled through each member; None: the member's own server is dialled, without handshake."""
    path: str = ""
    """Requested from the target over HTTP: the status must be 2xx or 3xx.  "" for no request."""
    interval: float = 30.0
    """Seconds between two checks of a member."""
    timeout: float = 5.0
    """Seconds that one check may take."""


class MemberConfig(NamedTuple):
    """One member of a group."""

    upstream: UpstreamConfig
    weight: int = 1
    """Its share of the flows, relative to the other members; only for the balance "weighted"."""


class GroupConfig(NamedTuple):
    """Several upstreams of which one serves each flow."""

    name: str
    """The name in `upstreams`, or the group's place in the file, such as "default[1]"."""
    members: tuple[MemberConfig, ...]
    balance: str = "round-robin"
    """One of netproxy.config.sections.upstreams.BALANCES."""
    health: HealthConfig | None = None
    """None: members are judged only by the dials of flows."""


class UpstreamConfig(NamedTuple):
    """A configured path out of the daemon: hops and groups, the first hop first."""

    steps: tuple[HopConfig | GroupConfig, ...] = (HopConfig("direct"),)
    name: str = ""
    """The name in `upstreams`; "" if it is written elsewhere."""

    @property
    def text(self) -> str:
        """The steps in their order, without secrets: "socks5://a:1 -> http://b:2"."""
        return " -> ".join(_step_text(step) for step in self.steps)

    @property
    def hops(self) -> Iterator[HopConfig]:
        """Yield all hops, including those of the members of groups."""
        for step in self.steps:
            if isinstance(step, HopConfig):
                yield step
            else:
                for member in step.members:
                    yield from member.upstream.hops


class ConditionsConfig(NamedTuple):
    """Conditions of a rule, as written: router.patterns parses them.

    Every condition that is given must hold, for any of its values.  domain and domain_file are
    one condition, and so are ip, ip_file and geoip.
    """

    domain: tuple[str, ...] = ()
    domain_file: tuple[str, ...] = ()
    ip: tuple[str, ...] = ()
    ip_file: tuple[str, ...] = ()
    geoip: tuple[str, ...] = ()
    """Country codes of two capital letters."""
    port: tuple[str, ...] = ()
    network: tuple[str, ...] = ()
    """ "tcp", "udp"."""
    client: tuple[IpNetwork, ...] = ()
    user: tuple[str, ...] = ()
    listener: tuple[str, ...] = ()
    hours: tuple[tuple[range, ...], ...] = ()
    """Minutes of the week, as config.hours.parse_hours() returns them."""
    sni: tuple[str, ...] = ()
    """Patterns of the name in a TLS ClientHello, which a listener with `sniff` looks at."""
    command: tuple[str, ...] = ()
    """Some of interfaces.flows.COMMANDS."""


class RuleConfig(NamedTuple):
    """Which upstream the flows that match take."""

    conditions: ConditionsConfig
    but_not: ConditionsConfig
    """The rule matches only if none of these conditions holds."""
    via: UpstreamConfig | None
    """None for `via: auto`."""
    upstream: UpstreamConfig | None
    """The upstream of `via: auto`; else None."""
    text: str = ""
    """The rule in one line, for people."""
    place: str = ""


class AutoConfig(NamedTuple):
    """`via: auto`: direct if that works, else through the rule's upstream."""

    deadline: float = 2.0
    """Seconds that the direct connection may take before the upstream is dialled."""
    remember: float = 21600.0
    """Seconds that a verdict holds: blocks last for days, outages for minutes."""
    entries: int = 4096
    """Verdicts that are remembered."""
    direct: tuple[str, ...] = ()
    """Domains and networks that are always dialled directly."""
    upstream: tuple[str, ...] = ()
    """Domains and networks that are never dialled directly."""
    place: str = ""


SERVER_FIRST_PORTS = tuple(range(port, port + 1) for port in (21, 22, 23, 25, 110, 143, 587, 3306))
"""FTP, SSH, TELNET, SMTP, POP3, IMAP, submission and MySQL: their servers speak first."""


class SniffConfig(NamedTuple):
    """What a listener looks for in the first bytes of its connections."""

    kinds: tuple[str, ...] = ()
    """ "tls" and "http"; () for nothing."""
    skipped: tuple[range, ...] = SERVER_FIRST_PORTS
    """Ports of targets at whose connections nothing is looked for."""
    by_name: bool = False
    """True if the name that was found is dialled in place of the address."""


def _step_text(step: HopConfig | GroupConfig) -> str:
    if isinstance(step, GroupConfig):
        members = ", ".join(member.upstream.name or member.upstream.text for member in step.members)
        return f"{step.balance} of ({members})"
    return step.url


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


class FakeConfig(NamedTuple):
    """The fake addresses that dns listeners answer."""

    networks: tuple[IpNetwork, ...] = ()
    """At most one of each family; () for no fake addresses."""
    domain: tuple[str, ...] = ()
    """Patterns of the names that have them; () for all public names."""
    exceptions: tuple[str, ...] = ()
    """Patterns of names that have none."""
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
    remember: bool = False
    """True if dns listeners remember which client was told which address for which name."""
    fake: FakeConfig = FakeConfig()
    place: str = ""
