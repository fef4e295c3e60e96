"""HTTP/1.1 response heads of upstreams, and error responses of our own."""

from __future__ import annotations

import pytest

from netproxy.errors import Reason
from netproxy.net.stream import complete
from netproxy.protocol import http1
from netproxy.protocol.http.http1_error import encode_error
from netproxy.protocol.http1 import HttpError, HttpResponse, encode_response, read_response
from tests.support.alarms import stuck_after
from tests.support.sockets import SECONDS
from tests.support.readers import BytesReader, check_read, check_refused

OK = b"HTTP/1.1 200 OK\r\n"

RESPONSES = {
    "no field": (OK + b"\r\n", HttpResponse(1, 200, b"OK", [])),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\n", HttpResponse(0, 200, b"OK", [])),
    "phrase of many words": (
        b"HTTP/1.1 404 Not  Found \r\n\r\n",
        HttpResponse(1, 404, b"Not  Found ", []),
    ),
    "phrase in UTF-8": (
        b"HTTP/1.1 404 b\xc3\xb6se\r\n\r\n",
        HttpResponse(1, 404, b"b\xc3\xb6se", []),
    ),
    "empty phrase": (b"HTTP/1.1 200 \r\n\r\n", HttpResponse(1, 200, b"", [])),
    "no phrase and no space": (b"HTTP/1.1 200\r\n\r\n", HttpResponse(1, 200, b"", [])),
    "100": (b"HTTP/1.1 100 Continue\r\n\r\n", HttpResponse(1, 100, b"Continue", [])),
    "599": (b"HTTP/1.1 599 x\r\n\r\n", HttpResponse(1, 599, b"x", [])),
    "407 to CONNECT": (
        b"HTTP/1.1 407 Proxy Authentication Required\r\n"
        b'Proxy-Authenticate: Basic realm="a"\r\n\r\n',
        HttpResponse(
            1, 407, b"Proxy Authentication Required", [(b"Proxy-Authenticate", b'Basic realm="a"')]
        ),
    ),
    "fields in their order": (
        OK + b"Set-Cookie: b\r\nX: y\r\nset-cookie: a\r\n\r\n",
        HttpResponse(1, 200, b"OK", [(b"Set-Cookie", b"b"), (b"X", b"y"), (b"set-cookie", b"a")]),
    ),
    # RFC 9112 section 5.1: it is removed from responses.
    "white space before the colon": (
        OK + b"X \t: y\r\n\r\n",
        HttpResponse(1, 200, b"OK", [(b"X", b"y")]),
    ),
    "white space around a value": (
        OK + b"X:\t y z\t \r\n\r\n",
        HttpResponse(1, 200, b"OK", [(b"X", b"y z")]),
    ),
    "empty value": (OK + b"X:\r\n\r\n", HttpResponse(1, 200, b"OK", [(b"X", b"")])),
    "bytes over 127": (
        OK + b"X: \xc3\xbc\r\n\r\n",
        HttpResponse(1, 200, b"OK", [(b"X", b"\xc3\xbc")]),
    ),
}

# RFC 9112 sections 2.2 and 5.2, RFC 9110 section 5.5: a recipient may read these.
LOOSE = {
    "bare LF": b"HTTP/1.1 200 OK\nX: y z\n\n",
    "bare LF behind the status line": b"HTTP/1.1 200 OK\nX: y z\r\n\r\n",
    "bare LF behind a field": OK + b"X: y z\n\r\n",
    "bare LF as the empty line": OK + b"X: y z\r\n\n",
    "obs-fold": OK + b"X: y\r\n z\r\n\r\n",
    "obs-fold with a tab": OK + b"X: y\r\n\t \tz \r\n\r\n",
    "obs-fold with LF": OK + b"X: y\n z\n\n",
    "obs-fold before the value": OK + b"X:\r\n y z\r\n\r\n",
    "obs-fold of white space behind the value": OK + b"X: y z\r\n \t\r\n\r\n",
    "value on three lines": OK + b"X:\n\ty\n\tz\n\n",
}

