"""Properties of all DNS messages.

Hostile bytes raise ProtocolError or nothing, and a forwarder changes only what it must.
"""

from __future__ import annotations

import struct
from typing import Any, Callable

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st

from netproxy.errors import ProtocolError
from netproxy.protocol import dns, dns_message
from netproxy.protocol.dns import A, AAAA, IN, NAME_LIMIT, Question
from tests.support.dns import (
    ASKED,
    HEADER,
    QR,
    RD,
    TC,
    a,
    answer,
    cname,
    opt,
    option,
    query,
    question,
    record,
    soa,
)

many = settings(max_examples=200, deadline=None)
ASK = Question("www.example.com", A, IN)
WWW = question("www.example.com")
WHOLE = answer(
    WWW,
    (
        cname(ASKED, 300, b"\3far\xc0\x10"),
        a(200, owner=b"\3FAR\xc0\x10"),
        record(ASKED, 65280, 9, b"\xc0\x0c"),
    ),
    (soa(60, 60),),
    (opt(options=option(12, b"\0" * 9)),),
)
ASKING = query(WWW, opt(extended=0x8000, options=option(10, b"clients.")))

# Any bytes, and messages with a few changed bytes, which are parsed further.
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(WHOLE) - 1),
        st.one_of(st.integers(0, 255), st.sampled_from([0, 0x3F, 0x40, 0xC0, 0xFF])),
    ),
    max_size=6,
)


def edited(message: bytes, edits: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(message)
    for at, byte in edits:
        changed[at % len(message)] = byte
    return bytes(changed[: len(message) - cut])


HOSTILE = st.one_of(
    st.builds(
        edited, st.sampled_from([WHOLE, ASKING]), EDITS, st.sampled_from([0, 0, 0, 1, 5, 30])
    ),
    st.binary(max_size=60).map(lambda data: HEADER.pack(1, QR | RD, 1, 2, 1, 1) + data),
    st.binary(max_size=60).map(lambda data: HEADER.pack(1, QR, 1, 2, 1, 1) + WWW + data),
    st.binary(max_size=60),
)

PARSERS: dict[str, Callable[[bytes], Any]] = {
    "parse_header": dns.parse_header,
    "parse_question": dns.parse_question,
    "parse_answer": lambda data: dns.parse_answer(data, ASK),
    "parse_answer to itself": lambda data: dns.parse_answer(
        data, dns.parse_question(data)[0]._replace(qtype=A)
    ),
    "ttl_places": dns_message.ttl_offsets,
    "without_options": dns_message.without_options,
    "is_answer to hostile bytes": lambda data: dns.is_answer(WHOLE, data),
    "encode_error": lambda data: dns.encode_error(data, 2),
}
NEVER_RAISE: dict[str, Callable[[bytes], Any]] = {
    "is_answer": lambda data: dns.is_answer(data, ASKING),
    "cache_key": dns_message.cache_key,
    "least_ttl": dns_message.least_ttl,
    "udp_size": dns_message.udp_size,
    "truncate": lambda data: dns_message.truncate(data + b"\0" * 512, 512),
}


@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
def test_any_bytes_parse_or_raise_protocol_error(parse: Callable[[bytes], Any]) -> None:
    @many
    @given(HOSTILE)
    def check(data: bytes) -> None:
        try:
            parse(data)
        except ProtocolError:
            pass

    check()


@pytest.mark.parametrize("look", NEVER_RAISE.values(), ids=NEVER_RAISE)
def test_any_bytes_raise_nothing_in_these_functions(look: Callable[[bytes], Any]) -> None:
    @many
    @given(HOSTILE)
    def check(data: bytes) -> None:
        look(data)

    check()


@many
@given(HOSTILE)
def test_answer_with_a_least_ttl_can_be_cached_and_aged(data: bytes) -> None:
    """A forwarder needs no other check than least_ttl()."""
    ttl = dns_message.least_ttl(data)
    if ttl is None:
        return
    assert 0 <= ttl < 1 << 31
    kept = dns_message.without_options(data)
    assert dns_message.least_ttl(kept) is not None
    asking = query(data[12 : dns.parse_question(data)[1]])
    assert (
        dns.parse_header(dns_message.aged(kept, dns_message.ttl_offsets(kept), asking, ttl))[3:6]
        == dns.parse_header(data)[3:6]
    )


LABELS = st.one_of(
    st.binary(min_size=1, max_size=63),
    st.text("abcXYZ09-_", min_size=1, max_size=20).map(str.encode),
)
RAW_NAMES = (
    st.lists(LABELS, max_size=6)
    .map(lambda labels: b"".join(bytes((len(label),)) + label for label in labels) + b"\0")
    .filter(lambda raw: len(raw) <= NAME_LIMIT)
)
TYPES = st.one_of(st.sampled_from([A, AAAA, 255]), st.integers(0, 65535))


def ask(raw: bytes, qtype: int, qclass: int = 1) -> bytes:
    """Return a question whose name is these bytes."""
    return raw + struct.pack(">HH", qtype, qclass)


@many
@given(RAW_NAMES, TYPES, st.integers(0, 65535), st.booleans())
def test_name_survives_as_text(raw: bytes, qtype: int, id: int, edns: bool) -> None:
    parsed, end = dns.parse_question(query(ask(raw, qtype)))
    assert end == 12 + len(raw) + 4
    assert (
        parsed.name.isascii() and parsed.name.isprintable() and parsed.name == parsed.name.lower()
    )
    sent = dns.encode_query(id, parsed, edns)
    assert sent[12:end] == ask(raw.lower(), qtype)
    assert dns.parse_question(sent) == (parsed, end)
    assert dns_message.udp_size(sent) == (1232 if edns else 512)


@many
@given(RAW_NAMES, RAW_NAMES)
def test_names_are_equal_as_text_if_they_are_equal_on_the_wire(first: bytes, second: bytes) -> None:
    texts = [dns.parse_question(query(ask(raw, A)))[0].name for raw in (first, second)]
    assert (texts[0] == texts[1]) == (first.lower() == second.lower())


@many
@given(RAW_NAMES, TYPES, st.integers(0, 65535), st.integers(0, 65535), st.booleans())
def test_cache_key_ignores_id_and_spelling_only(
    raw: bytes, qtype: int, id: int, size: int, edns: bool
) -> None:
    additionals = (opt(size),) * edns
    key = dns_message.cache_key(query(ask(raw, qtype), *additionals, id=id))
    assert (key is None) == (128 <= qtype < 256)
    assert key == dns_message.cache_key(query(ask(raw.swapcase(), qtype), *additionals))
    if key:
        assert key != dns_message.cache_key(query(ask(raw, qtype ^ 0x20), *additionals))
        assert key != dns_message.cache_key(query(ask(raw, qtype, 0x21), *additionals))
        assert key != dns_message.cache_key(query(ask(raw, qtype), *(opt(),) * (not edns)))
        assert key != dns_message.cache_key(query(ask(b"\1a" + raw, qtype), *additionals))


TTLS = st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0, 90))
RECORDS = st.lists(
    st.tuples(st.sampled_from([1, 5, 6, 16, 28, 41, 65280]), TTLS, st.binary(max_size=20)),
    max_size=5,
)


