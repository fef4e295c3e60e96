"""HTTP/1.1 request heads, authorities and origins: read, refused, and written anew."""

from __future__ import annotations

import contextlib

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.net.stream import complete
from netproxy.protocol.http1 import (
    HttpError,
    HttpRequest,
    Origin,
    encode_request,
    field_list,
    field_values,
    parse_authority,
    parse_origin,
    read_request,
)
from tests.support.alarms import stuck_after
from tests.support.sockets import SECONDS
from tests.support.readers import BytesReader, check_read, check_refused

GET = b"GET http://a/ HTTP/1.1\r\n"
HOST = (b"Host", b"a")


def get_request(*fields: tuple[bytes, bytes]) -> HttpRequest:
    return HttpRequest(b"GET", b"http://a/", 1, [HOST, *fields])


REQUESTS = {
    "absolute form": (GET + b"Host: a\r\n\r\n", get_request()),
    "authority form": (
        b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
        HttpRequest(b"CONNECT", b"a:443", 1, [(b"Host", b"a:443")]),
    ),
    "origin form": (
        b"GET /x?y HTTP/1.1\r\nHost: a\r\n\r\n",
        HttpRequest(b"GET", b"/x?y", 1, [HOST]),
    ),
    "asterisk form": (
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        HttpRequest(b"OPTIONS", b"*", 1, [HOST]),
    ),
    "method of any token": (
        b"a-Z!#$%&'*+.^_`|~9 / HTTP/1.1\r\nHost: a\r\n\r\n",
        HttpRequest(b"a-Z!#$%&'*+.^_`|~9", b"/", 1, [HOST]),
    ),
    "HTTP/1.0 without Host": (
        b"GET http://a/ HTTP/1.0\r\n\r\n",
        HttpRequest(b"GET", b"http://a/", 0, []),
    ),
    "HTTP/1.0 with Host": (
        b"GET http://a/ HTTP/1.0\r\nHost: a\r\n\r\n",
        HttpRequest(b"GET", b"http://a/", 0, [HOST]),
    ),
    "one empty line before it": (b"\r\n" + GET + b"Host: a\r\n\r\n", get_request()),
    "CONNECT without Host": (
        b"CONNECT a:443 HTTP/1.1\r\nX: y\r\n\r\n",
        HttpRequest(b"CONNECT", b"a:443", 1, [(b"X", b"y")]),
    ),
    "bytes over 127 in the target": (
        b"GET http://a/\xc3\xa0\x85\xa0?\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        get_request()._replace(target=b"http://a/\xc3\xa0\x85\xa0?\xff"),
    ),
    "empty Host": (GET + b"Host:\r\n\r\n", HttpRequest(b"GET", b"http://a/", 1, [(b"Host", b"")])),
    "Host of another place": (
        GET + b"Host: b:81\r\n\r\n",
        HttpRequest(b"GET", b"http://a/", 1, [(b"Host", b"b:81")]),
    ),
    "Host in capitals": (
        GET + b"HOST: a\r\n\r\n",
        HttpRequest(b"GET", b"http://a/", 1, [(b"HOST", b"a")]),
    ),
    "white space around a value": (
        GET + b"Host: a\r\nX:\t y\tz \t\r\n\r\n",
        get_request((b"X", b"y\tz")),
    ),
    "no white space before a value": (GET + b"Host: a\r\nX:y\r\n\r\n", get_request((b"X", b"y"))),
    "empty value": (GET + b"Host: a\r\nX:\r\n\r\n", get_request((b"X", b""))),
    "value of white space": (GET + b"Host: a\r\nX: \t \r\n\r\n", get_request((b"X", b""))),
    "colons in a value": (GET + b"Host: a\r\nX: :y:\r\n\r\n", get_request((b"X", b":y:"))),
    "bytes over 127 in a value": (
        GET + b"Host: a\r\nX: y\x85\xa0\xffz\r\n\r\n",
        get_request((b"X", b"y\x85\xa0\xffz")),
    ),
    "equal names in their order": (
        GET + b"Host: a\r\nX: 2\r\nx: 1\r\nX: 2\r\n\r\n",
        get_request((b"X", b"2"), (b"x", b"1"), (b"X", b"2")),
    ),
}

