"""Requests for connect-udp and their answers: what both roles write, read and refuse."""

from __future__ import annotations

import pytest

from netproxy.errors import ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.stream import complete
from netproxy.protocol import http1
from netproxy.protocol.http import connect_udp
from netproxy.protocol.http.connect_udp import (
    asks_for,
    check_response,
    encode_accept,
    encode_request,
    parse_target,
    proxy_error,
    status_field,
)
from netproxy.protocol.http.http1_error import encode_error
from netproxy.protocol.http1 import (
    Fields,
    HttpError,
    HttpRequest,
    HttpResponse,
    read_request,
    read_response,
)
from tests.support.alarms import stuck_after
from tests.support.sockets import SECONDS
from tests.support.readers import BytesReader, check_read

HOST = (b"Host", b"proxy.example")
UPGRADE_FIELDS: Fields = [
    HOST,
    (b"Connection", b"Upgrade"),
    (b"Upgrade", b"connect-udp"),
    (b"Capsule-Protocol", b"?1"),
]
ACCEPT_FIELDS: Fields = UPGRADE_FIELDS[1:]
PREFIX = b"/.well-known/masque/udp/"
LONGEST = b".".join([b"a" * 63, b"a" * 63, b"a" * 63, b"a" * 61])


def get(target: bytes, *more: tuple[bytes, bytes]) -> HttpRequest:
    return HttpRequest(b"GET", target, 1, [*UPGRADE_FIELDS, *more])


TARGETS = {
    # RFC 9298 sections 2 and 3.2
    "RFC 9298, IPv4 in absolute form": (
        b"https://example.org/.well-known/masque/udp/192.0.2.6/443/",
        Address("192.0.2.6", 443),
    ),
    "IPv6 in absolute form": (
        b"https://proxy.example/.well-known/masque/udp/2001%3Adb8%3A%3A42/443/",
        Address("2001:db8::42", 443),
    ),
    "IPv6 in origin form": (PREFIX + b"2001%3Adb8%3A%3A42/443/", Address("2001:db8::42", 443)),
    "IPv6 in lower-case escapes": (
        PREFIX + b"2001%3adb8%3a%3a42/443/",
        Address("2001:db8::42", 443),
    ),
    "IPv6 of zeros": (PREFIX + b"%3A%3A/53/", Address("::", 53)),
    "IPv6 in another spelling": (
        PREFIX + b"2001%3ADB8%3A0%3A0%3A0%3A0%3A0%3A1/53/",
        Address("2001:db8::1", 53),
    ),
    "IPv6 in brackets, as everywhere here": (PREFIX + b"%5B%3A%3A1%5D/53/", Address("::1", 53)),
    "v4-mapped": (PREFIX + b"%3A%3Affff%3A127.0.0.1/53/", Address("127.0.0.1", 53)),
    "loose IPv4": (PREFIX + b"0x7f.1/53/", Address("127.0.0.1", 53)),
    "name": (PREFIX + b"target.example.com/443/", Address("target.example.com", 443)),
    "name in capitals": (PREFIX + b"Target.Example.COM/443/", Address("target.example.com", 443)),
    "name with an underscore and a hyphen": (
        PREFIX + b"_a-b.example/443/",
        Address("_a-b.example", 443),
    ),
    "name with a dot behind": (PREFIX + b"a./443/", Address("a", 443)),
    "name all in escapes": (PREFIX + b"%61%2E%62/443/", Address("a.b", 443)),
    "name of 253 bytes": (PREFIX + LONGEST + b"/443/", Address(LONGEST.decode(), 443)),
    "port 1": (PREFIX + b"a/1/", Address("a", 1)),
    "port 65535": (PREFIX + b"a/65535/", Address("a", 65535)),
    "port with zeros before": (PREFIX + b"a/00053/", Address("a", 53)),
    "http": (b"http://proxy.example:8080" + PREFIX + b"a/53/", Address("a", 53)),
    "scheme in capitals": (b"HTTPS://[::1]:8443" + PREFIX + b"a/53/", Address("a", 53)),
}

