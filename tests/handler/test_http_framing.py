"""Request smuggling: an ambiguous request gets one refusal, and nothing behind it is parsed."""

from __future__ import annotations

import pytest

from tests.support.origin import Rig, check_refused, get

BAD_REQUEST = b"400 Bad Request"
SMUGGLED = b"GET http://a.test/smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n"
HEAD = b"POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def refused_unseen(raw: bytes, status: bytes = BAD_REQUEST) -> None:
    """Check that the refusal is the only response, and that nothing is dialled."""
    with Rig() as rig:
        check_refused(rig.client(raw + SMUGGLED), status)
    assert rig.dialled == [] and rig.origin.connections == []


CODINGS = {
    "CL.TE": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
    "TE.CL": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n",
    "CL 0 and TE": b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE.TE": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n\r\n0\r\n\r\n",
    "two TE": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked first": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "gzip first": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "comma first": b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
    "comma last": b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n",
    "xchunked": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "Chunkedx": b"Transfer-Encoding: Chunkedx\r\n\r\n0\r\n\r\n",
    "quoted": b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "identity": b"Transfer-Encoding: identity\r\n\r\n",
    "empty": b"Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "parameter": b"Transfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n",
    "Chunked and CL": b"Transfer-Encoding: Chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("rest", CODINGS.values(), ids=CODINGS)
def test_transfer_coding_other_than_chunked_is_refused(rest: bytes) -> None:
    """Hazard 49."""
    refused_unseen(HEAD + rest)


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b"CHUNKED"])
def test_chunked_in_any_letter_case_is_accepted(coding: bytes) -> None:
    """Hazard 49."""
    with Rig() as rig:
        client = rig.client(
            HEAD + b"Transfer-Encoding: " + coding + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            get(b"a.test"),
        )
        assert [client.answer().body, client.answer().body] == [b"ok", b"ok"]
    first, second = rig.origin.requests()
    assert (first.body, first.get(b"transfer-encoding"), first.get(b"content-length")) == (
        b"hello",
        [b"chunked"],
        [],
    )
    assert (second.start, second.body) == (b"GET / HTTP/1.1", b"")


def test_transfer_coding_in_http_1_0_request_is_refused() -> None:
    """Hazard 49."""
    refused_unseen(b"POST http://a.test/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")


LENGTHS = [
    b"+5",
    b"5_0",
    b"0x5",
    b"",
    b"5,6",
    b"-1",
    b"1" + b"0" * 30,
    b"5 5",
    b"5;",
    b"5.0",
    b"\xb25",
    b"5,",
    b",5",
    b"five",
    b"5\x0b",
    b"\x855",
    b"5\xa0",
    b'"5"',
    b"1" * 5000,
]


@pytest.mark.parametrize("length", LENGTHS, ids=lambda value: repr(value[:12]))
def test_length_that_is_not_one_number_is_refused(length: bytes) -> None:
    """Hazard 50."""
    refused_unseen(HEAD + b"Content-Length: " + length + b"\r\n\r\nhello")


@pytest.mark.parametrize(
    "fields",
    [b"Content-Length: 5\r\nContent-Length: 6\r\n", b"Content-Length: 5\r\nContent-Length:\r\n"],
)
def test_two_different_lengths_are_refused(fields: bytes) -> None:
    """Hazard 50."""
    refused_unseen(HEAD + fields + b"\r\nhello")


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 5,5\r\n",
        b"Content-Length: 5 , 5\r\n",
        b"Content-Length:   5\t\r\n",
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 005\r\n",
    ],
)
def test_repeated_equal_lengths_are_forwarded_as_one(fields: bytes) -> None:
    """Hazard 50."""
    with Rig() as rig:
        client = rig.client(HEAD + fields + b"\r\nhello" + get(b"a.test"))
        assert [client.answer().body, client.answer().body] == [b"ok", b"ok"]
    first, second = rig.origin.requests()
    assert (first.get(b"content-length"), first.body, second.body) == ([b"5"], b"hello", b"")


