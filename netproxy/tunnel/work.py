"""Serves work connections on the agent: each waits to be opened, then dials and relays.

An idle work connection holds no thread.  The agent's offer is read anew for each request of the
bridge, so that a reload takes effect at once.  Any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Mapping, NamedTuple, Protocol

from netproxy.errors import DialError, Reason, StreamError
from netproxy.interfaces.connections import READABLE, Blocking, Wait
from netproxy.interfaces.flows import TUNNEL_AGENT, Flow
from netproxy.interfaces.services import Refusal
from netproxy.protocol import proxy_protocol, socks5, tunnel
from netproxy.protocol.capsule import Capsules
from netproxy.protocol.tunnel import BridgePort
from netproxy.protocol.tunnel_datagrams import AddressedDatagrams
from netproxy.tunnel.control import take_messages

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Stream
    from netproxy.interfaces.services import Counter
    from netproxy.net.framed import Framing
    from netproxy.protocol.tunnel import OpenRequest
    from netproxy.tunnel.pool import WorkPool

SPARE_SECONDS = 60.0
"""An idle connection beyond those that the pool keeps is closed after so long."""


class LocalService(NamedTuple):
    """A service of the agent."""

    target: Address
    proxy_protocol: bool = False
    """True if a PROXY header tells the service the client's address."""


class Offer(NamedTuple):
    """What an agent offers to its bridge."""

    services: Mapping[BridgePort, LocalService]
    is_exit: bool
    """True if the bridge may have anything dialled that the agent's rules permit."""


class DialledFlow(Protocol):
    """A connection to the target of a flow."""

    upstream: Stream

    def accept(self, client: Stream, reply: bytes) -> Wait | None:
        """Send the reply, then relay between `client` and the target until both have ended."""

    def finish(self, ended: str) -> None:
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
        self, stream: Stream, flow: Flow, framing: Framing, accepted: bytes
    ) -> Wait | None:
        """Send `accepted`, then relay datagrams to the flow's target.  Raises DialError."""

    def serve_all(
        self, stream: Stream, flow: Flow, framing: Framing, wrap: Callable[[Address], bytes]
    ) -> Wait | None:
        """Relay datagrams to any target; `wrap` encodes the source of a reply."""


class FlowRelays(NamedTuple):
    """What dials and relays the flows of work connections, TCP and UDP, with the same router."""

    tcp: FlowDialer
    udp: DatagramRelay


class WorkStarter(Protocol):
    """Runs work connections on the threads of the connection pool and the poller."""

    def begin(self, work: WorkConnection) -> None:
        """Drive work.handshake(), then what its Wait says, and at the end call work.end()."""


class _NotOffered(DialError):
    """The bridge asks for what this agent does not offer."""


class WorkServer:
    """Serves the work connections of an agent (pool.WorkHandler)."""

    def __init__(self, starter: WorkStarter, counter: Counter) -> None:
        """Begin with nothing to offer: configure() must come before the agent dials."""
        self.counter = counter
        self._starter = starter
        self.offer = Offer({}, False)
        self.to_services: FlowRelays
        self.to_targets: FlowRelays
        # The set's own calls are atomic.
        self._live: set[WorkConnection] = set()

    def configure(self, offer: Offer, to_services: FlowRelays, to_targets: FlowRelays) -> None:
        """Set the offer.

        `to_services` dials the agent's services, `to_targets` what the bridge asks an exit for.
        """
        self.offer, self.to_services, self.to_targets = offer, to_services, to_targets

    @property
    def live(self) -> int:
        """Work connections that were opened and have not ended."""
        return len(self._live)

    def abort(self) -> None:
        """Shut the opened work connections down."""
        for work in list(self._live):
            work.stream.shutdown()

    def serve(self, stream: Stream, pool: WorkPool) -> None:
        """Take an idle work connection over."""
        self._starter.begin(WorkConnection(self, stream, pool))

    def opened(self, work: WorkConnection) -> None:
        """Count a work connection in."""
        self._live.add(work)

    def ended(self, work: WorkConnection) -> None:
        """Count a work connection out, if it was opened."""
        self._live.discard(work)


