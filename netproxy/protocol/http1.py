"""HTTP/1.1 heads (RFC 9110, 9112): read once into a canonical form, written anew.

Received bytes are never passed on as they are: a head is parsed with anchored ASCII
expressions into a HttpRequest or HttpResponse, and encoded from there.  What two
implementations could read in two ways is an HttpError with the status to answer: a request
is read strictly, as the origin must find in it what the rules have seen.  The response of an
origin may also have what RFC 9112 lets a recipient accept.  Bodies are http1_message's.  No
I/O of its own.
"""

from __future__ import annotations

import re

from netproxy.errors import EndOfStream, LimitError, ProtocolError, Reason, ReplyTable
from netproxy.interfaces.addresses import Address
from netproxy.protocol.host import HostError, parse_host
from netproxy.typed import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Reader, Steps

# Bytes of a request line: RFC 9112 section 3 asks for at least 8000.
TARGET_LIMIT = 8192
# Bytes of all fields, and their number.
HEAD_LIMIT = 65536
FIELDS_LIMIT = 100
# Lines of fields in a response: some origins send more than a hundred fields, cookies mostly.
RESPONSE_LINES_LIMIT = 500
HTTP_PORT = 80

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# Clients send UTF-8 in paths as it is; an authority is ASCII (_AUTHORITY).
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])\Z")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?\Z")
# White space around a value is stripped after the match: in the expression it would cost
# cubic time.
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)\Z")
# RFC 9112 section 5.1 removes white space before the colon.  RFC 9110 section 5.5 lets control
# characters other than NUL, CR and LF stay in a value.
_LOOSE_FIELD = re.compile(rb"(" + _TOKEN + rb")[ \t]*:([^\0\r\n]*)\Z")
# The next line of a folded value (RFC 9112 section 5.2).
_FOLDED = re.compile(rb"[ \t]([^\0\r\n]*)\Z")
_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp]://([^/?#]+)([/?][^#]*)?\Z")
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{0,5}))?\Z")
# Bytes that some languages strip as white space: at the edge of a value they would be read in
# two ways.
_STRIPPED_BY_SOME = (b"\x85", b"\xa0")

