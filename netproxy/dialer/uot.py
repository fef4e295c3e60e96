"""UDP over TCP (UoT version 2) through a proxy whose far end understands it.

A connection to a name that exists nowhere tells the far end that frames of datagrams follow.
One stream carries all targets of a client.
"""

from __future__ import annotations

from netproxy.dialer.hop import ProxyDialer
from netproxy.errors import DialError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import FlowCounter
from netproxy.net.frames.framed import FramedConn
from netproxy.protocol import uot
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer
    from netproxy.interfaces.services import Counter

PORT = 443
"""The port beside the name.  It has no meaning; rules of proxies usually permit it."""
_UNKNOWN_NAME = frozenset(
    {
        Reason.NAME,
        Reason.HOST_UNREACHABLE,
        Reason.NETWORK_UNREACHABLE,
        Reason.REFUSED,
        Reason.GENERAL,
    }
)
"""What a proxy without UoT reports: it has looked the name up or tried to connect to it."""


class UotDialer(ProxyDialer):
    """A dialer that adds datagrams to a dialer through a proxy."""

    def __init__(self, plain: ProxyDialer, carrier: ProxyDialer, counter: Counter) -> None:
        """`plain` dials TCP.  `carrier` has the same hop, but leaves every name to the proxy."""
        super().__init__(plain.hop)
        self.carries = plain.carries | {"udp"}
        self.resolves_names = plain.resolves_names
        self._plain = plain
        self._carrier = carrier
        self._counter = counter

    def with_via(self, via: Dialer) -> UotDialer:
        """Return a dialer like this one that reaches its proxy through `via`."""
        return UotDialer(self._plain.with_via(via), self._carrier.with_via(via), self._counter)

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target without UoT.  Raises DialError."""
        return self._plain.dial(flow)

    def dial_packet(self, flow: Flow) -> FramedConn:
        """Open a stream for all datagrams of a client.  Raises DialError."""
        stream = self._open(flow)
        try:
            stream.write(uot.encode_request(uot.UotRequest(False, flow.target)))
            return FramedConn(stream, uot.Frames(), FlowCounter(self._counter, flow))
        except StreamError as error:
            stream.close()
            raise DialError(Reason.GENERAL, self.name, str(error)) from error

    def _open(self, flow: Flow) -> Stream:
        try:
            return self._carrier.dial(flow.to_hop(Address(uot.MAGIC, PORT)))
        except DialError as error:
            if error.upstream or error.reason not in _UNKNOWN_NAME:
                raise
            said = f"UDP over TCP is not supported ({error.said or error.why})"
            raise DialError(error.reason, said=said, hop=error.hop) from error
