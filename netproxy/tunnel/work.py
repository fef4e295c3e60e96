"""Serves work connections on the agent: each waits to be opened, then dials and relays.

An idle work connection holds no thread.  The agent's offer is read anew for each request of the
bridge, so that a reload takes effect at once.  Any thread.
"""

from __future__ import annotations

from netproxy.errors import DialError, ProtocolError, Reason, StreamError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, UnixAddress
from netproxy.interfaces.connections import READABLE, Blocking, Wait
from netproxy.interfaces.flows import TUNNEL_AGENT, Flow
from netproxy.interfaces.services import Refusal
from netproxy.protocol import proxy_protocol, socks5, tunnel
from netproxy.protocol.http.capsule import Capsules
from netproxy.protocol.tunnel import BridgePort
from netproxy.protocol.tunnels.datagrams import AddressedDatagrams
from netproxy.protocol.tunnels.path import parse_flow
from netproxy.tunnel.streams.reusable_stream import ReusableStream
from netproxy.tunnel.control.connection import take_messages
from netproxy.typed import TYPE_CHECKING, Mapping, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Stream
    from netproxy.interfaces.services import Counter
    from netproxy.protocol.tunnel import OpenRequest
    from netproxy.protocol.tunnels.path import FlowOffer
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.streams.relays import DialledFlow, FlowRelays
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

    __slots__ = (
        "stream",
        "_server",
        "_pool",
        "_offered",
        "_flow",
        "_is_reusable",
        "_is_idle_again",
    )

    def __init__(self, server: WorkServer, stream: Stream, pool: WorkPool) -> None:
        self._server = server
        self.stream = stream
        self._pool = pool
        # What the bridge has offered to carry datagrams beside it.
        self._offered: FlowOffer | None = None
        self._flow: PathFlow | None = None
        # Whether the bridge has opened it so, and whether its stream has ended cleanly.
        self._is_reusable = self._is_idle_again = False

    def handshake(self) -> Handshake:
        """Wait for the bridge's request; serve it on a pool thread, as it may dial."""
        # No descriptor tells of a request that was deciphered with the end of the last stream.
        if not self.stream.read_ahead():
            return None
        if not self.stream.unread():
            return self._wait()
        wait: Wait | None = yield Blocking(self._run)
        return wait

    def _run(self) -> Wait | None:
        """Serve the bridge's request if it has arrived, else wait for it."""
        for message in take_messages(self.stream):
            if message.kind in (tunnel.OPEN, tunnel.OPEN_REUSABLE):
                self._server.opened(self)
                self._pool.opened(self.stream)
                self._is_reusable = message.kind == tunnel.OPEN_REUSABLE
                return self._open(tunnel.parse_open(message.value))
            if message.kind == tunnel.FLOW:
                self._offered = parse_flow(message.value)
        return self._wait()

    def _wait(self) -> Wait | None:
        if self._pool.ended:
            return None
        return Wait(((self.stream.socket, READABLE),), SPARE_SECONDS, self._resume, idle=True)

    def end(self) -> None:
        """Make the connection idle again after a stream that has ended cleanly, else close it."""
        self._server.ended(self)
        if self._flow is not None:
            self._flow.close()
        if self._is_idle_again and self._pool.take_back(self.stream):
            self._server.serve(self.stream, self._pool)
            return
        self._pool.closed(self.stream)
        self.stream.close()

    def _stream_ended(self, is_clean: bool) -> None:
        self._is_idle_again = is_clean
        if not is_clean:
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
            reason, counter = error.why, self._server.counter
            if isinstance(error, _NotOffered):
                host, asked = request.client.host, request.target
                counter.refuse(
                    Refusal("tunnel_refused", reason, TUNNEL_AGENT, host, asked, error.decided)
                )
            else:
                # The flow has a record.
                counter.count("tunnel_refused", reason)
            self.stream.write(tunnel.encode_refuse(error.reason))
            self._is_idle_again = self._is_reusable and not self.stream.unread()
            return None

    def _open_target(self, request: OpenRequest, target: Address) -> Wait | None:
        if not self._server.offer.is_exit:
            raise _NotOffered(Reason.DENIED, "not an exit", decided="tunnel.agent.exit")
        relays = self._server.to_targets
        flow = Flow(request.network, request.client, target, TUNNEL_AGENT, "")
        if request.network == "tcp":
            return self._accept(relays.tcp.open(flow))
        relays.udp.permit(flow)
        beside = self._take_flow(is_addressed=True)
        self.stream.write(self._accept_flow())
        return relays.udp.serve_all(
            self.stream, flow, AddressedDatagrams(), socks5.encode_address, beside
        )

    def _open_service(self, request: OpenRequest, port: BridgePort) -> Wait | None:
        service = self._server.offer.services.get(port)
        if service is None or port.network != request.network:
            decided = "tunnel.agent.services"
            raise _NotOffered(Reason.DENIED, f"no service at port {port}", decided=decided)
        relays = self._server.to_services
        flow = Flow(request.network, request.client, service.target, TUNNEL_AGENT, "")
        if request.network == "udp":
            beside = self._take_flow(is_addressed=False)
            framing, accepted = Capsules(service.target), self._accept_flow()
            return relays.udp.serve_one(self.stream, flow, framing, accepted, beside)
        dialled = relays.tcp.open(flow)
        if service.proxy_protocol:
            _send_proxy_header(dialled, request.client, service.target)
        return self._accept(dialled)

    def _take_flow(self, is_addressed: bool) -> PathFlow | None:
        """Return what carries datagrams beside the connection; None: the bridge has no path."""
        paths, offered = self._pool.paths, self._offered
        if paths is not None and offered is not None:
            self._flow = paths.flow(offered, is_addressed)
        return self._flow

    def _accept_flow(self) -> bytes:
        """Return the ACCEPT message that tells the bridge which flow was taken."""
        return tunnel.encode_accept(self._flow.number if self._flow is not None else 0)

    def _accept(self, dialled: DialledFlow) -> Wait | None:
        """Tell the bridge that the target is connected, and relay."""
        if not self._is_reusable:
            return dialled.accept(self.stream, tunnel.encode_accept())
        try:
            # It precedes the first chunk of the stream.
            self.stream.reply(tunnel.encode_accept())
            carried = ReusableStream(self.stream, self._stream_ended)
        except (ProtocolError, StreamError):
            dialled.finish("reset")
            raise
        return dialled.accept(carried, b"")


def _send_proxy_header(dialled: DialledFlow, client: Address, target: Address) -> None:
    """Tell a service the client's address.  Raises DialError."""
    upstream = dialled.upstream
    try:
        is_socket = isinstance(target, UnixAddress)
        reached = UNSPECIFIED_ADDRESS if is_socket else upstream.peer_address()
        upstream.write(proxy_protocol.encode_v2(client, reached))
    except StreamError as error:
        dialled.finish("reset")
        raise DialError(Reason.GENERAL, str(target), str(error)) from error