REFUSED_LINES = {
    "lower-case version": b"GET http://a/ http/1.1",
    "HTTP/2": b"GET http://a/ HTTP/2.0",
    "HTTP/1.2": b"GET http://a/ HTTP/1.2",
    "HTTP/1.10": b"GET http://a/ HTTP/1.10",
    "HTTP/0.9": b"GET http://a/",
    "no target": b"GET HTTP/1.1",
    "empty target": b"GET  HTTP/1.1",
    "two spaces": b"GET  http://a/ HTTP/1.1",
    "space in the target": b"GET http://a/ b HTTP/1.1",
    "space before": b" GET http://a/ HTTP/1.1",
    "space behind": b"GET http://a/ HTTP/1.1 ",
    "tab between": b"GET\thttp://a/\tHTTP/1.1",
    "no method": b" http://a/ HTTP/1.1",
    "method not a token": b"G(T http://a/ HTTP/1.1",
    "bare CR": b"GET http://a/\rHTTP/1.1",
    "bare CR before the end": b"GET http://a/ HTTP/1.1\r",
    "NUL in the target": b"GET http://a/\0 HTTP/1.1",
    "NUL before": b"\0GET http://a/ HTTP/1.1",
    "DEL in the target": b"GET http://a/\x7f HTTP/1.1",
    "\\x85 between": b"GET\x85http://a/\x85HTTP/1.1",
    "\\xa0 before the version": b"GET http://a/\xa0HTTP/1.1",
    "method not ASCII": b"G\xc3\x9cT http://a/ HTTP/1.1",
    "vertical tab between": b"GET http://a/\x0bHTTP/1.1",
}

REFUSED_FIELDS = {
    "bare LF": b"Host: a\r\nX: y\nZ: z\r\n\r\n",
    "bare LF on every line": b"Host: a\n\n",
    "bare LF as the empty line": b"Host: a\r\n\n",
    "bare CR": b"Host: a\r\nX: y\rZ: z\r\n\r\n",
    "bare CR at the end of a value": b"Host: a\r\nX: y\r\r\n\r\n",
    "bare CR as the empty line": b"Host: a\r\n\r\r\n\r\n",
    "obs-fold": b"Host: a\r\nX: y\r\n z\r\n\r\n",
    "obs-fold with a tab": b"Host: a\r\nX: y\r\n\tz\r\n\r\n",
    "white space before the first field": b" Host: a\r\n\r\n",
    "Name :": b"Host: a\r\nContent-Length : 5\r\n\r\n",
    "Name and tab": b"Host: a\r\nX\t: y\r\n\r\n",
    "empty name": b"Host: a\r\n: y\r\n\r\n",
    "name not a token": b"Host: a\r\nX(y: z\r\n\r\n",
    "name not ASCII": b"Host: a\r\nX\xff: z\r\n\r\n",
    "name with \\x85": b"Host: a\r\nTransfer-Encoding\x85: chunked\r\n\r\n",
    "name with NUL": b"Host: a\r\nX\0: y\r\n\r\n",
    "no colon": b"Host: a\r\nX\r\n\r\n",
    "NUL": b"Host: a\r\nX: y\0z\r\n\r\n",
    "NUL at the end": b"Host: a\r\nX: y\0\r\n\r\n",
    "control character": b"Host: a\r\nX: \x1b[2J\r\n\r\n",
    "vertical tab": b"Host: a\r\nX: \x0by\r\n\r\n",
    "DEL": b"Host: a\r\nX: y\x7f\r\n\r\n",
    "\\x85 before a value": b"Host: a\r\nTransfer-Encoding: \x85chunked\r\n\r\n",
    "\\x85 behind a value": b"Host: a\r\nTransfer-Encoding: chunked\x85\r\n\r\n",
    "\\xa0 before a value": b"Host: a\r\nContent-Length: \xa05\r\n\r\n",
    "\\xa0 behind a value": b"Host: a\r\nContent-Length: 5\xa0 \r\n\r\n",
    "no Host": b"X: y\r\n\r\n",
    "no field": b"\r\n",
    "two Host": b"Host: a\r\nHost: b\r\n\r\n",
    "two equal Host": b"Host: a\r\nhost: a\r\n\r\n",
    "Host and an empty one": b"Host: a\r\nHost:\r\n\r\n",
    "Host: a,b": b"Host: a,b\r\n\r\n",
    "Host with userinfo": b"Host: user@a\r\n\r\n",
    "Host with a path": b"Host: a/b\r\n\r\n",
    "Host with a space": b"Host: a b\r\n\r\n",
    "Host with port 0": b"Host: a:0\r\n\r\n",
    "Host with port 99999": b"Host: a:99999\r\n\r\n",
    "Host with a URL": b"Host: http://a/\r\n\r\n",
    "Host that is no name": b"Host: a..b\r\n\r\n",
}