REFUSED_TARGETS = {
    # The path.
    "root": b"/",
    "another path": b"/masque/udp/a/443/",
    "path in capitals": b"/.Well-Known/masque/udp/a/443/",
    "path in escapes": b"/%2Ewell-known/masque/udp/a/443/",
    "of connect-ip": b"/.well-known/masque/ip/a/17/",
    "no slash behind": PREFIX + b"a/443",
    "two slashes behind": PREFIX + b"a/443//",
    "two slashes between": PREFIX + b"a//443/",
    "slash before": b"/" + PREFIX + b"a/443/",
    "something before": b"/x" + PREFIX + b"a/443/",
    "something behind": PREFIX + b"a/443/x",
    "one part more": PREFIX + b"a/443/53/",
    "query": PREFIX + b"a/443/?x=y",
    "empty query": PREFIX + b"a/443/?",
    "query instead": b"/?h=a&p=443",
    "fragment": PREFIX + b"a/443/#x",
    "newline behind": PREFIX + b"a/443/\n",
    "no port": PREFIX + b"a/",
    "no host": PREFIX + b"443/",
    "template itself": PREFIX + b"{target_host}/{target_port}/",
    "authority form": b"a:443",
    "asterisk form": b"*",
    "empty": b"",
    # The port.
    "empty port": PREFIX + b"a//",
    "port 0": PREFIX + b"a/0/",
    "port 00000": PREFIX + b"a/00000/",
    "port 65536": PREFIX + b"a/65536/",
    "port 99999": PREFIX + b"a/99999/",
    "port of six digits": PREFIX + b"a/000443/",
    "port of 5000 digits": PREFIX + b"a/" + b"4" * 5000 + b"/",
    "port +443": PREFIX + b"a/+443/",
    "port -443": PREFIX + b"a/-443/",
    "port 4_3": PREFIX + b"a/4_3/",
    "port 0x50": PREFIX + b"a/0x50/",
    "port by name": PREFIX + b"a/https/",
    "port in escapes": PREFIX + b"a/%34%34%33/",
    "port in superscript": PREFIX + b"a/" + "²".encode() + b"/",
    # The host.
    "empty host": PREFIX + b"/443/",
    "IPv6 not escaped": PREFIX + b"2001:db8::42/443/",
    "IPv6 in brackets not escaped": PREFIX + b"[::1]/443/",
    "IPv6 with a zone": PREFIX + b"fe80%3A%3A1%25eth0/443/",
    "IPv6 with a zone by number": PREFIX + b"fe80%3A%3A1%252/443/",
    "IPv6 with an empty zone": PREFIX + b"fe80%3A%3A1%25/443/",
    "IPv6 with a zone not escaped": PREFIX + b"fe80%3A%3A1%eth0/443/",
    "IPv6 in brackets with a zone": PREFIX + b"%5Bfe80%3A%3A1%25eth0%5D/443/",
    "IPv6 of nine groups": PREFIX + b"1%3A2%3A3%3A4%3A5%3A6%3A7%3A8%3A9/443/",
    "IPv6 with a port": PREFIX + b"%5B%3A%3A1%5D%3A53/443/",
    "name with a port": PREFIX + b"a%3A53/443/",
    "IPv4 out of range": PREFIX + b"256.1.1.1/443/",
    "IPv4 of five parts": PREFIX + b"1.2.3.4.5/443/",
    "two dots": PREFIX + b"a..b/443/",
    "one dot": PREFIX + b"./443/",
    "dots to climb": PREFIX + b"../443/",
    "label of 64 bytes": PREFIX + b"a" * 64 + b"/443/",
    "name of 254 bytes": PREFIX + LONGEST + b"a/443/",
    "userinfo": PREFIX + b"user@a/443/",
    "tilde": PREFIX + b"~a/443/",
    "asterisk": PREFIX + b"*/443/",
    "escaped asterisk": PREFIX + b"%2A/443/",
    "not ASCII": PREFIX + "bücher".encode() + b"/443/",
    # Escapes.
    "escape of one digit": PREFIX + b"a%2/443/",
    "escape of no digit": PREFIX + b"a%/443/",
    "escape of other digits": PREFIX + b"a%zz/443/",
    "escape with a sign": PREFIX + b"a%+1/443/",
    "escaped percent": PREFIX + b"a%2525/443/",
    "escaped twice": PREFIX + b"%2561/443/",
    "escaped slash": PREFIX + b"a%2Fb/443/",
    "escaped NUL": PREFIX + b"a%00/443/",
    "escaped CRLF": PREFIX + b"a%0D%0Ab/443/",
    "escaped newline behind": PREFIX + b"a%0A/443/",
    "escaped space": PREFIX + b"a%20b/443/",
    "escaped not ASCII": PREFIX + b"b%C3%BCcher/443/",
    "escaped byte that is no UTF-8": PREFIX + b"%FF/443/",
    # The authority.
    "absolute form without authority": b"https://" + PREFIX + b"a/443/",
    "ftp": b"ftp://proxy.example" + PREFIX + b"a/443/",
    "authority with userinfo": b"https://user@proxy.example" + PREFIX + b"a/443/",
    "authority with port 0": b"https://proxy.example:0" + PREFIX + b"a/443/",
    "authority with port 99999": b"https://proxy.example:99999" + PREFIX + b"a/443/",
    "authority that is no name": b"https://a..b" + PREFIX + b"a/443/",
    "authority with an escape": b"https://a%2E" + PREFIX + b"a/443/",
}

