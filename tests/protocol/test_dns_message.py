"""What a forwarder reads of DNS messages and changes in them: keys, TTLs, options, sizes."""

from __future__ import annotations

import pytest

from netproxy.errors import ProtocolError
from netproxy.protocol import dns, dns_message
from netproxy.protocol.dns import A, AAAA, CNAME, NXDOMAIN, SERVFAIL, SOA
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
# 255 octets.
LONGEST = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\0"
# 256 octets.
TOO_LONG = (b"\x3f" + b"a" * 63) * 3 + b"\x3e" + b"a" * 62 + b"\0"
TEN = b"\xc0\0\2\x0a"
ALIAS = name("alias.test")
# A header of an answer, and nothing else.
HEADER_ONLY = HEADER.pack(7, QR, 0, 0, 0, 0)


# Queries that have one key.
SHARED = {
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
    "another type": [query(question("www.example.com", AAAA))],
    "unknown type": [query(question("www.example.com", UNKNOWN))],
    "type 256": [query(question("www.example.com", 256))],
    "another class": [query(question("www.example.com", A, 3))],
}
NOT_SHARED = {
    "nothing": b"",
    "answer": answer(WWW),
    "NOTIFY": query(WWW, flags=4 << 11),
    "no question": HEADER.pack(1, RD, 0, 0, 0, 0),
    "two questions": HEADER.pack(1, RD, 2, 0, 0, 0) + WWW + WWW,
    "name of 256 octets": query(TOO_LONG + b"\0\1\0\1"),
    "zone transfer": query(question("example.com", 252)),
    "ANY": query(question("example.com", 255)),
    "type 128": query(question("example.com", 128)),
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
    def test_cache_key_is_shared_by_queries_with_one_answer(self) -> None:
        keys = [{dns_message.cache_key(message) for message in same} for same in SHARED.values()]
        assert all(len(same) == 1 and None not in same for same in keys)
        assert len(set().union(*keys)) == len(SHARED)

    @pytest.mark.parametrize("message", NOT_SHARED.values(), ids=NOT_SHARED)
    def test_query_for_one_client_has_no_cache_key(self, message: bytes) -> None:
        assert dns_message.cache_key(message) is None

    def test_cut_query_has_no_cache_key(self) -> None:
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
    "unknown type": (
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
    "no question": (HEADER_ONLY, None),
    "EDNS that was asked for": (answer(question("a", dns.OPT), (opt(),)), None),
}


class TestLeastTtl:
    @pytest.mark.parametrize(("message", "expected"), LEAST.values(), ids=LEAST)
    def test_least_ttl_is_how_long_an_answer_may_be_kept(
        self, message: bytes, expected: int | None
    ) -> None:
        assert dns_message.least_ttl(message) == expected

    def test_cut_answer_has_no_least_ttl(self) -> None:
        whole = answer(WWW, (a(60),), (soa(60, 60),), (opt(),))
        assert {dns_message.least_ttl(whole[:cut]) for cut in range(len(whole))} == {None}


def kept(ttl: int, more: int, asked_for: bytes = WWW, id: int = 0x1234) -> bytes:
    """Return an answer with two TTLs, an unknown type, and an OPT whose flags look like a TTL."""
    unknown = record(name("far.test"), UNKNOWN, more, b"\xc0\x0c\0\0\0\x3c")
    return dns_message.with_id(answer(asked_for, (a(ttl), unknown), (), (opt(extended=DO),)), id)


class TestAged:
    def test_aged_answer_differs_in_its_ttls_only(self) -> None:
        message = kept(300, 60)
        places = dns_message.ttl_offsets(message)
        assert [message[at : at + 4] for at in places] == [b"\0\0\1\x2c", b"\0\0\0\x3c"]
        assert dns_message.aged(message, places, query(WWW), 45) == kept(255, 15)
        assert dns_message.aged(message, places, query(WWW), 60) == kept(240, 0)
        assert dns_message.aged(message, places, query(WWW), 1000) == kept(0, 0)
        assert dns_message.aged(message, places, query(WWW), 0) == message == kept(300, 60)

    def test_aged_answer_has_id_and_spelling_of_the_query(self) -> None:
        spelt = question("wwW.ExAMPle.cOm")
        message = kept(300, 60)
        assert dns_message.aged(
            message, dns_message.ttl_offsets(message), query(spelt, id=0xFFFF), 45
        ) == kept(255, 15, spelt, 0xFFFF)

    def test_ttl_with_the_upper_bit_ages_to_zero(self) -> None:
        message = kept(0xFFFFFFFF, 0x80000009)
        assert dns_message.aged(message, dns_message.ttl_offsets(message), query(WWW), 10) == kept(
            0, 0
        )
        assert dns_message.aged(message, dns_message.ttl_offsets(message), query(WWW), 0) == kept(
            0, 0
        )
        longest = kept(0x7FFFFFFF, 1)
        assert dns_message.aged(longest, dns_message.ttl_offsets(longest), query(WWW), 1) == kept(
            0x7FFFFFFE, 0
        )

    def test_large_answer_for_the_root_is_aged(self) -> None:
        text = b"".join(b"\xff" + bytes((code,)) * 255 for code in range(16))
        message = answer(question("", TXT), (record(b"\0", TXT, 77, text),))
        assert len(message) > 4096 and dns_message.least_ttl(message) == 77
        assert dns_message.aged(
            message, dns_message.ttl_offsets(message), query(question("", TXT)), 7
        ) == answer(question("", TXT), (record(b"\0", TXT, 70, text),))


def test_other_id_changes_nothing_else() -> None:
    assert dns_message.with_id(query(WWW), 0x0102) == b"\1\2" + query(WWW)[2:]


class TestOptions:
    def test_options_of_a_server_are_removed(self) -> None:
        options = option(COOKIE, b"clients." + b"servers.") + option(PADDING, b"\0" * 100)
        assert dns_message.without_options(
            answer(WWW, (a(60),), (), (a(9), opt(1400, DO, options)))
        ) == answer(WWW, (a(60),), (), (a(9), opt(1400, DO)))

    def test_records_behind_removed_options_are_removed(self) -> None:
        message = answer(
            WWW,
            (a(60),),
            (soa(9, 9),),
            (a(8), opt(options=option(EXTENDED_ERROR, b"\0\3")), a(7), a(6)),
        )
        assert dns_message.without_options(message) == answer(
            WWW, (a(60),), (soa(9, 9),), (a(8), opt())
        )

    @pytest.mark.parametrize(
        "message",
        [
            answer(WWW),
            answer(WWW, (a(60),)),
            answer(WWW, (), (), (opt(), a(7))),
            answer(WWW, (a(60), opt(options=option(PADDING))), (soa(9, 9),)),
        ],
    )  # an OPT in the answer section is none
    def test_answer_without_options_is_unchanged(self, message: bytes) -> None:
        assert dns_message.without_options(message) == message

    def test_options_of_an_unreadable_answer_are_a_protocol_error(self) -> None:
        with pytest.raises(ProtocolError):
            dns_message.without_options(HEADER_ONLY)


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
        (HEADER_ONLY, 512),
        (b"", 512),
    ],
)
def test_size_of_a_datagram_is_what_the_client_announces(message: bytes, size: int) -> None:
    assert dns_message.udp_size(message) == size


