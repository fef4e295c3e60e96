"""Which servers are asked for which names, and what is answered without a server."""

from __future__ import annotations

import time
from typing import Any, Callable, Sequence

import pytest

from netproxy.errors import ProtocolError
from netproxy.protocol import dns
from netproxy.resolver import forwarder as forwarder_module
from netproxy.resolver.forwarder import HOSTS_TTL, DnsForwarder, ForwardingRule
from netproxy.resolver.resolver import LOOKUP_SECONDS, LookupResult, LookupFailed
from netproxy.router.matchers import DomainSet
from netproxy.resolver.servers import ServerError
from tests.support.dns import (
    ASKED,
    CD,
    HEADER,
    QR,
    RA,
    RD,
    a,
    cname,
    name,
    opt,
    query,
    question,
    record,
)
from tests.support.doubles import Counts
from tests.support.nameservers import answer_to, question_of, nxdomain

FOUR, SIX = b"\xc0\0\2\x01", b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1"
DO, PTR = 0x8000, 12
CLIENT = "192.168.1.5"
ReplyTable = Callable[[bytes], bytes]


def is_ipv4(asked: bytes) -> bool:
    """Return whether a query asks for A."""
    return question_of(asked).endswith(b"\0\1\0\1")


def addresses(four: bytes = a(60, FOUR), six: bytes = record(ASKED, 28, 30, SIX)) -> ReplyTable:
    """Return a reply with one record, by the type that is asked for."""
    return lambda asked: answer_to(asked, four if is_ipv4(asked) else six)


ADDRESSES = addresses()


class RecordingServers:
    """A group of servers that answers by `reply` and records queries and deadlines."""

    def __init__(self, reply: ReplyTable = ADDRESSES) -> None:
        self.queries: list[bytes] = []
        self.deadlines: list[float] = []
        self.closed = False
        self._reply = reply

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        self.queries += queries
        self.deadlines.append(deadline)
        return [self._reply(asked) for asked in queries]

    def close(self) -> None:
        self.closed = True

    def expire(self, now: float) -> list[Callable[[], None]]:
        return [self.close]

    @property
    def names(self) -> list[bytes]:
        return [question_of(asked) for asked in self.queries]


def fail(asked: bytes) -> bytes:
    """Raise ServerError, as silent servers do."""
    raise ServerError("server: no answer")


def forwarder(
    servers: Any = None,
    rules: Sequence[tuple[tuple[str, ...], Any]] = (),
    counts: Counts | None = None,
    **hosts: tuple[str, ...],
) -> DnsForwarder:
    """Return a forwarder.  An underscore in the name of a host stands for a dot."""
    return DnsForwarder(
        [ForwardingRule(names, group) for names, group in rules],
        servers,
        {host.replace("_", "."): addresses for host, addresses in hosts.items()},
        counts or Counts(),
    )


def with_code(code: int) -> ReplyTable:
    """Return a reply that has only a response code."""
    return lambda asked: answer_to(asked, flags=QR | RD | RA | code)