CHUNKS = {
    "underscore": b"0_2e\r\n",
    "hexadecimal prefix": b"0x5\r\nhello\r\n",
    "negative": b"-1\r\n",
    "plus": b"+5\r\nhello\r\n",
    "2^63 - 1": b"7FFFFFFFFFFFFFFF\r\n",
    "2^64 + 5": b"10000000000000005\r\nhello\r\n",
    "empty": b"\r\nhello\r\n",
    "no CRLF behind the data": b"5\r\nhello5\r\n",
    "LF only behind the size": b"5\nhello\r\n",
    "LF only behind the data": b"5\r\nhello\n0\r\n\r\n",
    "CR in an extension": b"5;a\rb\r\nhello\r\n",
    "64 KB extension": b"5;" + b"a" * 65536 + b"\r\nhello\r\n",
    "space before the size": b" 5\r\nhello\r\n",
    "NUL in an extension": b"5;\0\r\nhello\r\n",
    "no hexadecimal": b"g\r\n",
    "size and more": b"5 5\r\nhello\r\n",
    "no field in the trailer": b"0\r\nGET / HTTP/1.1\r\n\r\n",
    "folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "long trailer": b"0\r\nA: " + b"a" * 9000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_bad_chunks_are_refused_and_the_request_stays_incomplete(chunks: bytes) -> None:
    """Hazard 51."""
    with Rig() as rig:
        check_refused(rig.client(CHUNKED + chunks + b"0\r\n\r\n" + SMUGGLED), BAD_REQUEST)
    assert [request.whole for request in rig.origin.requests()] == [False]
    assert b"smuggled" not in rig.origin.connections[0].seen


def test_chunk_extensions_and_trailers_are_not_forwarded() -> None:
    """Hazard 51."""
    with Rig() as rig:
        client = rig.client(
            CHUNKED
            + b'5;a="b\xff";c\r\nhello\r\n0001 \r\n!\r\n00;x\r\n'
            + b"Host: b.test\r\nContent-Length: 9\r\n\r\n"
        )
        assert client.answer().body == b"ok"
    [request] = rig.origin.requests()
    assert (request.body, request.get(b"host"), request.get(b"content-length")) == (
        b"hello!",
        [b"a.test"],
        [],
    )


LINES = {
    "bare CR in the request line": b"GET http://a.test/\r HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "bare CR in a value": get(b"a.test", b"/", b"X: a\rb"),
    "CR CR LF": b"GET http://a.test/ HTTP/1.1\r\r\nHost: a.test\r\n\r\n",
    "bare LF behind the request line": b"GET http://a.test/ HTTP/1.1\nHost: a.test\r\n\r\n",
    "bare LF behind a field": b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\n\r\n",
    "bare LF as the empty line": b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\n",
    "obs-fold": get(b"a.test", b"/", b"X: a\r\n b"),
    "obs-fold with a tab": get(b"a.test", b"/", b"X: a\r\n\tb"),
    "space before the first field": b"GET http://a.test/ HTTP/1.1\r\n Host: a.test\r\n\r\n",
    "space before the colon": b"GET http://a.test/ HTTP/1.1\r\nHost : a.test\r\n\r\n",
    "space before the colon of a length": get(b"a.test", b"/", b"Content-Length : 5"),
    "tab before the colon": get(b"a.test", b"/", b"X\t: a"),
    "empty name": get(b"a.test", b"/", b": a"),
    "no colon": get(b"a.test", b"/", b"X"),
    "no token": get(b"a.test", b"/", b"X(y): a"),
    "NUL in a name": get(b"a.test", b"/", b"X\0: a"),
    "NUL in a value": get(b"a.test", b"/", b"X: a\0"),
    "NUL in the request line": b"GET http://a.test/\0 HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "\\x85 in a name": get(b"a.test", b"/", b"X\x85: a"),
    "\\x85 before a value": get(b"a.test", b"/", b"X: \x85a"),
    "\\xa0 behind a value": get(b"a.test", b"/", b"X: a\xa0"),
    "\\x85 for a space": b"GET\x85http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "\\xa0 before the version": b"GET http://a.test/\xa0HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "\\x85 in the host": b"GET http://a.test\x85/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "bytes over 127 in the target of CONNECT": (
        b"CONNECT b\xc3\xbccher.test:443 HTTP/1.1\r\nHost: a.test\r\n\r\n"
    ),
    "bare LF on every line": b"GET http://a.test/ HTTP/1.1\nHost: a.test\n\n",
    "folded length": get(b"a.test", b"/", b"Content-Length:\r\n 5"),
    "folded coding": get(b"a.test", b"/", b"Transfer-Encoding:\r\n chunked"),
    "length in a folded value": get(b"a.test", b"/", b"X: a\r\n Content-Length: 5"),
    "folded Host": b"GET http://a.test/ HTTP/1.1\r\nHost:\r\n a.test\r\n\r\n",
    "control character in a value": get(b"a.test", b"/", b"X: a\x01b"),
    "form feed": get(b"a.test", b"/", b"X: \x0ca"),
    "two spaces": b"GET  http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "tab for a space": b"GET\thttp://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "space at the end": b"GET http://a.test/ HTTP/1.1 \r\nHost: a.test\r\n\r\n",
    "HTTP/0.9": b"GET http://a.test/\r\n",
    "HTTP/2.0": b"GET http://a.test/ HTTP/2.0\r\nHost: a.test\r\n\r\n",
    "HTTP/1.10": b"GET http://a.test/ HTTP/1.10\r\nHost: a.test\r\n\r\n",
    "http/1.1": b"GET http://a.test/ http/1.1\r\nHost: a.test\r\n\r\n",
    "empty lines": b"\r\n\r\n\r\n",
}


