"""Responses of origins: how they end at the client, and which are refused as malformed."""

from __future__ import annotations

import threading

import pytest

from tests.support.origin import (
    OK,
    PATIENCE,
    Message,
    OriginConnection,
    Rig,
    answers,
    answers_and_closes,
    check_refused,
    get,
    in_turn,
)

BAD_GATEWAY = b"502 Bad Gateway"
CONTINUE, HINTS = (
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
)
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\n"
    b"X-Trailer: a\r\nContent-Length: 1\r\n\r\n"
)


def request(method: bytes = b"GET", version: bytes = b"1.1", *fields: bytes) -> bytes:
    return (
        get(b"a.test", b"/", *fields)
        .replace(b"GET", method, 1)
        .replace(b"HTTP/1.1", b"HTTP/" + version, 1)
    )


def served(answer: bytes, method: bytes = b"GET") -> Message:
    """Return `answer` as the client gets it. A second request checks where it ended."""
    with Rig(answers(answer, OK)) as rig:
        client = rig.client(request(method) + get(b"a.test", b"/2"))
        first = client.answer(method)
        assert client.answer().body == b"ok"
    assert first.whole and len(rig.origin.requests()) == 2
    return first


@pytest.mark.parametrize(
    "method,answer,length,body",
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", [b"5"], b""),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", [b"0"], b""),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", [], b""),
        (b"HEAD", b"HTTP/1.1 200 OK\r\n\r\n", [], b""),
        (b"HEAD", b"HTTP/1.1 404 No\r\nContent-Length: 5\r\n\r\n", [b"5"], b""),
        (
            b"GET",
            b'HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: "a"\r\n\r\n',
            [b"5"],
            b"",
        ),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", [], b""),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\n\r\n", [], b""),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", [], b""),
        (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", [], b""),
        (b"GET", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", [], b""),
        (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", [b"0"], b""),
        (b"GET", b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello", [b"5"], b"hello"),
        (b"GET", b"HTTP/1.1 500 \xe9\r\nContent-Length : 5\r\n\r\nhello", [b"5"], b"hello"),
        (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello", [b"5"], b"hello"),
        (
            b"GET",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
            [b"5"],
            b"hello",
        ),
        (b"GET", CHUNKED, [], b"hello"),
        (b"GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n0\r\n\r\n", [], b""),
    ],
)
def test_response_ends_where_its_framing_says(
    method: bytes, answer: bytes, length: list[bytes], body: bytes
) -> None:
    """Hazard 65."""
    got = served(answer, method)
    assert (got.get(b"content-length"), got.body, got.get(b"connection")) == (length, body, [])


def test_trailer_is_not_forwarded_unasked() -> None:
    """Hazard 65."""
    assert served(CHUNKED).names() == {b"transfer-encoding", b"via"}


def forwarded(answer: bytes, *fields: bytes, version: bytes = b"1.1") -> bytes:
    """Return the bytes that a client gets which sends `fields` and closes behind the answer."""
    with Rig(answers_and_closes(answer)) as rig:
        client = rig.client(request(b"GET", version, b"Connection: TE, close", *fields))
        client.rest()
    return bytes(client.seen)


TE = b"TE: trailers"


def test_trailer_reaches_a_client_that_accepts_it() -> None:
    """Hazard 65: a field that frames the message does not."""
    got = forwarded(CHUNKED, TE)
    assert got.endswith(b"3\r\nhel\r\n2\r\nlo\r\n0\r\nX-Trailer: a\r\n\r\n")
    assert forwarded(CHUNKED).endswith(b"0\r\n\r\n")
    assert forwarded(CHUNKED, b"TE: gzip").endswith(b"0\r\n\r\n")


def test_trailer_does_not_reach_a_client_that_gets_no_chunks() -> None:
    """Hazard 65."""
    assert forwarded(CHUNKED, TE, version=b"1.0").endswith(b"\r\n\r\nhello")


def test_announced_trailer_is_announced_to_a_client_that_accepts_it() -> None:
    """Hazard 56: names that must not be in a trailer, or that no field can have, are left out."""
    answer = CHUNKED.replace(
        b"\r\n\r\n", b"\r\nTrailer: X-A, Content-Length,, a b, Host\r\nTrailer: x-b\r\n\r\n", 1
    )
    assert b"\r\nTrailer: x-a, x-b\r\n" in forwarded(answer, TE)
    assert b"Trailer:" not in forwarded(answer)
    length = b"HTTP/1.1 200 OK\r\nTrailer: X-A\r\nContent-Length: 2\r\n\r\nok"
    assert b"Trailer:" not in forwarded(length, TE)


def test_trailer_has_no_field_of_the_head_of_a_hop_or_of_the_framing() -> None:
    """Hazard 65: a client may merge the trailer into the head."""
    names = (
        *(b"Transfer-Encoding", b"content-length", b"Host", b"Set-Cookie", b"Content-Type"),
        *(b"Connection", b"Via", b"Trailer", b"Proxy-Authenticate", b"Location", b"X-Hop"),
    )
    trailer = b"".join(name + b": x\n" for name in names) + b"ETag:\n a\n b\x01\nX: c\n\n"
    answer = b"HTTP/1.1 200 OK\nConnection: x-hop\nTransfer-Encoding: chunked\n\n0\n" + trailer
    assert forwarded(answer, TE).endswith(b"\r\n\r\n0\r\nETag: a b\x01\r\nX: c\r\n\r\n")


def test_trailer_that_is_no_field_ends_in_a_reset() -> None:
    """Hazard 67: the client must not take the body for complete."""
    answer = CHUNKED.replace(b"X-Trailer: a", b"HTTP/1.1 200 OK")
    with Rig(answers(answer)) as rig:
        client = rig.client(request(b"GET", b"1.1", TE))
        assert not client.answer().whole and client.end == "reset"


def test_response_until_close_becomes_chunked_and_keeps_the_connection() -> None:
    """Hazard 65."""
    with Rig(in_turn(answers_and_closes(b"HTTP/1.1 200 OK\r\n\r\nhel", b"lo"), answers(OK))) as rig:
        client = rig.client(get(b"a.test") + get(b"a.test"))
        first = client.answer()
        assert (first.body, first.get(b"transfer-encoding"), first.get(b"connection")) == (
            b"hello",
            [b"chunked"],
            [],
        )
        assert client.answer().body == b"ok"
    assert len(rig.dialled) == 2


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\n\r\nhello", b"HTTP/1.0 200 OK\r\n\r\nhello", CHUNKED]
)
def test_http_1_0_client_gets_response_until_close(answer: bytes) -> None:
    """Hazard 65."""
    with Rig(answers_and_closes(answer)) as rig:
        client = rig.client(request(b"GET", b"1.0"))
        got = client.answer()
    assert got.start == b"HTTP/1.1 200 OK" and got.names() == {b"via", b"connection"}
    assert (got.body, got.get(b"connection"), client.end) == (b"hello", [b"close"], "closed")


def test_interim_responses_reach_http_1_1_client_in_order() -> None:
    """Hazard 65."""
    with Rig(answers(CONTINUE + HINTS + HINTS + OK)) as rig:
        client = rig.client(get(b"a.test") + get(b"a.test"))
        for _ in range(2):
            got = [client.answer() for _ in range(4)]
            assert [answer.status for answer in got] == [100, 103, 103, 200]
            assert got[1].get(b"link") == [b"</a>"] and b"content-length" not in got[1].names()


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_interim_responses_do_not_reach_http_1_0_client(method: bytes) -> None:
    """Hazard 65."""
    with Rig(answers_and_closes(CONTINUE + HINTS + (OK if method == b"GET" else OK[:-2]))) as rig:
        client = rig.client(request(method, b"1.0"))
        assert client.answer(method).status == 200
        assert client.rest() == b""


def test_endless_interim_responses_are_bad_gateway() -> None:
    with Rig(answers(HINTS * 1000)) as rig:
        client = rig.client(get(b"a.test"))
        interim = 0
        while (answer := client.answer()).status == 103:
            interim += 1
        assert answer.start == b"HTTP/1.1 " + BAD_GATEWAY and interim < 100


BAD = {
    "no number": b"Content-Length: x\r\n\r\nhello",
    "negative": b"Content-Length: -5\r\n\r\nhello",
    "plus": b"Content-Length: +5\r\n\r\nhello",
    "empty": b"Content-Length:\r\n\r\nhello",
    "underscore": b"Content-Length: 5_0\r\n\r\nhello",
    "10^30": b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\nh",
    "two different": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a different list": b"Content-Length: 5, 6\r\n\r\nhello!",
    "TE and CL": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "CL and TE": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two codings": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "xchunked": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "TE and CL in lines that end in LF": (
        b"Transfer-Encoding: chunked\nContent-Length: 5\n\n0\n\n"
    ),
    "folded TE and CL": (b"Transfer-Encoding:\n chunked\nContent-Length:\r\n\t5\r\n\r\n0\r\n\r\n"),
    "length on two lines": b"Content-Length: 1\r\n 0\r\n\r\nhello",
    "two lengths, one folded": b"Content-Length: 5\n ,6\n\nhello!",
    "length that ends in a control character": b"Content-Length: 5\x0b\r\n\r\nhello",
    "coding on two lines": b"Transfer-Encoding: chun\r\n ked\r\n\r\n0\r\n\r\n",
    "two codings, one folded": b"Transfer-Encoding: gzip,\n chunked\n\n0\n\n",
    "identity and chunked": (b"Transfer-Encoding: identity\nTransfer-Encoding: chunked\n\n0\n\n"),
    "coding that begins with a control character": (
        b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"
    ),
    "fold before the first field": b" X: a\r\nContent-Length: 5\r\n\r\nhello",
    "CR for a line end": b"X: a\rContent-Length: 5\r\n\r\nhello",
    "bare CR": b"X: a\rb\r\nContent-Length: 5\r\n\r\nhello",
    "NUL": b"X: a\0\r\nContent-Length: 5\r\n\r\nhello",
    "no name": b": a\r\nContent-Length: 5\r\n\r\nhello",
    "no colon": b"X\r\nContent-Length: 5\r\n\r\nhello",
    "64 KB": b"X: " + b"a" * 65536 + b"\r\n\r\n",
    "501 fields": b"X: y\r\n" * 501 + b"\r\n",
    "501 lines": b"X: y\r\n" + b" z\r\n" * 500 + b"\r\n",
}


# What origins send, the fields that the client gets beside those of the framing, and that framing.
LENGTH_5, CHUNKS = ([b"5"], []), ([], [b"chunked"])
LOOSE = {
    "lines that end in LF": (
        b"Server: a\nContent-Length: 5\n\nhello",
        [(b"Server", b"a")],
        LENGTH_5,
    ),
    "folded value": (
        b"Server: a\r\n  b\r\n\tc\r\nContent-Length: 5\r\n\r\nhello",
        [(b"Server", b"a b c")],
        LENGTH_5,
    ),
    "folded length": (b"Content-Length:\r\n 5\r\n\r\nhello", [], LENGTH_5),
    "length in a folded value": (
        b"Server: a\n Content-Length: 3\nContent-Length: 5\n\nhello",
        [(b"Server", b"a Content-Length: 3")],
        LENGTH_5,
    ),
    "folded coding": (b"Transfer-Encoding:\n\tchunked\n\n5\nhello\n0\n\n", [], CHUNKS),
    "coding in a folded value": (
        b"Server: a\r\n Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello",
        [(b"Server", b"a Transfer-Encoding: chunked")],
        LENGTH_5,
    ),
    "identity with a length": (
        b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
        [],
        LENGTH_5,
    ),
    "130 fields": (
        b"X: y\r\n" * 129 + b"Content-Length: 5\r\n\r\nhello",
        [(b"X", b"y")] * 129,
        LENGTH_5,
    ),
}


@pytest.mark.parametrize("rest,fields,framing", LOOSE.values(), ids=LOOSE)
def test_loose_response_reaches_the_client_in_canonical_form(
    rest: bytes, fields: list[tuple[bytes, bytes]], framing: tuple[list[bytes], list[bytes]]
) -> None:
    """Hazard 141.  served() reads strictly, and checks that the next answer is in its place."""
    answer = served(b"HTTP/1.1 200 OK\n" + rest)
    ours = (b"via", b"content-length", b"transfer-encoding")
    assert [field for field in answer.fields if field[0].lower() not in ours] == fields
    assert (answer.get(b"content-length"), answer.get(b"transfer-encoding")) == framing
    assert answer.body == b"hello"


def test_control_characters_in_a_value_reach_the_client() -> None:
    """Hazard 141."""
    answer = b"HTTP/1.1 200 OK\r\nX: a\x01\x1b[2J\x7fb\r\nContent-Length: 2\r\n\r\nok"
    with Rig(answers(answer)) as rig:
        client = rig.client(get(b"a.test", b"/", b"Connection: close"))
        client.rest()
    assert b"\r\nX: a\x01\x1b[2J\x7fb\r\n" in client.seen


def test_identity_without_a_length_ends_with_the_connection() -> None:
    """Hazard 141."""
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nhello"
    with Rig(answers_and_closes(raw)) as rig:
        answer = rig.client(get(b"a.test")).answer()
    assert (answer.body, answer.get(b"transfer-encoding")) == (b"hello", [b"chunked"])


@pytest.mark.parametrize("rest", BAD.values(), ids=BAD)
def test_ambiguous_response_is_bad_gateway(rest: bytes) -> None:
    """Hazard 67."""
    closed = threading.Event()

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\n" + rest)
        connection.rest()
        closed.set()

    with Rig(play) as rig:
        client = rig.client(get(b"a.test") + get(b"a.test", b"/2"))
        check_refused(client, BAD_GATEWAY)
        assert closed.wait(PATIENCE)
    assert len(rig.dialled) == 1 and len(rig.origin.requests()) == 1


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 +20 OK",
        b"HTTP/2 200 OK",
        b"HTTP/1.2 200 OK",
        b"HTTP/1.1  200 OK",
        b"ICY 200 OK",
        b"HTTP/1.1 600 OK",
        b"HTTP/1.1 099 OK",
        b"HTTP/1.1 200 O\0K",
        b"http/1.1 200 OK",
        b" HTTP/1.1 200 OK",
        b"",
        b"hello",
        b"a" * 9000,
        b"HTTP/1.1 200 OK\rX: y",
        b"HTTP/1.1\xa0200 OK",
    ],
    ids=lambda start: repr(start[:20]),
)
def test_malformed_status_line_is_bad_gateway(start: bytes) -> None:
    """Hazard 67."""
    with Rig(answers(start + b"\r\nContent-Length: 2\r\n\r\nok")) as rig:
        check_refused(rig.client(get(b"a.test")), BAD_GATEWAY)


