"""Flows: what a rule looks at, what a flow has carried, and who is told of it."""

from __future__ import annotations

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.services import Refusal
from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.errors import DialError
    from netproxy.interfaces.routing import Bind, Dialer
    from netproxy.interfaces.services import Counter

TUNNEL_AGENT = "tunnel-agent"
"""The listener name of flows that a bridge asks its agent for."""
TUNNEL_DIRECT = "tunnel-direct"
"""The listener name of what a direct path between client and agent sends."""
ANY_USER = "*"
"""In a rule: every user who has logged in."""
WEEK_MINUTES = 7 * 24 * 60
"""The minutes of a week, which `hours` in a rule are counted in, from Monday 00:00."""
COMMANDS = ("connect", "bind", "http", "udp")
"""What clients ask for, as rules name it: Flow.command, and "udp" for every flow of datagrams."""


class FlowSource(NamedTuple):
    """What a flow has of its user and its listener for the choice of its local address."""

    bind: Bind | None
    """The bind of the user, else that of the listener; None for none."""
    label: str
    """The name of that bind in errors: "users.alice.bind"."""
    incoming: str
    """The local address that the client connected to; "" if no bind asks for it."""


_LOCAL_ZONES = (".localhost", ".local", ".lan", ".internal", ".home.arpa")


def is_public(name: str) -> bool:
    """Return whether a name may be the same everywhere.

    The machines that a local name means to an upstream are not those that the client means, and
    `destinations` could not refuse them.
    """
    return "." in name and not name.endswith(_LOCAL_ZONES)


class SeenName(NamedTuple):
    """The name that a client wants, of a flow whose target is an address."""

    host: str
    """In its canonical text (protocol.host)."""
    seen_in: str
    """Where it was seen: "tls", "http" or "dns"."""
    leads: bool = False
    """True if an upstream that resolves names is asked for the name instead of the address."""


class FirstBytes(NamedTuple):
    """What the first bytes of a connection tell."""

    protocol: str
    """What the client speaks, by the first byte: a value of handler.sps.ClientProtocol."""
    name: str = ""
    """The server that it wants, by a ClientHello or an HTTP request, canonical; "" for none."""
    alpn: tuple[str, ...] = ()
    """The application protocols that it offers in a ClientHello."""


class PortRoutes(Protocol):
    """The conditions of the routes of an sni listener.  Thread: any; never blocks."""

    def choose(self, seen: FirstBytes) -> int | None:
        """Return the index of the first route that a connection matches, None if none does."""


class PortRoute(NamedTuple):
    """The route of an sni listener that led a client's connection to where its flows begin."""

    listener: str
    """The sni listener's name."""
    place: str
    """The route in the configuration: "listeners[0].routes[2]"."""
    name: str
    """The name in the client's first bytes; "" for none."""


class Flow(NamedTuple):
    """One connection or UDP session, client to target: everything that a rule may look at."""

    network: str
    """ "tcp" or "udp"."""
    client: Address
    target: Address
    listener: str
    """The listener's name; "" for NetProxy's own connections to a proxy."""
    user: str
    """The user who logged in; "" for none."""
    addresses: tuple[Address, ...] = ()
    """The addresses of the target that the router found and allowed; () before a lookup."""
    stamp: object = None
    """Tells whether the login of `user` is still valid (access.permission).  Not for rules."""
    source: FlowSource | None = None
    """Where the flow is to leave from; None if no configured bind concerns it.  Not for rules."""
    seen: SeenName | None = None
    """The name that was seen for a target that is an address; None for none."""
    command: str = "connect"
    """What a TCP client asked for: "connect", "bind", or "http" for a request to be forwarded."""
    port_route: PortRoute | None = None
    """How the client came, if an sni listener accepted the connection; else None.  Not for
    rules."""

    def refusal(self, counter: str, reason: str, decided: object = "") -> Refusal:
        """Return the refusal of this flow, or of a datagram of it."""
        client = self.client.host
        return Refusal(
            counter, reason, self.listener, client, self.target, decided, self.network, self.user
        )

    def with_addresses(self, addresses: tuple[Address, ...]) -> Flow:
        """Return the flow with other addresses.  Cheaper than _replace(): all flows pass here."""
        network, client, target, listener, user, _, stamp, source, seen, command, route = self
        asked = network, client, target, listener, user
        return Flow(*asked, addresses, stamp, source, seen, command, route)

    def to_hop(self, server: Address, network: str = "tcp") -> Flow:
        """Return the flow that leads to another proxy.

        Rules, addresses, and the bind of the user or the listener no longer matter.
        """
        source = self.source and self.source._replace(bind=None)
        return Flow(network, self.client, server, "", self.user, source=source)


