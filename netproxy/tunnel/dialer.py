"""The way out through a connected agent: to its services, or, where it is an exit, to whatever it can reach."""

from __future__ import annotations

import time

from netproxy.errors import DeadlineError, DialError, ProtocolError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Counter
from netproxy.net.framed import FramedConn
from netproxy.net.stream import Stream
from netproxy.protocol import tunnel
from netproxy.protocol.capsule import Capsules
from netproxy.protocol.tunnel import AddressedDatagrams, Message, Opening, Service
from netproxy.tunnel.sessions import AgentSession, AgentSessions, WorkStream

TRIES = 3  # work connections that were closed just as they were to be used: nothing was sent on them yet
UNSPECIFIED_ADDRESS = Address("0.0.0.0", 0)


class TunnelDialer:
    carries = frozenset({"tcp", "udp"})
    refusal = Reason.UNSUPPORTED
    resolves_names = True  # they are resolved in the agent's network

    def __init__(
        self,
        agent: str,
        sessions: AgentSessions,
        seconds: float,
        counter: Counter,
        service: Service | None = None,
    ) -> None:
        """`seconds` for an opening; `service`: all flows go to this one, whatever their target."""
        self.name = f"tunnel://{agent}"
        self.symmetric = service is not None
        self._agent = agent
        self._sessions = sessions
        self._seconds = seconds
        self._counter = counter
        self._service = service

    def fixed_for(self, flow: Flow) -> TunnelDialer:
        return self

    def dial(self, flow: Flow) -> Stream:
        return self._open(Opening("tcp", flow.client, self._service or flow.target))

    def dial_packet(self, flow: Flow) -> FramedConn:
        stream = self._open(Opening("udp", flow.client, self._service or UNSPECIFIED_ADDRESS))
        framing = Capsules(flow.target) if self._service else AddressedDatagrams()
        return FramedConn(stream, framing, self._counter)

    def _open(self, opening: Opening) -> WorkStream:
        """An accepted work connection; DialError, as the agent has it or because there is none."""
        link = self._sessions.get(self._agent)
        try:
            if link is None:
                raise _at_fault(Reason.HOST_UNREACHABLE, f"agent '{self._agent}' is not connected")
            if self._service is None and not link.leads_out:
                raise _at_fault(Reason.DENIED, f"agent '{self._agent}' is no exit")
            return self._open_by(link, opening)
        except DialError as error:
            raise error.at_hop(self.name) from error

    def _open_by(self, link: AgentSession, opening: Opening) -> WorkStream:
        deadline = time.monotonic() + self._seconds
        for tries_left in reversed(range(TRIES)):
            stream = link.take(max(0.0, deadline - time.monotonic()))
            stream.datagrams = opening.network == "udp"
            stream.limit(max(0.0, deadline - time.monotonic()))
            try:
                stream.write(tunnel.encode_open(opening))
                answer = _answer(stream)
                if answer.kind == tunnel.REFUSE:
                    raise DialError(tunnel.parse_refuse(answer.value), str(opening.target))
                stream.limit(None)
                return stream
            except BaseException as error:
                stream.close()
                if isinstance(error, DeadlineError):
                    raise _at_fault(Reason.TIMEOUT, "the agent has not answered") from error
                if not isinstance(error, (StreamError, ProtocolError)):
                    raise
                if not tries_left:
                    raise _at_fault(
                        Reason.GENERAL, f"the work connection failed: {error}"
                    ) from error
        raise AssertionError("not reached")


def _answer(stream: Stream) -> Message:
    """ACCEPT or REFUSE; what else comes before it is nothing that we know."""
    while True:
        message = tunnel.read_message(stream)
        if message.kind in (tunnel.ACCEPT, tunnel.REFUSE):
            return message


def _at_fault(reason: Reason, said: str) -> DialError:
    """The tunnel's failure, and not the target's: where there is another way, it is to be tried."""
    return DialError(reason, said=said, upstream=True)
