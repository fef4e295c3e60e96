"""Targets that must be looked up before their upstream is known: queues, order, failures."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route
from netproxy.relay import nat
from netproxy.relay.table import waiting_datagrams
from netproxy.relay.client import Client
from netproxy.relay.entry import Entry, EntryState
from tests.support.flows import NamesNothing
from tests.support.nat import NatRig
from tests.support.upstreams import FakeDialer

FOUND = Address("203.0.113.9", 9000)
FLOOD = 10_000


class LookupRouter(NamesNothing):
    """A Router that must look every name up before it decides."""

    def __init__(self, dialer: Dialer) -> None:
        self.dialer = dialer
        self.failure: BaseException | None = None
        """Raised by route()."""
        self.known_failure: DialError | None = None
        """Raised by route_without_blocking()."""
        self.asked: list[str] = []

    def route_without_blocking(self, flow: Flow) -> Route | None:
        if self.known_failure:
            raise self.known_failure
        return None

    def route(self, flow: Flow) -> Route:
        self.asked.append(flow.target.host)
        if self.failure:
            raise self.failure
        return Route(self.dialer, flow._replace(addresses=(FOUND,)))

    def candidates(self, flow: Flow) -> Iterator[Dialer]:
        yield self.dialer


class LookupRig(NatRig):
    """A rig whose router needs lookups; its workers run when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.router = LookupRouter(self.dialer)
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
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[LookupRig]:
    rig = LookupRig()
    rig.use_clock(monkeypatch)
    yield rig
    rig.close()
    assert not rig.waiting() and not rig.table.entries and not rig.table.clients


class TestLookup:
    def test_datagrams_leave_in_order_after_the_lookup(self, rig: LookupRig) -> None:
        client = rig.client()
        entry = rig.asked(client)
        rig.send(entry, b"1", b"2")
        rig.send(entry, b"3")
        assert not rig.dialer.flows and rig.waiting() == 3
        # The lookup ends, and the dial begins.
        rig.workers.tasks.pop(0)()
        rig.send(entry, b"4")
        rig.workers.run()
        rig.send(entry, b"5")
        assert rig.sent() == [b"1", b"2", b"3", b"4", b"5"]
        assert not rig.waiting() and not any(name == "drops" for name, _ in rig.counts.counts)

    def test_session_and_destination_use_the_addresses_that_were_looked_up(
        self, rig: LookupRig
    ) -> None:
        client = rig.client()
        entry = rig.asked(client)
        rig.workers.run()
        assert entry.flow.addresses == (FOUND,) and rig.dialer.flows[0].addresses == (FOUND,)
        assert rig.router.asked == ["a.test"] and not client.unrouted and len(rig.table) == 1

    def test_targets_of_one_client_share_a_session_after_their_lookups(
        self, rig: LookupRig
    ) -> None:
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

    def test_session_after_a_lookup_is_recorded_when_it_ends(self, rig: LookupRig) -> None:
        client = rig.client()
        rig.send(rig.asked(client), b"x")
        rig.workers.run()
        rig.table.end(client.owner)
        assert [
            (record.flow.target.host, record.datagrams_sent) for record in rig.records.records
        ] == [("a.test", 1)]


class TestFailedLookup:
    @pytest.mark.parametrize("reason", [Reason.NAME, Reason.TIMEOUT, Reason.DENIED, Reason.LOOP])
    def test_failed_lookup_counts_what_waited_by_its_reason(
        self, rig: LookupRig, reason: Reason
    ) -> None:
        rig.router.failure = DialError(reason, "a.test")
        client = rig.client()
        entry = rig.asked(client)
        rig.send(entry, b"1", b"2")
        rig.workers.run()
        assert rig.counts.of("drops", reason.value) == 2
        assert (
            entry.state is EntryState.GONE
            and not rig.table.entries
            and not client.unrouted
            and not client.waiting
        )

    def test_next_datagram_after_a_failed_lookup_asks_again(self, rig: LookupRig) -> None:
        rig.router.failure = DialError(Reason.NAME, "a.test")
        client = rig.client()
        rig.send(rig.asked(client), b"lost")
        rig.workers.run()
        rig.router.failure = None
        rig.send(rig.asked(client), b"found")
        rig.workers.run()
        assert rig.sent() == [b"found"] and rig.router.asked == ["a.test"] * 2

    def test_name_that_is_known_not_to_exist_makes_no_entry(self, rig: LookupRig) -> None:
        rig.router.known_failure = DialError(Reason.NAME, "a.test")
        assert rig.ask(rig.client(), count=3) is None
        assert rig.counts.of("drops", Reason.NAME.value) == 3 and not rig.table.entries

    def test_upstream_without_udp_drops_what_waited_and_is_recorded(self, rig: LookupRig) -> None:
        streams: Any = FakeDialer("streams")
        streams.carries = frozenset({"tcp"})
        streams.refusal = DialError(Reason.UNSUPPORTED, said="streams carries no UDP")
        rig.router.dialer = streams
        rig.send(rig.asked(rig.client()), b"1")
        rig.workers.run()
        assert rig.counts.of("drops", Reason.UNSUPPORTED.value) == 1 and not rig.table.entries
        (refusal,) = rig.counts.refusals
        assert refusal.decided == "udp by streams: streams carries no UDP"

    def test_full_lookup_queue_refuses_the_entry(self, rig: LookupRig) -> None:
        rig.workers.full = True
        client = rig.client()
        assert rig.ask(client, count=2) is None
        assert rig.counts.of("drops", "lookup queue full") == 2
        assert not rig.table.entries and not client.unrouted

    def test_session_limit_after_the_lookup_drops_what_waited(self, rig: LookupRig) -> None:
        rig.policy(sessions=1)
        other = rig.client(5001)
        rig.asked(other)
        rig.workers.run()
        entry = rig.asked(rig.client())
        rig.send(entry, b"1")
        rig.workers.run()
        assert (
            rig.counts.of("drops", "session limit") == 1
            and entry.state is EntryState.GONE
            and len(rig.table) == 1
        )

    def test_exception_in_a_lookup_leaves_nothing_waiting(self, rig: LookupRig) -> None:
        rig.router.failure = ZeroDivisionError()
        entry = rig.asked(rig.client())
        rig.send(entry, b"1")
        with pytest.raises(ZeroDivisionError):
            rig.workers.run()
        assert (
            entry.state is EntryState.GONE
            and rig.counts.of("drops", "internal error") == 1
            and not rig.waiting()
        )


