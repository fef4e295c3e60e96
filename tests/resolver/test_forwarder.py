"""Which servers are asked for which names, and what is known without asking."""

from __future__ import annotations

import time
from typing import Any, Callable, Sequence

import pytest

from netproxy.errors import ProtocolError
from netproxy.protocol import dns
from netproxy.resolver import forwarder as forwarder_module
from netproxy.resolver.forwarder import HOSTS_TTL, ForwardingRule, DnsForwarder
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
from tests.support.nameservers import answer_to, question_of, nxdomain

FOUR, SIX = b"\xc0\0\2\x01", b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1"
DO = 0x8000
ReplyTable = Callable[[bytes], bytes]


def both(four: bytes = a(60, FOUR), six: bytes = record(ASKED, 28, 30, SIX)) -> ReplyTable:
    return lambda asked: answer_to(
        asked, four if asked[-15 if asked[11] else -4 :][:4] == b"\0\1\0\1" else six
    )


class Asked:
    """Servers: answers by `reply`, and keeps what it was asked."""

    def __init__(self, reply: ReplyTable = both()) -> None:
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


def fails(asked: bytes) -> bytes:
    raise ServerError("nobody: no answer")


def forwarder(
    servers: Any = None,
    branches: Sequence[tuple[tuple[str, ...], Any]] = (),
    **hosts: tuple[str, ...],
) -> DnsForwarder:
    return DnsForwarder(
        [ForwardingRule(names, asked) for names, asked in branches],
        servers,
        {host.replace("_", "."): addresses for host, addresses in hosts.items()},
    )


def coded(code: int) -> ReplyTable:
    return lambda asked: answer_to(asked, flags=QR | RD | RA | code)