REFUSED = {
    "HTTP/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\n\r\n",
    "no version": b"HTTP 200 OK\r\n\r\n",
    "ICY": b"ICY 200 OK\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status 099": b"HTTP/1.1 099 OK\r\n\r\n",
    "status 600": b"HTTP/1.1 600 OK\r\n\r\n",
    "status -20": b"HTTP/1.1 -20 OK\r\n\r\n",
    "status in other digits": "HTTP/1.1 ²00 OK\r\n\r\n".encode(),
    "phrase without space": b"HTTP/1.1 200OK\r\n\r\n",
    "two spaces before the status": b"HTTP/1.1  200 OK\r\n\r\n",
    "space before": b" HTTP/1.1 200 OK\r\n\r\n",
    "empty line before": b"\r\n" + OK + b"\r\n",
    "garbage": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "garbage without CR": b"220 smtp.example\n",
    "body alone": b"<html>\r\n\r\n",
    "bare CR in the phrase": b"HTTP/1.1 200 O\rK\r\n\r\n",
    "bare CR in a value": OK + b"X: y\rz\r\n\r\n",
    "NUL in the phrase": b"HTTP/1.1 200 O\0K\r\n\r\n",
    "NUL in a value": OK + b"X: y\0\r\n\r\n",
    "CR CR LF": OK + b"X: y\r\r\n\r\n",
    "CR in a folded line": OK + b"X: y\n z\rw\n\n",
    "NUL in a folded line": OK + b"X: y\r\n z\0\r\n\r\n",
    "white space before the first field": OK + b" X: y\r\n\r\n",
    "folded line before the first field": OK + b" \r\nX: y\r\n\r\n",
    "folded status line": b"HTTP/1.1 200\r\n OK\r\n\r\n",
    "control character in a name": OK + b"X\x01: y\r\n\r\n",
    "control character before the colon": OK + b"X\x0b: y\r\n\r\n",
    "control character for the white space of a fold": OK + b"X: y\r\n\x0bz\r\n\r\n",
    "name and no colon, folded": OK + b"X: y\r\nZ\r\n : z\r\n\r\n",
    "empty name": OK + b": y\r\n\r\n",
    "white space as name": OK + b" : y\r\n\r\n",
    "name not a token": OK + b"X Y: z\r\n\r\n",
    "no colon": OK + b"X\r\n\r\n",
}


@pytest.mark.parametrize(("data", "response"), RESPONSES.values(), ids=RESPONSES)
def test_response_is_read_to_its_last_byte(data: bytes, response: HttpResponse) -> None:
    """Hazards 61 and 65."""
    check_read(read_response, data, response)


@pytest.mark.parametrize(("data", "response"), RESPONSES.values(), ids=RESPONSES)
def test_encoded_response_is_read_back_as_http_1_1(data: bytes, response: HttpResponse) -> None:
    check_read(read_response, encode_response(response), response._replace(minor=1))


def test_response_has_these_bytes() -> None:
    response = HttpResponse(0, 204, b"", [(b"X", b""), (b"x", b"y z")])
    assert encode_response(response) == b"HTTP/1.1 204 \r\nX: \r\nx: y z\r\n\r\n"


@pytest.mark.parametrize("data", LOOSE.values(), ids=LOOSE)
def test_loose_response_is_read_and_encoded_in_canonical_form(data: bytes) -> None:
    """Hazard 141."""
    response = HttpResponse(1, 200, b"OK", [(b"X", b"y z")])
    check_read(read_response, data, response)
    assert encode_response(response) == OK + b"X: y z\r\n\r\n"


def test_folded_line_that_looks_like_a_field_is_a_part_of_the_value() -> None:
    """Hazard 141: the field behind it keeps its own value."""
    data = OK + b"X: y\n Content-Length: 5\r\n\tTransfer-Encoding: chunked\nZ: w\n\n"
    value = b"y Content-Length: 5 Transfer-Encoding: chunked"
    check_read(read_response, data, HttpResponse(1, 200, b"OK", [(b"X", value), (b"Z", b"w")]))


@pytest.mark.parametrize("code", [code for code in (*range(32), 127) if code not in (0, 10, 13)])
def test_value_of_a_response_may_have_control_characters(code: int) -> None:
    """Hazard 141: all but NUL, CR and LF; white space at the ends alone is left out."""
    value = b"y" + bytes((code,)) + b"z"
    check_read(
        read_response, OK + b"X: %b\r\n\r\n" % value, HttpResponse(1, 200, b"OK", [(b"X", value)])
    )