class TestBounds:
    def test_names_looked_up_at_once_are_bounded_for_a_client(self, rig: LookupRig) -> None:
        client, other = rig.client(), rig.client(5001)
        for number in range(nat.UNROUTED_LIMIT):
            assert rig.ask(client, f"n{number}.test")
        assert rig.ask(client, "more.test", count=4) is None
        assert rig.counts.of("drops", "waiting queue full") == 4
        # Another client has its own room.
        assert rig.ask(other, "more.test")
        rig.workers.run()
        assert not client.unrouted and rig.ask(client, "more.test")

    def test_waiting_datagrams_are_bounded_for_a_client(self, rig: LookupRig) -> None:
        client = rig.client()
        for number in range(8):
            entry = rig.asked(client, f"n{number}.test")
            for _ in range(waiting_datagrams.ENTRY_WAITING_LIMIT):
                rig.send(entry, b"x")
        assert rig.waiting() == client.waiting == waiting_datagrams.CLIENT_WAITING_LIMIT
        assert (
            rig.counts.of("drops", "waiting queue full")
            == 8 * waiting_datagrams.ENTRY_WAITING_LIMIT - waiting_datagrams.CLIENT_WAITING_LIMIT
        )

    def test_flood_of_names_leaves_nothing_behind(self, rig: LookupRig) -> None:
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
        # The client belongs to an association, and goes with it.
        assert list(rig.table.clients) == [client.peer]


class TestEnds:
    def test_end_of_the_association_removes_entries_that_are_looked_up(
        self, rig: LookupRig
    ) -> None:
        client = rig.client()
        entry = rig.asked(client)
        rig.send(entry, b"1")
        rig.table.end(client.owner)
        assert entry.state is EntryState.GONE and not rig.table.entries and not rig.waiting()
        # The lookup ends later and has no effect.
        rig.workers.run()
        assert not rig.dialer.flows and not len(rig.table)

    def test_close_of_the_table_removes_entries_that_are_looked_up(self, rig: LookupRig) -> None:
        entry = rig.asked(rig.client())
        rig.send(entry, b"1")
        rig.table.close()
        rig.workers.run()
        assert entry.state is EntryState.GONE and not rig.dialer.flows and not rig.waiting()

    def test_failure_after_the_end_counts_no_datagram_twice(self, rig: LookupRig) -> None:
        rig.router.failure = DialError(Reason.NAME, "a.test")
        client = rig.client()
        rig.send(rig.asked(client), b"1")
        rig.table.end(client.owner)
        rig.workers.run()
        assert sum(total for (name, _), total in rig.counts.counts.items() if name == "drops") == 1

    def test_client_whose_association_has_ended_gets_no_lookup(self, rig: LookupRig) -> None:
        client = rig.client()
        rig.table.end(client.owner)
        assert rig.ask(client) is None
        assert rig.counts.of("drops", "association ended") == 1 and not rig.table.entries

    def test_client_with_a_lookup_stays_when_its_other_sessions_end(self, rig: LookupRig) -> None:
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


class TestClientWithoutOwner:
    """A client without owner, as a forward has them, is known as long as it has an entry."""

    def test_client_without_owner_is_removed_when_its_lookup_fails(self, rig: LookupRig) -> None:
        rig.router.failure = DialError(Reason.NAME, "a.test")
        rig.asked(rig.client(owner=None))
        assert len(rig.table.clients) == 1
        rig.workers.run()
        assert not rig.table.clients

    @pytest.mark.parametrize("reason", [Reason.NAME, Reason.DENIED])
    def test_client_without_owner_whose_target_is_refused_is_removed_at_once(
        self, rig: LookupRig, reason: Reason
    ) -> None:
        rig.router.known_failure = DialError(reason, "a.test")
        for port in range(5000, 5100):
            assert rig.ask(rig.client(port, owner=None)) is None
        assert not rig.table.clients

    def test_client_without_owner_is_removed_if_the_lookup_queue_is_full(
        self, rig: LookupRig
    ) -> None:
        rig.workers.full = True
        assert rig.ask(rig.client(owner=None)) is None
        assert not rig.table.clients

    def test_client_without_owner_that_has_a_session_stays(self, rig: LookupRig) -> None:
        client = rig.client(owner=None)
        rig.asked(client)
        rig.workers.run()
        rig.router.known_failure = DialError(Reason.NAME, "b.test")
        assert rig.ask(client, "b.test") is None
        assert rig.table.clients == {client.peer: client}