ASKING = {
    "RFC 9298": get(PREFIX + b"a/443/"),
    "whatever the path": get(b"/"),
    "capitals": HttpRequest(
        b"GET", b"/", 1, [HOST, (b"CONNECTION", b"UPGRADE"), (b"UPGRADE", b"CONNECT-UDP")]
    ),
    "no Capsule-Protocol": HttpRequest(
        b"GET", b"/", 1, [HOST, (b"Connection", b"upgrade"), (b"Upgrade", b"connect-udp")]
    ),
    "among other options": HttpRequest(
        b"GET",
        b"/",
        1,
        [HOST, (b"Connection", b"keep-alive ,\tupgrade, x"), (b"Upgrade", b"connect-udp")],
    ),
    "option in a second field": HttpRequest(
        b"GET",
        b"/",
        1,
        [(b"Connection", b"keep-alive"), (b"connection", b"Upgrade"), (b"Upgrade", b"connect-udp")],
    ),
}

NOT_ASKING = {
    "POST": HttpRequest(b"POST", b"/", 1, UPGRADE_FIELDS),
    "HEAD": HttpRequest(b"HEAD", b"/", 1, UPGRADE_FIELDS),
    "CONNECT": HttpRequest(b"CONNECT", b"a:443", 1, UPGRADE_FIELDS),
    "get": HttpRequest(b"get", b"/", 1, UPGRADE_FIELDS),
    "HTTP/1.0": HttpRequest(b"GET", b"/", 0, UPGRADE_FIELDS),
    "no field": HttpRequest(b"GET", b"/", 1, [HOST]),
    "no Connection": HttpRequest(b"GET", b"/", 1, [HOST, (b"Upgrade", b"connect-udp")]),
    "Connection without upgrade": HttpRequest(
        b"GET", b"/", 1, [HOST, (b"Connection", b"keep-alive"), (b"Upgrade", b"connect-udp")]
    ),
    "Connection: upgrades": HttpRequest(
        b"GET", b"/", 1, [HOST, (b"Connection", b"upgrades"), (b"Upgrade", b"connect-udp")]
    ),
    "no Upgrade": HttpRequest(b"GET", b"/", 1, [HOST, (b"Connection", b"Upgrade")]),
    "empty Upgrade": HttpRequest(
        b"GET", b"/", 1, [HOST, (b"Connection", b"Upgrade"), (b"Upgrade", b"")]
    ),
    "websocket": HttpRequest(
        b"GET", b"/", 1, [HOST, (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    ),
    "connect-ip": HttpRequest(
        b"GET", b"/", 1, [HOST, (b"Connection", b"Upgrade"), (b"Upgrade", b"connect-ip")]
    ),
    "connect-udp/1": HttpRequest(
        b"GET", b"/", 1, [HOST, (b"Connection", b"Upgrade"), (b"Upgrade", b"connect-udp/1")]
    ),
    "one of two": HttpRequest(
        b"GET",
        b"/",
        1,
        [HOST, (b"Connection", b"Upgrade"), (b"Upgrade", b"connect-udp, websocket")],
    ),
    "one of two fields": get(b"/", (b"upgrade", b"h2c")),
    "twice": get(b"/", (b"upgrade", b"connect-udp")),
}

REQUESTS = {
    "IPv6": (Address("2001:db8::42", 443), b"2001%3Adb8%3A%3A42/443/"),
    "IPv4": (Address("192.0.2.6", 443), b"192.0.2.6/443/"),
    "name": (Address("_a-b.example", 1), b"_a-b.example/1/"),
    "longest name": (Address(LONGEST.decode(), 65535), LONGEST + b"/65535/"),
}

ACCEPTABLE = {
    "RFC 9298": HttpResponse(1, 101, b"Switching Protocols", ACCEPT_FIELDS),
    "another phrase": HttpResponse(1, 101, b"", ACCEPT_FIELDS),
    "capitals": HttpResponse(
        1, 101, b"", [(b"CONNECTION", b"UPGRADE"), (b"UPGRADE", b"Connect-UDP")]
    ),
    "no Capsule-Protocol": HttpResponse(1, 101, b"", ACCEPT_FIELDS[:2]),
    "among other options": HttpResponse(
        1, 101, b"", [(b"Connection", b"keep-alive, upgrade"), (b"Upgrade", b"connect-udp")]
    ),
    "other fields": HttpResponse(
        1, 101, b"", [*ACCEPT_FIELDS, (b"Proxy-Status", b'a; next-hop="b"'), (b"Server", b"c")]
    ),
}

# A response, and the end of the message about it.
UNACCEPTABLE = {
    "200": (HttpResponse(1, 200, b"OK", ACCEPT_FIELDS), "200"),
    "200 without a field": (HttpResponse(1, 200, b"OK", []), "200"),
    "100": (HttpResponse(1, 100, b"Continue", ACCEPT_FIELDS), "100"),
    "407": (HttpResponse(1, 407, b"", [(b"Proxy-Authenticate", b"Basic realm=a")]), "407"),
    "404": (HttpResponse(1, 404, b"Not Found", []), "404"),
    "no Connection": (HttpResponse(1, 101, b"", ACCEPT_FIELDS[1:]), "101"),
    "Connection without upgrade": (
        HttpResponse(1, 101, b"", [(b"Connection", b"close"), *ACCEPT_FIELDS[1:]]),
        "101",
    ),
    "no Upgrade": (HttpResponse(1, 101, b"", [ACCEPT_FIELDS[0], ACCEPT_FIELDS[2]]), "101"),
    "empty Upgrade": (HttpResponse(1, 101, b"", [ACCEPT_FIELDS[0], (b"Upgrade", b"")]), "101"),
    "websocket": (HttpResponse(1, 101, b"", [ACCEPT_FIELDS[0], (b"Upgrade", b"websocket")]), "101"),
    "two in one Upgrade": (
        HttpResponse(1, 101, b"", [ACCEPT_FIELDS[0], (b"Upgrade", b"connect-udp, h2c")]),
        "101",
    ),
    "twice in one Upgrade": (
        HttpResponse(1, 101, b"", [ACCEPT_FIELDS[0], (b"Upgrade", b"connect-udp, connect-udp")]),
        "101",
    ),
    "two Upgrade": (HttpResponse(1, 101, b"", [*ACCEPT_FIELDS, (b"Upgrade", b"websocket")]), "101"),
    "two equal Upgrade": (
        HttpResponse(1, 101, b"", [*ACCEPT_FIELDS, (b"upgrade", b"connect-udp")]),
        "101",
    ),
    "second Upgrade empty": (HttpResponse(1, 101, b"", [*ACCEPT_FIELDS, (b"Upgrade", b"")]), "101"),
    "Content-Length": (
        HttpResponse(1, 101, b"", [*ACCEPT_FIELDS, (b"Content-Length", b"0")]),
        "101",
    ),
    "content-length": (
        HttpResponse(1, 101, b"", [*ACCEPT_FIELDS, (b"content-length", b"5")]),
        "101",
    ),
    "Transfer-Encoding": (
        HttpResponse(1, 101, b"", [*ACCEPT_FIELDS, (b"Transfer-Encoding", b"chunked")]),
        "101",
    ),
    "Content-Type": (
        HttpResponse(1, 101, b"", [*ACCEPT_FIELDS, (b"Content-Type", b"text/plain")]),
        "101",
    ),
    # Proxy-Status (RFC 9209).
    "error": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; error=dns_error")]),
        "502 (dns_error)",
    ),
    "error of a 101": (
        HttpResponse(1, 101, b"", [(b"Proxy-Status", b"a; error=http_upgrade_failed")]),
        "101 (http_upgrade_failed)",
    ),
    "error without a space": (
        HttpResponse(1, 504, b"", [(b"PROXY-STATUS", b"a;error=dns_timeout")]),
        "504 (dns_timeout)",
    ),
    "error behind others": (
        HttpResponse(
            1, 502, b"", [(b"Proxy-Status", b'"a b"; next-hop=c;  error=x-y/z; details="d"')]
        ),
        "502 (x-y/z)",
    ),
    "error of the second": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a, b; error=dns_error")]),
        "502 (dns_error)",
    ),
    "error in a second field": (
        HttpResponse(
            1, 502, b"", [(b"Proxy-Status", b"a"), (b"proxy-status", b"b; error=dns_error")]
        ),
        "502 (dns_error)",
    ),
    "two errors": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; error=one, b; error=two")]),
        "502 (one)",
    ),
    "status without an error": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; received-status=500")]),
        "502",
    ),
    "error of another name": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; xerror=b; errors=c")]),
        "502",
    ),
    "error without a value": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; error; error=")]),
        "502",
    ),
    "error that is a number": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; error=5")]),
        "502",
    ),
    "error that is a string": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b'a; error="b"')]),
        "502",
    ),
    "error without a semicolon": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"error=dns_error")]),
        "502",
    ),
    "error not ASCII": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; error=b\xff")]),
        "502 (b)",
    ),
    "error of 64 bytes": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; error=" + b"b" * 64)]),
        f"502 ({'b' * 64})",
    ),
    "error of 60000 bytes": (
        HttpResponse(1, 502, b"", [(b"Proxy-Status", b"a; error=" + b"b" * 60000)]),
        f"502 ({'b' * 64})",
    ),
}


