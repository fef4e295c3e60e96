"""UDP datagrams that a client sends within a stream.

A stream begins with a request for connect-udp (connect_udp.py), or with a connection to the name
of UDP over TCP (uot.py); the streams of a tunnel are served in the same way.  Its frames go
through the listener's NAT table as datagrams do.  Replies come back on the threads of the
sessions.  What serves such streams is loaded for the first one.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import DialError, FlowRefused, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.flows import Failure, Record
from netproxy.relay.client import no_header
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.announce import Announcer
    from netproxy.handler.datagrams.stream_service import StreamService
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Beside, Framing, Introducer
    from netproxy.interfaces.flows import Flow, Observer
    from netproxy.interfaces.routing import Route, Router
    from netproxy.interfaces.services import Counter
    from netproxy.net.datagram import ArenaPool
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
        return self.open_one(stream, flow, framing, accepted, beside).run()

    def open_one(
        self,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        accepted: bytes,
        beside: Beside | None = None,
    ) -> StreamService:
        """Return what serves a stream for one target, as serve_one() does."""
        from netproxy.handler.datagrams.stream_service import StreamService  # late: see above

        flow, route = self.find_route(flow)
        service = StreamService(self, stream, flow, framing, no_header, beside)
        return self.begin(service, stream, (flow, route), accepted)

    def begin(
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
            raise self.refused(flow, route, error, ended) from error
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
        from netproxy.handler.datagrams.stream_service import StreamService  # late: see above

        flow = flow._replace(network="udp")
        return StreamService(self, stream, flow, framing, wrap, beside).run()

    def permit(self, flow: Flow) -> None:
        """Raise DialError, counted and recorded, if no datagram of a stream could leave."""
        try:
            refuse_without_udp(self.router, flow._replace(network="udp"))
        except DialError as error:
            raise self.refused(flow, None, error) from error

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
            raise self.refused(flow, route, error) from error

    def refused(
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
        from netproxy.handler.datagrams.uot import serve_uot  # late: few clients speak it

        return serve_uot(self._relay, client, self._flow, reply)
