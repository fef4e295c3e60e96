"""What the bridge knows of direct paths: clients, their pairs with agents, and their flows.

Thread: DirectOffers (bridge.py) guards all of it with its lock.
"""

from __future__ import annotations


from netproxy.protocol import socks5
from netproxy.protocol.tunnels import direct
from netproxy.protocol.tunnels.direct import DirectFlow
from netproxy.tunnel.direct.attempts import Attempts
from netproxy.tunnel.path.bridge import new_number
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import RelayedSession, WishingStream
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.path.path import Path
    from netproxy.tunnel.control.session import AgentSession


class RelayedFlow:
    """A flow that the bridge relays, and whose datagrams may go directly."""

    __slots__ = ("session", "stream", "pair", "relayed", "number")

    def __init__(
        self, session: RelayedSession, stream: WishingStream, pair: Pair, relayed: PathFlow
    ) -> None:
        self.session = session
        self.stream = stream
        self.pair = pair
        self.relayed = relayed
        """By which the agent knows it."""
        self.number = 0
        """Of the pair; 0 until both sides are told."""

    def tell(self, number: int) -> None:
        """Tell both sides that the flow may go directly; the agent first, as the client begins."""
        self.number, pair = number, self.pair
        target = socks5.encode_address(self.session.flow.target)
        known_as = pair.path.number, self.relayed.number
        to_agent = DirectFlow(pair.number, number, *known_as, target)
        pair.control.send(direct.encode_flow(to_agent))
        self.stream.tell(direct.encode_flow(DirectFlow(pair.number, number)))

    def end(self) -> None:
        """Tell both sides that the flow is relayed from now on."""
        if self.number:
            message = direct.encode_end(self.pair.number, self.number)
            self.pair.control.send(message)
            self.stream.tell(message)


class Pair:
    """A client and an agent."""

    __slots__ = (
        *("number", "client", "agent", "path", "control", "attempts", "rtt", "flows_begun"),
        "is_offered",
    )

    def __init__(self, client: ClientSide, agent: AgentSession, path: Path) -> None:
        """`path`: from the bridge to the agent."""
        self.number = new_number()
        self.client = client
        self.agent = agent
        self.path = path
        self.control = agent.control
        """The connection that the agent was told by; what it has told may be lost with it."""
        self.attempts = Attempts()
        self.rtt = 0.0
        """Seconds between client and agent, as the agent says; 0 if not known."""
        self.flows_begun = 0
        """The number of the newest flow."""
        self.is_offered = False
        """True once both sides know the pair."""

    def flows(self) -> list[RelayedFlow]:
        """Return the flows between the two."""
        flows = self.client.streams.values()
        return [flow for flow in flows if flow is not None and flow.pair is self]


class ClientSide:
    """A client that wishes direct paths, as the bridge knows it."""

    __slots__ = ("key", "name", "path", "streams", "pairs", "used")

    def __init__(self, key: tuple[str, bytes], name: str) -> None:
        self.key = key
        self.name = name
        self.path: Path | None = None
        """From the bridge to the client."""
        self.streams: dict[WishingStream, RelayedFlow | None] = {}
        """With the flows that may go directly; None: the stream is relayed alone."""
        self.pairs: dict[AgentSession, Pair] = {}
        self.used = 0.0
        """Monotonic seconds at which it last had a stream."""

    def send(self, data: bytes) -> None:
        """Send a message by any stream of the client."""
        stream = next((stream for stream in self.streams if not stream.closed), None)
        if stream is not None:
            stream.tell(data)
