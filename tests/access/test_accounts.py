"""Accounts: what counts for whom, limits of users and listeners, changes while flows run."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.access.accounts import pacing
from netproxy.access.accounts import subject as subject_module
from netproxy.access.accounts.account import FlowAccount
from netproxy.access.accounts.book import IDLE_LIMIT, AccountBook
from netproxy.access.accounts.ledger import LedgerFull
from netproxy.access.accounts.standing import Standing, Terms
from netproxy.access.accounts.subject import (
    CLIENT,
    CLIENT_OF_LISTENER,
    LISTENER,
    USER,
    Limits,
    ListenerRates,
)
from netproxy.access.accounts.usage import UsageBook
from netproxy.errors import DialError, Reason
from netproxy.interfaces.accounts import UNLIMITED
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, Traffic
from tests.support.accounts import a_flow, account_book


class Live:
    """A LiveFlow that has carried `sent` and `received` bytes."""

    number = 1
    dialer: Any = None
    started = 0.0

    def __init__(self, flow: Flow, sent: int = 0, received: int = 0) -> None:
        self.flow, self.sent, self.received = flow, sent, received
        self.killed: list[str] = []

    def traffic(self) -> Traffic:
        return Traffic(self.sent, self.received)

    def idle(self) -> float:
        return 0.0

    def kill(self, ended: str = "killed") -> None:
        self.killed.append(ended)


class Clock:
    """Stands in for the time module."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    monkeypatch.setattr(subject_module, "time", clock)
    return clock


def refused(book: AccountBook, flow: Flow) -> str:
    """Return the key of the limit that refuses a flow."""
    with pytest.raises(DialError) as caught:
        book.open(flow)
    assert caught.value.reason is Reason.LIMIT
    return caught.value.decided


def open_all(book: AccountBook, number: int, flow: Flow) -> list[FlowAccount]:
    return [book.open(flow) for _ in range(number)]


class TestCounts:
    def test_connections_and_sessions_of_a_user_are_limited_apart(self) -> None:
        book = account_book(alice=Limits(connections=2, sessions=1))
        connections = open_all(book, 2, a_flow())
        session = book.open(a_flow(network="udp"))
        assert refused(book, a_flow()) == "users.alice.limits.connections"
        assert refused(book, a_flow(network="udp")) == "users.alice.limits.sessions"
        assert book.reached("alice") == "users.alice.limits.sessions"
        book.open(a_flow("bob"))
        connections[0].close()
        book.open(a_flow())
        session.close()
        assert book.reached("alice") == ""

    def test_account_that_is_closed_twice_counts_once(self) -> None:
        book = account_book(alice=Limits(connections=1))
        first = book.open(a_flow())
        first.close()
        first.close()
        book.open(a_flow())
        assert refused(book, a_flow())

    def test_refused_flow_leaves_nothing_behind(self) -> None:
        book = account_book(alice=Limits(connections=1))
        account = book.open(a_flow())
        for number in range(100):
            assert refused(book, a_flow(client=Address(f"198.51.100.{number}", 1)))
        account.close()
        assert not book.stats(CLIENT) and not book.stats(USER)

    def test_new_flows_of_a_second_are_limited(self, clock: Clock) -> None:
        book = account_book(alice=Limits(connection_rate=10.0))
        for account in open_all(book, 10, a_flow()):
            account.close()
        assert refused(book, a_flow()) == "users.alice.limits.connection_rate"
        assert book.reached("alice") == "users.alice.limits.connection_rate"
        clock.now += 0.5
        open_all(book, 5, a_flow(network="udp"))
        assert refused(book, a_flow())

    def test_rate_of_new_flows_is_remembered_while_there_are_none(self, clock: Clock) -> None:
        book = account_book(alice=Limits(connection_rate=1 / 60))
        book.open(a_flow()).close()
        for _ in range(59):
            clock.now += 1.0
            book.expire(clock.now)
            assert refused(book, a_flow())
        clock.now += 2.0
        book.open(a_flow()).close()

    def test_subjects_without_flows_are_forgotten(self, clock: Clock) -> None:
        book = account_book()
        book.configure({}, {"main": ListenerRates(rate_per_client=1000)})
        for number in range(IDLE_LIMIT + 500):
            client = Address(f"10.{number >> 8}.{number & 255}.1", 1)
            book.open(a_flow("", client=client)).close()
        assert len(book._subjects) == 0 and len(book._idle) == IDLE_LIMIT
        clock.now += 3600.0
        book.expire(clock.now)
        assert not book._idle

    def test_addresses_of_an_ipv6_network_are_one_client(self) -> None:
        book = account_book()
        for number in range(3):
            book.open(a_flow("", client=Address(f"2001:db8::{number}", 1)))
        (stats,) = book.stats(CLIENT)
        assert (stats.name, stats.connections) == ("2001:db8::/64", 3)


