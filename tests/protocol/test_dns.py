"""The codec of DNS messages: headers, names, questions, answers and errors."""

from __future__ import annotations

import struct
from typing import Callable

import pytest

from netproxy.errors import ProtocolError
from netproxy.protocol import dns, dns_message
from netproxy.protocol.dns import (
    A,
    AAAA,
    FORMERR,
    IN,
    NOERROR,
    NXDOMAIN,
    REFUSED,
    SERVFAIL,
    SOA,
    AddressAnswer,
    Question,
)
from tests.support.dns import (
    AD,
    ASKED,
    CD,
    HEADER,
    QR,
    RA,
    RD,
    TC,
    a,
    answer,
    cname,
    name,
    opt,
    option,
    query,
    question,
    record,
    soa,
)

DO = 0x8000
COOKIE, PADDING = 10, 12
UNKNOWN, HTTPS, TXT, RRSIG = 65280, 65, 16, 46
WWW = question("www.example.com")
# 255 octets.
LONGEST = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\0"
TEN, TWENTY = b"\xc0\0\2\x0a", b"\xc0\0\2\x14"
PACKED6 = b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1"
HEADER_ONLY = HEADER.pack(7, QR, 0, 0, 0, 0)

# A query for A of www.example.com with AD.  The answer is a CNAME, www.example.net, and its two
# addresses.
QUERY_BYTES = bytes.fromhex(
    "8d26 0120 0001 0000 0000 0000 03777777 076578616d706c65 03636f6d 00 0001 0001"
)
ANSWER_BYTES = bytes.fromhex(
    "8d26 81a0 0001 0003 0000 0000 03777777 076578616d706c65 03636f6d 00 0001 0001"
    "c00c 0005 0001 0000012c 0011 03777777 076578616d706c65 036e6574 00"
    "c02d 0001 0001 00000014 0004 c0000201"
    "c02d 0001 0001 00000014 0004 c0000202"
)


def query_for(raw_name: bytes, qtype: int = A) -> bytes:
    """Return a query whose name is these bytes."""
    return query(raw_name + struct.pack(">HH", qtype, IN))


def expect_error_for_every_cut(parse: Callable[[bytes], object], data: bytes) -> None:
    """Expect ProtocolError for every beginning of `data`."""
    for cut in range(len(data)):
        with pytest.raises(ProtocolError):
            parse(data[:cut])


class TestHeader:
    def test_header_of_a_query_is_parsed(self) -> None:
        assert dns.parse_header(QUERY_BYTES) == (0x8D26, False, 0, False, True, NOERROR, 1, 0, 0, 0)

    def test_header_of_a_truncated_answer_is_parsed(self) -> None:
        header = dns.parse_header(HEADER.pack(65535, QR | 4 << 11 | TC | 0xF, 1, 2, 3, 4))
        assert header == dns.DnsHeader(65535, True, 4, True, False, 15, 1, 2, 3, 4)

    def test_header_that_is_cut_is_a_protocol_error(self) -> None:
        expect_error_for_every_cut(dns.parse_header, HEADER_ONLY)


# A name as Question has it, and on the wire.
NAMES = {
    "the root": ("", b"\0"),
    "one label": ("com", b"\3com\0"),
    "lower case alone": ("www.example.com", b"\3wWw\7eXAMPLE\3com\0"),
    "service": ("_dns._udp.example", b"\4_dns\4_udp\7example\0"),
    "dot in a label": ("a\\046b.c", b"\3a.b\1c\0"),
    "backslash": ("\\092", b"\1\\\0"),
    "odd bytes": ("\\000\\032\\255x", b"\4\0 \xffx\0"),
    "63 octets in a label": ("a" * 63, b"\x3f" + b"a" * 63 + b"\0"),
    "255 octets": (".".join(["a" * 63] * 3 + ["a" * 61]), LONGEST),
}
BAD_NAMES = {
    "256 octets": (b"\x3f" + b"a" * 63) * 3 + b"\x3e" + b"a" * 62 + b"\0",
    "64 octets in a label": b"\x40" + b"a" * 64 + b"\0",
    "bits 10": b"\x80a\0",
    "pointer to itself": b"\xc0\x0c",
    "pointer into the header": b"\1a\xc0\0",
    "pointer onward": b"\1a\xc0\x10\0\0",
}


