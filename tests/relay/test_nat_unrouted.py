"""Targets whose names are looked up before their way out is known: what waits, in which order it leaves, what is given up."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route
from netproxy.relay import nat
from netproxy.relay import entry as entry_module
from netproxy.relay.entry import Entry
from netproxy.relay.session import Client
from tests.support.nat import NatRig
from tests.support.upstreams import FakeDialer

FOUND = Address("203.0.113.9", 9000)
FLOOD = 10_000


class LookingUp:
    """A Router that must look every name up first; `failure` is what comes of it, `at_once` what is known of it already."""

    def __init__(self, dialer: Dialer) -> None:
        self.dialer = dialer
        self.failure: BaseException | None = None
        self.at_once: DialError | None = None
        self.asked: list[str] = []

    def route_without_blocking(self, flow: Flow) -> Route | None:
        if self.at_once:
            raise self.at_once
        return None

    def route(self, flow: Flow) -> Route:
        self.asked.append(flow.target.host)
        if self.failure:
            raise self.failure
        return Route(self.dialer, flow._replace(addresses=(FOUND,)))

    def ways(self, flow: Flow) -> Iterator[Dialer]:
        yield self.dialer


class Unrouted(NatRig):
    def __init__(self) -> None:
        super().__init__()
        self.router = LookingUp(self.dialer)
        self.workers.eager = False

    def ask(self, client: Client, host: str = "a.test", count: int = 1) -> Entry | None:
        flow = Flow("udp", client.address, Address(host, 9000), "main", "")
        return self.table.open((client.peer, host.encode()), client, flow, self.router, count)

    def asked(self, client: Client, host: str = "a.test") -> Entry:
        entry = self.ask(client, host)
        assert entry is not None
        return entry

    def sent(self) -> list[bytes]:
        return [payload for conn in self.dialer.conns for payload, _ in conn.sent]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Unrouted]:
    rig = Unrouted()
    monkeypatch.setattr(nat, "time", rig.clock)
    monkeypatch.setattr(entry_module, "time", rig.clock)
    yield rig
    rig.workers.eager = True
    rig.workers.run()
    rig.table.close()
    assert not rig.waiting() and not rig.table.entries and not rig.table.clients


class TestFound:
    def test_what_has_waited_leaves_in_order_and_what_comes_then_behind_it(
        self, rig: Unrouted
    ) -> None:
        client = rig.client()
        entry = rig.asked(client)
        rig.send(entry, b"1", b"2")
        rig.send(entry, b"3")
        assert not rig.dialer.flows and rig.waiting() == 3
        rig.workers.tasks.pop(0)()  # the lookup has ended, and the dial begins
        rig.send(entry, b"4")
        rig.workers.run()
        rig.send(entry, b"5")
        assert rig.sent() == [b"1", b"2", b"3", b"4", b"5"]
        assert not rig.waiting() and not any(name == "drops" for name, _ in rig.counts.counts)

    def test_the_session_and_the_destination_are_by_the_addresses_that_were_found(
        self, rig: Unrouted
    ) -> None:
        client = rig.client()
        entry = rig.asked(client)
        rig.workers.run()
        assert entry.flow.addresses == (FOUND,) and rig.dialer.flows[0].addresses == (FOUND,)
        assert rig.router.asked == ["a.test"] and not client.unrouted and len(rig.table) == 1

    def test_targets_of_one_client_by_one_way_out_share_its_session(self, rig: Unrouted) -> None:
        client = rig.client()
        first, second = rig.asked(client, "a.test"), rig.asked(client, "b.test")
        rig.send(second, b"b")
        rig.send(first, b"a")
        rig.workers.run()
        assert (
            first.session is second.session
            and sorted(rig.sent()) == [b"a", b"b"]
            and len(rig.dialer.conns) == 1
        )

    def test_it_is_recorded_when_it_ends_like_any_other(self, rig: Unrouted) -> None:
        client = rig.client()
        rig.send(rig.asked(client), b"x")
        rig.workers.run()
        rig.table.end(client.owner)
        assert [
            (record.flow.target.host, record.datagrams_sent) for record in rig.records.records
        ] == [("a.test", 1)]


class TestGivenUp:
    @pytest.mark.parametrize("reason", [Reason.NAME, Reason.TIMEOUT, Reason.DENIED, Reason.LOOP])
    def test_what_waited_is_counted_by_the_reason(self, rig: Unrouted, reason: Reason) -> None:
        rig.router.failure = DialError(reason, "a.test")
        client = rig.client()
        entry = rig.asked(client)
        rig.send(entry, b"1", b"2")
        rig.workers.run()
        assert rig.counts.of("drops", reason.value) == 2
        assert entry.gone and not rig.table.entries and not client.unrouted and not client.waiting

    def test_the_next_datagram_asks_anew(self, rig: Unrouted) -> None:
        rig.router.failure = DialError(Reason.NAME, "a.test")
        client = rig.client()
        rig.send(rig.asked(client), b"lost")
        rig.workers.run()
        rig.router.failure = None
        rig.send(rig.asked(client), b"found")
        rig.workers.run()
        assert rig.sent() == [b"found"] and rig.router.asked == ["a.test"] * 2

    def test_a_name_that_lately_was_none_costs_no_entry(self, rig: Unrouted) -> None:
        rig.router.at_once = DialError(Reason.NAME, "a.test")
        assert rig.ask(rig.client(), count=3) is None
        assert rig.counts.of("drops", Reason.NAME.value) == 3 and not rig.table.entries

    def test_a_way_out_without_datagrams(self, rig: Unrouted) -> None:
        streams: Any = FakeDialer("streams")
        streams.carries = frozenset({"tcp"})
        streams.refusal = DialError(Reason.UNSUPPORTED, said="streams carries no UDP")
        rig.router.dialer = streams
        rig.send(rig.asked(rig.client()), b"1")
        rig.workers.run()
        assert rig.counts.of("drops", Reason.UNSUPPORTED.value) == 1 and not rig.table.entries
        assert rig.log.of("limited") == ["udp by streams: streams carries no UDP"]

    def test_too_many_lookups_wait_in_the_pool(self, rig: Unrouted) -> None:
        rig.workers.full = True
        client = rig.client()
        assert rig.ask(client, count=2) is None
        assert rig.counts.of("drops", "lookup queue full") == 2
        assert not rig.table.entries and not client.unrouted

    def test_no_room_for_its_session(self, rig: Unrouted) -> None:
        rig.policy(sessions=1)
        other = rig.client(5001)
        rig.asked(other)
        rig.workers.run()
        entry = rig.asked(rig.client())
        rig.send(entry, b"1")
        rig.workers.run()
        assert rig.counts.of("drops", "session limit") == 1 and entry.gone and len(rig.table) == 1

    def test_a_fault_leaves_nothing_waiting(self, rig: Unrouted) -> None:
        rig.router.failure = ZeroDivisionError()
        entry = rig.asked(rig.client())
        rig.send(entry, b"1")
        with pytest.raises(ZeroDivisionError):
            rig.workers.run()
        assert entry.gone and rig.counts.of("drops", "internal error") == 1 and not rig.waiting()


class TestBounds:
    def test_so_many_names_of_one_client_are_looked_up_at_once(self, rig: Unrouted) -> None:
        client, other = rig.client(), rig.client(5001)
        for number in range(nat.UNROUTED_LIMIT):
            assert rig.ask(client, f"n{number}.test")
        assert rig.ask(client, "more.test", count=4) is None
        assert rig.counts.of("drops", "waiting queue full") == 4
        assert rig.ask(other, "more.test")  # another client has its own room
        rig.workers.run()
        assert not client.unrouted and rig.ask(client, "more.test")

    def test_datagrams_that_wait_are_bounded_for_a_client(self, rig: Unrouted) -> None:
        client = rig.client()
        for number in range(8):
            entry = rig.asked(client, f"n{number}.test")
            for _ in range(entry_module.WAITING_LIMIT):
                rig.send(entry, b"x")
        assert rig.waiting() == client.waiting == entry_module.WAITING_CLIENT
        assert (
            rig.counts.of("drops", "waiting queue full")
            == 8 * entry_module.WAITING_LIMIT - entry_module.WAITING_CLIENT
        )

    def test_names_without_end_leave_nothing_behind(self, rig: Unrouted) -> None:
        """Hazard 39."""
        rig.router.failure = DialError(Reason.NAME, "x")
        client = rig.client()
        for number in range(FLOOD):
            rig.send(rig.asked(client, f"n{number}.test"), b"x")
            if number % 100 == 99:
                rig.workers.run()
        assert rig.counts.of("drops", Reason.NAME.value) == FLOOD
        assert (
            not rig.table.entries
            and not client.unrouted
            and not rig.waiting()
            and not len(rig.table)
        )
        assert list(rig.table.clients) == [client.peer]  # its association's, and goes with it


class TestEnds:
    def test_with_the_association(self, rig: Unrouted) -> None:
        client = rig.client()
        entry = rig.asked(client)
        rig.send(entry, b"1")
        rig.table.end(client.owner)
        assert entry.gone and not rig.table.entries and not rig.waiting()
        rig.workers.run()  # the lookup ends later, and nothing comes of it
        assert not rig.dialer.flows and not len(rig.table)

    def test_with_the_table(self, rig: Unrouted) -> None:
        entry = rig.asked(rig.client())
        rig.send(entry, b"1")
        rig.table.close()
        rig.workers.run()
        assert entry.gone and not rig.dialer.flows and not rig.waiting()

    def test_a_failure_after_the_end_counts_nothing_twice(self, rig: Unrouted) -> None:
        rig.router.failure = DialError(Reason.NAME, "a.test")
        client = rig.client()
        rig.send(rig.asked(client), b"1")
        rig.table.end(client.owner)
        rig.workers.run()
        assert sum(total for (name, _), total in rig.counts.counts.items() if name == "drops") == 1

    def test_an_association_that_ended_a_moment_ago_enters_nothing(self, rig: Unrouted) -> None:
        client = rig.client()
        rig.table.end(client.owner)
        assert rig.ask(client) is None
        assert rig.counts.of("drops", "association ended") == 1 and not rig.table.entries

    def test_a_client_goes_on_when_its_other_sessions_end(self, rig: Unrouted) -> None:
        client = rig.client(owner=None)
        rig.asked(client, "a.test")
        rig.workers.run()
        entry = rig.asked(client, "b.test")
        rig.later(1000.0)
        rig.expire()
        rig.later(1000.0)
        assert rig.expire() == 1 and rig.table.clients == {client.peer: client}
        rig.send(entry, b"b")
        rig.workers.run()
        assert b"b" in rig.sent()


class TestNobodysClients:
    """Those of a fixed target: known by what they have."""

    def test_one_whose_lookup_fails_is_forgotten(self, rig: Unrouted) -> None:
        rig.router.failure = DialError(Reason.NAME, "a.test")
        rig.asked(rig.client(owner=None))
        assert len(rig.table.clients) == 1
        rig.workers.run()
        assert not rig.table.clients

    @pytest.mark.parametrize("reason", [Reason.NAME, Reason.DENIED])
    def test_one_that_leads_nowhere_is_forgotten_at_once(
        self, rig: Unrouted, reason: Reason
    ) -> None:
        rig.router.at_once = DialError(reason, "a.test")
        for port in range(5000, 5100):
            assert rig.ask(rig.client(port, owner=None)) is None
        assert not rig.table.clients

    def test_one_for_which_the_pool_is_full_is_forgotten(self, rig: Unrouted) -> None:
        rig.workers.full = True
        assert rig.ask(rig.client(owner=None)) is None
        assert not rig.table.clients

    def test_one_that_has_something_is_kept(self, rig: Unrouted) -> None:
        client = rig.client(owner=None)
        rig.asked(client)
        rig.workers.run()
        rig.router.at_once = DialError(Reason.NAME, "b.test")
        assert rig.ask(client, "b.test") is None
        assert rig.table.clients == {client.peer: client}