AUTHORITIES = {
    "name": (b"Example.com:443", Address("example.com", 443)),
    "IPv4": (b"192.0.2.1:1", Address("192.0.2.1", 1)),
    "loose IPv4": (b"0x7f.1:65535", Address("127.0.0.1", 65535)),
    "IPv6": (b"[2001:DB8::1]:443", Address("2001:db8::1", 443)),
    "v4-mapped": (b"[::ffff:127.0.0.1]:443", Address("127.0.0.1", 443)),
    "underscore": (b"a_b.example:80", Address("a_b.example", 80)),
    "trailing dot": (b"a.:80", Address("a", 80)),
    "zeros before the port": (b"a:00080", Address("a", 80)),
}

REFUSED_AUTHORITIES = {
    "no port": b"host",
    "empty port": b"host:",
    "port 0": b"host:0",
    "port 00000": b"host:00000",
    "port 65536": b"host:65536",
    "port 99999": b"host:99999",
    "port of six digits": b"host:000080",
    "path": b"host:443/",
    "IPv6 without port": b"[::1]",
    "IPv6 without brackets": b"::1:443",
    "userinfo": b"user@host:443",
    "userinfo and password": b"user:password@host:443",
    "comma": b"a,b:443",
    "comma behind": b"a:443,b:443",
    # Python takes some of these for numbers.
    "port +80": b"host:+80",
    "port -80": b"host:-80",
    "port 8_0": b"host:8_0",
    "port 0x50": b"host:0x50",
    "port with a space": b"host: 80",
    "port with LF": b"host:80\n",
    "port in superscript": "host:²".encode(),
    "port in Latin-1 superscript": b"host:\xb2",
    "empty": b"",
    "empty host": b":443",
    "empty brackets": b"[]:443",
    "name in brackets": b"[abc]:443",
    "IPv4 in brackets": b"[127.0.0.1]:443",
    "zone": b"[fe80::1%25eth0]:443",
    "IPvFuture": b"[v1.a]:443",
    "two dots": b"a..b:443",
    "percent": b"%61:443",
    "NUL": b"a\0:443",
    "query": b"a:443?",
    "fragment": b"a:443#",
    "backslash": b"a\\:443",
    "number out of range": b"256.1.1.1:443",
}

ORIGINS = {
    "path": (b"http://a/x", Origin(Address("a", 80), b"a", b"/x")),
    "no path": (b"http://a", Origin(Address("a", 80), b"a", b"/")),
    "query without path": (b"http://a?x=/y", Origin(Address("a", 80), b"a", b"/?x=/y")),
    "port": (b"http://a:8080/", Origin(Address("a", 8080), b"a:8080", b"/")),
    "default port is kept for Host": (b"http://a:80/", Origin(Address("a", 80), b"a:80", b"/")),
    "authority as it was for Host": (
        b"HTTP://Exa-mple.COM./",
        Origin(Address("exa-mple.com", 80), b"Exa-mple.COM.", b"/"),
    ),
    "IPv6": (b"http://[::1]/", Origin(Address("::1", 80), b"[::1]", b"/")),
    "path and query as they were": (
        b"http://a//b/../%2e/;c?d=http://e/?f",
        Origin(Address("a", 80), b"a", b"//b/../%2e/;c?d=http://e/?f"),
    ),
    "bytes over 127 in the path": (
        b"http://a/\xc3\xbc\x85",
        Origin(Address("a", 80), b"a", b"/\xc3\xbc\x85"),
    ),
    "at in the path": (b"http://a/@b", Origin(Address("a", 80), b"a", b"/@b")),
}