class TestQuestion:
    @pytest.mark.parametrize(("text", "raw"), NAMES.values(), ids=NAMES)
    def test_question_is_parsed(self, text: str, raw: bytes) -> None:
        message = query_for(raw, UNKNOWN)
        assert dns.parse_question(message + b"more") == (Question(text, UNKNOWN, IN), len(message))
        expect_error_for_every_cut(dns.parse_question, message)

    @pytest.mark.parametrize(("text", "raw"), NAMES.values(), ids=NAMES)
    def test_query_is_encoded_in_lower_case(self, text: str, raw: bytes) -> None:
        assert dns.encode_query(0x1234, Question(text, AAAA, IN), edns=False) == query_for(
            raw.lower(), AAAA
        )

    @pytest.mark.parametrize("raw", BAD_NAMES.values(), ids=BAD_NAMES)
    def test_question_with_a_bad_name_is_a_protocol_error(self, raw: bytes) -> None:
        with pytest.raises(ProtocolError):
            dns.parse_question(query_for(raw))

    @pytest.mark.parametrize("count", [0, 2, 256])
    def test_message_without_exactly_one_question_is_a_protocol_error(self, count: int) -> None:
        with pytest.raises(ProtocolError):
            dns.parse_question(HEADER.pack(1, RD, count, 0, 0, 0) + WWW + WWW)

    @pytest.mark.parametrize(
        "text", ["a..b", ".", "a.", "a" * 64, ".".join(["a" * 63] * 4), "é", "\\256", "a\\", "\\x"]
    )
    def test_name_that_cannot_be_sent_is_a_value_error(self, text: str) -> None:
        with pytest.raises(ValueError):
            dns.encode_query(1, Question(text, A, IN))

    def test_query_announces_1232_bytes(self) -> None:
        assert dns.encode_query(0xFFFE, Question("a.b", AAAA, IN)) == (
            b"\xff\xfe\1\0\0\1\0\0\0\0\0\1\1a\1b\0\0\x1c\0\1\0\0\x29\x04\xd0\0\0\0\0\0\0"
        )


