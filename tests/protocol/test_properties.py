"""Codecs on generated input: both roles agree, and any bytes raise ProtocolError or nothing."""

from __future__ import annotations

import string
from socket import inet_aton, inet_ntoa
from typing import Any, Callable

import pytest

pytest.importorskip("hypothesis")
from hypothesis import assume, given, settings, strategies as st

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address, ip_text, pack_ip
from netproxy.net.stream import complete
from netproxy.protocol import http1, socks4, socks5
from netproxy.protocol.http import http1_message
from netproxy.protocol.host import HostError, canonical_ipv6, parse_host
from netproxy.protocol.http1 import HttpRequest, HttpResponse
from tests.support.readers import TRAILING, BytesReader, read_body, run

many = settings(max_examples=200, deadline=None)


def mixture(*pieces: bytes, random_every: int = 8, longest: int = 12) -> st.SearchStrategy[bytes]:
    """Generate `pieces` in any order, with any byte in place of each `random_every`-th piece.

    They take one draw of bytes, which is cheap.
    """
    table = [
        bytes((code,)) if code % random_every == random_every - 1 else pieces[code % len(pieces)]
        for code in range(256)
    ]
    return st.binary(max_size=longest).map(lambda codes: b"".join(map(table.__getitem__, codes)))


def framed_by(
    starts: list[bytes], then: st.SearchStrategy[bytes], ends: list[bytes]
) -> st.SearchStrategy[bytes]:
    return st.tuples(st.sampled_from(starts), then, st.sampled_from(ends)).map(b"".join)


def texts(alphabet: str, shortest: int = 1, longest: int = 20) -> st.SearchStrategy[bytes]:
    table = bytes(ord(alphabet[code % len(alphabet)]) for code in range(256))
    return st.binary(min_size=shortest, max_size=longest).map(lambda codes: codes.translate(table))


def read_chunks(reader: BytesReader) -> bytes:
    return b"".join(read_body(reader, http1_message.Framing(chunked=True)))


def frame_request(data: bytes) -> object:
    return http1_message.request_framing(complete(http1.read_request(BytesReader(data))))


def frame_response(data: bytes) -> object:
    return http1_message.response_framing(complete(http1.read_response(BytesReader(data))), b"GET")


def origin(data: bytes) -> object:
    return http1.parse_origin(HttpRequest(b"OPTIONS", data, 1, []))


HOSTS = mixture(
    b"a", b".", b"127", b"1", b"0x7f", b"08", b"example", b"-", b"%", b"9" * 30, longest=6
)
IPV6_LIKE = framed_by(
    [b"", b"["],
    mixture(b"::", b":", b"ffff", b"1", b"127.0.0.1", random_every=40, longest=6),
    [b"", b"]"],
)
SOCKS_PIECES = mixture(b"\0", b"\1", b"a", b".", b"\x0bexample.com", b"\0" * 18)
SOCKS4 = framed_by(
    [b"\4\1\0\x50\1", b"\4\1\0\x50\0\0\0\1", b"\0\x5a", b"\4", b""], SOCKS_PIECES, [b"\0\0", b""]
)
SOCKS5 = framed_by(
    [b"\5\1\0\1", b"\5\3\0\3", b"\5\1\0\4", b"\1\1u", b"\5", b"\1", b""],
    SOCKS_PIECES,
    [b"\0\x50", b""],
)
TARGET_BYTES = framed_by(
    [b"\1", b"\3", b"\4", b"\3\x0bexample.com", b"\3\0", b""],
    mixture(b"a", b"\0\x50", b"\0" * 4, b"\0" * 14, longest=3),
    [b""],
)
AUTHORITIES = framed_by(
    [b"a", b"[::1]", b"127.1", b""],
    mixture(b"a", b".", b"@", b",", b"1", random_every=40, longest=2),
    [b":80", b":81", b":0", b":99999", b"", b":+8"],
)
URLS = framed_by(
    [b"http://", b"HTTP://", b""], AUTHORITIES, [b"", b"/", b"/x?y", b"?y", b"#z", b"/\0"]
)
LINES = mixture(
    b"Host: a\r\n",
    b"X: y\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: ",
    b"X:",
    b"5,5\r\n",
    b"\t \r\n",
    b"\x85",
    b"\xa0\r\n",
    b"\r",
    b"\n",
    b" ",
    b"\0",
    random_every=40,
    longest=5,
)
ENDS = [b"\r\n", b"\r\n", b"\r\n", b" HTTP/1.1\r\n\r\n", b""]
REQUESTS = framed_by(
    [
        b"POST http://a/ HTTP/1.1\r\nHost: a\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        b"GET / HTTP/1.0\r\n",
        b"GET ",
        b"",
    ],
    LINES,
    ENDS,
)
RESPONSES = framed_by(
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 404\r\n", b"HTTP/1.0 304\r\n", b"HTTP/1.1 ", b""],
    LINES,
    ENDS,
)
CHUNKS = framed_by(
    [b"5\r\nhello\r\n", b"1\r\n", b""],
    mixture(
        b"5\r\nhello\r\n",
        b"1;a=b\r\nx\r\n",
        b"0\r\n",
        b"X: y\r\n",
        b"\r\n",
        b"_",
        b"0x",
        b"-",
        b" ",
        b"\n",
        random_every=40,
        longest=5,
    ),
    [b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"\r\n", b""],
)

