"""Forwards HTTP requests to their origins, one exchange each (RFC 9110 section 7).

An outbound connection is kept for the next request of the client that has the same user and
leads to the same origin through the same upstream.  A safe request is sent again if a kept
connection turns out to be closed.
"""

from __future__ import annotations

import os
from functools import partial

from netproxy.errors import (
    ClientLeft,
    DeadlineError,
    DialError,
    EndOfStream,
    FlowRefused,
    NetProxyError,
    Reason,
    StreamError,
)
from netproxy.handler.http import PROXY_NAME, RETRY_SECONDS
from netproxy.handler.http_exchange import Exchange, OriginGone
from netproxy.interfaces.connections import Blocking, Steps, Wait
from netproxy.protocol import http1
from netproxy.protocol.http import connect_udp
from netproxy.protocol.http.http1_error import RecordedError, error_body, id_fields
from netproxy.relay.connection import CLIENT_LEFT, take_eviction
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.handler.outbound import Outbound
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.relay.connection import OutboundConnection

PSEUDONYM = b"netproxy-" + os.urandom(6).hex().encode()
"""This daemon in Via fields, the same in all its processes (RFC 9110 section 7.6.3)."""
# Safe methods: such a request is sent again if a kept connection has closed meanwhile.
RETRIED = (b"GET", b"HEAD", b"OPTIONS")


class Forwarder:
    """Forwards the requests of all connections of a listener.  Immutable."""

    def __init__(self, outbound: Outbound, idle: float) -> None:
        """Forward requests.  `idle`: seconds that an origin may be silent."""
        self._outbound = outbound
        self._idle = idle
        self._pseudonym = PSEUDONYM

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
        exchange.check_loop()
        if exchange.answered_here():
            outcome: OutboundConnection | Wait | None = kept
        else:
            flow = flow._replace(target=exchange.origin.address, command="http")
            outcome = yield from self._exchange(exchange, flow, kept)
        if client.open and not isinstance(outcome, Wait) and not exchange.persistent:
            yield from client.close_staged()
        return outcome

    def _exchange(
        self, exchange: Exchange, flow: Flow, kept: OutboundConnection | None
    ) -> Steps[OutboundConnection | Wait | None]:
        try:
            connection = yield from self._reuse(kept, flow)
        except FlowRefused as refused:
            error = self._outbound.note_failure(flow, None, 0.0, refused)
            if _answer_limit(exchange, error):
                return kept
            assert kept is not None
            kept.upstream.close()
            raise error from refused
        if connection is not None:
            try:
                return (yield from self._run(exchange, connection))
            except OriginGone:
                if exchange.request.method not in RETRIED or not exchange.framing.empty:
                    raise RecordedError(502, "the origin closed without an answer") from None
        connection = yield from self._outbound.connect(flow, exchange.client)
        try:
            return (yield from self._run(exchange, connection))
        except OriginGone as error:
            raise RecordedError(502, "the origin closed without an answer") from error

    @staticmethod
    def _run(
        exchange: Exchange, connection: OutboundConnection
    ) -> Steps[OutboundConnection | Wait | None]:
        """Run the exchange.  Raises OriginGone if the origin closed before it answered."""
        try:
            return (yield from exchange.run(connection))
        except NetProxyError as error:
            if isinstance(error, ClientLeft) or exchange.client.evicted:
                _end_without_client(connection, exchange.client)
                return None
            gone = isinstance(error, (EndOfStream, StreamError))
            reset = isinstance(error, StreamError) and not isinstance(error, DeadlineError)
            name = ""
            if exchange.answered or not gone:
                name = connection.finish("failed", fault=str(error))
            else:
                connection.finish("reset" if reset else "closed")
            if exchange.answered:
                # Otherwise the client takes a truncated response for a complete one.
                exchange.client.reset()
                return None
            if gone:
                raise OriginGone(str(error)) from error
            if isinstance(error, http1.HttpError):
                raise RecordedError(error.status, str(error), name) from error
            raise

    def _reuse(
        self, kept: OutboundConnection | None, flow: Flow
    ) -> Steps[OutboundConnection | None]:
        """Return the kept connection if it leads to this request's origin; else close it.

        Raises FlowRefused, and closes nothing, if a limit refuses the request.
        """
        if kept is None:
            return None
        router = self._outbound.router
        try:
            flow = router.named(flow)
            if kept.flow.target == flow.target:
                route = router.route_without_blocking(flow)
                if route is None:
                    route = yield Blocking(partial(router.route, flow))
                if kept.may_serve(route):
                    return kept.again(route, self._outbound.accounts.open(flow, is_new=False))
        except DialError as error:
            if isinstance(error, FlowRefused) and error.reason is Reason.LIMIT:
                raise
            # The next connect() fails in the same way, and records it.
        kept.upstream.close()
        return None


def _answer_limit(exchange: Exchange, error: DialError) -> bool:
    """Answer a request that a limit refuses; False if the client's connection must end then."""
    if not (exchange.persistent and exchange.framing.empty):
        return False
    body = error_body(error.said, error.id)
    fields = [
        (b"Content-Type", b"text/plain; charset=us-ascii"),
        (b"X-Content-Type-Options", b"nosniff"),
        (b"Content-Length", b"%d" % len(body)),
        connect_udp.status_field(error.reason, PROXY_NAME),
        (b"Retry-After", b"%d" % RETRY_SECONDS),
        *id_fields(error.id),
    ]
    status = http1.REPLIES[error.reason]
    response = http1.HttpResponse(1, status, http1.PHRASES[status].encode(), fields)
    head = http1.encode_response(response)
    exchange.client.reply(head if exchange.request.method == b"HEAD" else head + body)
    return True


def _end_without_client(connection: OutboundConnection, client: Stream) -> None:
    """End the flow of a client that has left, or was evicted."""
    ended, decided = take_eviction(client) if client.evicted else (CLIENT_LEFT, "")
    connection.finish(ended, fault=decided)
    client.reset()
