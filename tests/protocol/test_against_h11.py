"""Messages that we read and write anew mean the same to h11, another implementation."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.errors import ProtocolError
from netproxy.net.stream import complete
from netproxy.protocol.http1 import (
    HttpRequest,
    encode_request,
    encode_response,
    read_request,
    read_response,
)
from netproxy.protocol.http.http1_message import (
    Framing,
    encode_chunk,
    request_framing,
    response_framing,
)
from tests.support.readers import BytesReader, read_body

h11 = pytest.importorskip("h11")

REQUESTS = {
    "origin form": b"GET /x?y=z HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute form": b"GET http://a:81/ HTTP/1.1\r\nHost: a:81\r\nAccept: */*\r\n\r\n",
    "asterisk form": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
    "empty line before": b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "white space and order": (
        b"GET / HTTP/1.1\r\nHOST:\ta \r\nX: 2\r\nx:1\r\nY:\r\nZ: a \tb\r\n\r\n"
    ),
    "bytes over 127": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\xfcc\xc3\xbc\r\n\r\n",
    "length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    "length 0": b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "chunks": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;a=b\r\nhello\r\n1 \r\n!\r\n0\r\nX: y\r\n\r\n",
    "no chunk": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "body of a GET": b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n\r\n",
    "upgrade": b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
}
RESPONSES = {
    "length": (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
    "until close": (b"GET", b"HTTP/1.1 200 OK\r\n\r\nhello"),
    "HTTP/1.0": (b"GET", b"HTTP/1.0 404 Not Found\r\nContent-Type: text/plain\r\n\r\nhello"),
    "chunks": (
        b"GET",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n",
    ),
    "no phrase": (b"GET", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"),
    "space before a colon": (
        b"GET",
        b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\nX\t:y\r\n\r\nhello",
    ),
    "equal names": (
        b"GET",
        b"HTTP/1.1 302 Found\r\nSet-Cookie: b\r\nSet-Cookie: a\r\nContent-Length: 0\r\n\r\n",
    ),
    "HEAD": (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
    "204": (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    "304": (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    "100": (b"GET", b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n"),
    "103": (b"GET", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
    "407 to CONNECT": (
        b"CONNECT",
        b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="a"\r\nContent-Length: 5\r\n\r\nhello',
    ),
}


def lowered(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in fields]


def read_and_frame(reader: BytesReader, framing: Framing) -> tuple[bytes, bytes]:
    """Return the data of a body, and its bytes as they are sent on."""
    pieces = list(read_body(reader, framing))
    data = b"".join(pieces)
    return data, b"".join(map(encode_chunk, [*pieces, b""])) if framing.chunked else data


def read_by_h11(connection: Any, raw: bytes, close: bool = False) -> tuple[Any, bytes]:
    """Return the head and the body that h11 reads."""
    connection.receive_data(raw)
    if close:
        connection.receive_data(b"")
    head, data = connection.next_event(), b""
    if isinstance(head, h11.InformationalResponse):
        return head, data
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data), event
        data += event.data
    return head, data


@pytest.mark.parametrize("raw", REQUESTS.values(), ids=REQUESTS)
def test_h11_reads_the_request_that_we_read(raw: bytes) -> None:
    reader = BytesReader(raw)
    request = complete(read_request(reader))
    body, framed = read_and_frame(reader, request_framing(request))
    head, data = read_by_h11(h11.Connection(h11.SERVER), encode_request(request) + framed)
    assert (head.method, head.target, head.http_version) == (request.method, request.target, b"1.1")
    assert list(head.headers) == lowered(request.fields)
    assert data == body
    assert reader.rest() == b""


@pytest.mark.parametrize(("method", "raw"), RESPONSES.values(), ids=RESPONSES)
def test_h11_reads_the_response_that_we_read(method: bytes, raw: bytes) -> None:
    reader = BytesReader(raw)
    response = complete(read_response(reader))
    framing = response_framing(response, method)
    body, framed = read_and_frame(reader, framing)
    client = h11.Connection(h11.CLIENT)
    client.send(
        h11.Request(
            method=method,
            target=b"a:443" if method == b"CONNECT" else b"/",
            headers=[(b"Host", b"a")],
        )
    )
    client.send(h11.EndOfMessage())
    head, data = read_by_h11(client, encode_response(response) + framed, close=framing.until_close)
    assert (head.status_code, head.reason, head.http_version) == (
        response.status,
        response.phrase,
        b"1.1",
    )
    assert list(head.headers) == lowered(response.fields)
    assert data == body
    assert reader.rest() == b""


def test_h11_agrees_on_every_request_that_we_forward() -> None:
    """Hazards 49, 50, 51 and 52."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    names = st.sampled_from(
        [
            b"Transfer-Encoding:",
            b"Content-Length:",
            b"X:",
            b"Connection: close",
            b"Content-Length :",
            b"",
        ]
    )
    values = st.lists(
        st.sampled_from(
            [b"chunked", b"5", b",", b" ", b"\t", b"\r", b"\n", b"\x85", b"\xa0", b"\0", b"+", b"_"]
        ),
        max_size=3,
    )
    lines = st.builds(lambda name, value: name + b"".join(value) + b"\r\n", names, values)

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(st.lists(lines, max_size=3).map(b"".join))
    def check(fields: bytes) -> None:
        try:
            request: HttpRequest = complete(
                read_request(BytesReader(b"POST / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n"))
            )
            framing = request_framing(request)
        except ProtocolError:
            return
        body = b"5\r\nhello\r\n0\r\n\r\n" if framing.chunked else b"x" * (framing.length or 0)
        head, data = read_by_h11(h11.Connection(h11.SERVER), encode_request(request) + body)
        assert data == (b"hello" if framing.chunked else body)
        assert {name for name, _ in head.headers} == {name.lower() for name, _ in request.fields}

    check()