READERS = {
    "socks4.read_request": (socks4.read_request, SOCKS4),
    "socks4.read_reply": (socks4.read_reply, SOCKS4),
    "socks5.read_methods": (socks5.read_methods, SOCKS5),
    "socks5.read_method": (socks5.read_method, SOCKS5),
    "socks5.read_credentials": (socks5.read_credentials, SOCKS5),
    "socks5.read_credentials_status": (socks5.read_credentials_status, SOCKS5),
    "socks5.read_request": (socks5.read_request, SOCKS5),
    "socks5.read_reply": (socks5.read_reply, SOCKS5),
    "http1.read_request": (http1.read_request, REQUESTS),
    "http1.read_response": (http1.read_response, RESPONSES),
    "http1_message.read_body": (read_chunks, CHUNKS),
}
PARSERS = {
    "parse_host": (parse_host, st.one_of(HOSTS, IPV6_LIKE)),
    "canonical_ipv6": (canonical_ipv6, IPV6_LIKE),
    "parse_target": (socks5.parse_target, TARGET_BYTES),
    "parse_authority": (http1.parse_authority, AUTHORITIES),
    "parse_origin": (origin, URLS),
    "request_framing": (frame_request, REQUESTS),
    "response_framing": (frame_response, RESPONSES),
}


@pytest.mark.parametrize(("read", "strategy"), READERS.values(), ids=READERS)
def test_any_bytes_are_read_alike_whole_and_byte_by_byte(
    read: Callable[[BytesReader], Any], strategy: st.SearchStrategy[bytes]
) -> None:
    """The only exception that they may raise is ProtocolError."""

    def outcome(data: bytes, step: int) -> object:
        reader = BytesReader(data, step)
        try:
            return run(read, reader), reader.rest()
        except ProtocolError as error:
            return type(error), str(error)

    @many
    @given(st.one_of(strategy, strategy, st.binary(max_size=40)))
    def check(data: bytes) -> None:
        assert outcome(data, 0) == outcome(data, 1)

    check()


@pytest.mark.parametrize(("parse", "strategy"), PARSERS.values(), ids=PARSERS)
def test_any_bytes_parse_or_raise_a_protocol_error(
    parse: Callable[[bytes], Any], strategy: st.SearchStrategy[bytes]
) -> None:
    @many
    @given(st.one_of(strategy, strategy, st.binary(max_size=40)))
    def check(data: bytes) -> None:
        try:
            parse(data)
        except ProtocolError:
            pass

    check()


LABELS = st.text(string.ascii_lowercase + string.digits + "-_", min_size=1, max_size=63)
IPV4 = st.ip_addresses(v=4).map(str)
IPV6 = st.ip_addresses(v=6).map(lambda address: ip_text(address.packed))


def is_name(host: str) -> bool:
    try:
        return parse_host(host.encode()) == host
    except HostError:
        return False


NAMES = st.lists(LABELS, min_size=1, max_size=5).map(".".join).filter(is_name)
CREDENTIALS = st.text(st.characters(max_codepoint=0xD7FF), min_size=1, max_size=60)
TARGETS = st.builds(Address, st.one_of(NAMES, IPV4, IPV6), st.integers(0, 65535))


@many
@given(st.one_of(HOSTS, IPV6_LIKE, texts("abcXYZ019.-_", 0, 30)))
def test_canonical_host_is_its_own_canonical_text(raw: bytes) -> None:
    try:
        host = parse_host(raw)
    except HostError:
        return
    assert parse_host(host.encode("ascii")) == host
    assert set(host) <= set(string.ascii_lowercase + string.digits + "-_.:")
    assert 0 < len(host) <= 253
    assert parse_host(raw.upper()) == host
    packed = pack_ip(host)
    assert packed is None or ip_text(packed) == host


