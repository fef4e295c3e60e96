"""Serves connect-udp (RFC 9298): the datagrams of an HTTP request, for one target or for all."""

from __future__ import annotations

from netproxy.errors import DialError, Reason, StreamError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, pack_ip
from netproxy.interfaces.routing import Route
from netproxy.protocol.http import connect_udp
from netproxy.protocol.http.capsule import Capsules
from netproxy.protocol.tunnels.wish import parse_wish
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.handler.datagrams.stream_service import StreamService
    from netproxy.handler.datagrams.stream_udp import StreamUdpRelay
    from netproxy.interfaces.connections import Stream, Wait
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer
    from netproxy.protocol import http1


class ConnectUdp:
    """Answers the requests for connect-udp of one listener."""

    def __init__(self, relay: StreamUdpRelay) -> None:
        self._relay = relay

    def serve(self, stream: Stream, request: http1.HttpRequest, flow: Flow) -> Wait | None:
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
            raise self._relay.refused(flow, None, error)
        introducer = self._relay.introducer
        wish = _wish_of(request, stream) if introducer is not None else None
        service = self._relay.open_one(stream, flow, Capsules(target), connect_udp.encode_accept())
        if introducer is not None and wish is not None:
            introducer.introduce(Wish(service, flow, *wish))
        return service.run()

    def _only_dialer(self, flow: Flow) -> Dialer | None:
        """Return the dialer of all targets, if one address serves all of them; else None.

        A first target that is a name has addresses that only its upstream may know.
        """
        if self._relay.table.symmetric or pack_ip(flow.target.host) is None:
            return None
        dialers = {
            dialer for dialer in self._relay.router.candidates(flow) if "udp" in dialer.carries
        }
        dialer = dialers.pop() if len(dialers) == 1 else None
        return dialer if dialer is not None and dialer.knows_bound else None

    def _serve_bound(self, stream: Stream, flow: Flow, dialer: Dialer) -> Wait | None:
        """Serve a stream for all targets, or for that of the request if that is not possible.

        Raises DialError; nothing has been written then.
        """
        from netproxy.handler.datagrams.bound_service import BoundService  # late: few clients ask

        route = Route(dialer, flow)
        if flow.target != UNSPECIFIED_ADDRESS:
            flow, route = self._relay.find_route(flow)
        service, accepted = BoundService(self._relay, stream, flow), connect_udp.encode_accept()
        return self._relay.begin(service, stream, (flow, route), accepted).run()


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