@pytest.mark.parametrize(("target", "path"), REQUESTS.values(), ids=REQUESTS)
def test_request_has_these_bytes_and_is_read_back(target: Address, path: bytes) -> None:
    data = encode_request(target, "proxy.example")
    assert data == (
        b"GET /.well-known/masque/udp/" + path + b" HTTP/1.1\r\n"
        b"Host: proxy.example\r\n"
        b"Connection: Upgrade\r\n"
        b"Upgrade: connect-udp\r\n"
        b"Capsule-Protocol: ?1\r\n"
        b"\r\n"
    )
    check_read(read_request, data, get(PREFIX + path))
    request = complete(read_request(BytesReader(data)))
    assert asks_for(request) and parse_target(request) == target


def test_request_carries_credentials() -> None:
    data = encode_request(Address("a", 53), "[2001:db8::1]:8080", b"Basic YTpi")
    assert complete(read_request(BytesReader(data))).fields == [
        (b"Host", b"[2001:db8::1]:8080"),
        *ACCEPT_FIELDS,
        (b"Proxy-Authorization", b"Basic YTpi"),
    ]


def test_scope_of_an_address_is_not_encoded() -> None:
    assert encode_request(Address("fe80::1%2", 53), "a").startswith(
        b"GET /.well-known/masque/udp/fe80%3A%3A1/53/ HTTP/1.1\r\n"
    )


