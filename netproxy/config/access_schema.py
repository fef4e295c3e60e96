"""The schema of users, limits and destinations: who may use a listener, how much, and for what.

schema.py has everything else and explains the form.  None means that there is no limit.
"""

from __future__ import annotations

from netproxy.config.routing_schema import UpstreamConfig
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import Bind
from netproxy.typed import NamedTuple


class NetworkList(NamedTuple):
    """Networks and exclusions; the longest prefix decides.  Without networks: all others."""

    networks: tuple[IpNetwork, ...] = ()
    excluded: tuple[IpNetwork, ...] = ()


class ClientsConfig(NamedTuple):
    """The clients that may connect to a listener or to a port of an agent."""

    allow: NetworkList = NetworkList()
    """Empty for all."""
    deny: NetworkList = NetworkList()
    """Those of `allow` that may not connect."""


class SocketFileConfig(NamedTuple):
    """Who may connect to a UNIX socket."""

    mode: int = 0o660
    """The permissions of its file."""
    owner: int = -1
    """The user's number; -1: that of the daemon."""
    group: int = -1
    """The group's number; -1: that of the daemon."""


class LimitsConfig(NamedTuple):
    """What the clients of a listener may use at the same time, and how fast."""

    connections: int = 1024
    connections_per_client: int | None = None
    """None: 256, or connections if the listener is on loopback.  The reader fills it in."""
    connection_rate_per_client: float | None = None
    """New connections per second."""
    rate: int | None = None
    """Bytes per second in each direction, of all clients together."""
    rate_per_client: int | None = None
    """Bytes per second in each direction."""
    handshakes: int = 256
    """Unfinished handshakes of each address."""


class QuotaConfig(NamedTuple):
    """Bytes that a user may move, both directions together."""

    day: int | None = None
    """A day of the system's time zone."""
    month: int | None = None
    total: int | None = None


class UserLimitsConfig(NamedTuple):
    """What a user may use, on all listeners together."""

    connections: int | None = None
    """TCP connections at the same time."""
    sessions: int | None = None
    """UDP sessions at the same time."""
    connection_rate: float | None = None
    """New connections and UDP sessions per second."""
    rate_up: int | None = None
    """Bytes per second, client to target."""
    rate_down: int | None = None
    """Bytes per second, target to client."""
    burst: int | None = None
    """Bytes that may pass at once after a pause; None: those of a quarter of a second, but at
    least 64 KiB."""
    quota: QuotaConfig = QuotaConfig()


class UserConfig(NamedTuple):
    """A user who may log in."""

    password: str
    """A scrypt hash, or plain text."""
    limits: UserLimitsConfig = UserLimitsConfig()
    expires: str = ""
    """The last day on which the user may log in, "2027-01-31"; "" for no end."""
    upstream: UpstreamConfig | None = None
    """The upstream of flows that no rule decides; None: that of the listener, or the default."""
    place: str = ""
    bind: Bind | None = None
    """Where direct connections of the user leave from; None: the listener says."""

    def __repr__(self) -> str:
        return f"UserConfig(limits={self.limits!r}, expires={self.expires!r})"


class AuthConfig(NamedTuple):
    """A program or a service that checks the logins of users that are not in `users`."""

    command: tuple[str, ...] = ()
    """The program with its arguments; () for none."""
    url: str = ""
    """The service; "" for none."""
    timeout: float = 3.0
    """Seconds that a check may take."""
    cache: float = 60.0
    """Seconds that a positive answer is remembered; 0 for never."""
    cache_failures: float = 5.0
    """Seconds that a negative answer is remembered; 0 for never."""
    place: str = ""
    names_upstreams: bool = True
    """True if the upstream that an answer names counts; False with the option -u."""

    @property
    def is_set(self) -> bool:
        """True if there is a program or a service."""
        return bool(self.command or self.url)

    def __repr__(self) -> str:
        return f"AuthConfig({self.place!r})"


class PenaltyConfig(NamedTuple):
    """What failed logins of one client address lead to."""

    after: int = 5
    """Failures within a minute before the penalty begins."""
    duration: float = 10.0
    """Seconds of the first penalty (`for`); each further one is twice as long."""
    longest: float = 600.0
    """Seconds."""


class DestinationsConfig(NamedTuple):
    """The targets that clients may reach: names in access.destinations.RANGES, or networks."""

    deny: tuple[str, ...] | None
    """None: the default of each listener."""
    allow: tuple[str, ...]
    """Exceptions from deny."""
    place: str = ""
