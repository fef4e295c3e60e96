"""HTTP requests for an origin (RFC 9110 section 7): over which upstream each goes, and when one is kept.

An upstream is kept for the next request of the same client connection if that
leads to the same origin by the same way.  One that turns out to be closed is
replaced, for requests that may be sent twice; no other request ever is.
"""
from __future__ import annotations

import os

from netproxy.errors import DeadlineError, EndOfStream, NetProxyError, Reason, StreamError
from netproxy.handler.connector import Connector, Passage
from netproxy.handler.http_exchange import Exchange, OriginGone, wait_readable
from netproxy.interfaces import Flow, Pause
from netproxy.net.stream import Stream
from netproxy.protocol import http1

HOPS_LIMIT = 20             # proxies in Via: more are a loop
RETRIED = (b"GET", b"HEAD", b"OPTIONS")     # safe methods may be sent again where a kept connection was just closing


class Forwarder:
    """Immutable; used by all connections of a listener."""

    def __init__(self, connector: Connector, idle: float) -> None:
        """`idle`: seconds an origin may be silent."""
        self._connector = connector
        self._idle = idle
        self._pseudonym = b"netproxy-" + os.urandom(6).hex().encode()

    def forward(self, client: Stream, request: http1.Request, flow: Flow, kept: Passage | None) -> Passage | Pause | None:
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

    def _exchange(self, exchange: Exchange, passage: Passage) -> Passage | Pause | None:
        """OriginGone where the origin has closed before it answered anything."""
        try:
            response = exchange.send(passage)
            return exchange.answer(passage, response)
        except (EndOfStream, StreamError) as error:
            reset = isinstance(error, StreamError) and not isinstance(error, DeadlineError)
            passage.finish("failed" if exchange.answered else "reset" if reset else "closed")
            if exchange.answered:
                exchange.client.reset()     # an answer cut short must not look like a whole one
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
        if (kept.flow.target == flow.target and kept.dialer is self._connector.route(flow)
                and not wait_readable(upstream, 0.0)):
            return kept.again(flow)
        upstream.close()
        return None
