"""HTTP proxy connections: CONNECT tunnels, and requests for absolute addresses one after the other (RFC 9110 section 7).

Reads a request, checks the credentials it carries, and hands it to a tunnel or to
an exchange (http_exchange).  Pipelined requests wait unread until their turn, so that
the answers come in order and each is routed for itself.  An upstream is kept for the
next request of the same connection if that leads to the same origin by the same way;
one that turns out to be closed is replaced, for requests that may be sent twice.
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import Sequence

from netproxy.access.login import Login
from netproxy.errors import (
    DeadlineError,
    DialError,
    EndOfStream,
    NeedsThread,
    NetProxyError,
    Reason,
    StreamError,
)
from netproxy.handler.outbound import Connector, Passage
from netproxy.handler.http_exchange import Exchange, OriginGone, wait_readable
from netproxy.handler.stream_udp import StreamUdpRelay
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Counter
from netproxy.net.stream import Stream
from netproxy.protocol import connect_udp, http1

KEEPALIVE_SECONDS = 60.0  # for the next request of a connection to begin
HEAD_SECONDS = 10.0  # for its head, once it has begun
# Mail is not what CONNECT is for, and an open door for it gets a proxy's address on every block list.
CONNECT_PORTS_REFUSED = frozenset({25})
CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"
PROXY_NAME = "netproxy"  # in Proxy-Status
HOPS_LIMIT = 20  # proxies in Via: more are a loop
RETRIED = (
    b"GET",
    b"HEAD",
    b"OPTIONS",
)  # safe methods may be sent again where a kept connection was just closing
_CHALLENGE = (b"Proxy-Authenticate", b'Basic realm="netproxy", charset="UTF-8"')


class HttpHandler:
    def __init__(
        self,
        listener: str,
        connector: Connector,
        forwarder: Forwarder,
        login: Login,
        counter: Counter,
        datagrams: StreamUdpRelay | None = None,
    ) -> None:
        """`datagrams` serves connect-udp."""
        self._datagrams = datagrams
        self._listener = listener
        self._connector = connector
        self._forwarder = forwarder
        self._login = login
        self._counter = counter

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        return self._serve(stream, client, None)

    def attempt(self, stream: Stream, client: Address) -> Wait | None:
        """For CONNECT by those who need no password."""
        return stream.attempt(
            lambda: self._attempt(stream, client), lambda: self.handle(stream, client)
        )

    def _attempt(self, stream: Stream, client: Address) -> Wait | None:
        request = http1.read_request(stream)
        if request.method != b"CONNECT" or self._login.offered:
            raise NeedsThread
        stream.welcome()
        flow = Flow("tcp", client, _tunnel_target(request), self._listener, "")
        return self._connector.attempt(
            stream,
            flow,
            lambda passage: passage.accept(stream, CONNECTED),
            lambda error: self._refuse_dial(stream, b"CONNECT", error),
        )

    def _serve(self, stream: Stream, client: Address, upstream: Passage | None) -> Wait | None:
        """Requests, one after the other, until the client has to think; `upstream` is kept from the one before."""
        method = b""
        try:
            while True:
                method = b""
                request = http1.read_request(stream)
                method = request.method
                user = self._authenticate(request, client)
                stream.welcome()
                flow = Flow("tcp", client, client, self._listener, user)
                if request.method == b"CONNECT":
                    return self._connector.tunnel(
                        flow._replace(target=_tunnel_target(request))
                    ).accept(stream, CONNECTED)
                if self._datagrams is not None and connect_udp.asks_for(request):
                    return self._datagrams.connect_udp(stream, request, flow)
                outcome, upstream = self._forwarder.forward(stream, request, flow, upstream), None
                if isinstance(outcome, Wait):
                    return outcome
                upstream = outcome
                if not stream.open:
                    return None
                if not stream.unread():
                    kept, upstream = upstream, None
                    return Wait(
                        ((stream.socket, READABLE),),
                        KEEPALIVE_SECONDS,
                        lambda ready: self._resume(stream, client, kept, ready),
                        idle=True,
                    )
                stream.limit(HEAD_SECONDS)
        except EndOfStream as error:
            if error.partial:
                raise
        except DeadlineError:
            self._refuse(stream, method, 408, "the request did not come in time")
        except http1.HttpError as error:
            self._refuse(
                stream,
                method,
                error.status,
                str(error),
                [_CHALLENGE] if error.status == 407 else [],
            )
        except DialError as error:
            self._refuse_dial(stream, method, error)
        finally:
            if upstream is not None:
                upstream.upstream.close()
        return None

    def _resume(
        self, stream: Stream, client: Address, upstream: Passage | None, ready: bool
    ) -> Wait | None:
        """The client has sent something, or its time is up."""
        if ready:
            stream.limit(HEAD_SECONDS)
            return self._serve(stream, client, upstream)
        if upstream is not None:
            upstream.upstream.close()
        return None

    def _authenticate(self, request: http1.Request, client: Address) -> str:
        """The user of this request, "" for nobody.  Nothing is remembered from one request to the next."""
        values = http1.field_values(request.fields, b"proxy-authorization")
        if not values and self._datagrams is not None and connect_udp.asks_for(request):
            values = http1.field_values(
                request.fields, b"authorization"
            )  # to its client we are the origin
        if not self._login.offered or (not values and not self._login.required):
            return ""
        if len(values) == 1:
            user = self._login.check(*_basic(values[0]), client)
            if user is not None:
                return user
        if values:
            self._counter.count("authentication", "refused")
        raise http1.HttpError(407, "this proxy wants a user name and a password")

    def _refuse_dial(self, stream: Stream, method: bytes, error: DialError) -> None:
        self._refuse(
            stream,
            method,
            http1.REPLIES[error.reason],
            error.reason.value,
            [connect_udp.status_field(error.reason, PROXY_NAME)],
        )

    @staticmethod
    def _refuse(
        stream: Stream,
        method: bytes,
        status: int,
        message: str,
        extra: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """The one place where an error becomes an answer.  What follows on the connection is not read as requests."""
        try:
            stream.write(http1.encode_error(status, message, extra, method == b"HEAD"))
        except StreamError:
            pass
        stream.close_staged()


def _tunnel_target(request: http1.Request) -> Address:
    """Of a CONNECT.  What the client sent behind it goes out once the target is there, or never."""
    target = http1.parse_authority(request.target)
    if target.port in CONNECT_PORTS_REFUSED:
        raise http1.HttpError(403, f"CONNECT to port {target.port} is not allowed")
    return target


class Forwarder:
    """Immutable; used by all connections of a listener."""

    def __init__(self, connector: Connector, idle: float) -> None:
        """`idle`: seconds an origin may be silent."""
        self._connector = connector
        self._idle = idle
        self._pseudonym = b"netproxy-" + os.urandom(6).hex().encode()

    def forward(
        self, client: Stream, request: http1.Request, flow: Flow, kept: Passage | None
    ) -> Passage | Wait | None:
        """Serves one request; the upstream that may be kept for the next, or a pause of the tunnel that it has become.

        The client's stream is closed where no other request may follow.  Raises DialError and HttpError
        only while nothing has been answered.
        """
        exchange = Exchange(client, request, self._pseudonym, self._idle)
        self._check_loop(request, exchange)
        if exchange.answered_here():
            return kept
        flow = flow._replace(target=exchange.origin.address)
        passage = self._reuse(kept, flow)
        if passage is not None:
            try:
                return self._exchange(exchange, passage)
            except OriginGone:
                if request.method not in RETRIED or not exchange.framing.empty:
                    raise http1.HttpError(502, "the origin closed without an answer") from None
        try:
            return self._exchange(exchange, self._connector.open(flow))
        except OriginGone as error:
            raise http1.HttpError(502, "the origin closed without an answer") from error

    def _exchange(self, exchange: Exchange, passage: Passage) -> Passage | Wait | None:
        """OriginGone where the origin has closed before it answered anything."""
        try:
            response = exchange.send(passage)
            return exchange.answer(passage, response)
        except (EndOfStream, StreamError) as error:
            reset = isinstance(error, StreamError) and not isinstance(error, DeadlineError)
            passage.finish("failed" if exchange.answered else "reset" if reset else "closed")
            if exchange.answered:
                exchange.client.reset()  # an answer cut short must not look like a whole one
                return None
            raise OriginGone(str(error)) from error
        except NetProxyError:
            passage.finish("failed")
            if exchange.answered:
                exchange.client.reset()
                return None
            raise

    def _check_loop(self, request: http1.Request, exchange: Exchange) -> None:
        via = http1.field_list(request.fields, b"via")
        if len(via) >= HOPS_LIMIT or any(self._pseudonym in hop.split() for hop in via):
            raise http1.HttpError(502, Reason.LOOP.value)

    def _reuse(self, kept: Passage | None, flow: Flow) -> Passage | None:
        """The upstream of the last request, if it leads where this one goes and is still open."""
        if kept is None:
            return None
        upstream = kept.upstream
        if (
            kept.flow.target == flow.target
            and kept.dialer is self._connector.route(flow)
            and not wait_readable(upstream, 0.0)
        ):
            return kept.again(flow)
        upstream.close()
        return None


def _basic(value: bytes) -> tuple[bytes, bytes]:
    """User and password of "Basic ..."; two empty ones, which nobody has, for anything else."""
    scheme, _, encoded = value.partition(b" ")
    if scheme.lower() != b"basic":
        return b"", b""
    try:
        user, _, password = base64.b64decode(encoded.strip(b" "), validate=True).partition(b":")
    except binascii.Error:
        return b"", b""
    return user, password
