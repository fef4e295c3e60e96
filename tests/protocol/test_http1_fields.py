"""Fields that go on to the next hop: as seen on the wire, and by the functions that choose them."""

from __future__ import annotations

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.http1 import Fields, HttpRequest, HttpResponse, Origin
from netproxy.protocol.http.http1_message import (
    NONE,
    Framing,
    request_fields,
    response_fields,
    upgrade_of,
)
from tests.support.origin import Message, Rig, answers, get

ORIGIN = Origin(Address("a.test", 80), b"A.test:80", b"/")
VIA = (b"Via", b"1.1 us")


def request_at_origin(*fields: bytes, method: bytes = b"GET", body: bytes = b"") -> Message:
    """Send a request through a proxy; return it as it arrives at the origin."""
    with Rig() as rig:
        client = rig.client(get(b"a.test", b"/", *fields).replace(b"GET", method, 1) + body)
        assert client.answer(method).status == 200
    [request] = rig.origin.requests()
    assert request.whole
    return request


def answer_at_client(*fields: bytes) -> Message:
    """Return an answer with `fields` as it arrives at the client."""
    with Rig(
        answers(
            b"HTTP/1.1 200 OK\r\n"
            + b"".join(field + b"\r\n" for field in fields)
            + b"Content-Length: 2\r\n\r\nok"
        )
    ) as rig:
        answer = rig.client(get(b"a.test")).answer()
    assert answer.body == b"ok"
    return answer


def test_request_keeps_its_fields_in_order_and_gets_via() -> None:
    request = request_at_origin(
        b"B: 1",
        b"a: 2",
        b"b: 3",
        b"Accept: */*",
        b"X-Odd:  \tone \t two\t ",
        b"X-Empty:",
        b"X-8: \xff",
    )
    [via] = request.get(b"via")
    assert via.startswith(b"1.1 netproxy-") and request.fields == [
        (b"Host", b"a.test"),
        (b"B", b"1"),
        (b"a", b"2"),
        (b"b", b"3"),
        (b"Accept", b"*/*"),
        (b"X-Odd", b"one \t two"),
        (b"X-Empty", b""),
        (b"X-8", b"\xff"),
        (b"Via", via),
    ]


def test_answer_keeps_its_fields_in_order_and_gets_via() -> None:
    answer = answer_at_client(
        b"Server: a",
        b"Set-Cookie: b=c",
        b"set-cookie: d=e",
        b"WWW-Authenticate: Basic",
        b"Allow: GET",
    )
    [via] = answer.get(b"via")
    assert via.startswith(b"1.1 netproxy-") and answer.fields == [
        (b"Server", b"a"),
        (b"Set-Cookie", b"b=c"),
        (b"set-cookie", b"d=e"),
        (b"WWW-Authenticate", b"Basic"),
        (b"Allow", b"GET"),
        (b"Via", via),
        (b"Content-Length", b"2"),
    ]


@pytest.mark.parametrize(
    "options",
    [
        b"host, content-length, x-foo",
        b"Host,Content-Length,X-Foo",
        b"close, x-foo, host, via, content-length",
        b"x-foo ,, connection,\tcontent-length, transfer-encoding, proxy-authorization, host",
    ],
)
def test_connection_removes_the_fields_it_names_except_those_we_write(options: bytes) -> None:
    """Hazard 55."""
    request = request_at_origin(
        b"X-Foo: gone",
        b"X-Foo: too",
        b"X-Foobar: stays",
        b"Content-Length: 5",
        b"Connection: " + options,
        method=b"POST",
        body=b"hello",
    )
    assert request.get(b"host") == [b"a.test"]
    assert (request.get(b"content-length"), request.body) == ([b"5"], b"hello")
    assert (request.get(b"x-foo"), request.get(b"x-foobar")) == ([], [b"stays"])
    assert len(request.get(b"via")) == 1
    assert b"connection" not in request.names()


def test_options_of_several_connection_fields_all_count() -> None:
    """Hazard 55."""
    request = request_at_origin(
        b"Connection: x-one",
        b"X-One: a",
        b"connection: x-two, x-three",
        b"X-Two: b",
        b"x-three: c",
        b"X-Four: d",
    )
    assert request.names() == {b"host", b"x-four", b"via"}


def test_transfer_encoding_named_by_connection_is_kept() -> None:
    """Hazard 55."""
    request = request_at_origin(
        b"Transfer-Encoding: chunked",
        b"Connection: transfer-encoding, host",
        method=b"POST",
        body=b"5\r\nhello\r\n0\r\n\r\n",
    )
    assert (request.get(b"transfer-encoding"), request.body) == ([b"chunked"], b"hello")


def test_connection_of_an_answer_removes_named_fields_except_its_length() -> None:
    """Hazard 55."""
    answer = answer_at_client(
        b"Connection: x-foo, content-length, via, keep-alive",
        b"X-Foo: gone",
        b"X-Bar: stays",
        b"Keep-Alive: timeout=5",
    )
    assert answer.names() == {b"x-bar", b"via", b"content-length"}