class FlowCounter:
    """Counts for the sockets of one flow: records of what they drop name its client.

    A Counter.  Sockets know neither clients nor listeners.
    """

    __slots__ = ("_counter", "_flow")

    def __init__(self, counter: Counter, flow: Flow) -> None:
        self._counter = counter
        self._flow = flow

    def count(self, name: str, reason: str, amount: int = 1) -> None:
        """Add `amount`."""
        self._counter.count(name, reason, amount)

    def refuse(self, refusal: Refusal, amount: int = 1) -> str:
        """Count refusals and write their record, with what the flow knows; return its id."""
        flow = self._flow
        known = flow.refusal(refusal.counter, refusal.reason, refusal.decided)
        return self._counter.refuse(known._replace(asked=refusal.asked or flow.target), amount)

    def refuse_unrecorded(self, name: str, reason: str, client: str, amount: int) -> bool:
        """Count refusals of the flow's client if they get no record now; see Counter."""
        return self._counter.refuse_unrecorded(name, reason, self._flow.client.host, amount)


class Traffic(NamedTuple):
    """Bytes and datagrams that a flow has carried so far."""

    sent: int
    """Bytes, client to target."""
    received: int
    """Bytes, target to client."""
    datagrams_sent: int = 0
    datagrams_received: int = 0


class Failure(NamedTuple):
    """Why a dial has failed, as far as it is remembered: a DialError without its traceback."""

    reason: str
    hop: str
    """The label of the proxy that failed or that reported the failure; "" for none."""
    tried: tuple[tuple[str, str], ...]
    """The addresses that were dialled, each with the failure there."""

    @classmethod
    def of(cls, error: DialError) -> Failure:
        """Return what is remembered of an error."""
        return cls(error.why, error.hop, error.tried)


class Record(NamedTuple):
    """One finished connection or UDP session, for the access log."""

    flow: Flow
    upstream: str
    """The dialer's name."""
    sent: int
    """Bytes, client to target."""
    received: int
    """Bytes, target to client; of forwarded HTTP, heads and framing included."""
    seconds: float
    ended: str
    """How the flow ended, in the words of a log line: "closed", "idle", "connection refused"."""
    datagrams_sent: int = 0
    datagrams_received: int = 0
    number: int = 0
    """The number of the LiveFlow; 0 if the flow never lived."""
    rule: str = ""
    """The rule of its route; "" if it was not routed."""
    member: str = ""
    """The member of a group that carried it, "" without a group."""
    decided: str = ""
    """What refused the flow, or which fault ended it; "" for every other end."""
    failure: Failure | None = None
    """Of a dial that failed."""
    id: str = ""
    """Of the incident that it tells of, assigned by the observer; "" for every other end."""


class LiveFlow(Protocol):
    """A connection or a UDP session that is running.  Thread: any."""

    flow: Flow
    number: int
    """Assigned by the observer when the flow begins."""
    dialer: Dialer
    started: float
    """Monotonic seconds."""

    def traffic(self) -> Traffic:
        """Return what the flow has carried so far."""

    def idle(self) -> float:
        """Return the seconds since a byte or a datagram came from the client or went to it."""

    def kill(self, ended: str = "killed") -> None:
        """End the flow soon; `ended` is what its record says."""


class Observer(Protocol):
    """Is told when flows begin and end.  Thread: any; must not block."""

    def began(self, live: LiveFlow, dialled: float | None = None) -> None:
        """Note a new flow; `dialled` is the seconds that its dial took, None without a dial."""

    def finished(self, record: Record) -> str:
        """Note the record of a flow that has ended or was refused.

        Return the id of its incident, "" if it has ended without a fault.
        """