class TestOurLookups:
    def test_both_families_are_asked_for_in_one_exchange(self) -> None:
        servers = RecordingServers()
        began = time.monotonic()
        result = forwarder(servers).ask("www.example")
        assert result == LookupResult(("192.0.2.1", "2001:db8::1"), 30)
        assert (
            len(servers.deadlines) == 1
            and began + LOOKUP_SECONDS <= servers.deadlines[0] <= time.monotonic() + LOOKUP_SECONDS
        )
        assert servers.names == [question("www.example", 1), question("www.example", 28)]
        assert [asked[2:12] for asked in servers.queries] == [
            HEADER.pack(0, RD, 1, 0, 0, 1)[2:]
        ] * 2
        assert all(asked.endswith(opt()) for asked in servers.queries)

    def test_ttl_is_that_of_the_family_with_addresses(self) -> None:
        result = forwarder(
            RecordingServers(
                lambda asked: (
                    answer_to(asked, a(60, FOUR)) if is_ipv4(asked) else nxdomain(asked, 5)
                )
            )
        ).ask("www.example")
        assert result == LookupResult(("192.0.2.1",), 60)

    def test_cname_is_followed(self) -> None:
        def reply(asked: bytes) -> bytes:
            target = name("host.example")
            return answer_to(
                asked, cname(ASKED, 20, target), *((a(60, FOUR, target),) if is_ipv4(asked) else ())
            )

        assert forwarder(RecordingServers(reply)).ask("www.example") == LookupResult(
            ("192.0.2.1",), 20
        )

    @pytest.mark.parametrize("ttl", [0, 7, 300])
    def test_nxdomain_is_kept_as_long_as_the_soa_says(self, ttl: int) -> None:
        assert forwarder(RecordingServers(lambda asked: nxdomain(asked, ttl))).ask(
            "www.example"
        ) == LookupResult((), ttl)

    def test_nxdomain_without_a_soa_is_not_kept(self) -> None:
        assert forwarder(RecordingServers(with_code(dns.NXDOMAIN))).ask(
            "www.example"
        ) == LookupResult((), 0)
        assert forwarder(RecordingServers(answer_to)).ask("www.example") == LookupResult((), 0)

    @pytest.mark.parametrize(
        "reply",
        [
            fail,
            with_code(dns.SERVFAIL),
            with_code(dns.REFUSED),
            lambda asked: b"\0" * 12,
            lambda asked: answer_to(asked, a(60, b"\1")),
            lambda asked: answer_to(asked[:12] + question("evil.example"), a(60, FOUR)),
        ],
        ids=["silence", "SERVFAIL", "REFUSED", "no answer", "short address", "another name"],
    )
    def test_failure_of_the_servers_is_a_failed_lookup(self, reply: ReplyTable) -> None:
        with pytest.raises(LookupFailed):
            forwarder(RecordingServers(reply)).ask("www.example")

    def test_failure_of_one_family_does_not_affect_the_other(self) -> None:
        def reply(asked: bytes) -> bytes:
            return (
                answer_to(asked, a(60, FOUR)) if is_ipv4(asked) else with_code(dns.SERVFAIL)(asked)
            )

        assert forwarder(RecordingServers(reply)).ask("www.example") == LookupResult(
            ("192.0.2.1",), 60
        )

    def test_failure_of_one_family_without_addresses_of_the_other_is_a_failed_lookup(self) -> None:
        def reply(asked: bytes) -> bytes:
            return nxdomain(asked) if is_ipv4(asked) else with_code(dns.SERVFAIL)(asked)

        with pytest.raises(LookupFailed):
            forwarder(RecordingServers(reply)).ask("www.example")

    @pytest.mark.parametrize("host", ["a..b", "a" * 64, ".".join(["a" * 63] * 4), "b\u00fccher"])
    def test_name_that_cannot_be_sent_is_a_failed_lookup(self, host: str) -> None:
        servers = RecordingServers()
        with pytest.raises(LookupFailed):
            forwarder(servers).ask(host)
        assert not servers.queries

    @pytest.mark.parametrize("code", [dns.FORMERR, dns.NOTIMP])
    def test_server_that_cannot_read_edns_is_asked_without_it(self, code: int) -> None:
        def reply(asked: bytes) -> bytes:
            if asked[11]:
                return asked[:2] + HEADER.pack(0, QR | code, 0, 0, 0, 0)[2:]
            return answer_to(asked, a(60, FOUR)) if is_ipv4(asked) else answer_to(asked)

        servers = RecordingServers(reply)
        assert forwarder(servers).ask("www.example") == LookupResult(("192.0.2.1",), 60)
        assert [asked[11] for asked in servers.queries] == [1, 1, 0, 0]
        assert servers.deadlines[0] == servers.deadlines[1]

    def test_system_is_asked_without_servers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            forwarder_module, "ask_system", lambda host: LookupResult((f"of {host}",), 10)
        )
        of_lan = RecordingServers()
        by_rules = forwarder(None, [(("host.lan",), of_lan), (("ads.example",), None)])
        assert by_rules.ask("www.example") == LookupResult(("of www.example",), 10)
        assert by_rules.ask("ads.example") == LookupResult((), HOSTS_TTL)
        assert by_rules.ask("host.lan").addresses == ("192.0.2.1", "2001:db8::1")


