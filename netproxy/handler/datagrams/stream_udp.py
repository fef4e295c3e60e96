"""UDP datagrams that a client sends within a stream: connect-udp (RFC 9298), UDP over TCP.

A stream begins with a request for connect-udp, which may be for all targets (bound_service.py),
or with a connection to the name of UDP over TCP (UoT); the streams of a tunnel are served in the
same way.  Its frames go through the
listener's NAT table as datagrams do.  Replies come back on the threads of the sessions.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import DialError, EndOfStream, FlowRefused, ProtocolError, Reason, StreamError
from netproxy.handler.datagrams.stream_service import StreamService
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, pack_ip
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.flows import Failure, Record
from netproxy.interfaces.routing import Route
from netproxy.net.stream import complete
from netproxy.protocol import uot
from netproxy.protocol.http import connect_udp
from netproxy.protocol.http.capsule import Capsules
from netproxy.protocol.tunnels.wish import parse_wish
from netproxy.relay.client import no_header
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.announce import Announcer
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Beside, Framing, Introducer
    from netproxy.interfaces.flows import Flow, Observer
    from netproxy.interfaces.routing import Dialer, Router
    from netproxy.interfaces.services import Counter
    from netproxy.net.datagram import ArenaPool
    from netproxy.protocol import http1
    from netproxy.relay.nat import NatTable

NO_UPSTREAM = "-"  # in the record of a flow that was not routed


class StreamUdpRelay:
    """Serves the datagrams in the streams of one listener."""

    def __init__(
        self,
        router: Router,
        table: NatTable,
        arenas: ArenaPool,
        counter: Counter,
        observer: Observer,
        idle: float,
        permission: Permission | None,
    ) -> None:
        """`idle`: seconds that a stream may be silent.  `permission`: None in a tunnel."""
        self.router, self.table, self.arenas = router, table, arenas
        self.counter, self.observer, self.idle = counter, observer, idle
        self.permission = permission  # asked for each new target
        self.announcer: Announcer | None = None
        """Announces public addresses to clients of connect-udp; None: the local ones are told."""
        self.introducer: Introducer | None = None
        """Has clients and agents of tunnels talk directly; None if none does.  Set at once."""

    def connect_udp(self, stream: Stream, request: http1.HttpRequest, flow: Flow) -> Wait | None:
        """Answer a request for connect-udp and serve its datagrams (RFC 9298 section 3).

        Raises HttpError or DialError; nothing has been answered then.
        """
        target = connect_udp.parse_target(request)
        flow = flow._replace(network="udp", target=target)
        if (
            connect_udp.is_bind_offered(request.fields)
            and (dialer := self._only_dialer(flow)) is not None
        ):
            return self._serve_bound(stream, flow, dialer)
        if target == UNSPECIFIED_ADDRESS:
            error = DialError(Reason.UNSUPPORTED, said="targets have different public addresses")
            raise self._refused(flow, None, error)
        introducer = self.introducer
        wish = _wish_of(request, stream) if introducer is not None else None
        service = self._open_one(stream, flow, Capsules(target), connect_udp.encode_accept())
        if introducer is not None and wish is not None:
            introducer.introduce(Wish(service, flow, *wish))
        return service.run()

    def _only_dialer(self, flow: Flow) -> Dialer | None:
        """Return the dialer of all targets, if one address serves all of them; else None.

        A first target that is a name has addresses that only its upstream may know.
        """
        if self.table.symmetric or pack_ip(flow.target.host) is None:
            return None
        dialers = {dialer for dialer in self.router.candidates(flow) if "udp" in dialer.carries}
        dialer = dialers.pop() if len(dialers) == 1 else None
        return dialer if dialer is not None and dialer.knows_bound else None

    def _serve_bound(self, stream: Stream, flow: Flow, dialer: Dialer) -> Wait | None:
        """Serve a stream for all targets, or for that of the request if that is not possible.

        Raises DialError; nothing has been written then.
        """
        from netproxy.handler.datagrams.bound_service import BoundService  # late: few clients ask

        route = Route(dialer, flow)
        if flow.target != UNSPECIFIED_ADDRESS:
            flow, route = self.find_route(flow)
        service, accepted = BoundService(self, stream, flow), connect_udp.encode_accept()
        return self._begin(service, stream, (flow, route), accepted).run()

    def uot(self, stream: Stream, flow: Flow, reply: bytes) -> Wait | None:
        """Accept a connection to the name of UoT with `reply` and serve its datagrams.

        Raises EndOfStream or StreamError if the client leaves.
        """
        stream.write(reply)
        request = uot.UotRequest(False, UNSPECIFIED_ADDRESS)
        try:
            if flow.target.host != uot.MAGIC_V1:
                request = complete(uot.read_request(stream))
        except EndOfStream:
            raise
        except ProtocolError as error:
            self.counter.refuse(flow.refusal("connections_refused", "no UoT request", error))
            # The stream is open, and UoT has no message for an error: a reset says it.
            stream.reset()
            return None
        if not request.connected:
            return self.serve_all(stream, flow, uot.Frames(), uot.encode_address)
        flow = flow._replace(network="udp", target=request.target)
        try:
            return self.serve_one(stream, flow, uot.Frames(request.target), b"")
        except DialError:  # counted and recorded
            stream.reset()
            return None

    def serve_one(
        self,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        accepted: bytes,
        beside: Beside | None = None,
    ) -> Wait | None:
        """Serve a stream for one target; only the target may reply.

        The target's name is resolved before `accepted` is written (RFC 9298 section 3.1).
        `beside` carries what need not go by the stream.
        Raises DialError; nothing has been written then.
        """
        return self._open_one(stream, flow, framing, accepted, beside).run()

    def _open_one(
        self,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        accepted: bytes,
        beside: Beside | None = None,
    ) -> StreamService:
        """Return what serves a stream for one target, as serve_one() does."""
        flow, route = self.find_route(flow)
        service = StreamService(self, stream, flow, framing, no_header, beside)
        return self._begin(service, stream, (flow, route), accepted)

    def _begin(
        self, service: StreamService, stream: Stream, found: tuple[Flow, Route], accepted: bytes
    ) -> StreamService:
        """Open the session and write the answer to a stream; return the service.

        Raises DialError, recorded: nothing has been written then.  `found`: as of find_route().
        """
        flow, route = found
        try:
            stream.write(service.open_now(route, accepted))
        except DialError as error:
            ended = service.abandon(error.why)
            raise self._refused(flow, route, error, ended) from error
        except BaseException:
            service.abandon("failed")
            raise
        return service

    def serve_all(
        self,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        wrap: Callable[[Address], bytes],
        beside: Beside | None = None,
    ) -> Wait | None:
        """Serve a stream whose frames name their targets.

        It is a client with endpoint-independent mapping, as a SOCKS5 association is.
        `wrap` encodes the source of a reply; `beside` is as in serve_one().
        """
        return StreamService(
            self, stream, flow._replace(network="udp"), framing, wrap, beside
        ).run()

    def permit(self, flow: Flow) -> None:
        """Raise DialError, counted and recorded, if no datagram of a stream could leave."""
        try:
            refuse_without_udp(self.router, flow._replace(network="udp"))
        except DialError as error:
            raise self._refused(flow, None, error) from error

    def find_route(self, flow: Flow) -> tuple[Flow, Route]:
        """Return the flow with its name, and its route.  Raises DialError, counted and recorded."""
        route = None
        try:
            flow = self.router.named(flow._replace(network="udp"))
            route = self.router.route(flow)
            if not flow.target.port:
                raise DialError(Reason.REFUSED, f"{flow.target}: port 0")
            if "udp" not in route.dialer.carries:
                raise DialError(route.dialer.refusal, said=f"{route.dialer.name} carries no UDP")
            return flow, route
        except DialError as error:
            raise self._refused(flow, route, error) from error

    def _refused(
        self, flow: Flow, route: Route | None, error: DialError, recorded: bool = False
    ) -> DialError:
        """Count a flow that could not begin, and record it unless a session has done so."""
        if isinstance(error, FlowRefused):
            refusal = flow.refusal("requests_refused", error.said, error.decided)
            return error.recorded_as(self.counter.refuse(refusal))
        self.counter.count("dial_failures", error.why)
        if recorded:
            return error
        upstream, rule = (route.dialer.name, route.rule) if route else (NO_UPSTREAM, "")
        record = Record(flow, upstream, 0, 0, 0.0, str(error), rule=rule)
        record = record._replace(decided=error.decided_by(rule), failure=Failure.of(error))
        return error.recorded_as(self.observer.finished(record))


def _wish_of(request: http1.HttpRequest, stream: Stream) -> tuple[bytes, int] | None:
    """Return the client's wish for a direct path and the port of its stream; None without it.

    Keys are sent within TLS only.
    """
    identifier = parse_wish(request)
    if not identifier or stream.plain:
        return None
    try:
        return identifier, stream.local_address().port
    except StreamError:
        return None


class Wish:
    """The wish that the datagrams of a stream go directly (interfaces.datagrams.WishingStream)."""

    __slots__ = ("flow", "identifier", "port", "session", "tell", "_service")

    def __init__(self, service: StreamService, flow: Flow, identifier: bytes, port: int) -> None:
        """`identifier` and `port`: as in WishingStream."""
        self._service = service
        self.flow = flow
        self.identifier = identifier
        self.port = port
        self.session = service.session
        self.tell = service.tell

    @property
    def closed(self) -> bool:
        """Whether the stream has ended."""
        return self._service.closed


def refuse_without_udp(router: Router, flow: Flow) -> None:
    """Raise DialError if no datagram of a client could leave, whatever its target.

    It is better refused now than lost one by one.
    """
    dialers = list(router.candidates(flow))
    if not any("udp" in dialer.carries for dialer in dialers):
        raise DialError(dialers[-1].refusal, said=f"{dialers[-1].name} carries no UDP")


class UotStream:
    """What a client gets for a connection to the name of UoT: a stream of datagrams."""

    def __init__(self, relay: StreamUdpRelay, flow: Flow) -> None:
        self._relay, self._flow = relay, flow

    def bound(self) -> Address:
        """Return the address for the reply: there is no socket yet that has one."""
        return UNSPECIFIED_ADDRESS

    def accept(self, client: Stream, reply: bytes) -> Wait:
        """Tell the client that it is connected, then serve its datagrams, on a pool thread.

        Reading the request of UoT may block, and so may opening its session.
        """
        return Wait((), None, partial(self._serve, client, reply))

    def _serve(self, client: Stream, reply: bytes, ready: bool) -> Wait | None:
        return self._relay.uot(client, self._flow, reply)