def test_connection_option_named_connection_is_ignored() -> None:
    """Hazard 55."""
    assert request_at_origin(b"Connection: connection, keep-alive", b"Keep-Alive: 5").names() == {
        b"host",
        b"via",
    }


@pytest.mark.parametrize(
    "field",
    [
        b"Proxy-Authorization: Basic YTpi",
        b"Proxy-Connection: keep-alive",
        b"Keep-Alive: timeout=5",
        b"TE: gzip, deflate;q=0.5",
        b"Trailer: X",
        b"Connection: keep-alive",
        b"Upgrade: h2c",
        b"PROXY-CONNECTION: close",
        b"proxy-authorization: x",
    ],
)
def test_hop_by_hop_field_of_a_request_is_not_forwarded(field: bytes) -> None:
    """Hazard 56."""
    assert request_at_origin(field, b"X: y").names() == {b"host", b"x", b"via"}


@pytest.mark.parametrize(
    "field",
    [
        b"Keep-Alive: timeout=5",
        b"Proxy-Connection: keep-alive",
        b"Proxy-Authenticate: Basic",
        b"Proxy-Authentication-Info: nextnonce=a",
        b"Upgrade: h2c",
        b"Connection: close",
        b"Trailer: X",
        b"Connection: upgrade",
        b"TE: trailers",
    ],
)
def test_hop_by_hop_field_of_an_answer_is_not_forwarded(field: bytes) -> None:
    """Hazard 56."""
    assert answer_at_client(field, b"X: y").names() == {b"x", b"via", b"content-length"}


@pytest.mark.parametrize(
    "fields,via",
    [
        ([], b"1.1 us"),
        ([(b"Via", b"1.0 a")], b"1.0 a, 1.1 us"),
        ([(b"via", b"1.0 a, 1.1 b (c)"), (b"VIA", b"2 d")], b"1.0 a, 1.1 b (c), 2 d, 1.1 us"),
    ],
)
def test_via_is_extended_in_one_field(fields: Fields, via: bytes) -> None:
    assert request_fields(HttpRequest(b"GET", b"", 1, fields), ORIGIN, NONE, b"us", None) == [
        (b"Host", b"A.test:80"),
        (b"Via", via),
    ]
    assert response_fields(HttpResponse(1, 200, b"OK", fields), NONE, False, b"us") == [
        (b"Via", via)
    ]


@pytest.mark.parametrize("value", [b"trailers", b"gzip, Trailers ,deflate;q=0.5"])
def test_wish_for_trailers_is_written_anew(value: bytes) -> None:
    """Hazard 56: of TE, which is for one hop, we pass on what we can do ourselves."""
    request = request_at_origin(b"Connection: keep-alive, TE", b"TE: " + value)
    assert (request.get(b"te"), request.get(b"connection")) == ([b"trailers"], [b"TE"])
    assert request.names() == {b"host", b"via", b"te", b"connection"}


def test_http_1_0_client_cannot_wish_for_trailers() -> None:
    request = HttpRequest(b"GET", b"", 0, [(b"TE", b"trailers")])
    assert [name for name, _ in request_fields(request, ORIGIN, NONE, b"us", None)] == [
        b"Host",
        b"Via",
    ]


def test_wish_for_trailers_and_an_upgrade_share_one_connection_field() -> None:
    """Hazard 57."""
    fields = [(b"Connection", b"TE, Upgrade"), (b"TE", b"trailers"), (b"Upgrade", b"websocket")]
    request = HttpRequest(b"GET", b"", 1, fields)
    assert request_fields(request, ORIGIN, NONE, b"us", b"websocket")[2:] == [
        (b"Connection", b"TE, Upgrade"),
        (b"TE", b"trailers"),
        (b"Upgrade", b"websocket"),
    ]


def test_via_names_the_received_version() -> None:
    assert request_fields(HttpRequest(b"GET", b"", 0, []), ORIGIN, NONE, b"us", None)[-1] == (
        b"Via",
        b"1.0 us",
    )
    assert response_fields(HttpResponse(0, 200, b"OK", []), Framing(), True, b"us")[0] == (
        b"Via",
        b"1.0 us",
    )


@pytest.mark.parametrize(
    "method,value,forwarded",
    [
        (b"OPTIONS", b"5", b"4"),
        (b"TRACE", b"1", b"0"),
        (b"OPTIONS", b"0", b"0"),
        (b"OPTIONS", b"010", b"9"),
        (b"OPTIONS", b"x", b"x"),
        (b"OPTIONS", b"9" * 5000, b"9" * 5000),
        (b"GET", b"5", b"5"),
        (b"GET", b"0", b"0"),
        (b"options", b"5", b"5"),
    ],
)
def test_max_forwards_is_decremented_for_options_and_trace_only(
    method: bytes, value: bytes, forwarded: bytes
) -> None:
    fields = request_fields(
        HttpRequest(method, b"", 1, [(b"Max-Forwards", value)]), ORIGIN, NONE, b"us", None
    )
    assert [value for name, value in fields if name == b"Max-Forwards"] == [forwarded]


