"""Special names: which names they are, and the answers of empty zones, byte by byte."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from netproxy.protocol import dns
from netproxy.resolver.local_answers import SPECIAL_TTL, special_answer
from netproxy.resolver.resolver import ask_system
from netproxy.resolver.special_names import has_no_address, is_localhost, special_zone
from tests.support.dns import ASKED, HEADER, QR, RA, RD, a, name, opt, query, question, record

NS, SOA, PTR, AAAA, SVCB, ANY = 2, 6, 12, 28, 64, 255
NXDOMAIN = 3
LOCAL6 = bytes(15) + b"\1"


def answered(host: str, qtype: int = 1) -> bytes | None:
    """Return the answer to a question."""
    asked = query(question(host, qtype))
    parsed, end = dns.parse_question(asked)
    return special_answer(asked, parsed, end)


def expected(host: str, qtype: int, *answers: bytes, code: int = 0, zone: str = "") -> bytes:
    """Return an answer with records, or with the SOA of `zone` as authority."""
    authorities = [soa(host, zone)] if zone else []
    header = HEADER.pack(0x1234, QR | RD | RA | code, 1, len(answers), len(authorities), 0)
    return header + question(host, qtype) + b"".join((*answers, *authorities))


def soa(host: str, zone: str) -> bytes:
    """Return the SOA of an empty zone, its names as pointers into the question."""
    apex = struct.pack(">H", 0xC000 | 12 + len(host) - len(zone))
    numbers = struct.pack(">5I", 1, 3600, 1200, 604800, SPECIAL_TTL)
    return record(apex, SOA, SPECIAL_TTL, apex + name("nobody.invalid") + numbers)


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "a.localhost", "b.a.localhost"])
def test_localhost_is_this_machine(host: str) -> None:
    """RFC 6761 section 6.3."""
    assert answered(host) == expected(host, 1, a(SPECIAL_TTL, b"\x7f\0\0\1"))
    assert answered(host, AAAA) == expected(host, AAAA, record(ASKED, AAAA, SPECIAL_TTL, LOCAL6))
    assert answered(host, 15) == expected(host, 15, zone="localhost")


@pytest.mark.parametrize("host", ["invalid", "a.invalid", "b.A.Invalid"])
@pytest.mark.parametrize("qtype", [1, AAAA, SOA, ANY])
def test_invalid_does_not_exist(host: str, qtype: int) -> None:
    """RFC 6761 section 6.4."""
    assert answered(host, qtype) == expected(host, qtype, code=NXDOMAIN, zone="invalid")


@pytest.mark.parametrize("host", ["resolver.arpa", "_dns.resolver.arpa", "a.resolver.arpa"])
@pytest.mark.parametrize("qtype", [1, SVCB])
def test_resolver_arpa_has_no_data(host: str, qtype: int) -> None:
    """RFC 9462 section 6.4.  The designated resolver of a server is not that of its forwarder."""
    assert answered(host, qtype) == expected(host, qtype, zone="resolver.arpa")


@pytest.mark.parametrize(
    "host, zone",
    [
        ("9.1.168.192.in-addr.arpa", "168.192.in-addr.arpa"),
        ("4.3.2.10.in-addr.arpa", "10.in-addr.arpa"),
        ("1.0.16.172.in-addr.arpa", "16.172.in-addr.arpa"),
        ("1.0.31.172.in-addr.arpa", "31.172.in-addr.arpa"),
        ("1.0.64.100.in-addr.arpa", "64.100.in-addr.arpa"),
        ("1.0.127.100.in-addr.arpa", "127.100.in-addr.arpa"),
        ("1.0.254.169.in-addr.arpa", "254.169.in-addr.arpa"),
        ("2.0.0.127.in-addr.arpa", "127.in-addr.arpa"),
        ("1.2.0.192.in-addr.arpa", "2.0.192.in-addr.arpa"),
        ("x.255.255.255.255.in-addr.arpa", "255.255.255.255.in-addr.arpa"),
        ("0.0.0.0.in-addr.arpa", "0.in-addr.arpa"),
        ("1." + "0." * 27 + "0.0.d.f.ip6.arpa", "d.f.ip6.arpa"),
        ("1." + "0." * 26 + "0.0.0.8.e.f.ip6.arpa", "8.e.f.ip6.arpa"),
        ("1." + "0." * 26 + "0.0.0.b.e.f.ip6.arpa", "b.e.f.ip6.arpa"),
        ("1." + "0." * 23 + "8.b.d.0.1.0.0.2.ip6.arpa", "8.b.d.0.1.0.0.2.ip6.arpa"),
    ],
)
def test_reverse_name_of_a_local_network_does_not_exist(host: str, zone: str) -> None:
    """RFC 6303 section 3: an empty zone."""
    assert answered(host, PTR) == expected(host, PTR, code=NXDOMAIN, zone=zone)
    assert answered(zone, PTR) == expected(zone, PTR, zone=zone)
    assert answered(zone, SOA) == expected(zone, SOA, soa(zone, zone))
    assert answered(zone, NS) == expected(zone, NS, record(ASKED, NS, SPECIAL_TTL, ASKED))


@pytest.mark.parametrize(
    "host, zone",
    [("1.0.0.127.in-addr.arpa", "127.in-addr.arpa"), ("1." + "0." * 31 + "ip6.arpa", "")],
)
def test_loopback_address_has_the_name_localhost(host: str, zone: str) -> None:
    assert answered(host, PTR) == expected(
        host, PTR, record(ASKED, PTR, SPECIAL_TTL, name("localhost"))
    )
    assert answered(host, 1) == expected(host, 1, zone=zone or host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "arpa",
        "in-addr.arpa",
        "ip6.arpa",
        "8.8.8.8.in-addr.arpa",
        "1.0.15.172.in-addr.arpa",
        "1.0.32.172.in-addr.arpa",
        "1.0.63.100.in-addr.arpa",
        "1.0.128.100.in-addr.arpa",
        "172.in-addr.arpa",
        "c.f.ip6.arpa",
        "ipv4only.arpa",
        "home.arpa",
        "notlocalhost",
        "localhost.example",
        "invalid.example",
        "test",
        "www.example",
        "xresolver.arpa",
    ],
)
def test_other_name_is_not_special(host: str) -> None:
    assert answered(host) is None and special_zone(host) is None
    assert not has_no_address(host) and not is_localhost(host)


def test_answer_has_edns_if_the_query_has() -> None:
    asked = query(question("a.invalid"), opt(4096))
    parsed, end = dns.parse_question(asked)
    answer = special_answer(asked, parsed, end)
    assert answer is not None and answer.endswith(soa("a.invalid", "invalid") + opt(1232))
    assert HEADER.unpack_from(answer)[2:] == (1, 0, 1, 1)
    assert dns.parse_answer(answer, parsed) == dns.AddressAnswer(NXDOMAIN, [], SPECIAL_TTL)


@pytest.mark.parametrize("host", ["a.invalid", "resolver.arpa", "1.0.0.10.in-addr.arpa"])
def test_system_is_not_asked_for_a_special_name(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert ask_system(host).addresses == ()
