"""Fake addresses: which queries get them, which names have them, and the way back."""

from __future__ import annotations

import pytest

from netproxy.errors import QueryRefused
from netproxy.interfaces.networks import IpNetwork
from netproxy.protocol import dns
from netproxy.resolver.client_names.fake_addresses import (
    SPARED,
    TTL,
    FakeAddresses,
    FakeNames,
    capacity,
)
from netproxy.resolver.client_names.fake_memory import FakeMemory, client_tag
from netproxy.resolver.client_names.fake_table import FakeTable
from netproxy.resolver.forwarder import DnsForwarder, ForwardingRule
from netproxy.resolver.special_names import parse_reverse_name, reverse_name
from netproxy.router.matchers import DomainSet
from tests.support.dns import ASKED, QR, RA, RD, a, name, opt, query, question, record
from tests.support.doubles import Counts
from tests.support.nameservers import answer_to

CLIENT = "192.168.1.5"
FOUR, SIX = IpNetwork.parse("198.18.0.0/15"), IpNetwork.parse("fc00:1815::/64")
A, AAAA, PTR, HTTPS, SVCB, TXT, ANY = 1, 28, 12, 65, 64, 16, 255
FIRST, FIRST6 = "198.18.0.16", "fc00:1815::10"


def fakes(*networks: IpNetwork, names: FakeNames | None = None) -> FakeAddresses:
    table = FakeTable(FakeMemory(1), 0)
    return FakeAddresses(networks or (FOUR, SIX), names or FakeNames(), table)


def ask(of: FakeAddresses, host: str, kind: int = A, client: str = CLIENT) -> list[str] | None:
    """Return the addresses in the answer; None if the name has no fake addresses."""
    asked = query(question(host, kind))
    parsed, end = dns.parse_question(asked)
    answer = of.answer(asked, parsed, end, client)
    if answer is None:
        return None
    if kind not in (A, AAAA):
        assert answer == answer_to(asked)
        return []
    found = dns.parse_answer(answer, parsed)
    assert found.rcode == dns.NOERROR
    return found.addresses


def test_answer_has_one_address_of_the_range_and_a_short_ttl() -> None:
    given = fakes()
    asked = query(question("WWW.example"))
    parsed, end = dns.parse_question(asked)
    assert given.answer(asked, parsed, end, CLIENT) == answer_to(
        asked, a(TTL, bytes((198, 18, 0, SPARED)))
    )
    asked = query(question("www.example", AAAA), opt(4096))
    parsed, end = dns.parse_question(asked)
    six = record(ASKED, AAAA, TTL, bytes.fromhex("fc001815" + "0" * 22 + "10"))
    answer = given.answer(asked, parsed, end, CLIENT)
    assert answer is not None and six in answer and dns.find_opt(answer) is not None


def test_name_has_one_number_for_both_families_and_in_any_spelling() -> None:
    given = fakes()
    assert ask(given, "www.example") == ask(given, "WWW.Example") == [FIRST]
    assert ask(given, "www.example", AAAA) == [FIRST6]
    assert ask(given, "other.example", AAAA) == ["fc00:1815::11"]
    assert (given.name(FIRST, CLIENT), given.name(FIRST6, CLIENT)) == ("www.example", "www.example")
    assert given.name("198.18.0.17", CLIENT) == "other.example"


@pytest.mark.parametrize("kind", [HTTPS, SVCB])
def test_records_with_hints_of_addresses_are_answered_empty(kind: int) -> None:
    given = fakes()
    assert ask(given, "www.example", kind) == []
    assert given.name(FIRST, CLIENT) == ""


def test_family_without_a_network_is_answered_empty() -> None:
    assert ask(fakes(FOUR), "www.example", AAAA) == ask(fakes(SIX), "www.example") == []


@pytest.mark.parametrize("kind", [TXT, PTR, ANY, 2, 15, 33])
def test_other_types_go_to_the_servers(kind: int) -> None:
    assert ask(fakes(), "www.example", kind) is None


@pytest.mark.parametrize(
    "host",
    [
        *("printer", "printer.lan", "printer.local", "x.home.arpa", "x.internal"),
        *("ipv4only.arpa", "1.2.3.4", "a b.example", "::1.example", "x" * 63 + ".localhost"),
    ],
)
def test_names_that_are_not_public_have_none(host: str) -> None:
    assert ask(fakes(), host) is None


def test_chosen_names_alone_have_fake_addresses() -> None:
    chosen = FakeNames(DomainSet([".example", "printer.lan"]), DomainSet(["*.cdn.example"]))
    given = fakes(names=chosen)
    for host, has in (
        ("www.example", True),
        ("example", True),
        ("printer.lan", True),
        ("cdn.example", True),
        ("a.cdn.example", False),
        ("www.test.org", False),
    ):
        assert (ask(given, host) is not None) == has, host


def test_host_that_is_no_fake_address_has_no_name() -> None:
    given = fakes(FOUR)
    for host in ("198.20.0.1", "fc00:1815::10", "www.example", "2001:db8::1", ""):
        assert given.name(host, CLIENT) is None
    # Nobody has asked; or interfaces may have it.
    for host in (FIRST, "198.18.0.1", "198.19.255.255"):
        assert given.name(host, CLIENT) == ""


def test_client_with_too_many_names_is_refused() -> None:
    """Hazard 159."""
    given = fakes(IpNetwork.parse("198.18.0.0/24"))
    for number in range(119, -1, -1):
        assert ask(given, f"n{number}.example")
    with pytest.raises(QueryRefused) as refusal:
        ask(given, "one-more.example")
    assert (str(refusal.value), refusal.value.decided) == (
        "no fake address left",
        "dns.fake 198.18.0.0/24",
    )
    assert ask(given, "one-more.example", client="192.168.1.6") == ["198.18.0.136"]


