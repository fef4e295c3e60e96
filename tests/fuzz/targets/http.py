"""HTTP/1.1 heads, bodies and responses, and what h11 makes of them when they are written anew."""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.parse
from functools import partial
from typing import Any, Callable, NamedTuple

import h11

from netproxy.errors import ProtocolError
from netproxy.interfaces.connections import Steps
from netproxy.net.stream import Stream
from netproxy.protocol import http1
from netproxy.protocol.http import capsule
from netproxy.protocol.http import connect_udp
from netproxy.protocol.http1 import Fields, HttpRequest, HttpResponse
from netproxy.protocol.http.http1_message import (
    Body,
    Framing,
    encode_chunk,
    encode_last_chunk,
    request_fields,
    request_framing,
    response_fields,
    response_framing,
    trailer_fields,
    upgrade_of,
)
from tests.fuzz.target import LONGEST, TRAILING, Target, accepted, check_framing, check_reader
from tests.fuzz.target import read_outcome

_LIMITS = {
    "protocol.http1.TARGET_LIMIT": 160,
    "protocol.http1.HEAD_LIMIT": 400,
    "protocol.http1.FIELDS_LIMIT": 8,
    "protocol.http1.RESPONSE_LINES_LIMIT": 12,
    "protocol.http.http1_message.CHUNK_LINE_LIMIT": 40,
    "protocol.http.http1_message.TRAILER_LIMIT": 80,
    "protocol.http.http1_message.PIECE": 16,
}
# An empty line, the first line, all fields, each with the rest of the line that is too long.
_HEAD_LIMIT = 160 + 160 + 2 * 400
_PSEUDONYM = b"netproxy"
_METHODS = (b"GET", b"HEAD", b"CONNECT", b"POST")
_BODILESS = (204, 304)
# h11 folds these into one canonical value, from which it frames the body.
_FRAMING = (b"content-length", b"transfer-encoding")
_CONTROLS = re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_WORDS = (
    *(b"GET ", b"POST ", b"CONNECT ", b"OPTIONS * ", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"\r\n"),
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 101 \r\n", b"HTTP/1.0 304\r\n", b"http://a/", b"a:80"),
    *(b"Host: a\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"5, 5"),
    *(b"Connection: close, x\r\n", b"Connection: Upgrade\r\n", b"Upgrade: websocket\r\n", b":"),
    *(b"Upgrade: connect-udp\r\n", b"Via: 1.1 a\r\n", b"Max-Forwards: 0\r\n", b" \t", b"\n", b"\r"),
    *(b"TE: trailers\r\n", b"Trailer: X\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b";a=b", b"\x85"),
    *(b"Proxy-Status: a; error=dns_error\r\n", b"X : y\r\n", b"\r\n folded", b"\xa0", b"\0"),
    *(b"\n folded", b"Transfer-Encoding: identity\n", b"Content-Length:\n 5\n", b"\x0b", b"\x01"),
    b"/.well-known/masque/udp/192.0.2.1/443/",
    b"/.well-known/masque/udp/2001%3Adb8%3A%3A1/53/",
)


class _Message(NamedTuple):
    """A message as h11 reads it."""

    head: Any
    """h11.Request or a response.  Any: the attributes differ."""
    body: bytes
    rest: bytes
    """Bytes behind the message."""
    trailer: Any
    """Fields behind the body.  Any: as in head."""


def _read_by_h11(role: Any, data: bytes, method: bytes) -> _Message:
    """Read one message, the answer to a `method` request unless it is a request itself.

    `role` is h11.SERVER or h11.CLIENT.  Any: h11 does not export their type.
    Raises h11.RemoteProtocolError.
    """
    connection = h11.Connection(role, max_incomplete_event_size=1 << 20)
    if role is h11.CLIENT:
        connection.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    head: Any = None
    body, trailer = b"", ()
    while True:
        event = connection.next_event()
        if isinstance(event, (h11.Request, h11.Response, h11.InformationalResponse)):
            head = event
            if isinstance(event, h11.InformationalResponse):
                break
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            trailer = event.headers
            break
        elif event is h11.PAUSED:
            break
        elif event is h11.NEED_DATA:
            # A body without a length ends with the connection.
            connection.receive_data(b"")
    rest, _ = connection.trailing_data
    return _Message(head, body, rest, trailer)


def _lowered(fields: Any) -> Fields:
    """Return fields without those of the framing, names in lower case.  Any: h11 has a type."""
    pairs = [(bytes(name).lower(), bytes(value)) for name, value in fields]
    return [pair for pair in pairs if pair[0] not in _FRAMING]


# -- requests


def _check_request(data: bytes) -> None:
    head = check_reader(http1.read_request, data, _HEAD_LIMIT)
    if not head.accepted:
        return
    request: HttpRequest = head.result
    assert len(request.fields) <= 8
    _check_connect_udp(request)
    if request.method == b"CONNECT":
        accepted(http1.parse_authority, request.target)
        return
    origin = accepted(http1.parse_origin, request)
    framing = accepted(request_framing, request)
    if origin is None or framing is None:
        return
    body = check_reader(_read_whole(framing), head.rest, len(head.rest))
    if not body.accepted:
        return
    upgrade = upgrade_of(request.fields) if framing.empty and request.minor else None
    fields = request_fields(request, origin, framing, _PSEUDONYM, upgrade)
    # h11 refuses bytes over 127 in a target.
    path = _NOT_ASCII.sub(b"?", origin.path)
    anew = HttpRequest(request.method, path, 1, fields)
    written = http1.encode_request(anew) + _framed(framing, body.result.data, [])
    # The upgrade ends what h11 reads: what follows belongs to another protocol.
    message = _read_by_h11(h11.SERVER, written + TRAILING * (upgrade is None), b"")
    assert message.rest == TRAILING * (upgrade is None), message
    assert (message.head.method, message.head.target) == (request.method, path)
    assert _lowered(message.head.headers) == _lowered(fields)
    assert message.body == body.result.data
    names = [name.lower() for name, _ in fields]
    assert names.count(b"host") == 1 and b"proxy-authorization" not in names


def _check_connect_udp(request: HttpRequest) -> None:
    if not connect_udp.asks_for(request):
        return
    target = accepted(connect_udp.parse_target, request)
    if target is not None:
        written = connect_udp.encode_request(target, "proxy:80")
        again = read_outcome(http1.read_request, written, len(written), 1)
        assert again.accepted and connect_udp.asks_for(again.result)
        assert connect_udp.parse_target(again.result) == target


# -- connect-udp

_UPGRADE = b"Host: a\r\nConnection: Upgrade\r\nUpgrade: connect-udp\r\n"
_CAPSULE_LIMITS = {
    "protocol.http.capsule.VALUE_LIMIT": 200,
    "protocol.http.capsule.UDP_PAYLOAD_LIMIT": 190,
}


def _check_stream_of_datagrams(data: bytes) -> None:
    """The first line is the end of the path; the other bytes follow the fields of the upgrade."""
    path, _, rest = data.partition(b"\n")
    written = b"GET /.well-known/masque/udp/%b HTTP/1.1\r\n" % path + _UPGRADE + rest
    head = check_reader(http1.read_request, written, _HEAD_LIMIT + len(_UPGRADE))
    if not head.accepted or not connect_udp.asks_for(head.result):
        return
    _check_connect_udp(head.result)
    target = accepted(connect_udp.parse_target, head.result)
    if target is None:
        return
    host, port, end = head.result.target.decode("ascii").rsplit("/", 3)[1:]
    assert (int(port), end) == (target.port, "")
    _check_host(urllib.parse.unquote(host, errors="strict"), target.host)
    for payload, raw in check_framing(partial(capsule.Capsules, target), head.rest, 16 + 200):
        assert len(payload) <= 190 and raw == b""


def _check_host(text: str, host: str) -> None:
    """Check what an escaped host stands for: an address, a number of inet_aton(3), or a name."""
    if accepted(ipaddress.ip_address, text.strip("[]")) is not None:
        address = ipaddress.ip_address(text.strip("[]"))
        assert ipaddress.ip_address(host) == (getattr(address, "ipv4_mapped", None) or address)
    elif accepted(ipaddress.ip_address, host) is not None:
        # "0x" is 0, as in the URLs of browsers; inet_aton(3) does not take it.
        number = re.sub(r"\b0[xX](?=\.|\Z)", "0", text.removesuffix("."))
        assert socket.inet_ntoa(socket.inet_aton(number)) == host
    else:
        assert text.removesuffix(".").lower() == host


# -- bodies


class _Whole(NamedTuple):
    data: bytes
    trailer: Fields


def _read_whole(framing: Framing, status: int = 400) -> Callable[[Stream], Steps[_Whole]]:
    """Return a codec that reads a body to its end.  `status`: 502 for that of a response."""

    def read(stream: Stream) -> Steps[_Whole]:
        body = Body(stream, framing, status)
        data = b""
        while piece := (yield from body.read()):
            assert len(piece) <= 16
            data += piece
        return _Whole(data, body.trailer)

    return read


def _framed(framing: Framing, data: bytes, trailer: Fields) -> bytes:
    """Frame a body anew, in two pieces and with its trailer if it goes in chunks."""
    if not framing.chunked:
        return data
    half = len(data) // 2
    pieces = filter(None, (data[:half], data[half:]))
    return b"".join(map(encode_chunk, pieces)) + encode_last_chunk(trailer)


def _check_body(data: bytes) -> None:
    """A body in chunks; what h11 reads in it, if it reads it, is the same."""
    body = check_reader(_read_whole(Framing(chunked=True)), data, LONGEST + len(TRAILING))
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    if body.accepted:
        framed = _framed(Framing(chunked=True), body.result.data, [])
        message = _read_by_h11(h11.SERVER, head + framed, b"")
        assert (message.body, message.rest) == (body.result.data, b"")
    try:
        raw = _read_by_h11(h11.SERVER, head + data, b"")
    except h11.RemoteProtocolError:
        return
    # h11 reads more than we do: bare LF, for one.  What both read must be the same.
    if body.accepted:
        assert (raw.body, raw.rest) == (body.result.data, body.rest)


# -- responses


def _check_response(data: bytes) -> None:
    """The first byte chooses the method of the request."""
    if not data:
        return
    method, data = _METHODS[data[0] % len(_METHODS)], data[1:]
    head = check_reader(http1.read_response, data, _HEAD_LIMIT)
    if not head.accepted:
        return
    response: HttpResponse = head.result
    accepted(connect_udp.check_response, response)
    assert len(connect_udp.proxy_error(response)) <= connect_udp.ERROR_LIMIT
    framing = accepted(response_framing, response, method)
    # Neither has a body, nor goes on to the client without its protocol.
    if framing is None or response.status == 101 or method == b"CONNECT":
        return
    body = read_outcome(_read_whole(framing, 502), head.rest, len(head.rest), 1)
    if not body.accepted:
        assert issubclass(body.result[0], ProtocolError)
        return
    chunked = framing.chunked or framing.until_close
    _check_received_response(method, data, response, body.result.data)
    fields = response_fields(response, framing, chunked, _PSEUDONYM, framing.chunked)
    whole = body.result._replace(trailer=trailer_fields(body.result.trailer, response))
    _check_written_response(method, response._replace(fields=fields), chunked, whole)


def _check_received_response(
    method: bytes, data: bytes, response: HttpResponse, body: bytes
) -> None:
    """Check that h11 finds the same names and body in what the origin sent, if it reads that."""
    try:
        message = _read_by_h11(h11.CLIENT, data, method)
    except h11.RemoteProtocolError:
        return
    if response.status >= 200:
        names = [name for name, _ in _lowered(message.head.headers)]
        assert names == [name for name, _ in _lowered(response.fields)]
        assert message.body == body


def _check_written_response(
    method: bytes, response: HttpResponse, chunked: bool, body: _Whole
) -> None:
    response = response._replace(fields=_without_controls(response.fields))
    trailer = _without_controls(body.trailer)
    framed = _framed(Framing(chunked=chunked), body.data, trailer)
    written = http1.encode_response(response) + framed
    message = _read_by_h11(h11.CLIENT, written + TRAILING, method)
    assert message.head.status_code == response.status
    assert bytes(message.head.reason).strip(b" \t") == response.phrase.strip(b" \t"), message
    assert _lowered(message.head.headers) == _lowered(response.fields)
    assert (message.body, message.rest) == (body.data, TRAILING), message
    assert _lowered(message.trailer) == [(name.lower(), value) for name, value in trailer]
    assert not (response.status in _BODILESS or response.status < 200) or not body.data


def _without_controls(fields: Fields) -> Fields:
    """Replace control characters, which go on to the client; h11 refuses some of them."""
    return [(name, _CONTROLS.sub(b"?", value)) for name, value in fields]


TARGETS = (
    Target("http-request", _check_request, _WORDS, 1024, _LIMITS),
    Target(
        "connect-udp",
        _check_stream_of_datagrams,
        (
            *(b"192.0.2.1/443/", b"example.com/53/", b"2001%3Adb8%3A%3A1/53/", b"/", b"%3A", b"%"),
            *(b"0x7f.1", b"%5B%3A%3A1%5D", b"%00", b"65535", b"Content-Length: 0\r\n", b"\r\n"),
            *(
                b"\0\6\0hello",
                b"\0\1\0",
                b"\0\2\1x",
                b"\x40\0",
                b"\xc0" + bytes(7),
                b"\x80\0\x40\0",
            ),
        ),
        512,
        _LIMITS | _CAPSULE_LIMITS,
    ),
    Target("http-body", _check_body, _WORDS, 1024, _LIMITS),
    Target("http-response", _check_response, _WORDS, 1024, _LIMITS),
)
