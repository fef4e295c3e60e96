"""What dials and relays the flows that a bridge asks its agent for, as this room needs it.

handler has the implementations.
"""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream, Wait
    from netproxy.interfaces.datagrams import Beside, Framing
    from netproxy.interfaces.flows import Flow


class DialledFlow(Protocol):
    """A connection to the target of a flow."""

    upstream: Stream

    def accept(self, client: Stream, reply: bytes) -> Wait | None:
        """Send the reply, then relay between `client` and the target until both have ended."""

    def finish(self, ended: str) -> str:
        """Close it and record how it ended."""


class FlowDialer(Protocol):
    """Routes and dials TCP flows."""

    def open(self, flow: Flow) -> DialledFlow:
        """Connect to the flow's target.  Blocks.  Raises DialError, which has been recorded."""


class DatagramRelay(Protocol):
    """Relays the datagrams that a stream carries."""

    def permit(self, flow: Flow) -> None:
        """Raise DialError if no datagram of the flow's client could be sent anywhere."""

    def serve_one(
        self,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        accepted: bytes,
        beside: Beside | None = None,
    ) -> Wait | None:
        """Send `accepted`, then relay datagrams to the flow's target.  Raises DialError."""

    def serve_all(
        self,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        wrap: Callable[[Address], bytes],
        beside: Beside | None = None,
    ) -> Wait | None:
        """Relay datagrams to any target; `wrap` encodes the source of a reply."""


class FlowRelays(NamedTuple):
    """What dials and relays the flows of work connections, TCP and UDP, with the same router."""

    tcp: FlowDialer
    udp: DatagramRelay