def test_networks_of_all_sizes_have_their_addresses() -> None:
    assert capacity(IpNetwork.parse("198.18.0.0/24")) == 239
    small = fakes(IpNetwork.parse("198.18.0.0/28"))
    with pytest.raises(QueryRefused):
        ask(small, "www.example")


# -- in the forwarder


def forwarder(of: FakeAddresses | None, counts: Counts | None = None) -> DnsForwarder:
    """Return a forwarder with hosts, a blocked name and a rule, whose servers are not asked."""
    servers: object = object()
    rules = [
        ForwardingRule(("blocked.example",), None),
        ForwardingRule(("corp.example",), servers),  # type: ignore[arg-type]
    ]
    hosts = {"fixed.example": ("192.0.2.1",), "empty.example": ()}
    counter = Counts() if counts is None else counts
    return DnsForwarder(rules, servers, hosts, counter, of)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["www.example", "corp.example"])
def test_forwarder_answers_names_of_servers_with_fake_addresses(host: str) -> None:
    counts = Counts()
    asked = query(question(host))
    answer = forwarder(fakes(), counts).answer(asked, CLIENT)
    assert answer == answer_to(asked, a(TTL, bytes((198, 18, 0, SPARED))))
    assert counts.of("queries", "fake") == 1
    assert forwarder(None).answer(asked, CLIENT) is None


def test_forwarder_answers_hosts_special_and_blocked_names_as_before() -> None:
    given = fakes()
    for host, kind in (
        *(("fixed.example", A), ("fixed.example", HTTPS), ("empty.example", A)),
        *(("blocked.example", A), ("localhost", A), ("x.invalid", A)),
        ("1.0.168.192.in-addr.arpa", PTR),
    ):
        asked = query(question(host, kind))
        with_fakes = forwarder(given).answer(asked, CLIENT)
        assert with_fakes is not None and with_fakes == forwarder(None).answer(asked, CLIENT)
    chaos = query(question("www.example", A, 3))
    assert forwarder(given).answer(chaos, CLIENT) is None
    assert given.name(FIRST, CLIENT) == ""


@pytest.mark.parametrize("network", [FOUR, SIX, IpNetwork.parse("fd00:1815::/64")])
def test_reverse_lookup_of_a_fake_address_has_the_name(network: IpNetwork) -> None:
    given = fakes(network)
    answering = forwarder(given)
    kind = A if network.size == 4 else AAAA
    (address,) = ask(given, "www.example", kind) or ()
    asked = query(question(reverse_name(address), PTR))
    assert answering.answer(asked, CLIENT) == answer_to(
        asked, record(ASKED, PTR, TTL, name("www.example"))
    )
    unknown = query(question(reverse_name(network.address(SPARED + 9)), PTR))
    assert answering.answer(unknown, CLIENT) == query(
        question(reverse_name(network.address(SPARED + 9)), PTR), flags=QR | RD | RA | dns.NXDOMAIN
    )
    other = query(question(reverse_name(address), TXT))
    assert answering.answer(other, CLIENT) == answer_to(other)


def test_reverse_lookup_tells_nobody_else_what_a_client_has_asked_for() -> None:
    given = fakes(FOUR)
    (address,) = ask(given, "www.example") or ()
    asked = query(question(reverse_name(address), PTR))
    unknown = query(question(reverse_name(address), PTR), flags=QR | RD | RA | dns.NXDOMAIN)
    other = "192.168.1.6"
    assert forwarder(given).answer(asked, other) == unknown
    # A client that has found the address by itself has not asked.
    assert given.name(address, other) == "www.example"
    assert forwarder(given).answer(asked, other) == unknown
    ask(given, "www.example", client=other)
    assert forwarder(given).answer(asked, other) == answer_to(
        asked, record(ASKED, PTR, TTL, name("www.example"))
    )


def test_reverse_lookup_is_no_use_of_the_address() -> None:
    """Hazard 159.  A client that looks all fake addresses up keeps none of them."""
    memory = FakeMemory(1)
    given = FakeAddresses((FOUR,), FakeNames(), FakeTable(memory, 0))
    (address,) = ask(given, "www.example") or ()
    memory.note_use(0, 0, client_tag(CLIENT), 1.0)
    asked = query(question(reverse_name(address), PTR))
    assert forwarder(given).answer(asked, CLIENT) is not None
    assert memory.last_use(0).time == 1
    assert given.name(address, CLIENT) == "www.example"
    assert memory.last_use(0).time > 1


def test_reverse_lookup_of_other_addresses_is_forwarded() -> None:
    answering = forwarder(fakes())
    for host in ("1.2.0.193.in-addr.arpa", "18.198.in-addr.arpa", reverse_name("2001:500::1")):
        assert answering.answer(query(question(host, PTR)), CLIENT) is None


@pytest.mark.parametrize("address", ["198.18.0.1", "fc00:1815::1", "0.0.0.0", "::"])
def test_name_of_an_address_leads_back_to_it(address: str) -> None:
    assert parse_reverse_name(reverse_name(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "in-addr.arpa", "1.2.3.in-addr.arpa", "1.2.3.4.5.in-addr.arpa", "ip6.arpa"),
        *("300.2.3.4.in-addr.arpa", "01.2.3.4.in-addr.arpa", "x.2.3.4.in-addr.arpa"),
        *(".".join("0" * 31) + ".ip6.arpa", ".".join("g" * 32) + ".ip6.arpa", "www.example"),
        ".".join("0" * 31 + "\\") + ".ip6.arpa",
    ],
)
def test_other_names_are_names_of_no_address(text: str) -> None:
    assert parse_reverse_name(text) == ""
