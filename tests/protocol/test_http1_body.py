"""Bodies of HTTP/1.1: how they end, and their data without the framing."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.errors import EndOfStream
from netproxy.net.stream import complete
from netproxy.protocol.http1 import HttpError, read_request, read_response
from netproxy.protocol.http.http1_message import (
    NONE,
    PIECE,
    Body,
    Framing,
    encode_chunk,
    encode_last_chunk,
    request_framing,
    response_framing,
)
from tests.support.readers import BytesReader, check_read, check_refused, read_body

CHUNKED = Framing(chunked=True)
UNTIL_CLOSE = Framing()
POST = b"POST http://a/ HTTP/1.1\r\nHost: a\r\n"
OK = b"HTTP/1.1 200 OK\r\n"

# Fields of a head, and how the body behind it ends, in a request as in a response.
FRAMINGS = {
    "Content-Length": (b"Content-Length: 5\r\n", Framing(length=5)),
    "Content-Length 0": (b"Content-Length: 0\r\n", NONE),
    "Content-Length of 18 digits": (
        b"Content-Length: 999999999999999999\r\n",
        Framing(length=10**18 - 1),
    ),
    "white space around the number": (b"Content-Length: \t 5 \r\n", Framing(length=5)),
    "name in capitals": (b"CONTENT-LENGTH: 5\r\n", Framing(length=5)),
    "equal list": (b"Content-Length: 5, 5\r\n", Framing(length=5)),
    "equal list without white space": (b"Content-Length: 5,5\r\n", Framing(length=5)),
    "equal fields": (b"Content-Length: 5\r\nContent-Length: 5\r\n", Framing(length=5)),
    "chunked": (b"Transfer-Encoding: chunked\r\n", CHUNKED),
    "Chunked": (b"Transfer-Encoding: Chunked\r\n", CHUNKED),
    "CHUNKED in white space": (b"TRANSFER-ENCODING:\tCHUNKED \r\n", CHUNKED),
}

REFUSED = {
    "CL.TE": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    "TE.CL": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    "TE and an empty CL": b"Transfer-Encoding: chunked\r\nContent-Length:\r\n",
    "TE.TE": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    "two TE": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    "TE and an empty TE": b"Transfer-Encoding: chunked\r\nTransfer-Encoding:\r\n",
    "empty TE": b"Transfer-Encoding:\r\n",
    ",chunked": b"Transfer-Encoding: ,chunked\r\n",
    "chunked,": b"Transfer-Encoding: chunked,\r\n",
    "xchunked": b"Transfer-Encoding: xchunked\r\n",
    "chunkedx": b"Transfer-Encoding: chunkedx\r\n",
    "chunked, chunked": b"Transfer-Encoding: chunked, chunked\r\n",
    "gzip, chunked": b"Transfer-Encoding: gzip, chunked\r\n",
    "chunked, identity": b"Transfer-Encoding: chunked, identity\r\n",
    "identity twice": b"Transfer-Encoding: identity\r\nTransfer-Encoding: identity\r\n",
    "identity and TE": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
    "identity, chunked": b"Transfer-Encoding: identity, chunked\r\n",
    "identity with a parameter": b"Transfer-Encoding: identity;x=y\r\n",
    "\\x0bidentity": b"Transfer-Encoding: \x0bidentity\r\n",
    "identity and two CL": (
        b"Transfer-Encoding: identity\r\nContent-Length: 5\r\nContent-Length: 6\r\n"
    ),
    "chunked with a parameter": b"Transfer-Encoding: chunked;x=y\r\n",
    "chunked in quotes": b'Transfer-Encoding: "chunked"\r\n',
    "\\x85chunked": b"Transfer-Encoding: \x85chunked\r\n",
    "chunked\\xa0": b"Transfer-Encoding: chunked\xa0\r\n",
    "vertical tab and chunked": b"Transfer-Encoding: \x0bchunked\r\n",
    "chunKed with a Kelvin sign": "Transfer-Encoding: chun\u212aed\r\n".encode(),
    "+5": b"Content-Length: +5\r\n",
    "5_0": b"Content-Length: 5_0\r\n",
    "0x5": b"Content-Length: 0x5\r\n",
    "empty CL": b"Content-Length:\r\n",
    "5,6": b"Content-Length: 5,6\r\n",
    "5,": b"Content-Length: 5,\r\n",
    ",5": b"Content-Length: ,5\r\n",
    "5,05": b"Content-Length: 5,05\r\n",
    "5 5": b"Content-Length: 5 5\r\n",
    "-1": b"Content-Length: -1\r\n",
    "-0": b"Content-Length: -0\r\n",
    "10**30": b"Content-Length: 1000000000000000000000000000000\r\n",
    "2**63": b"Content-Length: 9223372036854775808\r\n",
    "2**64": b"Content-Length: 18446744073709551616\r\n",
    "5.0": b"Content-Length: 5.0\r\n",
    "5e0": b"Content-Length: 5e0\r\n",
    "5;x": b"Content-Length: 5;x\r\n",
    "two CL": b"Content-Length: 5\r\nContent-Length: 6\r\n",
    "CL and an empty CL": b"Content-Length: 5\r\nContent-Length:\r\n",
    "two CL in other cases": b"Content-Length: 5\r\ncontent-length: 6\r\n",
    "\\x855": b"Content-Length: \x855\r\n",
    "5\\xa0": b"Content-Length: 5\xa0\r\n",
    "superscript": b"Content-Length: \xb2\r\n",
    "Arabic digit": "Content-Length: \u0665\r\n".encode(),
    "form feed and 5": b"Content-Length: \x0c5\r\n",
}

BODIES = {
    "nothing": (NONE, b"", b""),
    "length": (Framing(length=5), b"hello", b"hello"),
    "no chunk": (CHUNKED, b"0\r\n\r\n", b""),
    "chunks": (CHUNKED, b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", b"hello!"),
    "hexadecimal in both cases": (
        CHUNKED,
        b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n",
        b"0123456789" * 2,
    ),
    "zeros before a size": (CHUNKED, b"000005\r\nhello\r\n000\r\n\r\n", b"hello"),
    "CRLF in the data": (CHUNKED, b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b"\r\n0\r\n\r\n"),
    "extension": (CHUNKED, b'5;a=b;c="d e"\r\nhello\r\n0;e\r\n\r\n', b"hello"),
    "white space before an extension": (CHUNKED, b"5 \t;a\r\nhello\r\n0\r\n\r\n", b"hello"),
    "trailers are left out": (CHUNKED, b"1\r\nx\r\n0\r\nX: y\r\nContent-Length: 5\r\n\r\n", b"x"),
}

REFUSED_CHUNKS = {
    "0_2e": b"0_2e\r\n" + b"x" * 46 + b"\r\n0\r\n\r\n",
    "0x5": b"0x5\r\nhello\r\n0\r\n\r\n",
    "-1": b"-1\r\n",
    "+5": b"+5\r\nhello\r\n0\r\n\r\n",
    "7FFFFFFFFFFFFFFF": b"7FFFFFFFFFFFFFFF\r\n",
    "FFFFFFFFFFFFFFFF": b"FFFFFFFFFFFFFFFF\r\n",
    "10000000000000005": b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "16 zeros and 5": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "empty size": b"\r\nhello\r\n0\r\n\r\n",
    "extension without size": b";a\r\nhello\r\n0\r\n\r\n",
    "space before": b" 5\r\nhello\r\n0\r\n\r\n",
    "size and more": b"5 5\r\nhello\r\n0\r\n\r\n",
    "not hexadecimal": b"g\r\n",
    "\\x85 behind": b"5\x85\r\nhello\r\n0\r\n\r\n",
    "\\xa0 before": b"\xa05\r\nhello\r\n0\r\n\r\n",
    "Latin-1 superscript": b"\xb2\r\n",
    "missing CRLF": b"5\r\nhello0\r\n\r\n",
    "one byte too many": b"5\r\nhello!\r\n0\r\n\r\n",
    "CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "CR behind the size": b"5\r\r\nhello\r\n0\r\n\r\n",
    "NUL in an extension": b"5;\0\r\nhello\r\n0\r\n\r\n",
    "extension of 64 KB": b"5;" + b"a" * 65536 + b"\r\nhello\r\n0\r\n\r\n",
    "size of 64 KB": b"0" * 65536 + b"\r\n\r\n",
    # Two implementations would see the end of such a body in two places.
    "bare CR in a trailer": b"0\r\nX: y\rz\r\n\r\n",
    "bare CR as the end": b"0\r\n\r\r\n\r\n",
    "trailer that is a request": b"0\r\nGET /x HTTP/1.1\r\n\r\n",
    "trailer without a name": b"0\r\n: y\r\n\r\n",
    "trailer with white space before": b"0\r\n X: y\r\n\r\n",
    "NUL in a trailer": b"0\r\nX: \0\r\n\r\n",
    "CR and no LF behind the data": b"5\r\nhello\r0\r\n\r\n",
    "two LF behind the data": b"5\r\nhello\n\n0\r\n\r\n",
}

# Read from origins alone; what follows is framed anew for the client.
LOOSE_CHUNKS = {
    "LF behind the size": (b"5\nhello\r\n0\r\n\r\n", b"hello"),
    "LF behind the data": (b"5\r\nhello\n0\r\n\r\n", b"hello"),
    "LF behind the last size": (b"0\n\r\n", b""),
    "LF behind the trailers": (b"0\r\n\n", b""),
    "LF behind a trailer": (b"0\r\nX: y\n\r\n", b""),
    "LF everywhere": (b"5\nhello\n0\n\n", b"hello"),
    "LF behind an extension": (b"5;a\nhello\r\n0\r\n\r\n", b"hello"),
    "LF in the data": (b"5\nhe\nlo\n0\nX: y\n\n", b"he\nlo"),
    "folded trailer": (b"0\r\nX: y\r\n z\r\n\r\n", b""),
    "control character in a trailer": (b"0\r\nX: \x01\r\n\r\n", b""),
}


def framing_of_request(head: bytes) -> Framing:
    return request_framing(complete(read_request(BytesReader(head + b"\r\n"))))


def framing_of_response(head: bytes, method: bytes = b"GET") -> Framing:
    return response_framing(complete(read_response(BytesReader(head + b"\r\n"))), method)


def read_whole_body(framing: Framing, status: int = 400) -> Any:
    return lambda reader: b"".join(read_body(reader, framing, status))


@pytest.mark.parametrize(("fields", "framing"), FRAMINGS.values(), ids=FRAMINGS)
def test_framing_of_body_is_read_from_the_head(fields: bytes, framing: Framing) -> None:
    """Hazards 49 and 50; white space around a value: RFC 9112 section 5.1."""
    assert framing_of_request(POST + fields) == framing
    assert framing_of_response(OK + fields) == framing


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"CONNECT"])
def test_request_of_any_method_may_have_a_body(method: bytes) -> None:
    head = method + POST[4:] + b"Content-Length: 5\r\n"
    assert framing_of_request(head) == Framing(length=5)


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)
def test_ambiguous_framing_of_request_is_answered_400(fields: bytes) -> None:
    """Hazards 49 and 50."""
    with pytest.raises(HttpError) as caught:
        framing_of_request(POST + fields)
    assert caught.value.status == 400


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)
def test_ambiguous_framing_of_response_is_answered_502(fields: bytes) -> None:
    """Hazard 67."""
    with pytest.raises(HttpError) as caught:
        framing_of_response(OK + fields)
    assert caught.value.status == 502


def test_transfer_encoding_in_http_1_0_is_refused() -> None:
    """Hazard 49."""
    with pytest.raises(HttpError) as caught:
        framing_of_request(b"POST http://a/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n")
    assert caught.value.status == 400
    with pytest.raises(HttpError) as caught:
        framing_of_response(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n")
    assert caught.value.status == 502


def test_message_without_length_has_no_body_or_one_until_close() -> None:
    """Hazard 65."""
    assert framing_of_request(POST) == NONE
    assert framing_of_response(OK) == UNTIL_CLOSE
    assert framing_of_response(b"HTTP/1.0 200 OK\r\n") == UNTIL_CLOSE
    assert framing_of_response(b"HTTP/1.1 404 Not Found\r\n") == UNTIL_CLOSE


@pytest.mark.parametrize(
    "fields", [b"", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"]
)
@pytest.mark.parametrize(
    ("status", "method"),
    [
        (100, b"POST"),
        (101, b"GET"),
        (103, b"GET"),
        (199, b"GET"),
        (204, b"GET"),
        (304, b"GET"),
        (200, b"HEAD"),
        (404, b"HEAD"),
    ],
)
def test_response_that_never_has_a_body_ignores_its_framing(
    status: int, method: bytes, fields: bytes
) -> None:
    """Hazard 65."""
    assert framing_of_response(b"HTTP/1.1 %d x\r\n" % status + fields, method) == NONE


@pytest.mark.parametrize(
    "fields",
    [
        b"",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    ],
)
@pytest.mark.parametrize("status", [200, 201, 299])
def test_success_of_connect_ignores_its_framing(status: int, fields: bytes) -> None:
    """Hazard 61."""
    assert framing_of_response(b"HTTP/1.1 %d x\r\n" % status + fields, b"CONNECT") == NONE


def test_refusal_of_connect_has_a_body() -> None:
    """Hazard 61."""
    assert framing_of_response(b"HTTP/1.1 407 x\r\nContent-Length: 5\r\n", b"CONNECT") == Framing(
        length=5
    )


def test_framing_tells_how_a_body_ends() -> None:
    assert [(f.empty, f.until_close) for f in (NONE, Framing(length=5), CHUNKED, UNTIL_CLOSE)] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]


@pytest.mark.parametrize(("framing", "data", "body"), BODIES.values(), ids=BODIES)
def test_body_is_read_to_its_last_byte(framing: Framing, data: bytes, body: bytes) -> None:
    check_read(read_whole_body(framing), data, body)


@pytest.mark.parametrize("data", REFUSED_CHUNKS.values(), ids=REFUSED_CHUNKS)
def test_invalid_chunks_are_refused(data: bytes) -> None:
    """Hazards 51 and 52."""
    if len(data) > 1000:
        # check_refused() would read it whole at every truncation.
        for status in (400, 502):
            with pytest.raises(HttpError) as caught:
                read_whole_body(CHUNKED, status)(BytesReader(data))
            assert caught.value.status == status
        return
    for status in (400, 502):
        check_refused(read_whole_body(CHUNKED, status), data, HttpError, status=status)


@pytest.mark.parametrize(("data", "body"), LOOSE_CHUNKS.values(), ids=LOOSE_CHUNKS)
def test_loose_chunks_are_read_from_origins_and_refused_from_clients(
    data: bytes, body: bytes
) -> None:
    """Hazards 51 and 141."""
    check_read(read_whole_body(CHUNKED, 502), data, body)
    check_refused(read_whole_body(CHUNKED), data, HttpError, status=400)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize(
    ("fields", "framing"),
    [
        (b"Transfer-Encoding: identity\r\n", UNTIL_CLOSE),
        (b"transfer-encoding: Identity\r\n", UNTIL_CLOSE),
        (b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n", Framing(length=5)),
        (b"Transfer-Encoding:\n identity\nContent-Length: 5\n", Framing(length=5)),
    ],
)
def test_identity_means_no_coding_in_a_response_alone(
    fields: bytes, framing: Framing, version: bytes
) -> None:
    """Hazard 141."""
    assert framing_of_response(b"HTTP/" + version + b" 200 OK\r\n" + fields) == framing
    with pytest.raises(HttpError) as caught:
        framing_of_request(POST.replace(b"1.1", version) + fields)
    assert caught.value.status == 400


def test_chunk_line_over_1_kb_is_refused() -> None:
    """Hazard 51."""
    line = b"1;".ljust(1022, b"a")
    assert read_whole_body(CHUNKED)(BytesReader(line + b"\r\nx\r\n0\r\n\r\n")) == b"x"
    reader = BytesReader(line + b"a" * 65536 + b"\r\nx\r\n0\r\n\r\n", step=1)
    with pytest.raises(HttpError):
        read_whole_body(CHUNKED)(reader)
    assert reader.taken <= 1024


def test_trailers_over_8_kb_are_refused() -> None:
    trailers = b"X: y\r\n" * 99
    fits = b"0\r\n" + trailers + (b"Y: ".ljust(8192 - len(trailers) - 4, b"z")) + b"\r\n\r\n"
    assert read_whole_body(CHUNKED)(BytesReader(fits)) == b""
    for data in (
        fits[:3] + b"X" + fits[3:],
        b"0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"0\r\n" + b"X" * 100_000,
    ):
        reader = BytesReader(data, step=1024)
        with pytest.raises(HttpError) as caught:
            read_whole_body(CHUNKED)(reader)
        assert caught.value.status == 400
        assert reader.taken <= 8192 + 1024


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_large_body_is_read_in_pieces(size: int) -> None:
    data = b"x" * size
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (size, data) if size else b"0\r\n\r\n"
    for framing, raw in ((Framing(length=size), data), (CHUNKED, chunked), (UNTIL_CLOSE, data)):
        pieces = list(read_body(BytesReader(raw, step=3 * PIECE), framing))
        assert b"".join(pieces) == data
        assert all(0 < len(piece) <= PIECE for piece in pieces)


def test_data_is_returned_as_it_comes() -> None:
    body = read_body(BytesReader(b"5\r\nhello\r\n0\r\n\r\n", step=1), CHUNKED)
    assert list(body) == [b"h", b"e", b"l", b"l", b"o"]


@pytest.mark.parametrize(
    ("framing", "data", "given"),
    [
        (Framing(length=9), b"hello", b"hello"),
        (CHUNKED, b"9\r\nhello", b"hello"),
        (CHUNKED, b"5\r\nhello\r\n", b"hello"),
    ],
)
def test_truncated_body_is_returned_and_then_ends_the_stream(
    framing: Framing, data: bytes, given: bytes
) -> None:
    pieces = []
    with pytest.raises(EndOfStream):
        for piece in read_body(BytesReader(data), framing):
            pieces.append(piece)
    assert b"".join(pieces) == given


@pytest.mark.parametrize("step", [0, 1])
def test_body_until_close_has_everything(step: int) -> None:
    """Hazard 65."""
    reader = BytesReader(b"0\r\n\r\nhello", step)
    assert b"".join(read_body(reader, UNTIL_CLOSE)) == b"0\r\n\r\nhello"
    assert reader.rest() == b""


def test_chunk_has_these_bytes() -> None:
    assert encode_chunk(b"hello") == b"5\r\nhello\r\n"
    assert encode_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"
    assert encode_chunk(b"") == b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("status", "data", "trailer"),
    [
        (400, b"1\r\nx\r\n0\r\n\r\n", []),
        (400, b"0\r\nX: y\r\nx:\tz \r\n\r\n", [(b"X", b"y"), (b"x", b"z")]),
        (502, b"0\nX : y\n z\n\n", [(b"X", b"y z")]),
    ],
)
def test_trailer_is_kept_once_the_body_was_read(
    status: int, data: bytes, trailer: list[tuple[bytes, bytes]]
) -> None:
    body = Body(BytesReader(data), CHUNKED, status)
    while complete(body.read()):
        assert body.trailer == []
    assert body.trailer == trailer


def test_last_chunk_has_its_trailer() -> None:
    assert encode_last_chunk([]) == b"0\r\n\r\n"
    assert encode_last_chunk([(b"X", b"y"), (b"x", b"")]) == b"0\r\nX: y\r\nx: \r\n\r\n"


def test_encoded_chunks_are_read_back() -> None:
    pieces = [b"a", b"\r\n", b"0\r\n\r\n", b"x" * 300]
    check_read(
        read_whole_body(CHUNKED),
        b"".join(map(encode_chunk, pieces)) + encode_chunk(b""),
        b"".join(pieces),
    )