@pytest.mark.parametrize("raw", LINES.values(), ids=LINES)
def test_malformed_lines_are_refused(raw: bytes) -> None:
    """Hazard 52."""
    refused_unseen(raw)


def test_refused_request_stops_those_behind_it_but_not_the_one_before() -> None:
    with Rig() as rig:
        client = rig.client(get(b"a.test", b"/1") + LINES["bare CR in a value"] + SMUGGLED)
        assert client.answer().start == b"HTTP/1.1 200 OK"
        check_refused(client, BAD_REQUEST)
    assert [request.start for request in rig.origin.requests()] == [b"GET /1 HTTP/1.1"]


def request_with_fields_of(size: int) -> bytes:
    """Return a request with `size` bytes of fields, of at most 1 KB each."""
    fields, left = [b"Host: a.test\r\n"], size - 14
    while left:
        take = left if left <= 1024 else min(1024, left - 16)
        fields.append(b"X: " + b"a" * (take - 5) + b"\r\n")
        left -= take
    return b"GET http://a.test/ HTTP/1.1\r\n" + b"".join(fields) + b"\r\n"


def test_head_over_64_kb_is_refused() -> None:
    """Hazard 68."""
    refused_unseen(request_with_fields_of(65537), b"431 Request Header Fields Too Large")


def test_field_over_64_kb_is_refused() -> None:
    """Hazard 68."""
    refused_unseen(
        get(b"a.test", b"/", b"X: " + b"a" * 65536), b"431 Request Header Fields Too Large"
    )


def test_head_just_below_64_kb_is_forwarded() -> None:
    """Hazard 68."""
    with Rig() as rig:
        assert rig.client(request_with_fields_of(65500)).answer().body == b"ok"
    assert (
        sum(len(name) + len(value) + 4 for name, value in rig.origin.requests()[0].fields) > 65500
    )


@pytest.mark.parametrize(
    "count,status", [(100, b"200 OK"), (101, b"431 Request Header Fields Too Large")]
)
def test_request_with_more_than_100_fields_is_refused(count: int, status: bytes) -> None:
    """Hazard 68."""
    with Rig() as rig:
        answer = rig.client(get(b"a.test", b"/", *[b"X: y"] * (count - 1))).answer()
        assert answer.start == b"HTTP/1.1 " + status
    assert len(rig.origin.requests()) == (1 if status == b"200 OK" else 0)


def test_target_over_8_kb_is_refused() -> None:
    """Hazard 68."""
    refused_unseen(get(b"a.test", b"/" + b"a" * 8192), b"414 URI Too Long")
    refused_unseen(get(b"a.test", b"/" + b"a" * 60000), b"414 URI Too Long")


def test_target_of_8000_bytes_is_forwarded() -> None:
    """Hazard 68."""
    with Rig() as rig:
        assert rig.client(get(b"a.test", b"/" + b"a" * 8000)).answer().body == b"ok"
    assert rig.origin.requests()[0].start == b"GET /" + b"a" * 8000 + b" HTTP/1.1"


def test_refusal_reaches_client_that_is_still_sending() -> None:
    with Rig() as rig:
        client = rig.client(LINES["obs-fold"])
        client.send(b"x" * 60000)
        check_refused(client, BAD_REQUEST)


def test_request_sent_byte_by_byte_is_forwarded() -> None:
    raw = CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"
    with Rig() as rig:
        client = rig.client(*[raw[at : at + 1] for at in range(len(raw))])
        assert client.answer().body == b"ok"
    [request] = rig.origin.requests()
    assert (request.body, request.whole) == (b"hello", True)


def test_empty_line_before_a_request_is_skipped() -> None:
    with Rig() as rig:
        client = rig.client(b"\r\n" + get(b"a.test") + b"\r\n" + get(b"a.test"))
        assert client.answer() == client.answer()
    assert len(rig.origin.requests()) == 2


@pytest.mark.parametrize(
    "raw", [b"", b"GET http://a.te", get(b"a.test")[:-2], HEAD + b"Content-Length: 9\r\n\r\nhell"]
)
def test_request_of_client_that_resets_stays_incomplete(raw: bytes) -> None:
    with Rig() as rig:
        rig.client(raw).reset()
        rig.join()
    assert not [request for request in rig.origin.requests() if request.whole]


def test_client_that_ends_within_its_body_gets_bad_request() -> None:
    """RFC 9112 section 8: an incomplete request may get an error; 502 would be wrong."""
    with Rig() as rig:
        client = rig.client(HEAD + b"Content-Length: 9\r\n\r\nhell")
        client.stop_sending()
        check_refused(client, BAD_REQUEST)
    assert [request.whole for request in rig.origin.requests()] == [False]
