"""DNS messages: names, questions and answers, and what a forwarder alters in what others wrote."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from netproxy.errors import ProtocolError
from netproxy.protocol import dns, dns_message
from netproxy.protocol.dns import (
    A,
    AAAA,
    CNAME,
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
    AA,
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
COOKIE, SUBNET, PADDING, EXTENDED_ERROR = 10, 8, 12, 15
UNKNOWN, HTTPS, TXT, RRSIG = 65280, 65, 16, 46
WWW = question("www.example.com")
LONGEST = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\0"  # 255 octets
TEN, TWENTY = b"\xc0\0\2\x0a", b"\xc0\0\2\x14"
PACKED6 = b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1"
TWELVE = HEADER.pack(7, QR, 0, 0, 0, 0)

# www.example.com A, asked with AD; the answer is an alias, www.example.net, and its two addresses
QUERY_BYTES = bytes.fromhex(
    "8d26 0120 0001 0000 0000 0000 03777777 076578616d706c65 03636f6d 00 0001 0001"
)
ANSWER_BYTES = bytes.fromhex(
    "8d26 81a0 0001 0003 0000 0000 03777777 076578616d706c65 03636f6d 00 0001 0001"
    "c00c 0005 0001 0000012c 0011 03777777 076578616d706c65 036e6574 00"
    "c02d 0001 0001 00000014 0004 c0000201"
    "c02d 0001 0001 00000014 0004 c0000202"
)


def asked(raw_name: bytes, kind: int = A) -> bytes:
    """A query whose name is these bytes."""
    return query(raw_name + struct.pack(">HH", kind, IN))


def refuses_every_cut(parse: Any, data: bytes) -> None:
    for cut in range(len(data)):
        with pytest.raises(ProtocolError):
            parse(data[:cut])


class TestHead:
    def test_tells_a_query(self) -> None:
        assert dns.parse_header(QUERY_BYTES) == (0x8D26, False, 0, False, True, NOERROR, 1, 0, 0, 0)

    def test_tells_a_truncated_answer_of_another_opcode(self) -> None:
        head = dns.parse_header(HEADER.pack(65535, QR | 4 << 11 | TC | 0xF, 1, 2, 3, 4))
        assert head == dns.DnsHeader(65535, True, 4, True, False, 15, 1, 2, 3, 4)

    def test_is_not_shorter(self) -> None:
        refuses_every_cut(dns.parse_header, TWELVE)


NAMES = {  # as Question tells it, and on the wire
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
    "pointer into the head": b"\1a\xc0\0",
    "pointer onward": b"\1a\xc0\x10\0\0",
}


class TestQuestion:
    @pytest.mark.parametrize(("text", "raw"), NAMES.values(), ids=NAMES)
    def test_is_parsed(self, text: str, raw: bytes) -> None:
        message = asked(raw, UNKNOWN)
        assert dns.parse_question(message + b"more") == (Question(text, UNKNOWN, IN), len(message))
        refuses_every_cut(dns.parse_question, message)

    @pytest.mark.parametrize(("text", "raw"), NAMES.values(), ids=NAMES)
    def test_is_encoded(self, text: str, raw: bytes) -> None:
        assert dns.encode_query(0x1234, Question(text, AAAA, IN), edns=False) == asked(
            raw.lower(), AAAA
        )

    @pytest.mark.parametrize("raw", BAD_NAMES.values(), ids=BAD_NAMES)
    def test_with_a_bad_name_is_refused(self, raw: bytes) -> None:
        with pytest.raises(ProtocolError):
            dns.parse_question(asked(raw))

    @pytest.mark.parametrize("count", [0, 2, 256])
    def test_is_exactly_one(self, count: int) -> None:
        with pytest.raises(ProtocolError):
            dns.parse_question(HEADER.pack(1, RD, count, 0, 0, 0) + WWW + WWW)

    @pytest.mark.parametrize(
        "text", ["a..b", ".", "a.", "a" * 64, ".".join(["a" * 63] * 4), "é", "\\256", "a\\", "\\x"]
    )
    def test_with_a_name_that_cannot_be_sent_is_not_encoded(self, text: str) -> None:
        with pytest.raises(ValueError):
            dns.encode_query(1, Question(text, A, IN))

    def test_announces_what_ipv6_carries_whole(self) -> None:
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
    "addresses of somebody else": (answer(WWW, (a(60, TEN, FAR),)), (NOERROR, [], 0)),
    "address of another class": (answer(WWW, (record(ASKED, A, 60, TEN, 3),)), (NOERROR, [], 0)),
    "address elsewhere": (answer(WWW, (), (), (a(60, TEN),)), (NOERROR, [], 0)),
    "other kinds between": (
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
    "code of EDNS and of the head": (
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
    "another kind": answer(question("www.example.com", AAAA)),
    "another class": answer(question("www.example.com", A, 3)),
    "no question": TWELVE,
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
    "owner that points into the head": answer(WWW, (a(60, owner=b"\xc0\2"),)),
    "fewer records than the head says": answer(WWW, (a(60),))[:-16],
}


class TestAnswer:
    @pytest.mark.parametrize(("message", "expected"), ANSWERS.values(), ids=ANSWERS)
    def test_is_parsed(self, message: bytes, expected: tuple[int, list[str], int]) -> None:
        assert dns.parse_answer(message, ASK) == AddressAnswer(*expected)

    @pytest.mark.parametrize("message", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
    def test_that_is_none_is_refused(self, message: bytes) -> None:
        with pytest.raises(ProtocolError):
            dns.parse_answer(message, ASK)

    def test_cut_short_is_refused(self) -> None:
        whole = answer(
            WWW,
            (cname(ASKED, 30, ALIAS), a(40, TEN, ALIAS)),
            (soa(60, 60),),
            (opt(options=option(PADDING, b"\0" * 9)),),
        )
        refuses_every_cut(lambda data: dns.parse_answer(data, ASK), whole)
        refuses_every_cut(dns_message.ttl_offsets, whole)

    @pytest.mark.parametrize(
        ("packed", "text"),
        [(PACKED6, "2001:db8::1"), (b"\0" * 10 + b"\xff\xff" + TEN, "192.0.2.10")],
    )
    def test_of_ipv6_is_canonical(self, packed: bytes, text: str) -> None:
        message = answer(question("a", AAAA), (a(1), record(ASKED, AAAA, 60, packed)))
        assert dns.parse_answer(message, Question("a", AAAA, IN)) == (NOERROR, [text], 60)

    def test_to_what_we_ask_is_the_answer(self) -> None:
        sent = dns.encode_query(0x1234, ASK)
        assert dns.parse_question(sent)[0] == ASK
        assert dns.is_answer(answer(WWW, (a(60),), (), (opt(),)), sent)


class TestCompression:
    def test_is_that_of_rfc_1035(self) -> None:
        """The names of section 4.1.4, with pointers to 20 and to 26 as there."""
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

    def test_may_go_through_many_pointers(self) -> None:
        """Each label of a name of 127 in a record of its own, with a pointer to the next."""
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

    def test_makes_no_name_too_long(self) -> None:
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

    def test_by_pointers_alone_ends(self) -> None:
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
    "another kind, a letter's distance away": (answer(question("www.example.com", A + 32)), False),
    "question cut short": (answer(WWW)[:-1], False),
    "head cut short": (answer(WWW)[:11], False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize(("message", "expected"), IS_ANSWER.values(), ids=IS_ANSWER)
def test_answer_belongs_to_its_query(message: bytes, expected: bool) -> None:
    assert dns.is_answer(message, OUR_QUERY) is expected


def test_kinds_that_differ_as_letters_do_are_not_alike() -> None:
    """HTTPS is 65, which is an A; 97 is an a."""
    https, other = query(question("a", HTTPS)), query(question("a", HTTPS + 32))
    assert not dns.is_answer(answer(question("a", HTTPS + 32)), https)
    assert dns_message.cache_key(https) != dns_message.cache_key(other)


SHARED = {  # queries with one key
    "plain": [query(WWW), query(WWW, id=9), query(question("wWw.eXample.coM"))],
    "EDNS": [
        query(WWW, opt()),
        query(WWW, opt(4096)),
        query(WWW, opt(512, options=option(COOKIE, b"clientsX"))),
        query(
            WWW,
            opt(
                options=option(COOKIE, b"clientsY")
                + option(PADDING, b"\0" * 50)
                + option(11)
                + option(5, b"\x08")
            ),
        ),
    ],
    "DNSSEC": [query(WWW, opt(extended=DO)), query(WWW, opt(4096, DO), id=3)],
    "version 1": [query(WWW, opt(extended=1 << 16))],
    "AD": [query(WWW, flags=RD | AD)],
    "CD": [query(WWW, flags=RD | CD)],
    "no recursion": [query(WWW, flags=0)],
    "unknown flag": [query(WWW, flags=RD | 0x40)],
    "another name": [query(question("www.example.org"))],
    "root": [query(question("", 2))],
    "another kind": [query(question("www.example.com", AAAA))],
    "unknown kind": [query(question("www.example.com", UNKNOWN))],
    "kind 256": [query(question("www.example.com", 256))],
    "another class": [query(question("www.example.com", A, 3))],
}
NOT_SHARED = {
    "nothing": b"",
    "answer": answer(WWW),
    "NOTIFY": query(WWW, flags=4 << 11),
    "no question": HEADER.pack(1, RD, 0, 0, 0, 0),
    "two questions": HEADER.pack(1, RD, 2, 0, 0, 0) + WWW + WWW,
    "name of 256 octets": asked(BAD_NAMES["256 octets"]),
    "zone transfer": query(question("example.com", 252)),
    "ANY": query(question("example.com", 255)),
    "kind 128": query(question("example.com", 128)),
    "record in the answer section": HEADER.pack(1, RD, 1, 1, 0, 0) + WWW + a(1),
    "record in the authority section": HEADER.pack(1, RD, 1, 0, 1, 0) + WWW + soa(1, 1),
    "signature": query(WWW, record(b"\0", 250, 0, b"", 255)),
    "EDNS and a signature": query(WWW, opt(), record(b"\0", 250, 0, b"", 255)),
    "EDNS twice": query(WWW, opt(), opt()),
    "EDNS of a name": query(WWW, record(b"\1a\0", 41, 0, b"", 1232)),
    "EDNS cut short": query(WWW, opt())[:-1],
    "bytes behind the question": query(WWW) + b"\0",
    "bytes behind EDNS": query(WWW, opt()) + b"\0",
    "client subnet": query(WWW, opt(options=option(SUBNET, b"\0\1\x18\0\xc0\0\2"))),
    "client subnet behind a cookie": query(
        WWW, opt(options=option(COOKIE, b"clients.") + option(SUBNET, b"\0\1\0\0"))
    ),
    "server's half of a cookie": query(WWW, opt(options=option(COOKIE, b"clients." + b"servers."))),
    "unknown option": query(WWW, opt(options=option(65001, b"who"))),
    "half an option": query(WWW, opt(options=b"\0\x0c\0")),
    "option longer than the rest": query(WWW, opt(options=b"\0\x0c\0\2\0")),
}


class TestCacheKey:
    def test_is_shared_by_what_gets_the_same_answer_alone(self) -> None:
        keys = [{dns_message.cache_key(one) for one in same} for same in SHARED.values()]
        assert all(len(same) == 1 and None not in same for same in keys)
        assert len(set().union(*keys)) == len(SHARED)

    @pytest.mark.parametrize("message", NOT_SHARED.values(), ids=NOT_SHARED)
    def test_is_none_where_the_answer_is_not_for_others(self, message: bytes) -> None:
        assert dns_message.cache_key(message) is None

    def test_is_none_for_every_cut(self) -> None:
        whole = query(WWW, opt(options=option(PADDING, b"\0" * 9)))
        assert dns_message.cache_key(whole)
        assert {dns_message.cache_key(whole[:cut]) for cut in range(len(whole))} == {None}


LEAST = {
    "one record": (answer(WWW, (a(60),)), 60),
    "least of all sections": (
        answer(WWW, (a(60), a(50)), (record(b"\0", 2, 40, b"\0"),), (a(30, owner=b"\0"),)),
        30,
    ),
    "EDNS has none": (answer(WWW, (a(60),), (), (opt(extended=DO),)), 60),
    "chain": (answer(WWW, (cname(ASKED, 30, ALIAS), a(40, TEN, ALIAS))), 30),
    "unknown kind": (
        answer(question("a", UNKNOWN), (record(ASKED, UNKNOWN, 33, b"\xc0\x0c?"),)),
        33,
    ),
    "asked for a CNAME": (answer(question("a", CNAME), (cname(ASKED, 30, ALIAS),)), 30),
    "asked for a SOA": (answer(question("a", SOA), (soa(900, 5),)), 900),
    "no such name": (answer(WWW, (), (soa(900, 40),), flags=QR | NXDOMAIN), 40),
    "no such name behind a chain": (
        answer(WWW, (cname(ASKED, 9, ALIAS),), (soa(900, 40),), flags=QR | NXDOMAIN),
        9,
    ),
    "no data": (answer(WWW, (), (soa(30, 900),)), 30),
    "no data, other records": (answer(WWW, (), (soa(30, 900), record(b"\0", RRSIG, 20, b"x"))), 20),
    "no data at the end of a chain": (answer(WWW, (cname(ASKED, 90, ALIAS),), (soa(900, 40),)), 40),
    "data and a SOA beside it": (answer(WWW, (a(60),), (soa(900, 5),)), 60),
    "TTL 0": (answer(WWW, (a(60), a(0))), 0),
    "TTL with the uppermost bit": (answer(WWW, (a(1 << 31),)), 0),
    "no such name without SOA": (answer(WWW, flags=QR | NXDOMAIN), None),
    "no such name, and yet an address": (answer(WWW, (a(60),), flags=QR | NXDOMAIN), None),
    "no data without SOA": (answer(WWW, (), (), (opt(),)), None),
    "referral": (answer(WWW, (), (record(b"\0", 2, 40, b"\0"),)), None),
    "SOA in the answer section": (answer(WWW, (soa(60, 60),)), None),
    "failure": (answer(WWW, (), (soa(900, 40),), flags=QR | SERVFAIL), None),
    "truncated": (answer(WWW, (a(60),), flags=QR | TC), None),
    "code of EDNS": (answer(WWW, (a(60),), (), (opt(extended=1 << 24),)), None),
    "query": (query(WWW), None),
    "another opcode": (answer(WWW, (a(60),), flags=QR | 4 << 11), None),
    "no question": (TWELVE, None),
    "EDNS that was asked for": (answer(question("a", dns.OPT), (opt(),)), None),
}


class TestLeastTtl:
    @pytest.mark.parametrize(("message", "expected"), LEAST.values(), ids=LEAST)
    def test_is_how_long_an_answer_may_be_kept(self, message: bytes, expected: int | None) -> None:
        assert dns_message.least_ttl(message) == expected

    def test_is_none_for_every_cut(self) -> None:
        whole = answer(WWW, (a(60),), (soa(60, 60),), (opt(),))
        assert {dns_message.least_ttl(whole[:cut]) for cut in range(len(whole))} == {None}


def kept(ttl: int, more: int, asked_for: bytes = WWW, id: int = 0x1234) -> bytes:
    """An answer with two TTLs, a kind that nobody knows, and EDNS whose flags look like a TTL."""
    unknown = record(name("far.test"), UNKNOWN, more, b"\xc0\x0c\0\0\0\x3c")
    return dns_message.with_id(answer(asked_for, (a(ttl), unknown), (), (opt(extended=DO),)), id)


class TestAged:
    def test_has_less_time_to_live_and_nothing_else_changed(self) -> None:
        message = kept(300, 60)
        places = dns_message.ttl_offsets(message)
        assert [message[at : at + 4] for at in places] == [b"\0\0\1\x2c", b"\0\0\0\x3c"]
        assert dns_message.aged(message, places, query(WWW), 45) == kept(255, 15)
        assert dns_message.aged(message, places, query(WWW), 60) == kept(240, 0)
        assert dns_message.aged(message, places, query(WWW), 1000) == kept(0, 0)
        assert dns_message.aged(message, places, query(WWW), 0) == message == kept(300, 60)

    def test_speaks_to_who_asks_now(self) -> None:
        spelt = question("wwW.ExAMPle.cOm")
        message = kept(300, 60)
        assert dns_message.aged(message, dns_message.ttl_offsets(message), query(spelt, id=0xFFFF), 45) == kept(
            255, 15, spelt, 0xFFFF
        )

    def test_takes_a_time_with_the_uppermost_bit_as_none(self) -> None:
        message = kept(0xFFFFFFFF, 0x80000009)
        assert dns_message.aged(message, dns_message.ttl_offsets(message), query(WWW), 10) == kept(0, 0)
        assert dns_message.aged(message, dns_message.ttl_offsets(message), query(WWW), 0) == kept(0, 0)
        longest = kept(0x7FFFFFFF, 1)
        assert dns_message.aged(longest, dns_message.ttl_offsets(longest), query(WWW), 1) == kept(0x7FFFFFFE, 0)

    def test_large_text_and_the_root(self) -> None:
        text = b"".join(b"\xff" + bytes((code,)) * 255 for code in range(16))
        message = answer(question("", TXT), (record(b"\0", TXT, 77, text),))
        assert len(message) > 4096 and dns_message.least_ttl(message) == 77
        assert dns_message.aged(message, dns_message.ttl_offsets(message), query(question("", TXT)), 7) == answer(
            question("", TXT), (record(b"\0", TXT, 70, text),)
        )


def test_id_is_replaced_alone() -> None:
    assert dns_message.with_id(QUERY_BYTES, 0x0102) == b"\1\2" + QUERY_BYTES[2:]


class TestOptions:
    def test_of_a_server_are_not_kept(self) -> None:
        options = option(COOKIE, b"clients." + b"servers.") + option(PADDING, b"\0" * 100)
        assert dns_message.without_options(
            answer(WWW, (a(60),), (), (a(9), opt(1400, DO, options)))
        ) == answer(WWW, (a(60),), (), (a(9), opt(1400, DO)))

    def test_take_what_stands_behind_them_along(self) -> None:
        message = answer(
            WWW,
            (a(60),),
            (soa(9, 9),),
            (a(8), opt(options=option(EXTENDED_ERROR, b"\0\3")), a(7), a(6)),
        )
        assert dns_message.without_options(message) == answer(WWW, (a(60),), (soa(9, 9),), (a(8), opt()))

    @pytest.mark.parametrize(
        "message",
        [
            answer(WWW),
            answer(WWW, (a(60),)),
            answer(WWW, (), (), (opt(), a(7))),
            answer(WWW, (a(60), opt(options=option(PADDING))), (soa(9, 9),)),
        ],
    )  # an OPT in the answer section is none
    def test_that_are_not_there_change_nothing(self, message: bytes) -> None:
        assert dns_message.without_options(message) == message

    def test_of_what_cannot_be_read_are_refused(self) -> None:
        with pytest.raises(ProtocolError):
            dns_message.without_options(TWELVE)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (query(WWW), 512),
        (query(WWW, opt(1232)), 1232),
        (query(WWW, opt(65535, DO, option(COOKIE, b"clients."))), 65535),
        (query(WWW, opt(100)), 512),
        (query(WWW, record(b"\0", 250, 0, b"", 255), opt(4096)), 4096),
        (query(WWW, opt(4096))[:-1], 512),
        (
            HEADER.pack(1, RD, 1, 1, 0, 0) + WWW + opt(4096),
            512,
        ),  # an OPT in the answer section is none
        (TWELVE, 512),
        (b"", 512),
    ],
)
def test_datagrams_are_as_large_as_the_client_says(message: bytes, size: int) -> None:
    assert dns_message.udp_size(message) == size


LARGE = tuple(a(60) for _ in range(40))  # 640 bytes
FLAGS = QR | AA | RD | RA | AD


class TestTruncate:
    def test_leaves_what_fits(self) -> None:
        message = answer(WWW, LARGE)
        assert dns_message.truncate(message, len(message)) == message

    def test_leaves_head_and_question_of_what_does_not(self) -> None:
        message = answer(WWW, LARGE, (soa(1, 1),), (a(1),), FLAGS)
        assert dns_message.truncate(message, len(message) - 1) == answer(WWW, flags=FLAGS | TC)

    @pytest.mark.parametrize("others", [(), (a(1),)])
    def test_leaves_edns(self, others: tuple[bytes, ...]) -> None:
        edns = opt(1400, DO, option(EXTENDED_ERROR, b"\0\3why"))
        message = answer(WWW, LARGE, (), (*others, edns, *others), FLAGS)
        assert dns_message.truncate(message, 512) == answer(WWW, (), (), (edns,), FLAGS | TC)

    def test_leaves_edns_without_options_that_do_not_fit(self) -> None:
        message = answer(
            LONGEST + b"\0\1\0\1", LARGE, (), (opt(1400, DO, option(PADDING, b"\0" * 468)),)
        )
        short = dns_message.truncate(message, 512)
        assert short == answer(LONGEST + b"\0\1\0\1", (), (), (opt(1400, DO),), QR | RD | RA | TC)
        assert len(short) <= 512

    def test_leaves_the_head_of_what_cannot_be_read(self) -> None:
        assert dns_message.truncate(HEADER.pack(7, QR, 0, 9, 9, 9) + b"\xff" * 600, 512) == HEADER.pack(
            7, QR | TC, 0, 0, 0, 0
        )
        assert dns_message.truncate(answer(WWW, (a(1),))[:-1], 20) == answer(WWW, flags=QR | RD | RA | TC)


class TestError:
    @pytest.mark.parametrize("code", [FORMERR, SERVFAIL, REFUSED, 15])
    def test_repeats_id_and_question(self, code: int) -> None:
        assert dns.encode_error(query(WWW), code) == answer(WWW, flags=QR | RD | RA | code)

    def test_repeats_what_the_client_wants_of_the_flags(self) -> None:
        assert dns.encode_error(query(WWW, flags=5 << 11 | CD | AD | 0x40 | 9), REFUSED) == answer(
            WWW, flags=QR | 5 << 11 | CD | RA | REFUSED
        )

    @pytest.mark.parametrize("extended", [0, DO, DO | 1 << 16])
    def test_has_edns_where_the_query_has(self, extended: int) -> None:
        message = query(WWW, opt(4096, extended, option(COOKIE, b"clients.")))
        assert dns.encode_error(message, SERVFAIL) == answer(
            WWW, (), (), (opt(1232, extended & DO),), QR | RD | RA | SERVFAIL
        )

    @pytest.mark.parametrize("behind", [b"", b"\xff" * 40, b"\3www", WWW + WWW])
    def test_is_a_head_alone_where_the_question_cannot_be_read(self, behind: bytes) -> None:
        message = HEADER.pack(0x1234, RD, 2 if behind == WWW + WWW else 1, 0, 0, 1) + behind
        assert dns.encode_error(message, FORMERR) == HEADER.pack(
            0x1234, QR | RD | RA | FORMERR, 0, 0, 0, 0
        )

    def test_repeats_the_question_of_what_ends_behind_it(self) -> None:
        assert dns.encode_error(query(WWW, opt())[:-3], FORMERR) == answer(
            WWW, flags=QR | RD | RA | FORMERR
        )

    def test_needs_a_head(self) -> None:
        refuses_every_cut(lambda data: dns.encode_error(data, FORMERR), TWELVE)
