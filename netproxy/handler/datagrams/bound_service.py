"""The stream of a client that has all its targets behind one address of this proxy.

connect-udp with the extension of protocol.http.bound_udp.  The address is told in the answer and
stays: the client has one session, which is never idle, and the stream ends with it.  Each target
is permitted, routed and counted for itself, as in every other stream of datagrams.
"""

from __future__ import annotations

import select

from netproxy.errors import DialError, Reason
from netproxy.handler.announce import public_addresses
from netproxy.handler.datagrams.stream_service import StreamService
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.flows import FlowCounter
from netproxy.net.frames.answering import AnsweringSocket
from netproxy.protocol.http import bound_udp, connect_udp
from netproxy.protocol.http.contexts import BoundCapsules
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.handler.datagrams.stream_udp import StreamUdpRelay
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream, Wait
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Route


class BoundService(StreamService):
    """A stream whose client has asked for all targets."""

    __slots__ = ("_capsules",)

    def __init__(self, relay: StreamUdpRelay, stream: Stream, flow: Flow) -> None:
        """Take the socket out of the stream.  Raises StreamError."""
        first = None if flow.target == UNSPECIFIED_ADDRESS else flow.target
        self._capsules = BoundCapsules(first, True, self._admits, self._refuse)
        super().__init__(relay, stream, flow, self._capsules, bound_udp.encode_address)

    def open_now(self, route: Route, accepted: bytes) -> bytes:
        """Open the session; return the answer with its public addresses.

        Without addresses the stream is for the target of the request alone, and the answer is
        `accepted`.  Blocks.  Raises DialError.
        """
        table, client, target = self._relay.table, self._client, self._flow.target
        if target == UNSPECIFIED_ADDRESS:
            session = table.open_bound(client, route)
        else:
            key = self._socket, bound_udp.encode_address(target)
            session = table.open_now(key, client, route).session
        announcer, conn = self._relay.announcer, session.conn
        addresses = public_addresses(announcer, self._flow.client, self._stream, conn.bound)
        if not addresses:
            if target == UNSPECIFIED_ADDRESS:
                said = f"{route.dialer.name} does not tell which address targets see"
                raise DialError(Reason.UNSUPPORTED, said=said)
            self._capsules.disagree()
            return accepted
        if not table.keep_bound(client, self._socket.shutdown):
            raise DialError(Reason.GENERAL, said=session.ended)
        return connect_udp.encode_accept(bound_udp.accept_fields(addresses))

    def run(self) -> Wait | None:
        """Forward frames as every stream does, and send the answers that wait."""
        self._socket.flush()
        wait = super().run()
        if wait is None or not self._socket.waits:
            return wait
        watched = tuple((sock, events | select.POLLOUT) for sock, events in wait.watched)
        return wait._replace(watched=watched)

    def _make_socket(self, stream: Stream) -> AnsweringSocket:
        counter = FlowCounter(self._relay.counter, self._flow)
        return AnsweringSocket(stream, self._capsules, counter)

    def _admits(self, target: Address) -> bool:
        """Return whether a client may register a target; a refusal is counted and recorded."""
        flow = self._flow._replace(target=target)
        try:
            if self._relay.permission is not None:
                self._relay.permission.check(flow)
            self._relay.find_route(flow)
        except DialError:
            return False
        return True

    def _refuse(self, counter: str, reason: str) -> None:
        """Count and record a datagram that is dropped, or a registration that is refused."""
        relay, flow = self._relay, self._flow
        if not relay.counter.refuse_unrecorded(counter, reason, flow.client.host, 1):
            relay.counter.refuse(flow.refusal(counter, reason, connect_udp.BIND_FIELD.decode()))
