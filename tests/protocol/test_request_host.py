"""The host of an HTTP/1 request, as the first bytes of a connection name it."""

from __future__ import annotations

import pytest

from netproxy.errors import ProtocolError
from netproxy.protocol.http.request_host import HEAD_LIMIT, parse_request_host

NAMED = {
    "a name": (b"GET / HTTP/1.1\r\nHost: a.example\r\n", "a.example"),
    "a name and a port": (b"GET / HTTP/1.1\r\nHost: a.example:8080\r\n", "a.example"),
    "a name behind other fields": (
        b"POST /x HTTP/1.0\r\nAccept: */*\r\nX-Host: b.example\r\nhOST:A.Example \r\n",
        "a.example",
    ),
    "lines without CR": (b"GET / HTTP/1.1\nHost: a.example\n", "a.example"),
    "no host": (b"GET / HTTP/1.0\r\n\r\n", ""),
    "no host, with a body": (b"PUT / HTTP/1.0\r\nA: b\r\n\r\nHost: a.example\r\n", ""),
    "an empty host": (b"GET / HTTP/1.1\r\nHost: \r\n", ""),
    "an IPv4 address": (b"GET / HTTP/1.1\r\nHost: 192.0.2.1:80\r\n", ""),
    "an IPv6 address": (b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n", ""),
    "a name with a slash": (b"GET / HTTP/1.1\r\nHost: a/b\r\n", ""),
    "a name with ESC": (b"GET / HTTP/1.1\r\nHost: a\x1b.example\r\n", ""),
    "two names in one field": (b"GET / HTTP/1.1\r\nHost: a.example, b.example\r\n", ""),
}
INVALID = {
    "TLS": b"\x16\x03\x01",
    "SSH": b"SSH-2.0-x\r\n",
    "SOCKS5": b"\x05\x01\x00",
    "a lower-case method": b"get / HTTP/1.1\r\n",
    "a long method": b"A" * 21,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "RTSP": b"OPTIONS rtsp://a.example RTSP/1.0\r\n",
    "SMTP": b"EHLO a.example\r\n",
    "SIP": b"INVITE sip:a@a.example SIP/2.0\r\n",
    "a long line": b"GET /" + b"a" * HEAD_LIMIT,
    "a long head": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (HEAD_LIMIT // 6),
    "a name beyond the limit": b"GET / HTTP/1.1\r\n"
    + b"a: b\r\n" * (HEAD_LIMIT // 6)
    + b"Host: a.example\r\n\r\n",
}


@pytest.mark.parametrize(("data", "host"), NAMED.values(), ids=NAMED)
def test_request_gives_its_host(data: bytes, host: str) -> None:
    assert parse_request_host(data) == host
    assert parse_request_host(data + b"Host: other.example\r\n\r\n") == host


@pytest.mark.parametrize(("data", "host"), NAMED.values(), ids=NAMED)
def test_request_byte_by_byte_gives_the_same_host(data: bytes, host: str) -> None:
    results = [parse_request_host(data[:end]) for end in range(1, len(data) + 1)]
    given = [result for result in results if result is not None]
    assert given[0] == host
    assert set(given) == {host}


@pytest.mark.parametrize("data", INVALID.values(), ids=INVALID)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_request_host(data)