@pytest.mark.parametrize(
    "fields,framing,expected",
    [
        ([(b"Content-Length", b"5")], Framing(length=5), [(b"Content-Length", b"5")]),
        (
            [(b"Content-Length", b"5, 5"), (b"content-length", b"05")],
            Framing(length=5),
            [(b"Content-Length", b"5")],
        ),
        ([(b"Content-Length", b"0")], NONE, [(b"Content-Length", b"0")]),
        ([], NONE, []),
        (
            [(b"Transfer-Encoding", b"Chunked")],
            Framing(chunked=True),
            [(b"Transfer-Encoding", b"chunked")],
        ),
    ],
)
def test_framing_of_a_request_is_written_anew(
    fields: Fields, framing: Framing, expected: Fields
) -> None:
    assert request_fields(HttpRequest(b"PUT", b"", 1, fields), ORIGIN, framing, b"us", None)[
        1:
    ] == [VIA, *expected]


@pytest.mark.parametrize(
    "status,fields,framing,chunked,expected",
    [
        (200, [(b"Content-Length", b"5")], Framing(length=5), False, [(b"Content-Length", b"5")]),
        (200, [(b"Content-Length", b"5,5")], Framing(length=5), False, [(b"Content-Length", b"5")]),
        (
            200,
            [(b"Content-Length", b"5"), (b"content-length", b"5")],
            Framing(length=5),
            False,
            [(b"Content-Length", b"5")],
        ),
        (200, [(b"Content-Length", b"0")], NONE, False, [(b"Content-Length", b"0")]),
        (
            200,
            [(b"Transfer-Encoding", b"chunked")],
            Framing(chunked=True),
            True,
            [(b"Transfer-Encoding", b"chunked")],
        ),
        (200, [(b"Transfer-Encoding", b"chunked")], Framing(chunked=True), False, []),
        (200, [], Framing(), True, [(b"Transfer-Encoding", b"chunked")]),
        (200, [], Framing(), False, []),
        (304, [(b"Content-Length", b"5")], NONE, False, [(b"Content-Length", b"5")]),
        (304, [(b"Content-Length", b"x")], NONE, False, []),
        (304, [(b"Content-Length", b"5"), (b"Content-Length", b"6")], NONE, False, []),
        (304, [(b"Content-Length", b"9" * 5000)], NONE, False, []),
        (204, [(b"Content-Length", b"5")], NONE, False, []),
        (204, [(b"Transfer-Encoding", b"chunked")], NONE, False, []),
        (103, [(b"Content-Length", b"5")], NONE, False, []),
    ],
)
def test_framing_of_an_answer_is_written_anew(
    status: int, fields: Fields, framing: Framing, chunked: bool, expected: Fields
) -> None:
    assert response_fields(HttpResponse(1, status, b"", fields), framing, chunked, b"us") == [
        VIA,
        *expected,
    ]


@pytest.mark.parametrize(
    "connection,upgrade,protocol",
    [
        (b"Upgrade", b"websocket", b"websocket"),
        (b"keep-alive, upgrade", b"WebSocket", b"websocket"),
        (b"", b"websocket", None),
        (b"keep-alive", b"websocket", None),
        (b"Upgrade", b"h2c", None),
        (b"Upgrade", b"websocket, h2c", None),
        (b"Upgrade", b"", None),
        (b"Upgrade", b"TLS/1.0", None),
        (b"upgrades", b"websocket", None),
        (b"Upgrade", b"websocket/13", None),
    ],
)
def test_only_a_well_formed_websocket_upgrade_passes(
    connection: bytes, upgrade: bytes, protocol: bytes | None
) -> None:
    """Hazard 57."""
    assert upgrade_of([(b"Connection", connection), (b"Upgrade", upgrade)]) == protocol


def test_upgrade_of_a_request_is_written_anew() -> None:
    """Hazard 57."""
    fields = [
        (b"Connection", b"upgrade, x-foo"),
        (b"Upgrade", b"WebSocket"),
        (b"X-Foo", b"a"),
        (b"Sec-WebSocket-Key", b"b"),
    ]
    assert request_fields(
        HttpRequest(b"GET", b"", 1, fields), ORIGIN, NONE, b"us", b"websocket"
    ) == [
        (b"Host", b"A.test:80"),
        (b"Sec-WebSocket-Key", b"b"),
        VIA,
        (b"Connection", b"Upgrade"),
        (b"Upgrade", b"websocket"),
    ]