# 640 bytes.
LARGE = tuple(a(60) for _ in range(40))
FLAGS = QR | AA | RD | RA | AD


class TestTruncate:
    def test_answer_that_fits_is_not_truncated(self) -> None:
        message = answer(WWW, LARGE)
        assert dns_message.truncate(message, len(message)) == message

    def test_truncated_answer_has_header_and_question(self) -> None:
        message = answer(WWW, LARGE, (soa(1, 1),), (a(1),), FLAGS)
        assert dns_message.truncate(message, len(message) - 1) == answer(WWW, flags=FLAGS | TC)

    @pytest.mark.parametrize("others", [(), (a(1),)])
    def test_truncated_answer_has_its_opt(self, others: tuple[bytes, ...]) -> None:
        edns = opt(1400, DO, option(EXTENDED_ERROR, b"\0\3why"))
        message = answer(WWW, LARGE, (), (*others, edns, *others), FLAGS)
        assert dns_message.truncate(message, 512) == answer(WWW, (), (), (edns,), FLAGS | TC)

    def test_truncated_answer_loses_options_that_do_not_fit(self) -> None:
        message = answer(
            LONGEST + b"\0\1\0\1", LARGE, (), (opt(1400, DO, option(PADDING, b"\0" * 468)),)
        )
        short = dns_message.truncate(message, 512)
        assert short == answer(LONGEST + b"\0\1\0\1", (), (), (opt(1400, DO),), QR | RD | RA | TC)
        assert len(short) <= 512

    def test_truncated_answer_that_cannot_be_read_has_its_header(self) -> None:
        assert dns_message.truncate(
            HEADER.pack(7, QR, 0, 9, 9, 9) + b"\xff" * 600, 512
        ) == HEADER.pack(7, QR | TC, 0, 0, 0, 0)
        assert dns_message.truncate(answer(WWW, (a(1),))[:-1], 20) == answer(
            WWW, flags=QR | RD | RA | TC
        )