class TestUsage:
    def test_bytes_of_running_and_ended_flows_are_added_up(self) -> None:
        book, flow = account_book(), a_flow()
        first, second = open_all(book, 2, flow)
        live = Live(flow, 5, 7)
        first.attach(live)
        second.attach(Live(flow, 100, 200))
        second.close()
        live.sent = 10
        (stats,) = book.stats(USER)
        assert (stats.name, stats.connections, stats.sessions) == ("alice", 1, 0)
        assert (stats.up, stats.down) == (110, 207)
        live.received = 8
        (stats,) = book.stats(CLIENT)
        assert (stats.name, stats.up, stats.down) == ("192.0.2.1", 110, 208)

    def test_flows_of_a_subject_are_told(self) -> None:
        book, flow = account_book(), a_flow()
        account, live = book.open(flow), Live(flow)
        assert book.flows(USER, "alice") == []
        account.attach(live)
        assert book.flows(USER, "alice") == book.flows(CLIENT, "192.0.2.1") == [live]
        assert book.flows(USER, "bob") == []
        account.close()
        assert book.flows(USER, "alice") == []


class TestRates:
    def test_flows_of_a_user_share_one_rate_in_each_direction(self, clock: Clock) -> None:
        book = account_book(alice=Limits(rate_up=1_000_000, rate_down=2_000_000))
        stream, session = book.open(a_flow()), book.open(a_flow(network="udp"))
        other = book.open(a_flow("bob"))
        assert 0 < stream.up.renew(0) + session.up.renew(0) <= 250_000
        assert 0 < stream.down.renew(0) <= 500_000
        assert other.up.mark == UNLIMITED

    def test_user_does_not_get_a_new_burst_with_each_flow(self, clock: Clock) -> None:
        book = account_book(alice=Limits(rate_up=100_000, burst=50_000))
        moved = 0
        for _ in range(100):
            flow = a_flow()
            account, live = book.open(flow), Live(flow)
            account.attach(live)
            while room := account.up.renew(live.sent):
                live.sent += room
            account.close()
            moved += live.sent
        # The burst, and what new flows may lease ahead.
        most = 50_000 + pacing.FIRST_SECONDS * 100_000 + pacing.LEASE_LEAST
        assert 50_000 - pacing.LEASE_LEAST < moved <= most

    def test_rates_of_a_listener_and_of_its_clients(self, clock: Clock) -> None:
        book = account_book()
        book.configure({}, {"main": ListenerRates(rate=1_000_000, rate_per_client=10_000)})
        account = book.open(a_flow(""))
        moved = 0
        while room := account.down.renew(moved):
            moved += room
        assert moved <= pacing.default_burst(10_000)
        assert account.down.decided() == "limits.rate_per_client"
        elsewhere = book.open(a_flow("", listener="other"))
        assert elsewhere.down.mark == UNLIMITED

    def test_limits_of_a_reload_count_for_flows_that_run(self, clock: Clock) -> None:
        book, flow = account_book(), a_flow()
        account = book.open(flow)
        account.attach(Live(flow, 1_000_000))
        assert account.up.mark == UNLIMITED
        book.configure({"alice": Limits(rate_up=10_000)}, {})
        assert account.up.renew(1_000_000) > 0
        assert account.up.mark < 1_000_000 + pacing.BURST_LEAST
        book.configure({}, {"main": ListenerRates(rate=10_000)})
        assert account.down.renew(0) > 0
        assert account.down.mark < pacing.BURST_LEAST
        book.configure({}, {})
        assert account.up.mark == account.down.mark == UNLIMITED

    def test_override_takes_the_place_of_configured_limits_until_it_is_taken_back(self) -> None:
        book = account_book(alice=Limits(connections=5))
        book.override("alice", Limits(connections=1))
        book.open(a_flow())
        assert refused(book, a_flow())
        assert book.limits("alice") == Limits(connections=1)
        book.configure({"alice": Limits(connections=7)}, {})
        assert refused(book, a_flow())
        book.override("alice", None)
        open_all(book, 6, a_flow())
        assert refused(book, a_flow())


