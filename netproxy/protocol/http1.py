"""HTTP/1.1 heads (RFC 9110, 9112): read once into a canonical form, written anew.

Bytes that came in are never passed on as they are: a head is parsed with
anchored ASCII expressions into a HttpRequest or HttpResponse and encoded from there.
Whatever two implementations could read in two ways is an HttpError with the
status to answer.  Bodies are http1_message's.  No I/O of its own.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Sequence

from netproxy.errors import EndOfStream, LimitError, ProtocolError, Reason, ReplyTable
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Reader, Steps
from netproxy.protocol.host import HostError, parse_host

TARGET_LIMIT = 8192  # bytes of a request line: RFC 9112 section 3 asks for at least 8000
HEAD_LIMIT = 65536  # bytes of all fields
FIELDS_LIMIT = 100
HTTP_PORT = 80

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])\Z")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?\Z")
# White space around a value is stripped after the match: in the expression it would cost cubic time.
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)\Z")
_LOOSE_FIELD = re.compile(rb"(" + _TOKEN + rb")[ \t]*:([\t\x20-\x7e\x80-\xff]*)\Z")
_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp]://([^/?#]+)([/?][^#]*)?\Z")
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{0,5}))?\Z")
# Bytes that some languages strip as white space: at the edge of a value they would be read in two ways.
_STRIPPED_BY_SOME = (b"\x85", b"\xa0")

Fields = list[tuple[bytes, bytes]]

REPLIES: ReplyTable = {
    Reason.GENERAL: 502,
    Reason.DENIED: 403,
    Reason.NETWORK_UNREACHABLE: 502,
    Reason.HOST_UNREACHABLE: 502,
    Reason.NAME: 502,
    Reason.REFUSED: 502,
    Reason.TIMEOUT: 504,
    Reason.UNSUPPORTED: 501,
    Reason.AUTHENTICATION: 502,
    Reason.PROTOCOL: 502,
    Reason.LOOP: 403,
}
PHRASES = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    405: "Method Not Allowed",
    407: "Proxy Authentication Required",
    408: "Request Timeout",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    502: "Bad Gateway",
    504: "Gateway Timeout",
}


class HttpError(ProtocolError):
    """A message that is answered with `status` and the connection closed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class HttpRequest(NamedTuple):
    method: bytes
    target: bytes  # as sent: authority, absolute, origin or asterisk form
    minor: int  # HTTP/1.minor
    fields: Fields  # names as sent, values without surrounding white space


class HttpResponse(NamedTuple):
    minor: int
    status: int
    phrase: bytes
    fields: Fields


class Origin(NamedTuple):
    """Where an absolute-form request goes, and what the request line says there."""

    address: Address
    host: bytes  # for the Host field: the authority as the request-target has it
    path: bytes  # origin form


def read_request(reader: Reader) -> Steps[HttpRequest]:
    """One request head.  HttpError 400, 414 or 431; EndOfStream where the client closed before it."""
    line = yield from _read_line(reader, TARGET_LIMIT, 414)
    if not line:  # RFC 9112 section 2.2: one empty line before a request is let pass
        line = yield from _read_line(reader, TARGET_LIMIT, 414)
    match = _REQUEST_LINE.match(line)
    if not match:
        raise HttpError(400, "not an HTTP/1 request line")
    fields = yield from _read_fields(reader, _FIELD, 400)
    for _, value in fields:
        if value.startswith(_STRIPPED_BY_SOME) or value.endswith(_STRIPPED_BY_SOME):
            raise HttpError(
                400, "a field value begins or ends with a byte that some read as white space"
            )
    request = HttpRequest(match[1], match[2], match[3] == b"1", fields)
    _check_host(request)
    return request


def read_response(reader: Reader) -> Steps[HttpResponse]:
    """One response head; HttpError 502 for what is none."""
    match = _STATUS_LINE.match((yield from _read_line(reader, TARGET_LIMIT, 502)))
    if not match:
        raise HttpError(502, "not an HTTP/1 status line")
    fields = yield from _read_fields(reader, _LOOSE_FIELD, 502)
    return HttpResponse(int(match[1]), int(match[2]), match[3] or b"", fields)


def encode_request(request: HttpRequest) -> bytes:
    """Always our own version, RFC 9112 section 2.3."""
    return b"%b %b HTTP/1.1\r\n" % (request.method, request.target) + encode_fields(request.fields)


