"""A second opinion on all that is forwarded: what h11 reads at one end, it reads at the other."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.origin import OK, OriginConnection, Rig, answers_and_closes, get

h11 = pytest.importorskip("h11")

HOP_BY_HOP = {
    b"connection",
    b"proxy-connection",
    b"keep-alive",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"proxy-authorization",
    b"proxy-authenticate",
    b"via",
    b"host",
    b"content-length",
}
LONG = bytes(range(256)) * 1000

REQUESTS = {
    "GET": (b"/", get(b"a.test")),
    "query": (
        b"/a?b=c&d=%20",
        get(
            b"a.test",
            b"/a?b=c&d=%20",
            b"Accept: */*",
            b"X-Empty:",
            b"X-Obs: \xff\xfe",
            b"X: 1",
            b"x: 2",
            b"X: 3",
        ),
    ),
    "length": (b"/", get(b"a.test", b"/", b"Content-Length: 5") + b"hello"),
    "length 0": (b"/", get(b"a.test", b"/", b"Content-Length: 0").replace(b"GET", b"POST", 1)),
    "long body": (
        b"/",
        get(b"a.test", b"/", b"Content-Length: %d" % len(LONG)).replace(b"GET", b"PUT", 1) + LONG,
    ),
    "chunks": (
        b"/",
        get(b"a.test", b"/", b"Transfer-Encoding: chunked").replace(b"GET", b"POST", 1)
        + b"5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nX: y\r\n\r\n",
    ),
    "long chunk": (
        b"/",
        get(b"a.test", b"/", b"Transfer-Encoding: chunked").replace(b"GET", b"POST", 1)
        + b"%x\r\n%b\r\n0\r\n\r\n" % (len(LONG), LONG),
    ),
    "options": (b"*", get(b"a.test", b"").replace(b"GET", b"OPTIONS", 1)),
    "hop by hop": (
        b"/",
        get(
            b"a.test",
            b"/",
            b"Connection: keep-alive, x-a",
            b"Keep-Alive: 5",
            b"TE: trailers",
            b"Proxy-Connection: a",
            b"Proxy-Authorization: Basic YTpi",
            b"Authorization: Basic YTpi",
        ),
    ),
    "HTTP/1.0": (
        b"/",
        get(b"a.test", b"/", b"Content-Length: 5").replace(b"1.1", b"1.0", 1) + b"hello",
    ),
    "websocket": (
        b"/",
        get(
            b"a.test", b"/", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: a"
        ),
    ),
    "expect": (
        b"/",
        get(b"a.test", b"/", b"Expect: 100-continue", b"Content-Length: 5") + b"hello",
    ),
}
RESPONSES = {
    "length": (b"GET", OK),
    "length 0": (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "fields": (
        b"GET",
        b"HTTP/1.1 302 Found \xe9\r\nLocation: /x\r\nSet-Cookie: a=b\r\nset-cookie: c=d\r\nX-Obs: \xff\r\nX-Empty:\r\n"
        b"Content-Length: 2\r\n\r\nok",
    ),
    "long": (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(LONG) + LONG),
    "chunks": (
        b"GET",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n3e800\r\n"
        + LONG
        + b"\r\n0\r\nX: y\r\n\r\n",
    ),
    "until close": (b"GET", b"HTTP/1.1 200 OK\r\n\r\n" + LONG),
    "until close, empty": (b"GET", b"HTTP/1.1 200 OK\r\n\r\n"),
    "HTTP/1.0": (b"GET", b"HTTP/1.0 200 OK\r\nServer: a\r\n\r\nhello"),
    "HTTP/1.0 with a length": (b"GET", OK.replace(b"1.1", b"1.0")),
    "interim": (
        b"GET",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
    ),
    "HEAD": (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
    "HEAD of chunks": (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "204": (b"DELETE", b"HTTP/1.1 204 No Content\r\n\r\n"),
    "304": (b"GET", b'HTTP/1.1 304 Not Modified\r\nETag: "a"\r\nContent-Length: 5\r\n\r\n'),
    "no phrase": (b"GET", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok"),
    "hop by hop": (
        b"GET",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nKeep-Alive: 5\r\nProxy-Authenticate: Basic\r\nContent-Length: 2\r\n\r\nok",
    ),
}


def events(connection: Any, raw: bytes) -> tuple[list[Any], bytes]:
    """The heads that h11 sees and the body, to the end of the message."""
    connection.receive_data(raw)
    connection.receive_data(b"")
    heads, body = [], b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(
            event, (h11.Request, h11.Response, h11.InformationalResponse, h11.Data)
        ), event
        if isinstance(event, h11.Data):
            body += event.data
        else:
            heads.append(event)
    return heads, body


def end_to_end(head: Any) -> list[tuple[bytes, bytes]]:
    return [field for field in head.headers if field[0] not in HOP_BY_HOP]


def requested(raw: bytes) -> tuple[Any, bytes]:
    [head], body = events(h11.Connection(h11.SERVER, 1 << 20), raw)
    return head, body


def answered(method: bytes, raw: bytes) -> tuple[list[Any], bytes]:
    connection = h11.Connection(h11.CLIENT, 1 << 20)
    connection.send(h11.Request(method=method, target=b"/", headers=[(b"Host", b"a.test")]))
    connection.send(h11.EndOfMessage())
    return events(connection, raw)


@pytest.mark.parametrize("path,raw", REQUESTS.values(), ids=REQUESTS)
def test_h11_reads_the_request_that_the_client_sent(path: bytes, raw: bytes) -> None:
    with Rig(lambda connection: (connection.request(), connection.send(OK))) as rig:
        assert rig.client(raw).answer().body == b"ok"
    sent, body = requested(raw)
    arrived, arrived_body = requested(bytes(rig.origin.connections[0].seen))
    assert (arrived.method, arrived.target, arrived.http_version) == (sent.method, path, b"1.1")
    assert end_to_end(arrived) == end_to_end(sent) and arrived_body == body
    assert [value for name, value in arrived.headers if name == b"host"] == [b"a.test"]


@pytest.mark.parametrize("method,raw", RESPONSES.values(), ids=RESPONSES)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_h11_reads_the_answer_that_the_origin_gave(
    method: bytes, raw: bytes, version: bytes
) -> None:
    with Rig(answers_and_closes(raw)) as rig:
        client = rig.client(
            get(b"a.test", b"/", b"Connection: close")
            .replace(b"GET", method, 1)
            .replace(b"HTTP/1.1", b"HTTP/" + version, 1)
        )
        client.rest()
    given, body = answered(method, raw)
    arrived, arrived_body = answered(method, bytes(client.seen))
    if version == b"1.0":
        given = given[-1:]
    assert [(one.status_code, one.reason, one.http_version) for one in arrived] == [
        (one.status_code, one.reason, b"1.1") for one in given
    ]
    assert [end_to_end(one) for one in arrived] == [end_to_end(one) for one in given]
    assert arrived_body == body and client.end == "closed"


def test_h11_reads_the_tunnel_that_opens() -> None:
    def play(connection: OriginConnection) -> None:
        connection.send(b"data")

    with Rig(play) as rig:
        client = rig.client(b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\n\r\n")
        client.head()
        client.take(4)
    connection = h11.Connection(h11.CLIENT)
    connection.send(
        h11.Request(method=b"CONNECT", target=b"a.test:443", headers=[(b"Host", b"a.test")])
    )
    connection.send(h11.EndOfMessage())
    connection.receive_data(bytes(client.seen))
    head = connection.next_event()
    assert (head.status_code, head.reason, list(head.headers)) == (
        200,
        b"Connection established",
        [],
    )
    assert connection.next_event() is h11.PAUSED and connection.trailing_data == (b"data", False)


@pytest.mark.parametrize(
    "raw,status",
    [
        (get(b"a.test", b"/", b"Content-Length: x"), 400),
        (get(b"a.test:x"), 400),
        (b"CONNECT a.test:25 HTTP/1.1\r\nHost: a\r\n\r\n", 403),
    ],
)
def test_h11_reads_our_refusals(raw: bytes, status: int) -> None:
    with Rig() as rig:
        client = rig.client(raw)
        client.rest()
    [head], body = answered(b"GET", bytes(client.seen))
    fields = dict(head.headers)
    assert (head.status_code, int(fields[b"content-length"]), fields[b"connection"]) == (
        status,
        len(body),
        b"close",
    )