Fields: TypeAlias = list[tuple[bytes, bytes]]
"""Names as sent, and values without surrounding white space, in order."""

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
    Reason.LIMIT: 429,
}
PHRASES = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    405: "Method Not Allowed",
    407: "Proxy Authentication Required",
    408: "Request Timeout",
    414: "URI Too Long",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class HttpError(ProtocolError):
    """A message that is answered with `status`; then the connection is closed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class HttpRequest(NamedTuple):
    """The head of a request."""

    method: bytes
    target: bytes
    """As sent: authority, absolute, origin or asterisk form."""
    minor: int
    """HTTP/1.minor."""
    fields: Fields


class HttpResponse(NamedTuple):
    """The head of a response."""

    minor: int
    """HTTP/1.minor."""
    status: int
    phrase: bytes
    fields: Fields


class Origin(NamedTuple):
    """The origin server of a request in absolute form, and the request-target it gets."""

    address: Address
    host: bytes
    """For the Host field: the authority as the request-target has it."""
    path: bytes
    """In origin form."""


def read_request(reader: Reader) -> Steps[HttpRequest]:
    """Read the head of a request.

    Raises HttpError with 400, 414 or 431, and EndOfStream; its `partial` is False if the
    client closed before the head began.
    """
    line = yield from _read_line(reader, 400, TARGET_LIMIT, 414)
    if not line:
        # RFC 9112 section 2.2: an empty line before a request is ignored.
        line = yield from _read_line(reader, 400, TARGET_LIMIT, 414)
    match = _REQUEST_LINE.match(line)
    if not match:
        raise HttpError(400, "not an HTTP/1 request line")
    fields = yield from read_fields(reader, 400, HEAD_LIMIT, 431)
    for _, value in fields:
        if value.startswith(_STRIPPED_BY_SOME) or value.endswith(_STRIPPED_BY_SOME):
            message = "a field value begins or ends with a byte that some read as white space"
            raise HttpError(400, message)
    request = HttpRequest(match[1], match[2], match[3] == b"1", fields)
    _check_host(request)
    return request


def read_response(reader: Reader) -> Steps[HttpResponse]:
    """Read the head of a response.  Raises HttpError with 502, and EndOfStream."""
    match = _STATUS_LINE.match((yield from _read_line(reader, 502, TARGET_LIMIT, 502)))
    if not match:
        raise HttpError(502, "not an HTTP/1 status line")
    fields = yield from read_fields(reader, 502, HEAD_LIMIT, 502)
    return HttpResponse(int(match[1]), int(match[2]), match[3] or b"", fields)


def encode_request(request: HttpRequest) -> bytes:
    """Encode the head of a request, always with our own version (RFC 9112 section 2.3)."""
    return b"%b %b HTTP/1.1\r\n" % (request.method, request.target) + encode_fields(request.fields)


def encode_response(response: HttpResponse) -> bytes:
    """Encode the head of a response, always with our own version."""
    line = b"HTTP/1.1 %d %b\r\n" % (response.status, response.phrase)
    return line + encode_fields(response.fields)


def encode_fields(fields: Fields) -> bytes:
    """Encode fields and the empty line behind them."""
    return b"".join([b"%b: %b\r\n" % field for field in fields]) + b"\r\n"


def parse_authority(raw: bytes, default_port: int = 0) -> Address:
    """Parse "host:port" of a CONNECT target, a URL or a Host field.

    A missing port is `default_port`; with 0 the port must be there.  Raises HttpError with 400.
    """
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
    """Return the origin of a request in absolute form (RFC 9112 section 3.2.2).

    Its Host field does not count.  Raises HttpError with 400 for other forms.
    """
    match = _ABSOLUTE.match(request.target)
    if not match:
        raise HttpError(400, "a proxy takes requests for an absolute http:// address, or CONNECT")
    path = match[2] or b""
    if path[:1] != b"/":
        # Section 3.2.4: OPTIONS for a whole server becomes "*" at the last proxy.
        path = b"*" if request.method == b"OPTIONS" and not path else b"/" + path
    return Origin(parse_authority(match[1], HTTP_PORT), match[1], path)


def field_values(fields: Fields, name: bytes) -> list[bytes]:
    """Return the values of the fields named `name` (lower case), in order."""
    return [value for key, value in fields if key.lower() == name]


def field_list(fields: Fields, name: bytes) -> list[bytes]:
    """Return the members of a comma-separated field in lower case.

    White space around members and empty members are left out.
    """
    joined = b",".join(field_values(fields, name)).lower()
    return [member for member in (part.strip(b" \t") for part in joined.split(b",")) if member]


def read_fields(reader: Reader, status: int, limit: int, too_large: int) -> Steps[Fields]:
    """Read the fields of a head or of a trailer, and the empty line behind them.

    Those of a request, whose faults have the `status` 400, are read strictly.  In those of a
    response, 502, a line may end in LF alone, a value may have control characters, and a line
    that begins with white space continues the value before it.  Raises HttpError: `too_large`
    for more than `limit` bytes or too many fields, else `status`.
    """
    loose = status == 502
    pattern, lines_limit = (_LOOSE_FIELD, RESPONSE_LINES_LIMIT) if loose else (_FIELD, FIELDS_LIMIT)
    # Each field with the lines of its value.
    parts: list[tuple[bytes, list[bytes]]] = []
    left, lines = limit, 0
    while True:
        try:
            line = yield from _read_line(reader, status, left, too_large)
        except EndOfStream as error:
            # The head had begun, though perhaps not this line.
            raise EndOfStream("closed within a head", partial=True) from error
        if not line:
            return [(name, b" ".join(values).strip(b" \t")) for name, values in parts]
        left -= len(line) + 2
        lines += 1
        if match := pattern.match(line):
            parts.append((match[1], [match[2].strip(b" \t")]))
        elif loose and parts and (match := _FOLDED.match(line)):
            parts[-1][1].append(match[1].strip(b" \t"))
        else:
            raise HttpError(status, "not a header field")
        if lines > lines_limit or left <= 0:
            raise HttpError(too_large, "too many header fields")


def _read_line(reader: Reader, status: int, limit: int, too_long: int) -> Steps[bytes]:
    """Read a line; return it without its end, which is CRLF, or LF if `status` is 502.

    Raises HttpError: `too_long` for a line over `limit` bytes, `status` for another line end.
    """
    try:
        line = yield from reader.read_until(b"\n", limit)
    except LimitError as error:
        raise HttpError(too_long, "a line is too long") from error
    if line.endswith(b"\r\n"):
        line = line[:-2]
    elif status == 502:
        line = line[:-1]
    else:
        raise HttpError(status, "a line does not end in CRLF")
    if b"\r" in line:
        raise HttpError(status, "a line has a CR inside")
    return line


def _check_host(request: HttpRequest) -> None:
    """Check that there is exactly one valid Host field (RFC 9112 section 3.2).

    There may be none in HTTP/1.0, and in CONNECT, whose target decides alone.  Raises HttpError
    with 400.
    """
    hosts = field_values(request.fields, b"host")
    if len(hosts) > 1 or (not hosts and request.minor and request.method != b"CONNECT"):
        raise HttpError(400, "there must be one Host field")
    if hosts and hosts[0]:
        parse_authority(hosts[0], HTTP_PORT)