REFUSED_ORIGINS = {
    "origin form": b"/x",
    "asterisk form": b"*",
    "authority form": b"a:80",
    "https": b"https://a/",
    "ftp": b"ftp://a/",
    "no authority": b"http:///x",
    "no authority at all": b"http://",
    "one slash": b"http:/a/x",
    "fragment": b"http://a/x#y",
    "fragment behind the authority": b"http://a#y",
    "userinfo": b"http://user@a/",
    "userinfo and password": b"http://user:pw@a/",
    "userinfo that looks like a host": b"http://a:80@b/",
    "comma": b"http://a,b/",
    "port 0": b"http://a:0/",
    "port 99999": b"http://a:99999/",
    "backslash": b"http://a\\@b/",
    "percent": b"http://%61/",
    "two dots": b"http://a..b/",
    "bytes over 127": b"http://b\xc3\xbccher.example/",
    "\\xa0 behind the host": b"http://a\xa0/",
    "\\x85 before the host": b"http://\x85a/",
    "bytes over 127 in the port": b"http://a:8\xb2/",
}


@pytest.mark.parametrize(("data", "request_"), REQUESTS.values(), ids=REQUESTS)
def test_request_is_read_to_its_last_byte(data: bytes, request_: HttpRequest) -> None:
    """Hazard 53: a Host field of another place."""
    check_read(read_request, data, request_)


@pytest.mark.parametrize(("data", "request_"), REQUESTS.values(), ids=REQUESTS)
def test_encoded_request_is_read_back_as_http_1_1(data: bytes, request_: HttpRequest) -> None:
    if not any(name.lower() == b"host" for name, _ in request_.fields):
        request_ = request_._replace(fields=[HOST])
    check_read(read_request, encode_request(request_), request_._replace(minor=1))


def test_request_has_these_bytes() -> None:
    request = HttpRequest(b"GET", b"/x", 0, [HOST, (b"X", b""), (b"x", b"y z")])
    assert encode_request(request) == b"GET /x HTTP/1.1\r\nHost: a\r\nX: \r\nx: y z\r\n\r\n"


@pytest.mark.parametrize("line", REFUSED_LINES.values(), ids=REFUSED_LINES)
def test_invalid_request_line_is_answered_400(line: bytes) -> None:
    """Hazard 52."""
    check_refused(read_request, line + b"\r\nHost: a\r\n\r\n", HttpError, status=400)


def test_two_empty_lines_before_a_request_are_answered_400() -> None:
    check_refused(read_request, b"\r\n\r\n" + GET + b"Host: a\r\n\r\n", HttpError, status=400)


@pytest.mark.parametrize("ending", [b"\n", b"\r\r\n"])
def test_request_line_without_crlf_is_answered_400(ending: bytes) -> None:
    """Hazard 52."""
    check_refused(read_request, GET[:-2] + ending + b"Host: a\r\n\r\n", HttpError, status=400)


@pytest.mark.parametrize("fields", REFUSED_FIELDS.values(), ids=REFUSED_FIELDS)
def test_invalid_fields_are_answered_400(fields: bytes) -> None:
    """Hazards 52 and 54."""
    check_refused(read_request, GET + fields, HttpError, status=400)


def test_two_host_fields_are_answered_400_in_http_1_0() -> None:
    """Hazard 54."""
    check_refused(
        read_request, b"GET http://a/ HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", HttpError, status=400
    )


def test_request_line_over_8_kb_is_answered_414() -> None:
    """Hazard 68."""
    target = b"http://a/".ljust(8192 - len(b"GET  HTTP/1.1\r\n"), b"x")
    head = b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n"
    assert complete(read_request(BytesReader(head % target))).target == target
    for longer in (target + b"x", b"http://a/".ljust(8193, b"x")):
        with pytest.raises(HttpError) as caught:
            complete(read_request(BytesReader(head % longer)))
        assert caught.value.status == 414


def test_more_than_100_fields_are_answered_431() -> None:
    """Hazard 68."""
    head = GET + b"Host: a\r\n" + b"X: y\r\n" * 99
    assert len(complete(read_request(BytesReader(head + b"\r\n"))).fields) == 100
    with pytest.raises(HttpError) as caught:
        complete(read_request(BytesReader(head + b"X: y\r\n\r\n")))
    assert caught.value.status == 431


@pytest.mark.parametrize("lines", [1, 50])
def test_fields_over_64_kb_are_answered_431(lines: int) -> None:
    """Hazard 68."""
    short = b"X: y\r\n" * (lines - 1)
    left = 65536 - len(b"Host: a\r\n" + short + b"X: \r\n" + b"\r\n")
    head = GET + b"Host: a\r\n" + short + b"X: %b\r\n\r\n"
    request = complete(read_request(BytesReader(head % (b"y" * left))))
    assert request.fields[-1] == (b"X", b"y" * left)
    for more in (1, 2, 3, 70000):
        with pytest.raises(HttpError) as caught:
            complete(read_request(BytesReader(head % (b"y" * (left + more)))))
        assert caught.value.status == 431