def test_request_of_the_rfc_is_read() -> None:
    """RFC 9298 section 3.2."""
    request = complete(
        read_request(
            BytesReader(
                b"GET https://example.org/.well-known/masque/udp/192.0.2.6/443/ HTTP/1.1\r\n"
                b"Host: example.org\r\nConnection: Upgrade\r\n"
                b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
            )
        )
    )
    assert asks_for(request) and parse_target(request) == Address("192.0.2.6", 443)


@pytest.mark.parametrize("request_", ASKING.values(), ids=ASKING)
def test_request_asks_for_connect_udp(request_: HttpRequest) -> None:
    assert asks_for(request_)


@pytest.mark.parametrize("request_", NOT_ASKING.values(), ids=NOT_ASKING)
def test_request_does_not_ask_for_connect_udp(request_: HttpRequest) -> None:
    assert not asks_for(request_)


@pytest.mark.parametrize(("raw", "target"), TARGETS.values(), ids=TARGETS)
def test_target_is_canonical(raw: bytes, target: Address) -> None:
    assert parse_target(get(raw)) == target


@pytest.mark.parametrize("raw", REFUSED_TARGETS.values(), ids=REFUSED_TARGETS)
def test_invalid_target_is_answered_400(raw: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse_target(get(raw))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "raw", [PREFIX + b"a.example/443/", b"https://a.example:1" + PREFIX + b"%3A%3A1/53/"]
)
def test_truncated_target_is_answered_400(raw: bytes) -> None:
    for cut in range(len(raw)):
        with pytest.raises(HttpError) as caught:
            parse_target(get(raw[:cut]))
        assert caught.value.status == 400