ASK = Question("www.example.com", A, IN)
ALIAS, FAR = name("alias.test"), name("far.test")
ANSWERS = {
    "addresses in the server's order": (
        answer(WWW, (a(60, TWENTY), a(50, TEN))),
        (NOERROR, ["192.0.2.20", "192.0.2.10"], 50),
    ),
    "alias of two addresses": (ANSWER_BYTES, (NOERROR, ["192.0.2.1", "192.0.2.2"], 20)),
    "chain": (
        answer(WWW, (cname(ASKED, 30, ALIAS), cname(ALIAS, 20, FAR), a(40, TEN, FAR))),
        (NOERROR, ["192.0.2.10"], 20),
    ),
    "chain in any order": (
        answer(WWW, (a(40, TEN, FAR), cname(ALIAS, 50, FAR), cname(ASKED, 60, ALIAS))),
        (NOERROR, ["192.0.2.10"], 40),
    ),
    "names in another case": (
        answer(
            question("WWW.Example.COM"),
            (cname(name("wwW.example.com"), 9, name("ALIAS.test")), a(8, TEN, ALIAS)),
        ),
        (NOERROR, ["192.0.2.10"], 8),
    ),
    "chain that goes round": (
        answer(WWW, (cname(ASKED, 30, ALIAS), cname(ALIAS, 20, ASKED))),
        (NOERROR, [], 0),
    ),
    "alias of itself": (answer(WWW, (cname(ASKED, 30, ASKED),)), (NOERROR, [], 0)),
    "second alias of one name": (
        answer(WWW, (cname(ASKED, 30, ALIAS), cname(ASKED, 30, FAR), a(5, TEN, ALIAS))),
        (NOERROR, ["192.0.2.10"], 5),
    ),
    "chain that ends nowhere": (answer(WWW, (cname(ASKED, 30, ALIAS),)), (NOERROR, [], 0)),
    "chain to no data": (
        answer(WWW, (cname(ASKED, 30, ALIAS),), (soa(300, 60),)),
        (NOERROR, [], 30),
    ),
    "addresses of another name": (answer(WWW, (a(60, TEN, FAR),)), (NOERROR, [], 0)),
    "address of another class": (answer(WWW, (record(ASKED, A, 60, TEN, 3),)), (NOERROR, [], 0)),
    "address in another section": (answer(WWW, (), (), (a(60, TEN),)), (NOERROR, [], 0)),
    "other types between": (
        answer(WWW, (record(ASKED, RRSIG, 1, b"odd"), record(ASKED, UNKNOWN, 1, b""), a(60, TEN))),
        (NOERROR, ["192.0.2.10"], 60),
    ),
    "no data, least of the SOA's TTL": (answer(WWW, (), (soa(40, 900),)), (NOERROR, [], 40)),
    "no data, least of the SOA's minimum": (answer(WWW, (), (soa(900, 40),)), (NOERROR, [], 40)),
    "no data, no SOA": (answer(WWW), (NOERROR, [], 0)),
    "SOA that is none": (answer(WWW, (), (record(b"\0", SOA, 60, b"\0" * 21),)), (NOERROR, [], 0)),
    "SOA in another section": (answer(WWW, (soa(60, 60),)), (NOERROR, [], 0)),
    "no such name": (
        answer(WWW, (), (soa(900, 40),), flags=QR | RD | NXDOMAIN),
        (NXDOMAIN, [], 40),
    ),
    "no such name at the end of a chain": (
        answer(WWW, (cname(ASKED, 30, ALIAS),), (soa(900, 40),), flags=QR | NXDOMAIN),
        (NXDOMAIN, [], 30),
    ),
    "no such name, and yet addresses": (
        answer(WWW, (a(60, TEN),), flags=QR | NXDOMAIN),
        (NXDOMAIN, [], 0),
    ),
    "failure": (answer(WWW, (), (soa(900, 40),), flags=QR | SERVFAIL), (SERVFAIL, [], 0)),
    "failure without question": (HEADER.pack(1, QR | FORMERR, 0, 0, 0, 0), (FORMERR, [], 0)),
    "code of EDNS": (answer(WWW, (), (), (opt(extended=1 << 24),)), (16, [], 0)),
    "code of EDNS and of the header": (
        answer(WWW, (), (), (opt(extended=0xFF << 24),), flags=QR | 7),
        (0xFF7, [], 0),
    ),
    "EDNS in a wrong section": (
        answer(WWW, (a(60), opt(extended=1 << 24))),
        (NOERROR, ["192.0.2.1"], 60),
    ),
    "TTL with the uppermost bit": (answer(WWW, (a(1 << 31),)), (NOERROR, ["192.0.2.1"], 0)),
    "longest TTL": (answer(WWW, (a((1 << 31) - 1),)), (NOERROR, ["192.0.2.1"], (1 << 31) - 1)),
    "bytes behind it": (answer(WWW, (a(60),)) + b"more", (NOERROR, ["192.0.2.1"], 60)),
}
BAD_ANSWERS = {
    "query": query(WWW),
    "answer to a NOTIFY": answer(WWW, flags=QR | 4 << 11),
    "another name": answer(question("www.example.org"), (a(60),)),
    "another type": answer(question("www.example.com", AAAA)),
    "another class": answer(question("www.example.com", A, 3)),
    "no question": HEADER_ONLY,
    "two questions": HEADER.pack(1, QR, 2, 0, 0, 0) + WWW + WWW,
    "address too short": answer(WWW, (a(60, b"\1\2\3"),)),
    "address too long": answer(WWW, (a(60, PACKED6),)),
    "alias too short": answer(WWW, (cname(ASKED, 60, b"\1a"), a(60))),
    "bytes behind an alias": answer(WWW, (cname(ASKED, 60, ASKED + b"\0"),)),
    "owner with bits 01": answer(WWW, (a(60, owner=b"\x41a\0"),)),
    "owner that points onward": answer(
        WWW, (a(60, owner=b"\xc0\x80"), record(b"\0", TXT, 1, b"\0" * 200))
    ),
    "owner that points to itself": answer(
        WWW, (a(60, owner=struct.pack(">H", 0xC000 | 12 + len(WWW))),)
    ),
    "owner that points into the header": answer(WWW, (a(60, owner=b"\xc0\2"),)),
    "fewer records than the header says": answer(WWW, (a(60),))[:-16],
}