class WorkConnection:
    """One work connection, from its handshake to its end."""

    __slots__ = ("stream", "_server", "_pool")

    def __init__(self, server: WorkServer, stream: Stream, pool: WorkPool) -> None:
        self._server = server
        self.stream = stream
        self._pool = pool

    def handshake(self) -> Handshake:
        """Serve the bridge's request, on a pool thread: it may dial."""
        wait: Wait | None = yield Blocking(self._run)
        return wait

    def _run(self) -> Wait | None:
        """Serve the bridge's request if it has arrived, else wait for it."""
        for message in take_messages(self.stream):
            if message.kind == tunnel.OPEN:
                self._server.opened(self)
                self._pool.opened(self.stream)
                return self._open(tunnel.parse_open(message.value))
        if self._pool.ended:
            return None
        return Wait(((self.stream.socket, READABLE),), SPARE_SECONDS, self._resume, idle=True)

    def end(self) -> None:
        """Close the connection."""
        self._pool.closed(self.stream)
        self._server.ended(self)
        self.stream.close()

    def _resume(self, ready: bool) -> Wait | None:
        keep = self.stream.read_ahead() if ready else not self._pool.release(self.stream)
        return self._run() if keep else None

    def _open(self, request: OpenRequest) -> Wait | None:
        try:
            if isinstance(request.target, BridgePort):
                return self._open_service(request, request.target)
            return self._open_target(request, request.target)
        except DialError as error:
            reason, counter = error.reason.value, self._server.counter
            if isinstance(error, _NotOffered):
                host, asked = request.client.host, request.target
                counter.refuse(
                    Refusal("tunnel_refused", reason, TUNNEL_AGENT, host, asked, error.decided)
                )
            else:
                # The flow has a record.
                counter.count("tunnel_refused", reason)
            self.stream.write(tunnel.encode_refuse(error.reason))
            return None

    def _open_target(self, request: OpenRequest, target: Address) -> Wait | None:
        if not self._server.offer.is_exit:
            raise _NotOffered(Reason.DENIED, "not an exit", decided="tunnel.agent.exit")
        relays = self._server.to_targets
        flow = Flow(request.network, request.client, target, TUNNEL_AGENT, "")
        if request.network == "tcp":
            return relays.tcp.open(flow).accept(self.stream, tunnel.encode_accept())
        relays.udp.permit(flow)
        self.stream.write(tunnel.encode_accept())
        return relays.udp.serve_all(self.stream, flow, AddressedDatagrams(), socks5.encode_address)

    def _open_service(self, request: OpenRequest, port: BridgePort) -> Wait | None:
        service = self._server.offer.services.get(port)
        if service is None or port.network != request.network:
            decided = "tunnel.agent.services"
            raise _NotOffered(Reason.DENIED, f"no service at port {port}", decided=decided)
        relays = self._server.to_services
        flow = Flow(request.network, request.client, service.target, TUNNEL_AGENT, "")
        if request.network == "udp":
            return relays.udp.serve_one(
                self.stream, flow, Capsules(service.target), tunnel.encode_accept()
            )
        dialled = relays.tcp.open(flow)
        if service.proxy_protocol:
            _send_proxy_header(dialled, request.client, service.target)
        return dialled.accept(self.stream, tunnel.encode_accept())


def _send_proxy_header(dialled: DialledFlow, client: Address, target: Address) -> None:
    """Tell a service the client's address.  Raises DialError."""
    upstream = dialled.upstream
    try:
        upstream.write(proxy_protocol.encode_v2(client, upstream.peer_address()))
    except StreamError as error:
        dialled.finish("reset")
        raise DialError(Reason.GENERAL, str(target), str(error)) from error