@pytest.mark.parametrize(
    "field",
    [
        (b"Content-Length", b"0"),
        (b"content-length", b"5"),
        (b"Transfer-Encoding", b"chunked"),
        (b"CONTENT-TYPE", b"text/plain"),
    ],
)
def test_request_with_a_body_is_answered_400(field: tuple[bytes, bytes]) -> None:
    """RFC 9297 section 3.2."""
    with pytest.raises(HttpError) as caught:
        parse_target(get(PREFIX + b"a/443/", field))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "hostile",
    [
        PREFIX + b"%61" * 100_000 + b"\0",
        PREFIX + b"a" * 300_000,
        PREFIX + b"%" * 300_000,
        b"https://" + b"a" * 300_000,
        PREFIX + b"1." * 150_000 + b"/1/",
    ],
)
def test_target_is_read_in_linear_time(hostile: bytes) -> None:
    with stuck_after(SECONDS), pytest.raises(HttpError):
        parse_target(get(hostile))


def test_accepting_response_has_these_bytes_and_is_read_back() -> None:
    """RFC 9298 section 3.3."""
    assert encode_accept() == (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
        b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
    )
    check_read(read_response, encode_accept(), ACCEPTABLE["RFC 9298"])
    check_response(complete(read_response(BytesReader(encode_accept()))))


@pytest.mark.parametrize("response", ACCEPTABLE.values(), ids=ACCEPTABLE)
def test_accepting_response_is_recognized(response: HttpResponse) -> None:
    check_response(response)


@pytest.mark.parametrize(("response", "ending"), UNACCEPTABLE.values(), ids=UNACCEPTABLE)
def test_other_response_is_refused_with_its_status_and_error(
    response: HttpResponse, ending: str
) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_response(response)
    assert str(caught.value) == f"the proxy did not switch to connect-udp: it answered {ending}"


@pytest.mark.parametrize(
    "hostile",
    [
        b";" * 300_000,
        b"; " * 150_000,
        b";" + b" " * 300_000,
        b";error" * 50_000,
        b'; error="' * 30_000,
    ],
)
def test_proxy_status_is_read_in_linear_time(hostile: bytes) -> None:
    with stuck_after(SECONDS), pytest.raises(ProtocolError):
        check_response(HttpResponse(1, 502, b"", [(b"Proxy-Status", hostile)]))


def refusal(reason: Reason, name: str) -> bytes:
    """Return the refusal that a server sends."""
    return encode_error(http1.REPLIES[reason], reason.value, [status_field(reason, name)])