@many
@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.sampled_from(["%d", "0%o", "0x%x", "0X00%X"])),
        min_size=1,
        max_size=4,
    ).map(lambda parts: ".".join(form % number for number, form in parts).encode())
)
def test_every_ipv4_spelling_is_read_as_inet_aton_reads_it(raw: bytes) -> None:
    try:
        expected = inet_ntoa(inet_aton(raw.decode()))
    except OSError:
        with pytest.raises(HostError):
            parse_host(raw)
    else:
        assert parse_host(raw) == expected


@many
@given(TARGETS, st.integers(0, 255), st.text(string.printable, max_size=255).map(str.encode))
def test_encoded_socks4_request_is_read_back(target: Address, command: int, user_id: bytes) -> None:
    assume(target.host != "0.0.0.0")
    reader = BytesReader(socks4.encode_request(command, target, user_id) + TRAILING)
    assert complete(socks4.read_request(reader)) == (command, target, user_id)
    assert reader.rest() == TRAILING


@many
@given(TARGETS, st.integers(0, 255))
def test_encoded_socks5_message_is_read_back(address: Address, code: int) -> None:
    for encode, read in (
        (socks5.encode_request, socks5.read_request),
        (socks5.encode_reply, socks5.read_reply),
    ):
        reader = BytesReader(encode(code, address) + TRAILING)
        assert complete(read(reader)) == (code, address)
        assert reader.rest() == TRAILING


@many
@given(TARGETS, st.binary(max_size=20), st.binary(max_size=20))
def test_udp_header_is_found_at_any_offset(address: Address, before: bytes, payload: bytes) -> None:
    header = socks5.encode_header(address)
    arena = memoryview(before + header + payload + b"\0")
    assert socks5.header_length(arena, len(before)) == len(header)
    assert socks5.parse_target(header[socks5.ATYP_AT :]) == address


@many
@given(CREDENTIALS, CREDENTIALS)
def test_encoded_credentials_are_read_back(user: str, password: str) -> None:
    reader = BytesReader(socks5.encode_credentials(user, password) + TRAILING)
    assert complete(socks5.read_credentials(reader)) == (user.encode(), password.encode())
    assert reader.rest() == TRAILING


TOKENS = texts(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~")
VALUE = "".join(map(chr, range(0x21, 0x7F))) + "\t " + "".join(map(chr, range(0x80, 0x100)))
VALUES = texts(VALUE, 0, 40).map(lambda value: value.strip(b"\t \x85\xa0"))
FIELDS = st.lists(
    st.tuples(TOKENS.filter(lambda name: name.lower() != b"host"), VALUES), max_size=4
)
VISIBLE = texts("".join(map(chr, range(0x21, 0x7F))), 1, 60)


@many
@given(TOKENS, VISIBLE, FIELDS)
def test_encoded_http_request_is_read_back(
    method: bytes, target: bytes, fields: http1.Fields
) -> None:
    request = HttpRequest(method, target, 1, [*fields, (b"Host", b"a")])
    reader = BytesReader(http1.encode_request(request) + TRAILING)
    assert complete(http1.read_request(reader)) == request
    assert reader.rest() == TRAILING


@many
@given(st.integers(100, 599), texts(VALUE, 0), FIELDS)
def test_encoded_http_response_is_read_back(
    status: int, phrase: bytes, fields: http1.Fields
) -> None:
    response = HttpResponse(1, status, phrase, fields)
    reader = BytesReader(http1.encode_response(response) + TRAILING)
    assert complete(http1.read_response(reader)) == response
    assert reader.rest() == TRAILING


@many
@given(REQUESTS)
def test_head_written_anew_is_unambiguous(data: bytes) -> None:
    try:
        request = complete(http1.read_request(BytesReader(data)))
    except ProtocolError:
        return
    assume(request.minor)
    written = http1.encode_request(request)
    assert (
        written.count(b"\n")
        == written.count(b"\r")
        == written.count(b"\r\n")
        == len(request.fields) + 2
    )
    assert not set(written) & {0x0B, 0x0C, 0, 0x7F}
    assert complete(http1.read_request(BytesReader(written))) == request


@many
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.sampled_from([0, 1, 7]))
def test_encoded_chunks_are_read_back(pieces: list[bytes], step: int) -> None:
    reader = BytesReader(b"".join(map(http1_message.encode_chunk, [*pieces, b""])) + TRAILING, step)
    assert read_chunks(reader) == b"".join(pieces)
    assert reader.rest() == TRAILING