def test_head_without_end_is_read_up_to_its_limits() -> None:
    """Hazards 61 and 68."""
    for head in (b"G" * 1_000_000, GET + b"X" * 1_000_000, GET + b"X: y\r\n" * 200_000):
        reader = BytesReader(head, step=4096)
        with pytest.raises(HttpError):
            complete(read_request(reader))
        assert reader.taken <= 65536 + len(GET) + 4096


@pytest.mark.parametrize(
    "hostile",
    [
        b"X:" + b" " * 60_000 + b"\0",
        b"X: y" + b" " * 60_000 + b"z",
        b"X: " + b"y " * 30_000 + b"\0",
    ],
    ids=["white space and NUL", "white space within a value", "words and NUL"],
)
def test_field_is_read_in_linear_time(hostile: bytes) -> None:
    """Hazard 69: white space may belong to three parts of an expression, which costs cubic time."""
    with stuck_after(SECONDS), contextlib.suppress(HttpError):
        complete(read_request(BytesReader(GET + b"Host: a\r\n" + hostile + b"\r\n\r\n")))


def test_target_is_read_in_linear_time() -> None:
    """Hazard 69."""
    with stuck_after(SECONDS), pytest.raises(HttpError):
        parse_origin(get_request()._replace(target=b"http://" + b"a" * 300_000 + b"#"))


@pytest.mark.parametrize(("raw", "address"), AUTHORITIES.values(), ids=AUTHORITIES)
def test_authority_is_parsed(raw: bytes, address: Address) -> None:
    """Hazard 58."""
    assert parse_authority(raw) == address
    assert parse_authority(raw, 80) == address


@pytest.mark.parametrize("raw", REFUSED_AUTHORITIES.values(), ids=REFUSED_AUTHORITIES)
def test_invalid_authority_is_answered_400(raw: bytes) -> None:
    """Hazards 54 and 58."""
    with pytest.raises(HttpError) as caught:
        parse_authority(raw)
    assert caught.value.status == 400
    assert str(caught.value).isprintable()


def test_missing_port_is_the_default_port() -> None:
    assert parse_authority(b"a", 80) == Address("a", 80)
    assert parse_authority(b"[::1]", 80) == Address("::1", 80)
    with pytest.raises(HttpError):
        parse_authority(b"a:0", 80)


@pytest.mark.parametrize(("target", "origin"), ORIGINS.values(), ids=ORIGINS)
def test_origin_comes_from_the_target_and_not_from_host(target: bytes, origin: Origin) -> None:
    """Hazard 53."""
    assert parse_origin(HttpRequest(b"GET", target, 1, [(b"Host", b"elsewhere:81")])) == origin


@pytest.mark.parametrize("target", REFUSED_ORIGINS.values(), ids=REFUSED_ORIGINS)
def test_invalid_origin_is_answered_400(target: bytes) -> None:
    """Hazard 54."""
    with pytest.raises(HttpError) as caught:
        parse_origin(HttpRequest(b"GET", target, 1, [HOST]))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("target", "path"),
    [(b"http://a", b"*"), (b"http://a/", b"/"), (b"http://a?x", b"/?x"), (b"http://a/x", b"/x")],
)
def test_options_without_path_goes_on_as_asterisk(target: bytes, path: bytes) -> None:
    assert parse_origin(HttpRequest(b"OPTIONS", target, 1, [HOST])).path == path


def test_field_values_keep_order_and_case() -> None:
    fields = [(b"X", b"B"), (b"Y", b"c"), (b"x", b"A")]
    assert field_values(fields, b"x") == [b"B", b"A"]
    assert field_values(fields, b"z") == []


def test_field_list_joins_equal_names() -> None:
    """Hazard 55."""
    fields = [
        (b"Connection", b"Host, content-length,\tX-Foo "),
        (b"X", b"y"),
        (b"connection", b",, close ,"),
    ]
    assert field_list(fields, b"connection") == [b"host", b"content-length", b"x-foo", b"close"]
    assert field_list(fields, b"te") == []
