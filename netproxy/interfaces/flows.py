"""Flows: what a rule looks at, what a flow has carried, and who is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.services import Refusal

if TYPE_CHECKING:
    from netproxy.interfaces.routing import Bind, Dialer

TUNNEL_AGENT = "tunnel-agent"
"""The listener name of flows that a bridge asks its agent for."""


class FlowSource(NamedTuple):
    """What a flow has of its user and its listener for the choice of its local address."""

    bind: Bind | None
    """The bind of the user, else that of the listener; None for none."""
    label: str
    """The name of that bind in errors: "users.alice.bind"."""
    incoming: str
    """The local address that the client connected to; "" if no bind asks for it."""


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

    def refusal(self, counter: str, reason: str, decided: object = "") -> Refusal:
        """Return the refusal of this flow, or of a datagram of it."""
        client = self.client.host
        return Refusal(
            counter, reason, self.listener, client, self.target, decided, self.network, self.user
        )

    def to_hop(self, server: Address, network: str = "tcp") -> Flow:
        """Return the flow that leads to another proxy.

        Rules, addresses, and the bind of the user or the listener no longer matter.
        """
        source = self.source and self.source._replace(bind=None)
        return Flow(network, self.client, server, "", self.user, source=source)


class Traffic(NamedTuple):
    """Bytes and datagrams that a flow has carried so far."""

    sent: int
    """Bytes, client to target."""
    received: int
    """Bytes, target to client."""
    datagrams_sent: int = 0
    datagrams_received: int = 0


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

    def finished(self, record: Record) -> None:
        """Note the record of a flow that has ended or was refused."""
