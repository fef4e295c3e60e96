"""One HTTP request and its response, between a client and an origin.

Heads are encoded anew from the parsed ones, without the hop-by-hop fields.  The body is sent
while the response is awaited, so that an early response, or 100 Continue, reaches a client
that waits for it.  A client that leaves is noticed whatever the origin does.  The side at
fault decides the status: 4xx for the client, 5xx for the origin.
"""

from __future__ import annotations

import select

from netproxy.errors import (
    ClientLeft,
    DeadlineError,
    EndOfStream,
    NetProxyError,
    Reason,
    StreamError,
)
from netproxy.interfaces.connections import Events, Steps
from netproxy.interfaces.side_by_side import side_by_side
from netproxy.protocol import http1
from netproxy.protocol.http.http1_message import (
    NONE,
    Body,
    accepts_trailers,
    encode_chunk,
    encode_last_chunk,
    request_fields,
    request_framing,
    response_fields,
    response_framing,
    trailer_fields,
    upgrade_of,
)
from netproxy.relay.connection import wait_for_room
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream, Wait
    from netproxy.protocol.http.http1_message import Framing
    from netproxy.relay.connection import OutboundConnection

# Seconds for the next BODY_STEP bytes of a body: a client that sends byte by byte must not
# hold a connection to the origin for ever.
BODY_SECONDS, BODY_STEP = 30.0, 1024
# Interim (1xx) responses to one request.
INTERIM_LIMIT = 32
# Seconds that the origin may be silent once the client has sent its FIN: the client may still
# read, but most clients that send a FIN have closed.
HALF_CLOSED_SECONDS = 3.0
# Proxies in Via: more are a loop.
HOPS_LIMIT = 20
_RDHUP = 0x2000
_ALLOWED = (b"Allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, CONNECT")


class OriginGone(NetProxyError):
    """The origin closed before it answered."""