class TestOurLookups:
    def test_both_families_are_asked_for_at_once(self) -> None:
        servers = Asked()
        began = time.monotonic()
        found = forwarder(servers).ask("www.example")
        assert found == LookupResult(("192.0.2.1", "2001:db8::1"), 30)
        assert (
            len(servers.deadlines) == 1
            and began + LOOKUP_SECONDS <= servers.deadlines[0] <= time.monotonic() + LOOKUP_SECONDS
        )
        assert servers.names == [question("www.example", 1), question("www.example", 28)]
        assert [asked[2:12] for asked in servers.queries] == [HEADER.pack(0, RD, 1, 0, 0, 1)[2:]] * 2
        assert all(asked.endswith(opt()) for asked in servers.queries)

    def test_one_family_is_enough_and_its_ttl_alone_counts(self) -> None:
        found = forwarder(
            Asked(
                lambda asked: (
                    answer_to(asked, a(60, FOUR))
                    if question_of(asked).endswith(b"\0\1\0\1")
                    else nxdomain(asked, 5)
                )
            )
        ).ask("www.example")
        assert found == LookupResult(("192.0.2.1",), 60)

    def test_aliases_are_followed(self) -> None:
        def reply(asked: bytes) -> bytes:
            target = name("host.example")
            return answer_to(
                asked,
                cname(ASKED, 20, target),
                *((a(60, FOUR, target),) if question_of(asked).endswith(b"\0\1\0\1") else ()),
            )

        assert forwarder(Asked(reply)).ask("www.example") == LookupResult(("192.0.2.1",), 20)

    @pytest.mark.parametrize("ttl", [0, 7, 300])
    def test_that_there_is_no_such_name_holds_as_long_as_its_zone_says(self, ttl: int) -> None:
        assert forwarder(Asked(lambda asked: nxdomain(asked, ttl))).ask("www.example") == LookupResult(
            (), ttl
        )

    def test_without_a_zone_that_says_so_it_does_not_hold(self) -> None:
        assert forwarder(Asked(coded(dns.NXDOMAIN))).ask("www.example") == LookupResult((), 0)
        assert forwarder(Asked(answer_to)).ask("www.example") == LookupResult((), 0)

    @pytest.mark.parametrize(
        "reply",
        [
            fails,
            coded(dns.SERVFAIL),
            coded(dns.REFUSED),
            lambda asked: b"\0" * 12,
            lambda asked: answer_to(asked, a(60, b"\1")),
            lambda asked: answer_to(asked[:12] + question("evil.example"), a(60, FOUR)),
        ],
        ids=["silence", "SERVFAIL", "REFUSED", "no answer", "a short address", "another name"],
    )
    def test_what_is_no_answer_is_a_failure(self, reply: ReplyTable) -> None:
        with pytest.raises(LookupFailed):
            forwarder(Asked(reply)).ask("www.example")

    def test_a_family_that_fails_does_not_spoil_the_other(self) -> None:
        def reply(asked: bytes) -> bytes:
            return (
                answer_to(asked, a(60, FOUR))
                if question_of(asked).endswith(b"\0\1\0\1")
                else coded(dns.SERVFAIL)(asked)
            )

        assert forwarder(Asked(reply)).ask("www.example") == LookupResult(("192.0.2.1",), 60)

    def test_but_no_address_and_a_failure_is_no_news_of_the_name(self) -> None:
        def reply(asked: bytes) -> bytes:
            return (
                nxdomain(asked) if question_of(asked).endswith(b"\0\1\0\1") else coded(dns.SERVFAIL)(asked)
            )

        with pytest.raises(LookupFailed):
            forwarder(Asked(reply)).ask("www.example")

    @pytest.mark.parametrize("host", ["a..b", "a" * 64, ".".join(["a" * 63] * 4), "b\u00fccher"])
    def test_what_cannot_be_sent_is_a_failure(self, host: str) -> None:
        servers = Asked()
        with pytest.raises(LookupFailed):
            forwarder(servers).ask(host)
        assert not servers.queries

    @pytest.mark.parametrize("code", [dns.FORMERR, dns.NOTIMP])
    def test_a_server_that_cannot_read_edns_is_asked_without(self, code: int) -> None:
        def reply(asked: bytes) -> bytes:
            if asked[11]:
                return asked[:2] + HEADER.pack(0, QR | code, 0, 0, 0, 0)[2:]
            return (
                answer_to(asked, a(60, FOUR))
                if question_of(asked).endswith(b"\0\1\0\1")
                else answer_to(asked)
            )

        servers = Asked(reply)
        assert forwarder(servers).ask("www.example") == LookupResult(("192.0.2.1",), 60)
        assert [asked[11] for asked in servers.queries] == [1, 1, 0, 0]
        assert servers.deadlines[0] == servers.deadlines[1]

    def test_without_servers_the_system_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forwarder_module, "ask_system", lambda host: LookupResult((f"of {host}",), 10))
        of_lan = Asked()
        by_rules = forwarder(None, [(("host.lan",), of_lan), (("ads.example",), None)])
        assert by_rules.ask("www.example") == LookupResult(("of www.example",), 10)
        assert by_rules.ask("ads.example") == LookupResult((), HOSTS_TTL)
        assert by_rules.ask("host.lan").addresses == ("192.0.2.1", "2001:db8::1")


class TestBranches:
    def test_the_first_that_has_the_name_is_asked(self) -> None:
        first, second, others = Asked(), Asked(), Asked()
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

    def test_names_that_are_blocked_do_not_exist(self) -> None:
        servers = Asked()
        by_names = forwarder(servers, [(("ads.example",), None)])
        assert by_names.ask("ads.example") == LookupResult((), HOSTS_TTL)
        asked = query(question("Ads.Example", 65280), opt(), flags=RD | CD)
        assert by_names.answer(asked) == query(
            question("Ads.Example", 65280), opt(), flags=QR | RD | RA | CD | dns.NXDOMAIN
        )
        assert not servers.queries

    def test_all_give_up_what_nobody_uses(self) -> None:
        servers, of_lan = Asked(), Asked()
        for close in forwarder(servers, [(("host.lan",), of_lan), (("ads.example",), None)]).expire(
            1000.0
        ):
            close()
        assert servers.closed and of_lan.closed

    def test_all_are_closed(self) -> None:
        servers, of_lan = Asked(), Asked()
        forwarder(servers, [(("host.lan",), of_lan), (("ads.example",), None)]).close()
        assert servers.closed and of_lan.closed
        forwarder(None).close()