class TestRules:
    def test_first_rule_with_the_name_decides(self) -> None:
        first, second, others = RecordingServers(), RecordingServers(), RecordingServers()
        by_names = forwarder(others, [(("a.lan", "b.lan"), first), (("b.lan", "c.lan"), second)])
        for host in ("a.lan", "b.lan", "c.lan", "d.lan"):
            by_names.ask(host)
        for host in ("A.lan", "b.LAN", "C.lan", "d.lan"):
            by_names.forward(query(question(host)))
        assert first.names == [
            question(host, kind) for host in ("a.lan", "b.lan") for kind in (1, 28)
        ] + [question("a.lan"), question("b.lan")]
        assert second.names == [question("c.lan", 1), question("c.lan", 28), question("c.lan")]
        assert others.names == [question("d.lan", 1), question("d.lan", 28), question("d.lan")]

    def test_blocked_name_does_not_exist(self) -> None:
        servers = RecordingServers()
        by_names = forwarder(servers, [(("ads.example",), None)])
        assert by_names.ask("ads.example") == LookupResult((), HOSTS_TTL)
        asked = query(question("Ads.Example", 65280), opt(), flags=RD | CD)
        assert by_names.answer(asked, CLIENT) == query(
            question("Ads.Example", 65280), opt(), flags=QR | RD | RA | CD | dns.NXDOMAIN
        )
        assert not servers.queries

    def test_servers_of_all_rules_expire(self) -> None:
        servers, of_lan = RecordingServers(), RecordingServers()
        for close in forwarder(servers, [(("host.lan",), of_lan), (("ads.example",), None)]).expire(
            1000.0
        ):
            close()
        assert servers.closed and of_lan.closed

    def test_servers_of_all_rules_are_closed(self) -> None:
        servers, of_lan = RecordingServers(), RecordingServers()
        forwarder(servers, [(("host.lan",), of_lan), (("ads.example",), None)]).close()
        assert servers.closed and of_lan.closed
        forwarder(None).close()


class TestAnswersWithoutServer:
    HOSTS = {"printer_lan": ("192.0.2.1", "2001:db8::1", "192.0.2.9"), "nothing_lan": ()}

    def answer(self, asked: bytes) -> bytes | None:
        return forwarder(RecordingServers(fail), **self.HOSTS).answer(asked, CLIENT)

    def test_host_is_answered_with_its_addresses(self) -> None:
        answer = self.answer(query(question("Printer.LAN")))
        assert answer == HEADER.pack(0x1234, QR | RD | RA, 1, 2, 0, 0) + question(
            "Printer.LAN"
        ) + a(HOSTS_TTL, FOUR) + a(HOSTS_TTL, b"\xc0\0\2\x09")
        assert answer is not None and dns.parse_answer(
            answer, dns.Question("printer.lan", 1, 1)
        ).addresses == ["192.0.2.1", "192.0.2.9"]

    def test_answer_for_a_host_has_edns_if_the_query_has(self) -> None:
        answer = self.answer(query(question("printer.lan", 28), opt(4096, DO), flags=RD | CD))
        assert answer == (
            HEADER.pack(0x1234, QR | RD | RA | CD, 1, 1, 0, 1)
            + question("printer.lan", 28)
            + record(ASKED, 28, HOSTS_TTL, SIX)
            + opt(1232, DO)
        )

    @pytest.mark.parametrize(
        "host, kind", [("printer.lan", 16), ("printer.lan", 255), ("nothing.lan", 1)]
    )
    def test_host_without_data_of_the_type_is_no_error(self, host: str, kind: int) -> None:
        assert self.answer(query(question(host, kind))) == query(
            question(host, kind), flags=QR | RD | RA
        )

    @pytest.mark.parametrize(
        "asked",
        [question("other.lan"), question("a.printer.lan"), question("printer.lan", 16, 3)],
        ids=["another name", "below", "another class"],
    )
    def test_unknown_name_needs_a_server(self, asked: bytes) -> None:
        assert self.answer(query(asked)) is None

    @pytest.mark.parametrize(
        "asked",
        [
            HEADER.pack(1, RD, 0, 0, 0, 0),
            HEADER.pack(1, RD, 2, 0, 0, 0) + question("a.lan") * 2,
            HEADER.pack(1, RD, 1, 0, 0, 0) + b"\3ab",
        ],
    )
    def test_query_without_exactly_one_question_is_a_protocol_error(self, asked: bytes) -> None:
        with pytest.raises(ProtocolError):
            self.answer(asked)

    @pytest.mark.parametrize(
        "asked, host",
        [
            ("1.2.0.192.in-addr.arpa", "printer.lan"),
            ("9.2.0.192.IN-ADDR.ARPA", "printer.lan"),
            ("1." + "0." * 23 + "8.b.d.0.1.0.0.2.ip6.arpa", "printer.lan"),
        ],
    )
    def test_address_of_a_host_has_its_name(self, asked: str, host: str) -> None:
        answer = self.answer(query(question(asked, PTR)))
        assert answer == HEADER.pack(0x1234, QR | RD | RA, 1, 1, 0, 0) + question(
            asked, PTR
        ) + record(ASKED, PTR, HOSTS_TTL, name(host))

    def test_each_answer_without_a_server_is_counted_by_outcome(self) -> None:
        counts = Counts()
        rules = [(("ads.example",), None), (("host.lan",), RecordingServers())]
        by_rule = forwarder(None, rules, counts, printer_lan=("192.0.2.1",))
        for host in ("ads.example", "ads.example", "printer.lan", "localhost", "www.example"):
            assert by_rule.answer(query(question(host)), CLIENT) is not None
        assert by_rule.answer(query(question("host.lan")), CLIENT) is None
        assert counts.counts == {
            ("queries", "blocked"): 2,
            ("queries", "local"): 2,
            ("queries", "no name servers"): 1,
        }

    @pytest.mark.parametrize("below", ["ads", "a:b.ads", "::1.ads", "1.2.3.4.ads", "a b.ads"])
    def test_name_below_a_blocked_name_is_blocked_whatever_its_octets(self, below: str) -> None:
        """Hazard 76: a label with a colon does not make an address of a name."""
        asked = query(question(f"{below}.example"))
        blocking = forwarder(RecordingServers(fail), [(DomainSet([".ads.example"]), None)])
        answer = blocking.answer(asked, CLIENT)
        assert answer is not None and dns.parse_header(answer).rcode == dns.NXDOMAIN

    def test_name_without_servers_is_refused(self) -> None:
        without = forwarder(None, [(("host.lan",), RecordingServers())])
        answer = without.answer(query(question("www.example")), CLIENT)
        assert answer == query(question("www.example"), flags=QR | RD | RA | dns.REFUSED)