class TestAnswer:
    @pytest.mark.parametrize(("message", "expected"), ANSWERS.values(), ids=ANSWERS)
    def test_answer_is_parsed(self, message: bytes, expected: tuple[int, list[str], int]) -> None:
        assert dns.parse_answer(message, ASK) == AddressAnswer(*expected)

    @pytest.mark.parametrize("message", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
    def test_message_that_is_no_answer_is_a_protocol_error(self, message: bytes) -> None:
        with pytest.raises(ProtocolError):
            dns.parse_answer(message, ASK)

    def test_answer_that_is_cut_is_a_protocol_error(self) -> None:
        whole = answer(
            WWW,
            (cname(ASKED, 30, ALIAS), a(40, TEN, ALIAS)),
            (soa(60, 60),),
            (opt(options=option(PADDING, b"\0" * 9)),),
        )
        expect_error_for_every_cut(lambda data: dns.parse_answer(data, ASK), whole)
        expect_error_for_every_cut(dns_message.ttl_offsets, whole)

    @pytest.mark.parametrize(
        ("packed", "text"),
        [(PACKED6, "2001:db8::1"), (b"\0" * 10 + b"\xff\xff" + TEN, "192.0.2.10")],
    )
    def test_ipv6_address_of_an_answer_is_canonical(self, packed: bytes, text: str) -> None:
        message = answer(question("a", AAAA), (a(1), record(ASKED, AAAA, 60, packed)))
        assert dns.parse_answer(message, Question("a", AAAA, IN)) == (NOERROR, [text], 60)

    def test_answer_to_our_own_query_is_accepted(self) -> None:
        sent = dns.encode_query(0x1234, ASK)
        assert dns.parse_question(sent)[0] == ASK
        assert dns.is_answer(answer(WWW, (a(60),), (), (opt(),)), sent)


class TestCompression:
    def test_compressed_names_of_rfc_1035_are_parsed(self) -> None:
        """The names and offsets of section 4.1.4: pointers to 20 and to 26."""
        message = (
            HEADER.pack(1, QR, 1, 3, 0, 0)
            + b"\7unaided\1F\3ISI\4ARPA\0\0\1\0\1"
            + cname(ASKED, 4, b"\3FOO\xc0\x14")
            + cname(b"\3foo\xc0\x14", 3, b"\xc0\x1a")
            + a(2, TEN, b"\4arpa\0")
        )
        assert message.index(b"\1F\3ISI") == 20 and message.index(b"\4ARPA") == 26
        assert dns.parse_answer(message, Question("unaided.f.isi.arpa", A, IN)) == (
            NOERROR,
            ["192.0.2.10"],
            2,
        )

    def test_name_may_have_a_pointer_for_each_label(self) -> None:
        """Each of 127 labels is in its own record, with a pointer to the next."""
        records, at = [], 12 + len(question("b"))
        target = b"\0"
        for _ in range(127):
            target, here = b"\1a" + target, target
            records.append(record(b"\0", UNKNOWN, 9, target))
            target = struct.pack(">H", 0xC000 | at + 11)
            at += len(records[-1])
        message = answer(
            question("b"), (*records, cname(ASKED, 9, target), a(9, TEN, name(".".join("a" * 127))))
        )
        assert here and dns.parse_answer(message, Question("b", A, IN)).addresses == ["192.0.2.10"]
        longer = answer(question("b"), (*records, cname(ASKED, 9, b"\1a" + target)))
        with pytest.raises(ProtocolError):
            dns.parse_answer(longer, Question("b", A, IN))

    def test_compressed_name_above_255_octets_is_a_protocol_error(self) -> None:
        at = 12 + len(question("b"))
        for label, fits in ((b"", True), (b"\1a", False)):
            long = record(b"\0", UNKNOWN, 9, LONGEST)
            message = answer(
                question("b"),
                (
                    long,
                    cname(ASKED, 9, label + struct.pack(">H", 0xC000 | at + 11)),
                    a(9, TEN, LONGEST),
                ),
            )
            if fits:
                assert dns.parse_answer(message, Question("b", A, IN)).addresses == ["192.0.2.10"]
            else:
                with pytest.raises(ProtocolError):
                    dns.parse_answer(message, Question("b", A, IN))

    def test_name_with_too_many_pointers_is_a_protocol_error(self) -> None:
        start = 12 + len(WWW) + 11
        ladder = struct.pack(">H", 0xC00C) + b"".join(
            struct.pack(">H", 0xC000 | start + 2 * step) for step in range(3000)
        )
        last = struct.pack(">H", 0xC000 | start + len(ladder) - 2)
        with pytest.raises(ProtocolError):
            dns.parse_answer(
                answer(WWW, (record(b"\0", UNKNOWN, 1, ladder), a(60, owner=last))), ASK
            )
        short = struct.pack(">H", 0xC000 | start + 2 * 100)
        assert dns.parse_answer(
            answer(WWW, (record(b"\0", UNKNOWN, 1, ladder), a(60, owner=short))), ASK
        ).addresses == ["192.0.2.1"]


OUR_QUERY = query(WWW, opt())
IS_ANSWER = {
    "answer": (answer(WWW, (a(60),)), True),
    "answer in another case": (answer(question("WWW.example.COM")), True),
    "truncated answer": (answer(WWW, flags=QR | TC), True),
    "error": (answer(WWW, flags=QR | REFUSED), True),
    "error without question": (HEADER.pack(0x1234, QR | FORMERR, 0, 0, 0, 0), True),
    "no error, no question": (HEADER.pack(0x1234, QR, 0, 0, 0, 0), False),
    "two questions": (HEADER.pack(0x1234, QR, 2, 0, 0, 0) + WWW + WWW, False),
    "another ID": (dns_message.with_id(answer(WWW), 0x1235), False),
    "query": (OUR_QUERY, False),
    "another opcode": (answer(WWW, flags=QR | 5 << 11), False),
    "another name": (answer(question("www.example.net")), False),
    "another type, 32 away": (answer(question("www.example.com", A + 32)), False),
    "question cut short": (answer(WWW)[:-1], False),
    "header cut short": (answer(WWW)[:11], False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize(("message", "expected"), IS_ANSWER.values(), ids=IS_ANSWER)
def test_answer_is_matched_with_its_query(message: bytes, expected: bool) -> None:
    assert dns.is_answer(message, OUR_QUERY) is expected


def test_types_that_differ_as_letters_do_are_distinguished() -> None:
    """HTTPS is 65, which is the letter A; 97 is the letter a."""
    https, other = query(question("a", HTTPS)), query(question("a", HTTPS + 32))
    assert not dns.is_answer(answer(question("a", HTTPS + 32)), https)
    assert dns_message.cache_key(https) != dns_message.cache_key(other)


class TestError:
    @pytest.mark.parametrize("code", [FORMERR, SERVFAIL, REFUSED, 15])
    def test_error_repeats_id_and_question(self, code: int) -> None:
        assert dns.encode_error(query(WWW), code) == answer(WWW, flags=QR | RD | RA | code)

    def test_error_repeats_opcode_rd_and_cd(self) -> None:
        assert dns.encode_error(query(WWW, flags=5 << 11 | CD | AD | 0x40 | 9), REFUSED) == answer(
            WWW, flags=QR | 5 << 11 | CD | RA | REFUSED
        )

    @pytest.mark.parametrize("extended", [0, DO, DO | 1 << 16])
    def test_error_has_edns_if_the_query_has(self, extended: int) -> None:
        message = query(WWW, opt(4096, extended, option(COOKIE, b"clients.")))
        assert dns.encode_error(message, SERVFAIL) == answer(
            WWW, (), (), (opt(1232, extended & DO),), QR | RD | RA | SERVFAIL
        )

    @pytest.mark.parametrize("behind", [b"", b"\xff" * 40, b"\3www", WWW + WWW])
    def test_error_without_readable_question_is_a_header(self, behind: bytes) -> None:
        message = HEADER.pack(0x1234, RD, 2 if behind == WWW + WWW else 1, 0, 0, 1) + behind
        assert dns.encode_error(message, FORMERR) == HEADER.pack(
            0x1234, QR | RD | RA | FORMERR, 0, 0, 0, 0
        )

    def test_error_repeats_the_question_of_a_cut_query(self) -> None:
        assert dns.encode_error(query(WWW, opt())[:-3], FORMERR) == answer(
            WWW, flags=QR | RD | RA | FORMERR
        )

    def test_error_for_a_message_without_header_is_a_protocol_error(self) -> None:
        expect_error_for_every_cut(lambda data: dns.encode_error(data, FORMERR), HEADER_ONLY)
