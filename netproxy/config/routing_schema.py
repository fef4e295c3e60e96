"""Where flows go, as configured: upstreams (hops, groups and chains of these) and rules.

A part of the schema, with every default.  upstreams.py, hops.py and rules.py make these objects;
other rooms import them from netproxy.config.schema.
"""

from typing import Iterator, NamedTuple

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import Bind


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
    """One step of a chain: a proxy, a tunnel agent, or the schemes direct and block."""

    scheme: str
    """One of netproxy.config.url.HOP_SCHEMES."""
    server: Address = Address("", 0)
    """The proxy; for a tunnel the host is the agent's name and the port is 0."""
    user: str = ""
    password: str = ""
    udp: str = "auto"
    """How it carries UDP: "auto" (as the scheme does), "uot" (UDP over TCP) or "none"."""
    timeout: float | None = None
    """Seconds for its handshake, and for the connection to a first hop; None: timeouts.connect."""
    bind: Bind | None = None
    """Where a first hop is dialled from; None: its user or its listener says, or the system."""
    mark: int = 0
    """SO_MARK of the sockets to a first hop; 0 for none."""
    keepalive: float | None = None
    """Seconds of silence before TCP keep-alive probes a first hop; 0: never; None: the default."""
    tls: UpstreamTlsConfig = UpstreamTlsConfig()
    place: Place = Place()

    def __repr__(self) -> str:
        return f"HopConfig({self.scheme!r}, {self.server!r}, {self.user!r})"

    @property
    def url(self) -> str:
        """The hop as a URL, without user and password."""
        if self.scheme == "tunnel":
            return f"tunnel://{self.server.host}"
        return f"{self.scheme}://{self.server}" if self.server.host else self.scheme

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

    upstream: "UpstreamConfig"
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


class DestinationsConfig(NamedTuple):
    """The targets that clients may reach: names in access.destinations.RANGES, or networks."""

    deny: tuple[str, ...] | None
    """None: the default of each listener."""
    allow: tuple[str, ...]
    """Exceptions from deny."""
    place: str = ""


def _step_text(step: HopConfig | GroupConfig) -> str:
    if isinstance(step, GroupConfig):
        members = ", ".join(member.upstream.name or member.upstream.text for member in step.members)
        return f"{step.balance} of ({members})"
    return step.url
