"""What of an HTTP/1.1 message goes on to the next hop: its body, framed anew, and its fields.

`request_framing` and `response_framing` decide once how a body ends (RFC 9112 sections 6
and 7).  A Body gives its data without the framing; what is sent on is framed by
`encode_chunk` or by the length that was checked here.  `request_fields` and
`response_fields` leave out what was meant for one hop, and add what this proxy adds
(RFC 9110 section 7.6).  No I/O of its own.
"""

from __future__ import annotations

import re

from netproxy.errors import EndOfStream, LimitError
from netproxy.interfaces.connections import Reader
from netproxy.protocol.http1 import (
    Fields,
    HttpError,
    HttpRequest,
    HttpResponse,
    Origin,
    encode_fields,
    field_list,
    field_values,
    read_fields,
)
from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Steps

# Bytes of a chunk's size and extensions: nothing in use comes near.
CHUNK_LINE_LIMIT = 1024
# Bytes of a trailer section.
TRAILER_LIMIT = 8192
# Bytes of a body that are read at a time.
PIECE = 65536

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")
# 18 digits stay below 2^63.
_LENGTH = re.compile(rb"[0-9]{1,18}\Z")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?(\r?\n)\Z")

NO_BODY_STATUSES = (204, 304)

# Fields for one hop, and fields that this hop writes anew.  Those that Connection names are
# left out as well.  The fields written anew are never lost to Connection: they are written
# from what was parsed.
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer"),
        *(b"transfer-encoding", b"upgrade", b"content-length", b"via"),
    }
)
_REQUEST_ONLY = frozenset({b"host", b"proxy-authorization", b"max-forwards"})
_RESPONSE_ONLY = frozenset({b"proxy-authenticate", b"proxy-authentication-info"})
# Fields that mean something only before the body (RFC 9110 section 6.5.1): a client that merges
# a trailer into the head must not find them there.
_HEAD_ONLY = frozenset(
    b"age authorization cache-control content-encoding content-range content-type date expires "
    b"location retry-after set-cookie vary warning www-authenticate".split()
)
# The only upgrade in use; h2c would carry requests past the rules.
_UPGRADES = (b"websocket",)


class BodySource(Reader, Protocol):
    """What a body is read from."""

    def read_some(self, limit: int) -> Steps[bytes]:
        """Read 1 to `limit` bytes as they come; b"" at the end of the stream."""


class Framing(NamedTuple):
    """How a body ends: `chunked`, after `length` bytes, or (both unset) with the connection."""

    chunked: bool = False
    length: int | None = None

    @property
    def empty(self) -> bool:
        """True if there is no body, or one of no bytes."""
        return self.length == 0

    @property
    def until_close(self) -> bool:
        """True if the body ends with the connection."""
        return self.length is None and not self.chunked


NONE = Framing(length=0)


def request_framing(request: HttpRequest) -> Framing:
    """Return how the body of a request ends (RFC 9112 section 6.3).

    Raises HttpError with 400 for what could be read in two ways.
    """
    framing = _framing(request.fields, request.minor, 400)
    return NONE if framing.until_close else framing


def response_framing(response: HttpResponse, method: bytes) -> Framing:
    """Return how the body of the response to a `method` request ends.

    Raises HttpError with 502 for what could be read in two ways.
    """
    status = response.status
    # What follows the answer to CONNECT belongs to the tunnel.
    connected = method == b"CONNECT" and 200 <= status < 300
    if method == b"HEAD" or status < 200 or status in NO_BODY_STATUSES or connected:
        return NONE
    return _framing(response.fields, response.minor, 502)


class Body:
    """The data of one body, read piece by piece."""

    def __init__(self, reader: BodySource, framing: Framing, status: int = 400) -> None:
        """`status`: of the HttpError for invalid chunks.  With 502, for the body of a response,
        the lines between chunks may end in LF alone.
        """
        self._reader = reader
        self._framing = framing
        self._status = status
        self._line_ends = (b"\r\n", b"\n") if status == 502 else (b"\r\n",)
        # Bytes that are missing of the body, or of the chunk that was begun.
        self._left = framing.length or 0
        self._in_chunk = False
        self._begun = False
        # The fields behind the last chunk, once it was read.
        self.trailer: Fields = []

    def read(self, limit: int = PIECE) -> Steps[bytes]:
        """Return the next piece, at most `limit` bytes, b"" behind the last.

        Raises HttpError for invalid chunks, EndOfStream if the body ends too early.
        """
        if self._framing.until_close:
            return (yield from self._reader.read_some(min(limit, PIECE)))
        if self._framing.chunked and not self._left:
            self._left = yield from self._next_chunk()
        if not self._left:
            return b""
        piece = yield from self._reader.read_some(min(self._left, limit, PIECE))
        if not piece:
            raise EndOfStream("closed within a body", partial=self._begun)
        self._left -= len(piece)
        self._begun = True
        return piece

    def _next_chunk(self) -> Steps[int]:
        """Return the size of the next chunk, 0 for the last, whose trailer has been read."""
        if self._in_chunk and (yield from self._read_line(2)) not in self._line_ends:
            raise HttpError(self._status, "a chunk does not end in CRLF")
        match = _CHUNK.match((yield from self._read_line(CHUNK_LINE_LIMIT)))
        if not match or match[2] not in self._line_ends:
            raise HttpError(self._status, "not a chunk size")
        size = int(match[1], 16)
        self._in_chunk = self._begun = True
        if not size:
            status = self._status
            self.trailer = yield from read_fields(self._reader, status, TRAILER_LIMIT, status)
        return size

    def _read_line(self, limit: int) -> Steps[bytes]:
        try:
            return (yield from self._reader.read_until(b"\n", limit))
        except LimitError as error:
            raise HttpError(self._status, "a line of a chunk is too long") from error


