"""HTTP proxy connections: CONNECT, and requests for absolute addresses (RFC 9110 section 7).

Reads a request, checks the credentials it carries, and hands it to a tunnel or to an
exchange (http_exchange).  Pipelined requests wait unread until their turn, so that the
answers come in order and each is routed for itself.  An outbound connection is kept for
the next request that leads to the same origin through the same upstream.
"""

from __future__ import annotations

import binascii
import os
import select
from functools import partial
from typing import TYPE_CHECKING, Sequence

from netproxy.errors import (
    ClientLeft,
    DeadlineError,
    DialError,
    EndOfStream,
    NetProxyError,
    Reason,
    StreamError,
)
from netproxy.handler.http_exchange import Exchange, OriginGone
from netproxy.handler.outbound import CLIENT_LEFT
from netproxy.interfaces.connections import READABLE, Blocking, Events, Steps, Wait
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import poll_watched
from netproxy.protocol import connect_udp, http1

if TYPE_CHECKING:
    from netproxy.access.login import Login
    from netproxy.access.permission import Permission
    from netproxy.handler.outbound import Outbound, OutboundConnection
    from netproxy.handler.stream_udp import StreamUdpRelay
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Stream
    from netproxy.interfaces.services import Counter

# Seconds for the next request of a connection to begin, and for its head once it has begun.
KEEPALIVE_SECONDS, HEAD_SECONDS = 60.0, 10.0
# SMTP: a proxy that allows it sends spam, and is soon on every block list.
CONNECT_PORTS_REFUSED = frozenset({25})
CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"
# Our name in Proxy-Status (RFC 9209).
PROXY_NAME = "netproxy"
_CHALLENGE = (b"Proxy-Authenticate", b'Basic realm="netproxy", charset="UTF-8"')


class HttpHandler:
    """Serves HTTP proxy connections.  A Handler."""

    def __init__(
        self,
        listener: str,
        outbound: Outbound,
        forwarder: Forwarder,
        login: Login,
        counter: Counter,
        datagrams: StreamUdpRelay | None = None,
    ) -> None:
        """Serve requests.  `datagrams` serves connect-udp; None without UDP."""
        self.permission: Permission | None = None  # asked for each request but the first
        self._datagrams, self._listener = datagrams, listener
        self._outbound, self._forwarder = outbound, forwarder
        self._login, self._counter = login, counter

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Serve requests until the connection ends.  Each error becomes a response here."""
        connection = _HttpConnection(stream)
        try:
            return (yield from self._serve(connection, client))
        except EndOfStream as error:
            if error.partial:
                raise
            return None
        except DeadlineError:
            answer = connection.encode_error(408, "the request did not come in time")
        except http1.HttpError as error:
            challenge = [_CHALLENGE] if error.status == 407 else []
            answer = connection.encode_error(error.status, str(error), challenge)
        except DialError as error:
            status = [connect_udp.status_field(error.reason, PROXY_NAME)]
            code = http1.REPLIES[error.reason]
            answer = connection.encode_error(code, error.reason.value, status)
        finally:
            connection.close_kept()
        # Bytes that follow an error are not parsed as requests.
        try:
            stream.reply(answer)
        except StreamError:
            pass
        yield from stream.close_staged()
        return None

    def _serve(self, connection: _HttpConnection, client: Address) -> Handshake:
        """Serve one request after the other."""
        stream = connection.stream
        while True:
            connection.method = b""
            request = yield from http1.read_request(stream)
            connection.method = request.method
            if not stream.handshaking and self.permission is not None:
                self.permission.check_client(client.host)  # a reload may have come in between
            user = yield from self._authenticate(request, client)
            stream.handshaking = False
            flow = Flow("tcp", client, client, self._listener, user)
            if request.method == b"CONNECT":
                return (yield from self._tunnel(stream, flow, request))
            if self._datagrams is not None and connect_udp.asks_for(request):
                serve = partial(self._datagrams.connect_udp, stream, request, flow)
                wait: Wait | None = yield Blocking(serve)
                return wait
            kept, connection.kept = connection.kept, None
            outcome = yield from self._forwarder.forward(stream, request, flow, kept)
            if isinstance(outcome, Wait):
                return outcome
            connection.kept = outcome
            if not stream.open:
                return None
            if not stream.unread():
                watched = ((stream.socket, READABLE),)
                if not (yield Events(watched, KEEPALIVE_SECONDS, stream.light, idle=True)):
                    return None
            stream.limit(HEAD_SECONDS)

    def _tunnel(self, stream: Stream, flow: Flow, request: http1.HttpRequest) -> Handshake:
        flow = flow._replace(target=_tunnel_target(request))
        connection = yield from self._outbound.tunnel(flow, stream)
        return connection.accept(stream, CONNECTED)

    def _authenticate(self, request: http1.HttpRequest, client: Address) -> Steps[str]:
        """Return the user of this request, "" for none.

        Each request needs its own credentials.  Raises HttpError 407.
        """
        values = http1.field_values(request.fields, b"proxy-authorization")
        if not values and self._datagrams is not None and connect_udp.asks_for(request):
            # To a client of connect-udp the proxy is the origin (RFC 9298 section 3).
            values = http1.field_values(request.fields, b"authorization")
        if not self._login.offered or (not values and not self._login.required):
            return ""
        if len(values) == 1:
            name, password = _parse_basic(values[0])
            user = yield Blocking(partial(self._login.check, name, password, client))
            if user is not None:
                return str(user)
        if values:
            self._counter.count("authentication", "refused")
        raise http1.HttpError(407, "this proxy wants a user name and a password")


class _HttpConnection:
    """The state of a client's connection between its requests."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.method = b""
        self.kept: OutboundConnection | None = None  # of the last request, for the next one

    def encode_error(
        self, status: int, message: str, extra: Sequence[tuple[bytes, bytes]] = ()
    ) -> bytes:
        return http1.encode_error(status, message, extra, self.method == b"HEAD")

    def close_kept(self) -> None:
        if self.kept is not None:
            self.kept.upstream.close()