def test_response_has_up_to_500_lines_of_fields() -> None:
    """Hazard 141: a folded line counts like a field."""
    head = OK + b"X: y\r\n" * 300 + b"Z: a\r\n" + b" b\n" * 199
    fields = complete(read_response(BytesReader(head + b"\r\n"))).fields
    assert len(fields) == 301 and fields[-1] == (b"Z", b"a" + b" b" * 199)
    for more in (b" b\n", b"Z: c\n"):
        with pytest.raises(HttpError) as caught:
            complete(read_response(BytesReader(head + more + b"\r\n")))
        assert caught.value.status == 502


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_invalid_response_is_answered_502(data: bytes) -> None:
    """Hazards 52 and 61."""
    check_refused(read_response, data, HttpError, status=502)


def test_fields_over_64_kb_are_answered_502() -> None:
    """Hazard 61."""
    value = b"y" * (65536 - len(b"X: \r\n\r\n"))
    assert complete(read_response(BytesReader(OK + b"X: %b\r\n\r\n" % value))).fields == [
        (b"X", value)
    ]
    with pytest.raises(HttpError) as caught:
        complete(read_response(BytesReader(OK + b"X: %by\r\n\r\n" % value)))
    assert caught.value.status == 502


@pytest.mark.parametrize(
    "head",
    [
        OK + b"X: " + b"y" * 1_000_000,
        OK + b"X: y\r\n" * 200_000,
        b"HTTP/1.1 200 " + b"y" * 1_000_000,
    ],
    ids=["field", "fields", "phrase"],
)
def test_head_of_1_mb_is_answered_502_and_read_up_to_its_limits(head: bytes) -> None:
    """Hazard 61."""
    reader = BytesReader(head, step=4096)
    with pytest.raises(HttpError) as caught:
        complete(read_response(reader))
    assert caught.value.status == 502
    assert reader.taken <= 65536 + len(OK) + 4096


@pytest.mark.parametrize(
    "hostile",
    [
        b"X:" + b" " * 60_000 + b"\0",
        b"X" + b" " * 30_000 + b":" + b" " * 30_000 + b"\0",
        b"X" + b" " * 60_000 + b"\0",
        b"X: y\r\n" + b" " * 60_000 + b"\0",
    ],
    ids=["behind the colon", "on both sides of it", "without a colon", "in a folded line"],
)
def test_field_of_a_response_is_read_in_linear_time(hostile: bytes) -> None:
    with stuck_after(SECONDS), pytest.raises(HttpError):
        complete(read_response(BytesReader(OK + hostile + b"\r\n\r\n")))


def test_error_is_a_complete_response_in_plain_text() -> None:
    """Hazard 71."""
    assert encode_error(403, "not allowed by the rules") == (
        b"HTTP/1.1 403 Forbidden\r\n"
        b"Content-Type: text/plain; charset=us-ascii\r\n"
        b"X-Content-Type-Options: nosniff\r\n"
        b"Content-Length: 25\r\n"
        b"Connection: close\r\n"
        b"\r\n"
        b"not allowed by the rules\n"
    )


def test_error_has_its_length_and_extra_fields() -> None:
    response = encode_error(407, "grün <b>", [(b"Proxy-Authenticate", b'Basic realm="NetProxy"')])
    head, _, body = response.partition(b"\r\n\r\n")
    assert body == b"gr\\xfcn <b>\n"
    assert head.startswith(b"HTTP/1.1 407 Proxy Authentication Required\r\n")
    assert b"\r\nContent-Length: %d\r\n" % len(body) in head
    assert head.endswith(b'\r\nProxy-Authenticate: Basic realm="NetProxy"')


@pytest.mark.parametrize("status", http1.PHRASES)
def test_error_of_every_status_is_read_back(status: int) -> None:
    reader = BytesReader(encode_error(status, "x"))
    response = complete(read_response(reader))
    assert (response.status, response.phrase) == (status, http1.PHRASES[status].encode())
    assert reader.rest() == b"x\n"


def test_every_reason_has_a_status_with_a_phrase() -> None:
    """Hazard 77."""
    assert set(http1.REPLIES) == set(Reason)
    assert set(http1.REPLIES.values()) <= set(http1.PHRASES)
    assert {reason for reason, status in http1.REPLIES.items() if status == 403} == {
        Reason.DENIED,
        Reason.LOOP,
    }
    assert {reason for reason, status in http1.REPLIES.items() if status == 504} == {Reason.TIMEOUT}
    # A loop that Via shows is answered 502 (hazard 70).
    assert http1.REPLIES[Reason.LOOP] == 403


@pytest.mark.parametrize("status", [400, 414, 431, 502])
def test_every_status_of_a_refused_head_has_a_phrase(status: int) -> None:
    assert status in http1.PHRASES