class TestArrivals:
    def test_connections_of_a_client_within_a_second_are_limited(self, clock: Clock) -> None:
        book = account_book()
        book.configure({}, {"main": ListenerRates(connections_per_client=5.0)})
        refusals = [book.refuse_arrival("main", "192.0.2.1") for _ in range(8)]
        assert refusals == [""] * 5 + ["client connection rate"] * 3
        assert book.refuse_arrival("main", "192.0.2.2") == ""
        assert book.refuse_arrival("other", "192.0.2.1") == ""
        clock.now += 0.5
        assert [book.refuse_arrival("main", "192.0.2.1") for _ in range(3)] == [
            "",
            "",
            "client connection rate",
        ]

    def test_many_addresses_take_bounded_memory(self, clock: Clock) -> None:
        book = account_book()
        book.configure({}, {"main": ListenerRates(connections_per_client=5.0)})
        for number in range(2 * IDLE_LIMIT):
            book.refuse_arrival("main", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        assert len(book._idle) == IDLE_LIMIT and not book._subjects

    def test_banned_client_is_refused_at_once(self) -> None:
        book = account_book()
        book._standing.ban_client("2001:db8::1")
        assert book.refuse_arrival("main", "2001:db8::2") == "client banned"
        with pytest.raises(DialError) as caught:
            book.open(a_flow("", client=Address("2001:db8::3", 1)))
        assert (caught.value.reason, caught.value.said) == (Reason.DENIED, "client banned")


class TestQuota:
    def test_flows_end_when_the_quota_is_used_up(self) -> None:
        book, flow = account_book(), a_flow()
        book._standing.configure({"alice": Terms(day=1000)})
        account, live = book.open(flow), Live(flow)
        account.attach(live)
        other = book.open(a_flow("bob"))
        other.attach(Live(a_flow("bob"), 10**6))
        live.sent, live.received = 600, 399
        assert not book.expire(1.0)
        live.received = 400
        for call in book.expire(2.0):
            call()
        assert live.killed == ["quota used up"]
        with pytest.raises(DialError) as caught:
            book.open(flow)
        assert (caught.value.reason, caught.value.said) == (Reason.DENIED, "quota used up")
        assert caught.value.decided == "users.alice.limits.quota"
        book.open(a_flow("bob"))

    def test_bytes_of_ended_flows_count(self) -> None:
        book, flow = account_book(), a_flow()
        book._standing.configure({"alice": Terms(total=100)})
        account = book.open(flow)
        account.attach(Live(flow, 50, 50))
        account.close()
        with pytest.raises(DialError):
            book.open(flow)


def test_limits_of_an_external_check_count_until_the_next_answer() -> None:
    book = account_book(alice=Limits(connections=3))
    for user in ("alice", "bob"):
        book.grant(user, Limits(connections=1))
    open_all(book, 3, a_flow())
    book.open(a_flow("bob"))
    assert refused(book, a_flow("bob")) == "users.bob.limits.connections"
    book.grant("bob", Limits())
    book.open(a_flow("bob"))


def test_running_flows_are_counted_before_the_usage_is_saved() -> None:
    usage = UsageBook(None)
    book = AccountBook(usage, Standing(usage))
    account = book.open(a_flow())
    account.attach(Live(a_flow(), 3, 4))
    book.expire(5.0)
    assert usage.of("alice")[2] == (0, 0)
    book.expire(10.0)
    assert usage.of("alice")[2] == (3, 4)


def test_flow_no_longer_counts_for_a_listener_whose_rate_is_gone() -> None:
    book = account_book()
    book.configure({}, {"my proxy": ListenerRates(1000, 1000)})
    flow = a_flow("", listener="my proxy")
    account = book.open(flow)
    account.attach(Live(flow))
    assert [key[0] for key in book._subjects] == [CLIENT, LISTENER, CLIENT_OF_LISTENER]
    assert account.up.mark != UNLIMITED
    book.configure({}, {})
    assert [key[0] for key in book._subjects] == [CLIENT]
    assert account.up.mark == UNLIMITED
    account.close()
    assert not book._subjects


def test_further_request_on_a_connection_is_no_new_connection(clock: Clock) -> None:
    book = account_book(alice=Limits(connection_rate=1.0, connections=2))
    book.open(a_flow()).close()
    assert refused(book, a_flow())
    for _ in range(5):
        book.open(a_flow(), is_new=False).close()
    open_accounts = [book.open(a_flow(), is_new=False) for _ in range(2)]
    with pytest.raises(DialError):
        book.open(a_flow(), is_new=False)
    for account in open_accounts:
        account.close()


def test_rate_of_a_reload_reaches_flows_that_are_being_dialled() -> None:
    book = account_book()
    account = book.open(a_flow(""))
    book.configure({}, {"main": ListenerRates(rate=1000)})
    assert account.up.mark < UNLIMITED
    account.attach(Live(a_flow("")))
    account.close()
    assert not book._subjects


def test_full_ledger_refuses_only_what_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    book = account_book(alice=Limits(connections=5))

    def full(kind: str, name: str) -> Any:
        raise LedgerFull

    monkeypatch.setattr(book._ledger, "slot", full)
    account = book.open(a_flow(""))
    assert not account.subjects and not book._subjects
    with pytest.raises(DialError) as caught:
        book.open(a_flow())
    assert caught.value.decided == "the ledger" and not book._subjects