def declared_length(fields: Fields) -> int | None:
    """Return the number in Content-Length, None without a valid one.

    Several values that agree count once (RFC 9112 section 6.3).
    """
    parts = [
        part.strip(b" \t")
        for value in field_values(fields, b"content-length")
        for part in value.split(b",")
    ]
    same = len(set(parts)) == 1 and _LENGTH.match(parts[0])
    return int(parts[0]) if same else None


def encode_chunk(data: bytes) -> bytes:
    """Encode a chunk of at least one byte."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_last_chunk(trailer: Fields) -> bytes:
    """Encode the last chunk and the trailer behind it."""
    return b"0\r\n" + encode_fields(trailer)


def accepts_trailers(request: HttpRequest) -> bool:
    """Return whether a client wants the trailer of the response (RFC 9110 section 10.1.4)."""
    return request.minor == 1 and b"trailers" in field_list(request.fields, b"te")


def request_fields(
    request: HttpRequest, origin: Origin, framing: Framing, pseudonym: bytes, upgrade: bytes | None
) -> Fields:
    """Return the fields of a request as it goes to the origin.

    `pseudonym` is this proxy's name in Via, `upgrade` the protocol to ask for.
    """
    fields = [(b"Host", origin.host), *_kept(request.fields, _HOP_BY_HOP | _REQUEST_ONLY)]
    forwards = field_values(request.fields, b"max-forwards")
    if forwards:
        counts = request.method in (b"OPTIONS", b"TRACE")
        fields.append((b"Max-Forwards", _decrement(forwards[0]) if counts else forwards[0]))
    fields.append(_via(request.fields, request.minor, pseudonym))
    if framing.chunked:
        fields.append((b"Transfer-Encoding", b"chunked"))
    elif field_values(request.fields, b"content-length"):
        fields.append((b"Content-Length", b"%d" % (framing.length or 0)))
    options = [b"TE"] if accepts_trailers(request) else []
    options += [b"Upgrade"] if upgrade else []
    if options:
        fields.append((b"Connection", b", ".join(options)))
    if accepts_trailers(request):
        fields.append((b"TE", b"trailers"))
    if upgrade:
        fields.append((b"Upgrade", upgrade))
    return fields


def response_fields(
    response: HttpResponse, framing: Framing, chunked: bool, pseudonym: bytes, trailer: bool = False
) -> Fields:
    """Return the fields of a response as it goes to the client.

    `framing` is that of the origin; `chunked`: the body goes on in chunks, with its `trailer`.
    """
    fields = _kept(response.fields, _HOP_BY_HOP | _RESPONSE_ONLY)
    fields.append(_via(response.fields, response.minor, pseudonym))
    if trailer:
        announced = [(name, b"") for name in field_list(response.fields, b"trailer")]
        if names := [name for name, _ in trailer_fields(announced, response) if _NAME.match(name)]:
            fields.append((b"Trailer", b", ".join(names)))
    if chunked:
        fields.append((b"Transfer-Encoding", b"chunked"))
    elif response.status >= 200 and response.status != 204:
        # Also in a 304 and the answer to HEAD, which give the length of a body that does not come.
        length = declared_length(response.fields)
        if length is not None and not framing.chunked:
            fields.append((b"Content-Length", b"%d" % length))
    return fields


def trailer_fields(trailer: Fields, response: HttpResponse) -> Fields:
    """Return the fields of a response's trailer that go on to the client.

    What frames a message, or is meant for one hop or for the head, is left out.
    """
    dropped = _HOP_BY_HOP | _REQUEST_ONLY | _RESPONSE_ONLY | _HEAD_ONLY
    dropped |= frozenset(field_list(response.fields, b"connection"))
    return [field for field in trailer if field[0].lower() not in dropped]


def upgrade_of(fields: Fields) -> bytes | None:
    """Return the protocol that a request asks to switch to, None unless we pass it on."""
    protocols = field_list(fields, b"upgrade")
    named = b"upgrade" in field_list(fields, b"connection")
    return protocols[0] if named and len(protocols) == 1 and protocols[0] in _UPGRADES else None


def _framing(fields: Fields, minor: int, status: int) -> Framing:
    codings = field_values(fields, b"transfer-encoding")
    lengths = field_values(fields, b"content-length")
    if status == 502 and [coding.lower() for coding in codings] == [b"identity"]:
        codings = []  # RFC 2616 section 3.6: there is none
    if codings:
        if lengths or len(codings) > 1 or codings[0].lower() != b"chunked" or not minor:
            message = "Transfer-Encoding is not just 'chunked', or comes with Content-Length"
            raise HttpError(status, message)
        return Framing(chunked=True)
    if not lengths:
        return Framing()
    length = declared_length(fields)
    if length is None:
        raise HttpError(status, "Content-Length is not one number")
    return Framing(length=length)


def _kept(fields: Fields, dropped: frozenset[bytes]) -> Fields:
    dropped = dropped | frozenset(field_list(fields, b"connection"))
    return [field for field in fields if field[0].lower() not in dropped]


def _via(fields: Fields, minor: int, pseudonym: bytes) -> tuple[bytes, bytes]:
    return b"Via", b", ".join([*field_values(fields, b"via"), b"1.%d %b" % (minor, pseudonym)])


def _decrement(value: bytes) -> bytes:
    return b"%d" % max(0, int(value) - 1) if value.isdigit() and len(value) < 10 else value
