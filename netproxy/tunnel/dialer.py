"""Dials through a connected agent: to one of its services or, if it is an exit, to any target.

An opened work connection becomes the stream itself.  Names are resolved by the agent.  Any
thread; dials block.
"""

from __future__ import annotations

import time

from netproxy.errors import (
    DeadlineError,
    DialError,
    NetProxyError,
    ProtocolError,
    Reason,
    StreamError,
)
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.flows import FlowCounter
from netproxy.net.frames.framed import FramedConn
from netproxy.net.stream import complete
from netproxy.protocol import tunnel
from netproxy.protocol.http.capsule import Capsules
from netproxy.protocol.tunnel import OpenRequest
from netproxy.protocol.tunnels.datagrams import AddressedDatagrams
from netproxy.tunnel.streams.reusable_stream import ReusableStream
from netproxy.tunnel.control.session import NO_EXIT, NOT_CONNECTED, tunnel_failure
from netproxy.tunnel.streams.work_stream import WorkStream
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Framing
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Counter
    from netproxy.protocol.tunnel import BridgePort, TunnelMessage
    from netproxy.tunnel.control.sessions import AgentSessions

TRIES = 3
"""Work connections to try: one may close just as it is opened, and nothing was sent on it yet."""


class TunnelDialer:
    """A Dialer (interfaces.routing) through an agent."""

    refusal = Reason.UNSUPPORTED
    resolves_names = True
    knows_bound = False

    def __init__(
        self,
        agent: str,
        sessions: AgentSessions,
        seconds: float,
        counter: Counter,
        service: BridgePort | None = None,
    ) -> None:
        """Dial through the agent of this name, within `seconds`.

        All flows go to `service`, whatever their target; None: to their targets, by an exit.
        """
        self.name = f"tunnel://{agent}"
        self.symmetric = service is not None
        self.carries = frozenset({"tcp", "udp"} if service is None else {service.network})
        self._agent = agent
        self._sessions = sessions
        self._seconds = seconds
        self._counter = counter
        self._service = service

    def fixed_for(self, flow: Flow) -> TunnelDialer:
        """Return the dialer itself: no group is involved."""
        return self

    def dial(self, flow: Flow) -> Stream:
        """Connect to the service or to the flow's target.  Blocks.  Raises DialError."""
        return self.open(OpenRequest("tcp", flow.client, self._service or flow.target))

    def dial_packet(self, flow: Flow) -> FramedConn:
        """Open a packet connection.  Blocks.  Raises DialError."""
        request = OpenRequest("udp", flow.client, self._service or UNSPECIFIED_ADDRESS)
        stream = self.open(request, offers_flow=True)
        framing: Framing = AddressedDatagrams()
        if self._service is not None:
            framing = Capsules(flow.target)
        conn = FramedConn(stream, framing, FlowCounter(self._counter, flow))
        if isinstance(stream, WorkStream) and stream.flow is not None:
            conn.send_beside(stream.flow)
        return conn

    def open(self, request: OpenRequest, offers_flow: bool = False) -> Stream:
        """Return a stream that the agent has accepted.  Blocks.  Raises DialError.

        `offers_flow`: its datagrams may go by the path that the agent has.
        """
        session, elsewhere = self._sessions.get(self._agent), self._sessions.elsewhere
        if session is None:
            if elsewhere is not None and elsewhere.is_elsewhere(self._agent):
                return elsewhere.open(self._agent, request, self._seconds)
            said = NOT_CONNECTED.format(self._agent)
            raise self._failure(Reason.HOST_UNREACHABLE, said)
        if not isinstance(request.target, tunnel.BridgePort) and not session.is_exit:
            raise self._failure(Reason.DENIED, NO_EXIT.format(self._agent))
        deadline = time.monotonic() + self._seconds
        failure: NetProxyError | None = None
        for _ in range(TRIES):
            work = session.take(max(0.0, deadline - time.monotonic()))
            try:
                return self._ask(work, request, deadline, offers_flow)
            except DialError:
                # The agent has refused, and the connection is idle again or closed.
                raise
            except DeadlineError as error:
                work.close()
                raise self._failure(Reason.TIMEOUT, "the agent did not answer in time") from error
            except (StreamError, ProtocolError) as error:
                work.close()
                failure = error
            except BaseException:
                work.close()
                raise
        raise self._failure(Reason.GENERAL, f"the work connection failed: {failure}") from failure

    def _ask(
        self, work: WorkStream, request: OpenRequest, deadline: float, offers_flow: bool
    ) -> Stream:
        """Send the request, read the answer and return the stream that begins behind it.

        Raises DialError if the agent refuses.
        """
        work.datagrams = request.network == "udp"
        is_reusable = not work.datagrams and work.is_reusable
        work.limit(max(0.0, deadline - time.monotonic()))
        kind = tunnel.OPEN_REUSABLE if is_reusable else tunnel.OPEN
        before = work.offer_flow(self._service is None) if offers_flow else b""
        work.write(before + tunnel.encode_open(request, kind))
        answer = _read_answer(work)
        work.limit(None)
        is_accepted = answer.kind == tunnel.ACCEPT
        work.settle_flow(tunnel.parse_accept(answer.value) if is_accepted else 0)
        if answer.kind == tunnel.REFUSE:
            reason = tunnel.parse_refuse(answer.value)
            work.release(is_reusable)
            raise DialError(reason, str(request.target), hop=self.name)
        return ReusableStream(work, work.release) if is_reusable else work

    def _failure(self, reason: Reason, said: str) -> DialError:
        return tunnel_failure(self._agent, reason, said)


def _read_answer(stream: Stream) -> TunnelMessage:
    """Read ACCEPT or REFUSE; messages of unknown types before it are skipped."""
    while True:
        message = complete(tunnel.read_message(stream))
        if message.kind in (tunnel.ACCEPT, tunnel.REFUSE):
            return message