class TestAnswersWithoutAServer:
    HOSTS = {"printer_lan": ("192.0.2.1", "2001:db8::1", "192.0.2.9"), "nothing_lan": ()}

    def answer(self, asked: bytes) -> bytes | None:
        return forwarder(Asked(fails), **self.HOSTS).answer(asked)

    def test_addresses_of_a_host(self) -> None:
        found = self.answer(query(question("Printer.LAN")))
        assert found == HEADER.pack(0x1234, QR | RD | RA, 1, 2, 0, 0) + question("Printer.LAN") + a(
            HOSTS_TTL, FOUR
        ) + a(HOSTS_TTL, b"\xc0\0\2\x09")
        assert found is not None and dns.parse_answer(
            found, dns.Question("printer.lan", 1, 1)
        ).addresses == ["192.0.2.1", "192.0.2.9"]

    def test_with_edns(self) -> None:
        found = self.answer(query(question("printer.lan", 28), opt(4096, DO), flags=RD | CD))
        assert found == (
            HEADER.pack(0x1234, QR | RD | RA | CD, 1, 1, 0, 1)
            + question("printer.lan", 28)
            + record(ASKED, 28, HOSTS_TTL, SIX)
            + opt(1232, DO)
        )

    @pytest.mark.parametrize(
        "host, kind", [("printer.lan", 16), ("printer.lan", 255), ("nothing.lan", 1)]
    )
    def test_a_host_without_what_is_asked_for_exists_all_the_same(
        self, host: str, kind: int
    ) -> None:
        assert self.answer(query(question(host, kind))) == query(
            question(host, kind), flags=QR | RD | RA
        )

    @pytest.mark.parametrize(
        "asked",
        [question("other.lan"), question("a.printer.lan"), question("printer.lan", 16, 3)],
        ids=["another name", "below", "another class"],
    )
    def test_what_it_does_not_know_is_to_be_asked(self, asked: bytes) -> None:
        assert self.answer(query(asked)) is None

    @pytest.mark.parametrize(
        "asked",
        [
            HEADER.pack(1, RD, 0, 0, 0, 0),
            HEADER.pack(1, RD, 2, 0, 0, 0) + question("a.lan") * 2,
            HEADER.pack(1, RD, 1, 0, 0, 0) + b"\3ab",
        ],
    )
    def test_without_exactly_one_question_it_is_none(self, asked: bytes) -> None:
        with pytest.raises(ProtocolError):
            self.answer(asked)

    @pytest.mark.parametrize("below", ["ads", "a:b.ads", "::1.ads", "1.2.3.4.ads", "a b.ads"])
    def test_hazard_76_no_name_below_one_that_is_blocked_gets_out(self, below: str) -> None:
        """Labels hold any octet: a colon makes no address of a name."""
        asked = query(question(f"{below}.example"))
        found = forwarder(Asked(fails), [(DomainSet([".ads.example"]), None)]).answer(asked)
        assert found is not None and dns.parse_header(found).rcode == dns.NXDOMAIN

    def test_names_of_nobody_are_refused(self) -> None:
        found = forwarder(None, [(("host.lan",), Asked())]).answer(query(question("www.example")))
        assert found == query(question("www.example"), flags=QR | RD | RA | dns.REFUSED)


class TestForwarding:
    def test_passes_messages_as_they_are(self) -> None:
        strange = query(
            question("wWw.example", 65280, 3),
            opt(4096, DO, b"\xff\xfe\0\3abc"),
            flags=0x0FF0 & ~0x8000,
        )
        reply = answer_to(strange, record(ASKED, 65280, 60, b"whatever"), flags=QR | 0x0B50)
        servers = Asked(lambda asked: reply)
        assert forwarder(servers).forward(strange) == reply
        assert servers.queries == [strange]

    def test_where_nobody_answers_that_is_said(self) -> None:
        asked = query(question("www.example"), opt(4096, DO))
        assert forwarder(Asked(fails)).forward(asked) == query(
            question("www.example"), opt(1232, DO), flags=QR | RD | RA | dns.SERVFAIL
        )
        assert forwarder(None).forward(asked)[3] & 15 == dns.SERVFAIL