class TestForwarding:
    def test_messages_are_forwarded_unchanged(self) -> None:
        strange = query(
            question("wWw.example", 65280, 3),
            opt(4096, DO, b"\xff\xfe\0\3abc"),
            flags=0x0FF0 & ~0x8000,
        )
        reply = answer_to(strange, record(ASKED, 65280, 60, b"whatever"), flags=QR | 0x0B50)
        servers = RecordingServers(lambda asked: reply)
        assert forwarder(servers).forward(strange) == reply
        assert servers.queries == [strange]

    def test_query_that_no_server_answers_gets_servfail(self) -> None:
        asked = query(question("www.example"), opt(4096, DO))
        assert forwarder(RecordingServers(fail)).forward(asked) == query(
            question("www.example"), opt(1232, DO), flags=QR | RD | RA | dns.SERVFAIL
        )
        assert forwarder(None).forward(asked)[3] & 15 == dns.SERVFAIL


class TestSpecialNames:
    def test_special_name_is_answered_here(self) -> None:
        servers = RecordingServers()
        for asked in ("localhost", "a.invalid", "1.1.168.192.in-addr.arpa", "resolver.arpa"):
            assert forwarder(servers).answer(query(question(asked)), CLIENT) is not None
        assert not servers.queries

    @pytest.mark.parametrize(
        "asked", ["localhost", "a.invalid", "9.1.168.192.in-addr.arpa", "_dns.resolver.arpa"]
    )
    def test_rule_says_otherwise(self, asked: str) -> None:
        of_rule = RecordingServers()
        by_rule = forwarder(None, [((asked,), of_rule)])
        assert by_rule.answer(query(question(asked)), CLIENT) is None
        assert by_rule.forward(query(question(asked))) == ADDRESSES(query(question(asked)))
        assert by_rule.ask(asked).addresses == ("192.0.2.1", "2001:db8::1")
        assert of_rule.queries

    def test_host_says_otherwise(self) -> None:
        answer = forwarder(None, localhost=("192.0.2.1",), a_invalid=("192.0.2.1",))
        for host in ("localhost", "a.invalid"):
            asked = query(question(host))
            assert answer.answer(asked, CLIENT) == answer_to(asked, a(HOSTS_TTL, FOUR))

    def test_other_class_is_not_special(self) -> None:
        asked = query(question("localhost", 1, 3))
        assert forwarder(RecordingServers()).answer(asked, CLIENT) is None

    @pytest.mark.parametrize(
        "host", ["invalid", "a.invalid", "resolver.arpa", "1.127.in-addr.arpa"]
    )
    def test_special_name_has_no_address_for_us(self, host: str) -> None:
        servers = RecordingServers()
        assert forwarder(servers).ask(host).addresses == ()
        assert forwarder(None).ask(host).addresses == ()
        assert not servers.queries
