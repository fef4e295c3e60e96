"""Forwards HTTP requests to their origins, one exchange after the other.

An outbound connection is kept for the next request of the same client connection, if
that leads to the same origin through the same upstream.  A kept one that turns out to be
closed is replaced, for requests that may be sent twice.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from netproxy.errors import DeadlineError, EndOfStream, NetProxyError, Reason, StreamError
from netproxy.handler.http_exchange import Exchange, OriginGone
from netproxy.handler.outbound import CLIENT_LEFT, ClientLeft
from netproxy.interfaces.connections import Blocking, Steps, Wait
from netproxy.net.stream import poll_watched
from netproxy.protocol import http1

if TYPE_CHECKING:
    from netproxy.handler.outbound import Outbound, OutboundConnection
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow

# Proxies in Via: more are a loop.
HOPS_LIMIT = 20
# Safe methods are sent again if a kept connection was just closing.
RETRIED = (b"GET", b"HEAD", b"OPTIONS")


class Forwarder:
    """Forwards the requests of all connections of a listener.  Immutable."""

    def __init__(self, outbound: Outbound, idle: float) -> None:
        """`idle`: seconds that an origin may be silent."""
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
                exchange.client.reset()  # a cut answer must not look like a complete one
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
        """Return the connection of the last request if it leads to this one's origin."""
        if kept is None:
            return None
        upstream = kept.upstream
        if kept.flow.target == flow.target and not upstream.unread():
            router = self._outbound.router
            route = router.route_without_blocking(flow)
            if route is None:
                route = yield Blocking(lambda: router.route(flow))
            silent = not poll_watched(((upstream.socket, select.POLLIN),), 0)
            if kept.dialer is route.dialer and silent:
                return kept.again(flow)
        upstream.close()
        return None
