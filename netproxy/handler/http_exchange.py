"""One HTTP request and its answer, between a client and an origin.

What goes on is encoded anew from the parsed heads, without what is meant for
one hop only.  The body goes up while the answer is watched for, so that an early
answer, or 100 Continue, reaches a client that waits for it.  Whose fault an
error is decides its status: 4xx the client's, 5xx the origin's.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from typing import Iterator

from netproxy.errors import DeadlineError, EndOfStream, NetProxyError, StreamError
from netproxy.handler.outbound import Passage
from netproxy.interfaces.connections import Wait
from netproxy.net.stream import Stream, poll_streams
from netproxy.protocol import http1
from netproxy.protocol.http1_message import (
    LAST_CHUNK,
    NONE,
    Framing,
    encode_chunk,
    read_body,
    request_fields,
    request_framing,
    response_fields,
    response_framing,
    upgrade_of,
)

BODY_SECONDS = (
    30.0  # for the next BODY_STEP bytes of a body: a client that drips holds no thread for ever
)
BODY_STEP = 1024
LOOK_SECONDS = 0.1  # between two looks of an uploader at whether anybody still wants the body
INTERIM_LIMIT = 32  # 1xx answers to one request
_ALLOWED = (b"Allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, CONNECT")


class OriginGone(NetProxyError):
    """The origin closed before it answered."""


class Exchange:
    """One request under way."""

    def __init__(
        self, client: Stream, request: http1.Request, pseudonym: bytes, idle: float
    ) -> None:
        self.client = client
        self.request = request
        self.origin = http1.parse_origin(request)
        self.framing = request_framing(request)
        self.answered = False  # something of a final answer has gone to the client
        self._pseudonym = pseudonym
        self._idle = idle
        modern = request.minor == 1
        # a switch behind a body would have to wait for its end: the request goes on without it
        self._upgrade = upgrade_of(request.fields) if modern and self.framing.empty else None
        self._persistent = modern and b"close" not in http1.field_list(
            request.fields, b"connection"
        )
        self._body: Iterator[bytes] = read_body(client, self.framing)
        self._left = self.framing.length  # bytes of a body with a length that are still due
        self._uploaded = self.framing.empty
        self._pending = b""  # encoded, not yet taken by the origin
        self._interim = 0
        self._progress = 0  # bytes of the body since the client's time was last renewed
        self._deadline = 0.0
        self._over = threading.Event()  # the answer is complete

    def answered_here(self) -> bool:
        """Max-Forwards: 0 on OPTIONS or TRACE ends at this proxy (RFC 9110 section 7.6.2)."""
        values = http1.field_values(self.request.fields, b"max-forwards")
        if (
            self.request.method not in (b"OPTIONS", b"TRACE")
            or len(values) != 1
            or values[0].strip(b"0")
            or not values[0]
        ):
            return False
        if self.request.method == b"TRACE" or not self.framing.empty:
            raise http1.HttpError(405, "not answered by this proxy")
        self._begin_answer(http1.Response(1, 200, b"OK", [_ALLOWED, (b"Content-Length", b"0")]))
        if not self._persistent:
            self.client.close_staged()
        return True

    def send(self, passage: Passage) -> http1.Response:
        """The request, head and body, to the origin; its final answer's head, which may come before the body's end.

        EndOfStream and StreamError tell of the origin, HttpError of whose fault it is.
        """
        passage.upstream.pace(self._idle)
        fields = request_fields(
            self.request, self.origin, self.framing, self._pseudonym, self._upgrade
        )
        self._write(
            passage,
            http1.encode_request(http1.Request(self.request.method, self.origin.path, 1, fields)),
        )
        early = None if self._uploaded else self._upload(passage)
        return early or self._final(passage)

    def answer(self, passage: Passage, response: http1.Response) -> Passage | Wait | None:
        """The answer to the client; the upstream if it may be kept, or a pause of the tunnel that it has become."""
        if response.status == 101:
            return self._tunnel(passage, response)
        framing = response_framing(response, self.request.method)
        chunked = self.request.minor == 1 and (framing.chunked or framing.until_close)
        unfinished = bool(self._pending) or not self._uploaded
        self._persistent = (
            self._persistent and not unfinished and (chunked or framing.length is not None)
        )
        keep = (
            self._persistent
            and response.minor == 1
            and not framing.until_close
            and b"close" not in http1.field_list(response.fields, b"connection")
        )
        fields = response_fields(response, framing, chunked, self._pseudonym)
        uploader = self._upload_beside(passage) if unfinished else None
        try:
            self.client.pace(BODY_SECONDS)
            passage.received += self._begin_answer(response._replace(fields=fields))
            self._download(passage, framing, chunked)
        finally:
            self._end_upload(passage, uploader)
        passage.finish("done", keep)
        if not self._persistent:
            self.client.close_staged()
        return passage if keep else None

    # -- up

    def _upload(self, passage: Passage) -> http1.Response | None:
        """Sends the body; a final answer that came before its end, or None."""
        self._renew()
        while self._pending or not self._uploaded:
            if self._answer_waits(passage):
                response = self._head(passage)
                if response.status >= 200:
                    return response
                self._pass_on(passage, response)
                continue
            if not self._pending:
                self._pending = self._framed(self._piece())
            try:
                taken = passage.upstream.write_some(self._pending)
            except StreamError:
                self._uploaded = False
                return None  # the origin takes no more; its reason may be there already
            passage.sent += taken
            self._pending = self._pending[taken:]
        return None

    def _answer_waits(self, passage: Passage) -> bool:
        """Waits until the upload can go on (False), or the origin has begun to answer (True)."""
        upstream = passage.upstream
        if upstream.unread():
            return True
        if not self._pending and self.client.unread():
            return False
        poll = select.poll()
        poll.register(upstream.socket, select.POLLIN | (select.POLLOUT if self._pending else 0))
        if not self._pending:
            poll.register(self.client.socket, select.POLLIN)
        patience = self._idle if self._pending else max(0.0, self._deadline - time.monotonic())
        ready = dict(poll_streams(poll, patience))
        if not ready:
            raise (
                http1.HttpError(504, "the origin does not read")
                if self._pending
                else http1.HttpError(408, "the body did not come in time")
            )
        return bool(ready.get(upstream.socket.fileno(), 0) & ~select.POLLOUT)

    def _piece(self) -> bytes:
        """The next bytes of the body, b"" behind its last."""
        try:
            piece = next(self._body, b"")
        except DeadlineError as error:
            raise http1.HttpError(408, "the body did not come in time") from error
        except EndOfStream as error:
            raise http1.HttpError(400, "the body ended too early") from error
        except StreamError as error:
            raise http1.HttpError(400, "the client has gone") from error
        self._progress += len(piece)
        if self._progress >= BODY_STEP:
            self._renew()
        return piece

    def _framed(self, piece: bytes) -> bytes:
        """A piece of the body as it goes to the origin; knows when it was the last."""
        if self._left is None:
            self._uploaded = not piece
            return encode_chunk(piece) if piece else LAST_CHUNK
        self._left -= len(piece)
        self._uploaded = not self._left
        return piece

    def _renew(self) -> None:
        self._progress = 0
        self._deadline = time.monotonic() + BODY_SECONDS
        self.client.limit(BODY_SECONDS)

    def _upload_beside(self, passage: Passage) -> threading.Thread:
        """The rest of the body, while the answer comes down: some origins answer as they read."""
        thread = threading.Thread(
            target=self._upload_rest, args=(passage,), name="http-upload", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # can't start new thread
            raise http1.HttpError(502, "the answer came before the end of the request") from error
        return thread

    def _upload_rest(self, passage: Passage) -> None:
        try:
            self._write(passage, self._pending)
            while not self._uploaded and not self._over.is_set():
                if wait_readable(self.client, LOOK_SECONDS):
                    self._write(passage, self._framed(self._piece()))
        except NetProxyError:
            pass  # the origin has answered: what it did not read it did not want

    def _end_upload(self, passage: Passage, uploader: threading.Thread | None) -> None:
        """The answer is complete: nobody waits for the rest of the body."""
        if uploader is None:
            return
        self._over.set()
        try:
            passage.upstream.socket.shutdown(
                socket.SHUT_RDWR
            )  # wakes an uploader that waits for the origin
        except OSError:
            pass
        uploader.join()

    def _write(self, passage: Passage, data: bytes) -> None:
        passage.upstream.write(data)
        passage.sent += len(data)

    # -- down

    def _head(self, passage: Passage) -> http1.Response:
        try:
            response = http1.read_response(passage.upstream)
        except DeadlineError as error:
            raise http1.HttpError(504, "the origin does not answer") from error
        if response.status == 101 and self._upgrade is None:
            raise http1.HttpError(502, "the origin switched protocols unasked")
        return response

    def _final(self, passage: Passage) -> http1.Response:
        """The final answer's head; interim ones are passed on."""
        while True:
            response = self._head(passage)
            if response.status >= 200 or response.status == 101:
                return response
            self._pass_on(passage, response)

    def _pass_on(self, passage: Passage, response: http1.Response) -> None:
        """An interim answer, though not to an HTTP/1.0 client."""
        self._interim += 1
        if self._interim > INTERIM_LIMIT:
            raise http1.HttpError(502, "the origin does not come to an answer")
        if self.request.minor == 1:
            fields = response_fields(response, NONE, False, self._pseudonym)
            try:
                self._deliver(passage, http1.encode_response(response._replace(fields=fields)))
            except StreamError as error:
                raise http1.HttpError(400, "the client has gone") from error

    def _begin_answer(self, response: http1.Response) -> int:
        """A final answer's head, with what becomes of the connection; its bytes."""
        if not self._persistent:
            response.fields.append((b"Connection", b"close"))
        self.answered = True
        head = http1.encode_response(response)
        self.client.write(head)
        return len(head)

    def _download(self, passage: Passage, framing: Framing, chunked: bool) -> None:
        for piece in read_body(passage.upstream, framing, 502):
            self._deliver(passage, encode_chunk(piece) if chunked else piece)
        if chunked:
            self._deliver(passage, LAST_CHUNK)

    def _deliver(self, passage: Passage, data: bytes) -> None:
        self.client.write(data)
        passage.received += len(data)

    def _tunnel(self, passage: Passage, response: http1.Response) -> Wait | None:
        fields = response_fields(response, NONE, False, self._pseudonym)
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", self._upgrade or b"")]
        self.answered = True
        return passage.accept(self.client, http1.encode_response(response._replace(fields=fields)))


def wait_readable(stream: Stream, seconds: float) -> bool:
    """Whether a stream may be read, or has ended, within `seconds`."""
    if stream.unread():
        return True
    poll = select.poll()
    poll.register(stream.socket, select.POLLIN)
    return bool(poll_streams(poll, seconds))