def test_refusal_is_a_complete_response_that_closes() -> None:
    assert refusal(Reason.NAME, "netproxy-1a2b") == (
        b"HTTP/1.1 502 Bad Gateway\r\n"
        b"Content-Type: text/plain; charset=us-ascii\r\n"
        b"X-Content-Type-Options: nosniff\r\n"
        b"Content-Length: 18\r\n"
        b"Connection: close\r\n"
        b"Proxy-Status: netproxy-1a2b; error=dns_error\r\n"
        b"\r\n"
        b"name not resolved\n"
    )


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_reaches_the_client(reason: Reason) -> None:
    reader = BytesReader(refusal(reason, "us"))
    response = complete(read_response(reader))
    assert response.status == http1.REPLIES[reason]
    assert reader.rest() == reason.value.encode() + b"\n"
    assert proxy_error(response) == connect_udp.ERRORS[reason].decode()
    with pytest.raises(ProtocolError) as caught:
        check_response(response)
    assert str(caught.value).endswith(
        f"answered {response.status} ({connect_udp.ERRORS[reason].decode()})"
    )


def test_every_reason_has_an_error_type_of_rfc_9209() -> None:
    assert set(connect_udp.ERRORS) == set(Reason)
    assert set(connect_udp.ERRORS.values()) <= {
        b"dns_timeout",
        b"dns_error",
        b"destination_not_found",
        b"destination_unavailable",
        b"destination_ip_prohibited",
        b"destination_ip_unroutable",
        b"connection_refused",
        b"connection_limit_reached",
        b"connection_terminated",
        b"connection_timeout",
        b"http_request_denied",
        b"http_protocol_error",
        b"proxy_internal_error",
        b"proxy_configuration_error",
        b"proxy_loop_detected",
    }


def test_error_messages_repeat_nothing_of_the_request() -> None:
    for raw in REFUSED_TARGETS.values():
        with pytest.raises(HttpError) as caught:
            parse_target(get(raw))
        message = str(caught.value)
        assert message.isprintable() and message.isascii() and len(message) < 80


try:
    from hypothesis import given, settings, strategies as st
except ImportError:  # the tables above are enough
    pass
else:
    many = settings(max_examples=150, deadline=None)
    pieces = st.lists(
        st.one_of(
            st.sampled_from(
                [
                    b"a",
                    b".",
                    b"%3A",
                    b"%3A%3A",
                    b"%25",
                    b"%",
                    b"1",
                    b"/",
                    b"443",
                    b"%2F",
                    b"[",
                    b"]",
                    b"?",
                    b"0x7f",
                ]
            ),
            st.binary(max_size=2),
        ),
        max_size=8,
    ).map(b"".join)
    # The last character keeps a label from being a number, also a hexadecimal one.
    labels = st.from_regex(r"[a-z0-9_-]{0,20}[g-w]", fullmatch=True)
    hosts = st.one_of(
        st.lists(labels, min_size=1, max_size=4).map(".".join),
        st.ip_addresses(v=4).map(str),
        st.ip_addresses(v=6).map(
            lambda address: http1.parse_authority(b"[%b]:1" % str(address).encode()).host
        ),
    )

    @many
    @given(hosts, st.integers(1, 65535))
    def test_any_target_is_read_back(host: str, port: int) -> None:
        request = complete(
            read_request(BytesReader(encode_request(Address(host, port), "proxy.example")))
        )
        assert asks_for(request) and parse_target(request) == Address(host, port)

    @many
    @given(
        st.sampled_from([PREFIX, b"https://a" + PREFIX, b"/", b""]),
        pieces,
        st.sampled_from([b"/443/", b"/", b""]),
    )
    def test_any_request_target_is_read_back_or_answered_400(
        start: bytes, between: bytes, end: bytes
    ) -> None:
        try:
            target = parse_target(get(start + between + end))
        except HttpError as error:
            assert error.status == 400
        else:
            assert (
                parse_target(complete(read_request(BytesReader(encode_request(target, "a")))))
                == target
            )

    @many
    @given(
        st.integers(100, 599),
        st.lists(
            st.tuples(
                st.sampled_from([b"Connection", b"Upgrade", b"Proxy-Status", b"Content-Length"]),
                st.one_of(
                    st.sampled_from([b"upgrade", b"connect-udp", b"a; error=b"]),
                    st.binary(max_size=9),
                ),
            ),
            max_size=5,
        ),
    )
    def test_any_response_is_accepted_or_refused(status: int, fields: Fields) -> None:
        try:
            check_response(HttpResponse(1, status, b"", fields))
        except ProtocolError:
            return
        assert status == 101