@many
@given(RECORDS, RECORDS, RECORDS, st.integers(0, 100), st.integers(0, 65535))
def test_aged_answer_differs_in_ttls_id_and_spelling_only(
    first: list[Any], second: list[Any], third: list[Any], seconds: int, id: int
) -> None:
    def written(lessen: Callable[[int], int], asked: bytes) -> bytes:
        sections = [
            tuple(
                record(ASKED, rtype, ttl if rtype == 41 else lessen(ttl), data)
                for rtype, ttl, data in records
            )
            for records in (first, second, third)
        ]
        return answer(asked, sections[0], sections[1], sections[2])

    def older(ttl: int) -> int:
        return max(0, ttl - seconds) if ttl < 1 << 31 else 0

    message, spelt = written(lambda ttl: ttl, WWW), question("WWW.eXample.com")
    asking = query(spelt, id=id)
    assert dns_message.aged(
        message, dns_message.ttl_offsets(message), asking, seconds
    ) == dns_message.with_id(written(older, spelt), id)


@many
@given(RAW_NAMES, st.integers(0, 3000), st.booleans(), st.integers(512, 4096))
def test_truncated_answer_fits_and_matches_its_query(
    raw: bytes, padding: int, edns: bool, limit: int
) -> None:
    asked = ask(raw, 16)
    message = answer(
        asked,
        (record(ASKED, 16, 60, b"\0" * 2000),),
        (),
        (opt(options=option(12, b"\0" * padding)),) * edns,
    )
    short = dns_message.truncate(message, limit)
    assert len(short) <= limit
    assert dns.is_answer(short, query(asked))
    assert (short == message) == (len(message) <= limit)
    if short != message:
        assert dns.parse_header(short) == (0x1234, True, 0, True, True, 0, 1, 0, 0, edns)
        assert int.from_bytes(short[2:4], "big") == int.from_bytes(message[2:4], "big") | TC
        assert dns_message.udp_size(short) == (1232 if edns else 512)


@many
@given(HOSTILE, st.integers(0, 15))
def test_any_message_with_a_header_gets_an_error(data: bytes, code: int) -> None:
    if len(data) < 12:
        return
    asking = data[:2] + bytes((data[2] & 0x7F,)) + data[3:]
    header = dns.parse_header(dns.encode_error(asking, code))
    assert (
        header[:4] == (*dns.parse_header(asking)[:1], True, dns.parse_header(asking).opcode, False)
        and header.rcode == code
    )
    try:
        assert dns.is_answer(dns.encode_error(asking, code), asking)
    except ProtocolError:
        assert not header.qdcount