def encode_response(response: HttpResponse) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (response.status, response.phrase) + encode_fields(
        response.fields
    )


def encode_fields(fields: Fields) -> bytes:
    return b"".join([b"%b: %b\r\n" % field for field in fields]) + b"\r\n"


def encode_error(
    status: int, message: str, extra: Sequence[tuple[bytes, bytes]] = (), head: bool = False
) -> bytes:
    """A whole answer of ours, text/plain, after which the connection closes; `head`: to a HEAD request, without body."""
    body = (message + "\n").encode("ascii", "backslashreplace")
    fields = [
        (b"Content-Type", b"text/plain; charset=us-ascii"),
        (b"X-Content-Type-Options", b"nosniff"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Connection", b"close"),
        *extra,
    ]
    return encode_response(HttpResponse(1, status, PHRASES[status].encode(), fields)) + (
        b"" if head else body
    )


def parse_authority(raw: bytes, default_port: int = 0) -> Address:
    """host:port of a CONNECT target, a URL or a Host field; a port that is missing is `default_port`, 0 means it must be there."""
    match = _AUTHORITY.match(raw)
    if not match:
        raise HttpError(400, "not host:port")
    port = int(match[2]) if match[2] else default_port
    if not 0 < port < 65536:
        raise HttpError(400, "no port, or none between 1 and 65535")
    try:
        return Address(parse_host(match[1]), port)
    except HostError as error:
        raise HttpError(400, str(error)) from error


def parse_origin(request: HttpRequest) -> Origin:
    """The origin of a request in absolute form (RFC 9112 section 3.2.2): its Host field does not count."""
    match = _ABSOLUTE.match(request.target)
    if not match:
        raise HttpError(400, "a proxy takes requests for an absolute http:// address, or CONNECT")
    path = match[2] or b""
    if (
        path[:1] != b"/"
    ):  # section 3.2.4: OPTIONS for a whole server loses its path at the last proxy
        path = b"*" if request.method == b"OPTIONS" and not path else b"/" + path
    return Origin(parse_authority(match[1], HTTP_PORT), match[1], path)


def field_values(fields: Fields, name: bytes) -> list[bytes]:
    """The values of the fields named `name` (lower case), in order."""
    return [value for key, value in fields if key.lower() == name]


def field_list(fields: Fields, name: bytes) -> list[bytes]:
    """The members of a comma-separated field, lower case, white space and empty ones gone."""
    joined = b",".join(field_values(fields, name)).lower()
    return [member for member in (part.strip(b" \t") for part in joined.split(b",")) if member]


def is_field(line: bytes) -> bool:
    """Whether a line, its CRLF left out, is a header field."""
    return _FIELD.match(line) is not None


def _read_line(reader: Reader, limit: int, status: int) -> Steps[bytes]:
    """One line without its CRLF; a line ended by LF alone, or with a CR inside, is refused."""
    try:
        line = yield from reader.read_until(b"\n", limit)
    except LimitError as error:
        raise HttpError(status, "a line is too long") from error
    if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
        raise HttpError(502 if status == 502 else 400, "a line does not end in CRLF")
    return line[:-2]


def _read_fields(reader: Reader, pattern: re.Pattern[bytes], status: int) -> Steps[Fields]:
    """The fields and the empty line after them.  Too many or too long: 431, or 502 in a response."""
    too_large = 431 if status == 400 else status
    fields: Fields = []
    room = HEAD_LIMIT
    while True:
        try:
            line = yield from _read_line(reader, room, too_large)
        except EndOfStream as error:  # it had begun, though perhaps not this line
            raise EndOfStream("closed within a head", partial=True) from error
        if not line:
            return fields
        room -= len(line) + 2
        match = pattern.match(line)
        if not match:
            raise HttpError(status, "not a header field")
        fields.append((match[1], match[2].strip(b" \t")))
        if len(fields) > FIELDS_LIMIT or room <= 0:
            raise HttpError(too_large, "too many header fields")


def _check_host(request: HttpRequest) -> None:
    """RFC 9112 section 3.2: exactly one Host in HTTP/1.1, and one that could be meant."""
    hosts = field_values(request.fields, b"host")
    if len(hosts) > 1 or (not hosts and request.minor):
        raise HttpError(400, "there must be one Host field")
    if hosts and hosts[0]:
        parse_authority(hosts[0], HTTP_PORT)