def _tunnel_target(request: http1.HttpRequest) -> Address:
    """Return the target of a CONNECT.  Raises HttpError."""
    target = http1.parse_authority(request.target)
    if target.port in CONNECT_PORTS_REFUSED:
        raise http1.HttpError(403, f"CONNECT to port {target.port} is not allowed")
    return target


def _parse_basic(value: bytes) -> tuple[bytes, bytes]:
    """Return user and password of "Basic ...", two empty ones for anything else."""
    scheme, _, encoded = value.partition(b" ")
    if scheme.lower() != b"basic":
        return b"", b""
    encoded = encoded.strip(b" ")
    try:
        decoded = binascii.a2b_base64(encoded)
    except binascii.Error:
        return b"", b""
    if binascii.b2a_base64(decoded, newline=False) != encoded:
        # a2b_base64() skips what is not base64.
        return b"", b""
    user, _, password = decoded.partition(b":")
    return user, password


# Proxies in Via: more are a loop.
HOPS_LIMIT = 20
# Safe methods: such a request is sent again if a kept connection has closed meanwhile.
RETRIED = (b"GET", b"HEAD", b"OPTIONS")


class Forwarder:
    """Forwards the requests of all connections of a listener.  Immutable."""

    def __init__(self, outbound: Outbound, idle: float) -> None:
        """Forward requests.  `idle`: seconds that an origin may be silent."""
        self._outbound = outbound
        self._idle = idle
        self._pseudonym = b"netproxy-" + os.urandom(6).hex().encode()

    def forward(
        self,
        client: Stream,
        request: http1.HttpRequest,
        flow: Flow,
        kept: OutboundConnection | None,
    ) -> Steps[OutboundConnection | Wait | None]:
        """Serve one request.

        Returns the outbound connection that may be kept for the next request, or a Wait of
        the tunnel that it has become.  The client's stream is closed if no other request may
        follow.  Raises DialError and HttpError only while nothing has been answered.
        """
        exchange = Exchange(client, request, self._pseudonym, self._idle)
        self._check_loop(request)
        if exchange.answered_here():
            outcome: OutboundConnection | Wait | None = kept
        else:
            flow = flow._replace(target=exchange.origin.address)
            outcome = yield from self._exchange(exchange, flow, kept)
        if client.open and not isinstance(outcome, Wait) and not exchange.persistent:
            yield from client.close_staged()
        return outcome

    def _exchange(
        self, exchange: Exchange, flow: Flow, kept: OutboundConnection | None
    ) -> Steps[OutboundConnection | Wait | None]:
        connection = yield from self._reuse(kept, flow)
        if connection is not None:
            try:
                return (yield from self._run(exchange, connection))
            except OriginGone:
                if exchange.request.method not in RETRIED or not exchange.framing.empty:
                    raise http1.HttpError(502, "the origin closed without an answer") from None
        connection = yield from self._outbound.connect(flow, exchange.client)
        try:
            return (yield from self._run(exchange, connection))
        except OriginGone as error:
            raise http1.HttpError(502, "the origin closed without an answer") from error

    @staticmethod
    def _run(
        exchange: Exchange, connection: OutboundConnection
    ) -> Steps[OutboundConnection | Wait | None]:
        """Run the exchange.  Raises OriginGone if the origin closed before it answered."""
        try:
            return (yield from exchange.run(connection))
        except ClientLeft:
            connection.finish(CLIENT_LEFT)
            exchange.client.reset()
            return None
        except NetProxyError as error:
            gone = isinstance(error, (EndOfStream, StreamError))
            reset = isinstance(error, StreamError) and not isinstance(error, DeadlineError)
            if exchange.answered or not gone:
                connection.finish("failed")
            else:
                connection.finish("reset" if reset else "closed")
            if exchange.answered:
                # Otherwise the client takes a truncated response for a complete one.
                exchange.client.reset()
                return None
            if gone:
                raise OriginGone(str(error)) from error
            raise

    def _check_loop(self, request: http1.HttpRequest) -> None:
        via = http1.field_list(request.fields, b"via")
        if len(via) >= HOPS_LIMIT or any(self._pseudonym in hop.split() for hop in via):
            raise http1.HttpError(502, Reason.LOOP.value)

    def _reuse(
        self, kept: OutboundConnection | None, flow: Flow
    ) -> Steps[OutboundConnection | None]:
        """Return the kept connection if it leads to this request's origin; else close it."""
        if kept is None:
            return None
        upstream = kept.upstream
        if kept.flow.target == flow.target and not upstream.unread():
            router = self._outbound.router
            route = router.route_without_blocking(flow)
            if route is None:
                route = yield Blocking(partial(router.route, flow))
            silent = not poll_watched(((upstream.socket, select.POLLIN),), 0)
            if kept.dialer is route.dialer and silent:
                return kept.again(flow)
        upstream.close()
        return None
