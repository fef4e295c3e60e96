"""Dials through a connected agent: to one of its services or, if it is an exit, to any target.

An opened work connection becomes the stream itself.  Names are resolved by the agent.  Any
thread; dials block.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from netproxy.errors import (
    DeadlineError,
    DialError,
    NetProxyError,
    ProtocolError,
    Reason,
    StreamError,
)
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.net.framed import FramedConn
from netproxy.net.stream import complete
from netproxy.protocol import tunnel
from netproxy.protocol.capsule import Capsules
from netproxy.protocol.tunnel import OpenRequest
from netproxy.protocol.tunnel_datagrams import AddressedDatagrams
from netproxy.tunnel.sessions import tunnel_failure

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Counter
    from netproxy.net.framed import Framing
    from netproxy.protocol.tunnel import BridgePort, TunnelMessage
    from netproxy.tunnel.sessions import AgentSessions, WorkStream

TRIES = 3
"""Work connections to try: one may close just as it is opened, and nothing was sent on it yet."""


class TunnelDialer:
    """A Dialer (interfaces.routing) through an agent."""

    carries = frozenset({"tcp", "udp"})
    refusal = Reason.UNSUPPORTED
    resolves_names = True

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
        return self._open(OpenRequest("tcp", flow.client, self._service or flow.target))

    def dial_packet(self, flow: Flow) -> FramedConn:
        """Open a packet connection.  Blocks.  Raises DialError."""
        stream = self._open(OpenRequest("udp", flow.client, self._service or UNSPECIFIED_ADDRESS))
        framing: Framing = AddressedDatagrams()
        if self._service is not None:
            framing = Capsules(flow.target)
        return FramedConn(stream, framing, self._counter)

    def _open(self, request: OpenRequest) -> WorkStream:
        """Return a work connection that the agent has accepted."""
        session = self._sessions.get(self._agent)
        if session is None:
            raise self._failure(Reason.HOST_UNREACHABLE, f"agent '{self._agent}' is not connected")
        if self._service is None and not session.is_exit:
            raise self._failure(Reason.DENIED, f"agent '{self._agent}' is not an exit")
        deadline = time.monotonic() + self._seconds
        failure: NetProxyError | None = None
        for _ in range(TRIES):
            stream = session.take(max(0.0, deadline - time.monotonic()))
            try:
                self._ask(stream, request, deadline)
                return stream
            except DeadlineError as error:
                stream.close()
                raise self._failure(Reason.TIMEOUT, "the agent did not answer in time") from error
            except (StreamError, ProtocolError) as error:
                stream.close()
                failure = error
            except BaseException:
                stream.close()
                raise
        raise self._failure(Reason.GENERAL, f"the work connection failed: {failure}") from failure

    def _ask(self, stream: WorkStream, request: OpenRequest, deadline: float) -> None:
        """Send the request and read the answer.  Raises DialError if the agent refuses."""
        stream.datagrams = request.network == "udp"
        stream.limit(max(0.0, deadline - time.monotonic()))
        stream.write(tunnel.encode_open(request))
        answer = _read_answer(stream)
        if answer.kind == tunnel.REFUSE:
            reason = tunnel.parse_refuse(answer.value)
            raise DialError(reason, str(request.target), hop=self.name)
        stream.limit(None)

    def _failure(self, reason: Reason, said: str) -> DialError:
        return tunnel_failure(self._agent, reason, said)


def _read_answer(stream: Stream) -> TunnelMessage:
    """Read ACCEPT or REFUSE; messages of unknown types before it are skipped."""
    while True:
        message = complete(tunnel.read_message(stream))
        if message.kind in (tunnel.ACCEPT, tunnel.REFUSE):
            return message