def test_transfer_coding_in_http_1_0_response_is_bad_gateway() -> None:
    """Hazard 67."""
    with Rig(answers(CHUNKED.replace(b"1.1", b"1.0"))) as rig:
        check_refused(rig.client(get(b"a.test")), BAD_GATEWAY)


@pytest.mark.parametrize("method,status", [(b"HEAD", b"200"), (b"GET", b"304")])
@pytest.mark.parametrize("length", [b"x", b"5, 6", b"9" * 5000], ids=["x", "5, 6", "5000 digits"])
def test_bad_length_of_a_response_without_body_is_not_forwarded(
    method: bytes, status: bytes, length: bytes
) -> None:
    """Hazard 67."""
    with Rig(
        answers(b"HTTP/1.1 " + status + b" X\r\nContent-Length: " + length + b"\r\n\r\n")
    ) as rig:
        answer = rig.client(request(method)).answer(method)
    assert answer.status in (int(status), 502)
    assert answer.status == 502 or b"content-length" not in answer.names()


CUT = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhello",
    "between chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6",
    "trailer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n",
    "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nxyz\r\n",
}


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("answer", CUT.values(), ids=CUT)
def test_truncated_response_ends_in_a_reset(answer: bytes, version: bytes) -> None:
    with Rig(answers_and_closes(answer)) as rig:
        client = rig.client(request(b"GET", version) + get(b"a.test", b"/2"))
        got = client.answer()
        assert client.rest() == b"" and client.end == "reset"
    assert not got.whole and b"hello".startswith(got.body)
    assert [record.ended for record in rig.records] == ["failed"] and len(
        rig.origin.requests()
    ) == 1


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_response_until_close_that_is_reset_ends_in_a_reset(version: bytes) -> None:
    read = threading.Event()

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        assert read.wait(PATIENCE)
        connection.reset()

    with Rig(play) as rig:
        client = rig.client(request(b"GET", version))
        head = client.head()
        client.take(5 if version == b"1.0" else 10)
        read.set()
        assert client.rest() == b"" and client.end == "reset"
    assert head.status == 200


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Le", CONTINUE]
)
def test_origin_that_closes_within_the_head_is_bad_gateway(answer: bytes) -> None:
    with Rig(answers_and_closes(answer)) as rig:
        client = rig.client(get(b"a.test"))
        if answer == CONTINUE:
            assert client.answer().status == 100
        check_refused(client, BAD_GATEWAY)


def test_response_sent_byte_by_byte_is_forwarded() -> None:
    with Rig(
        lambda connection: (
            connection.request(),
            connection.send(*[CHUNKED[at : at + 1] for at in range(len(CHUNKED))]),
        )
    ) as rig:
        assert rig.client(get(b"a.test")).answer().body == b"hello"


def test_piece_of_a_response_is_forwarded_at_once() -> None:
    """A server-sent event must not wait for the next one."""
    seen = [threading.Event(), threading.Event()]

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        assert seen[0].wait(PATIENCE)
        connection.send(b"3\r\ntwo\r\n")
        assert seen[1].wait(PATIENCE)
        connection.send(b"0\r\n\r\n")

    with Rig(play) as rig:
        client = rig.client(get(b"a.test"))
        client.head()
        assert client.take(8) == b"3\r\none\r\n"
        seen[0].set()
        assert client.take(8) == b"3\r\ntwo\r\n"
        seen[1].set()
        assert client.take(5) == b"0\r\n\r\n"
