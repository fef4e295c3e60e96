"""Leads the connections of one port to many places, by their first bytes: an sni listener.

The name and the protocols in a ClientHello, the host of an HTTP request or the first byte alone
choose a route.  It leads to a target, or to the handler of another listener.  The bytes stay
unread: whoever serves the connection gets all of them.  A client that says too little is a
handshake that is not finished: it may be shed, and its time is limited.
"""

from __future__ import annotations

from netproxy.errors import DialError, ProtocolError
from netproxy.handler.forward import relay_to_target
from netproxy.handler.sni.first_bytes import HTTP, TLS, look
from netproxy.handler.sps import detect
from netproxy.interfaces.flows import FirstBytes, Flow, PortRoute, SeenName
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED
from netproxy.interfaces.services import Refusal
from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.outbound import Outbound
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handler, Handshake, Steps, Stream
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.interfaces.flows import PortRoutes
    from netproxy.interfaces.services import Counter

NO_ROUTE = "no route"
"""The reason of connections that no route matches."""


class RouteEnd(Protocol):
    """Where a route leads."""

    def serve(self, stream: Stream, client: Address, seen: FirstBytes) -> Handshake:
        """Serve a connection, whose bytes are all unread."""


class PlacedRoute(NamedTuple):
    """Where a route leads, and the route."""

    place: str
    """The route in the configuration: "listeners[0].routes[2]"."""
    end: RouteEnd


class SniHandler:
    """Serves the connections of an sni listener.  A Handler."""

    def __init__(
        self, listener: str, routes: PortRoutes, ends: Sequence[PlacedRoute], counter: Counter
    ) -> None:
        """`ends`: where `routes` lead, by their index."""
        self._listener = listener
        self._routes = routes
        self._ends = ends
        self._counter = counter

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Choose a route; a connection without one is closed without a word."""
        seen = yield from _first_bytes(stream)
        index = self._routes.choose(seen)
        if index is None:
            self._refuse(client, seen)
            return None
        place, end = self._ends[index]
        stream.port_route = PortRoute(self._listener, place, seen.name)
        if stream.trace is not None:
            stream.trace.step("route", route=place, protocol=seen.protocol, host=seen.name)
        return (yield from end.serve(stream, client, seen))

    def _refuse(self, client: Address, seen: FirstBytes) -> None:
        refusal = Refusal("connections_refused", NO_ROUTE, self._listener, client.host)
        asked = seen.name or seen.protocol
        self._counter.refuse(refusal._replace(asked=asked, decided="routes"))


def _first_bytes(stream: Stream) -> Steps[FirstBytes]:
    """Return what the first bytes of a connection tell.

    Raises DeadlineError, StreamError, and EndOfStream for a client that sends nothing.
    """
    protocol = detect((yield from stream.peek())).value
    if protocol in (TLS, HTTP):
        try:
            return (yield from look(stream, protocol))
        except ProtocolError:
            pass  # there is no name in it, and who serves it will say what is wrong
    return FirstBytes(protocol)


class ToTarget:
    """Connects to one target.  A RouteEnd."""

    def __init__(
        self, target: Address, outbound: Outbound, permission: Permission, send_proxy: str
    ) -> None:
        """`send_proxy`: the PROXY header for the target, "v1" or "v2"; "" for none."""
        self._target = target
        self._outbound = outbound
        self._permission = permission
        self._send_proxy = send_proxy

    def serve(self, stream: Stream, client: Address, seen: FirstBytes) -> Handshake:
        """Connect to the target and relay."""
        permission = self._permission
        sources = permission.sources
        source = None if sources is None else sources.of("", stream.local_address)
        name = SeenName(seen.name, seen.protocol) if seen.name else None
        flow = Flow("tcp", client, self._target, permission.listener, "", source=source, seen=name)
        flow = flow._replace(port_route=stream.port_route)
        try:
            permission.check(flow)  # a reload or a ban may have come since the first byte
        except DialError:
            stream.reset()
            return None
        return (yield from relay_to_target(self._outbound, flow, stream, self._send_proxy))


class ToListener:
    """Hands connections to the handler of another listener.  A RouteEnd."""

    def __init__(
        self, listener: str, handler: Handler, clients: AllowedClients, counter: Counter
    ) -> None:
        """`clients` may connect to the listener, by whichever port they come."""
        self._listener = listener
        self._handler = handler
        self._clients = clients
        self._counter = counter

    def serve(self, stream: Stream, client: Address, seen: FirstBytes) -> Handshake:
        """Serve the connection as if the listener had accepted it."""
        if decided := self._clients.refused_by(client.host):
            key = "connections_refused", CLIENT_NOT_ALLOWED
            self._counter.refuse(Refusal(*key, self._listener, client.host, "", decided))
            return None
        return (yield from self._handler.handle(stream, client))