class Exchange:
    """One request and its response.  Thread: the one that drives the client's connection."""

    def __init__(
        self, client: Stream, request: http1.HttpRequest, pseudonym: bytes, idle: float
    ) -> None:
        """Begin with a parsed request.  `idle`: seconds that the origin may be silent.

        Raises HttpError for a request that cannot be forwarded.
        """
        self.client = client
        self.request = request
        self.origin = http1.parse_origin(request)
        self.framing = request_framing(request)
        # True once a part of a final response was sent to the client.
        self.answered = False
        self._pseudonym = pseudonym
        self._idle = idle
        modern = request.minor == 1
        # A switch of protocols would have to wait for the end of a body: a request with a body
        # is forwarded without its upgrade.
        self._upgrade = upgrade_of(request.fields) if modern and self.framing.empty else None
        closes = b"close" in http1.field_list(request.fields, b"connection")
        self._persistent = modern and not closes
        self._body = Body(client, self.framing)
        # Bytes of a body with a length that are still to come.
        self._left = self.framing.length
        self._uploaded = self.framing.empty
        self._interim = 0
        # Bytes of the body since the client's deadline was last renewed, and bytes of the
        # response that were sent to the client.
        self._progress = self._delivered = 0

    def check_loop(self) -> None:
        """Raise HttpError if the request has passed here before."""
        via = http1.field_list(self.request.fields, b"via")
        if len(via) >= HOPS_LIMIT or any(self._pseudonym in hop.split() for hop in via):
            raise http1.HttpError(502, Reason.LOOP.value)

    def answered_here(self) -> bool:
        """Answer OPTIONS with Max-Forwards 0 (RFC 9110 section 7.6.2); refuse TRACE.

        Returns False if the request is for the origin.
        """
        values = http1.field_values(self.request.fields, b"max-forwards")
        is_zero = len(values) == 1 and values[0] != b"" and not values[0].strip(b"0")
        if self.request.method not in (b"OPTIONS", b"TRACE") or not is_zero:
            return False
        if self.request.method == b"TRACE" or not self.framing.empty:
            raise http1.HttpError(405, "not answered by this proxy")
        fields = [_ALLOWED, (b"Content-Length", b"0")]
        self.client.reply(self._final_head(http1.HttpResponse(1, 200, b"OK", fields)))
        return True

    @property
    def persistent(self) -> bool:
        """True if another request may follow on the client's connection."""
        return self._persistent

    def run(self, upstream: OutboundConnection) -> Steps[OutboundConnection | Wait | None]:
        """Send the request and forward the response.

        Returns the outbound connection if it may be kept for the next request, a Wait of the
        tunnel that it has become, or None.  Raises EndOfStream and StreamError for the origin,
        ClientLeft for the client, HttpError with the status of the side at fault.
        """
        upstream.upstream.pace(self._idle)
        fields = request_fields(
            self.request, self.origin, self.framing, self._pseudonym, self._upgrade
        )
        request = http1.HttpRequest(self.request.method, self.origin.path, 1, fields)
        head = http1.encode_request(request)
        yield from upstream.upstream.write_all(head)
        upstream.sent += len(head)
        return (yield from side_by_side(self._download(upstream), self._upload(upstream)))

    # -- the request

    def _upload(self, upstream: OutboundConnection) -> Steps[None]:
        """Send the body, then watch the client until it has left."""
        try:
            if not self._uploaded:
                self._renew()
            while not self._uploaded:
                room = yield from wait_for_room(upstream.account.up, upstream.sent)
                piece = self._framed((yield from self._read_piece(room)))
                if not (yield from self._send(upstream, piece)):
                    break
                self._renew(len(piece))
        except http1.HttpError:
            # An origin that has answered does not need the rest of the body.
            if not self.answered:
                raise
        yield from self._watch_client()

    def _send(self, upstream: OutboundConnection, piece: bytes) -> Steps[bool]:
        """Send a piece; return False if the origin has closed: its response may say why."""
        try:
            yield from upstream.upstream.write_all(piece)
        except DeadlineError as error:
            raise http1.HttpError(504, "the origin does not read") from error
        except StreamError:
            self._uploaded = False
            return False
        upstream.sent += len(piece)
        return True

    def _watch_client(self) -> Steps[None]:
        """Wait until the client has left.  Raises ClientLeft."""
        client = self.client.socket
        ready = yield Events(((client, _RDHUP),), None)
        if not ready[client.fileno()] & (select.POLLHUP | select.POLLERR):
            before = -1
            while before != self._delivered:
                before = self._delivered
                if (yield Events(((client, 0),), HALF_CLOSED_SECONDS)):
                    break
        raise ClientLeft("the client has left")

    def _read_piece(self, limit: int) -> Steps[bytes]:
        """Read the next piece of the body, at most `limit` bytes, b"" behind its last."""
        try:
            return (yield from self._body.read(limit))
        except DeadlineError as error:
            raise http1.HttpError(408, "the body did not come in time") from error
        except EndOfStream as error:
            raise http1.HttpError(400, "the body ended too early") from error
        except StreamError as error:
            raise http1.HttpError(400, "the client has gone") from error

    def _framed(self, piece: bytes) -> bytes:
        """Frame a piece of the body for the origin; note whether it was the last."""
        if self._left is None:
            self._uploaded = not piece
            return encode_chunk(piece) if piece else encode_last_chunk([])
        self._left -= len(piece)
        self._uploaded = not self._left
        return piece

    def _renew(self, size: int = BODY_STEP) -> None:
        """Give the client more time if another BODY_STEP bytes have come, the last `size` now."""
        self._progress += size
        if self._progress >= BODY_STEP:
            self._progress = 0
            if not self.answered:
                self.client.limit(BODY_SECONDS)

    # -- the response

    def _download(self, upstream: OutboundConnection) -> Steps[OutboundConnection | Wait | None]:
        response = yield from self._read_final(upstream)
        if response.status == 101:
            return self._tunnel(upstream, response)
        framing = response_framing(response, self.request.method)
        chunked = self.request.minor == 1 and (framing.chunked or framing.until_close)
        framed = chunked or framing.length is not None
        self._persistent = self._persistent and self._uploaded and framed
        closes = b"close" in http1.field_list(response.fields, b"connection")
        keep = self._persistent and response.minor == 1 and not framing.until_close and not closes
        trailers = framing.chunked and chunked and accepts_trailers(self.request)
        fields = response_fields(response, framing, chunked, self._pseudonym, trailers)
        self.client.pace(BODY_SECONDS)
        yield from self._deliver(upstream, self._final_head(response._replace(fields=fields)))
        trailer = yield from self._pass_body(upstream, framing, chunked)
        if chunked:
            trailer = trailer_fields(trailer, response) if trailers else []
            yield from self._deliver(upstream, encode_last_chunk(trailer))
        upstream.finish("done", keep)
        return upstream if keep else None

    def _read_final(self, upstream: OutboundConnection) -> Steps[http1.HttpResponse]:
        """Read the head of the final response; forward interim ones."""
        while True:
            response = yield from self._read_head(upstream)
            if upstream.trace is not None:
                upstream.trace.step("first byte", status=response.status)
            if response.status >= 200 or response.status == 101:
                return response
            yield from self._pass_interim(upstream, response)

    def _read_head(self, upstream: OutboundConnection) -> Steps[http1.HttpResponse]:
        try:
            response = yield from http1.read_response(upstream.upstream)
        except DeadlineError as error:
            raise http1.HttpError(504, "the origin does not answer") from error
        if response.status == 101 and self._upgrade is None:
            raise http1.HttpError(502, "the origin switched protocols unasked")
        return response

    def _pass_interim(
        self, upstream: OutboundConnection, response: http1.HttpResponse
    ) -> Steps[None]:
        """Forward an interim response, except to an HTTP/1.0 client."""
        self._interim += 1
        if self._interim > INTERIM_LIMIT:
            raise http1.HttpError(502, "the origin does not come to an answer")
        if self.request.minor == 1:
            fields = response_fields(response, NONE, False, self._pseudonym)
            try:
                head = http1.encode_response(response._replace(fields=fields))
                yield from self._deliver(upstream, head)
            except StreamError as error:
                raise http1.HttpError(400, "the client has gone") from error

    def _final_head(self, response: http1.HttpResponse) -> bytes:
        """Encode the head of a final response, with "Connection: close" if it is the last."""
        if not self._persistent:
            response.fields.append((b"Connection", b"close"))
        self.answered = True
        return http1.encode_response(response)

    def _pass_body(
        self, upstream: OutboundConnection, framing: Framing, chunked: bool
    ) -> Steps[http1.Fields]:
        """Forward the data of the body; return its trailer."""
        body = Body(upstream.upstream, framing, 502)
        while True:
            room = yield from wait_for_room(upstream.account.down, upstream.received)
            if not (piece := (yield from body.read(room))):
                return body.trailer
            yield from self._deliver(upstream, encode_chunk(piece) if chunked else piece)

    def _deliver(self, upstream: OutboundConnection, data: bytes) -> Steps[None]:
        yield from self.client.write_all(data)
        upstream.received += len(data)
        self._delivered += len(data)

    def _tunnel(self, upstream: OutboundConnection, response: http1.HttpResponse) -> Wait | None:
        fields = response_fields(response, NONE, False, self._pseudonym)
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", self._upgrade or b"")]
        self.answered = True
        head = http1.encode_response(response._replace(fields=fields))
        return upstream.accept(self.client, head)
