"""What ends in the NAT table, and when: idle times, limits, associations; always first out of the table, then closed."""

from __future__ import annotations

import pytest

from netproxy.relay import nat
from netproxy.relay import entry as entry_module
from netproxy.relay.quota import IDLE_TO_YIELD
from tests.support.nat import IDLE, TARGET, NatRig, conn_of
from tests.support.upstreams import FakeDialer


def tick(rig: NatRig, seconds: float) -> int:
    """So many seconds with a sweep in each; how many sessions died."""
    closed = 0
    for _ in range(int(seconds)):
        rig.later(1)
        closed += rig.expire()
    return closed


def answer(rig: NatRig, session: object) -> None:
    """One datagram comes back from the target."""
    before = len(rig.local.sent)
    conn_of(session).offer((b"answer", ("198.51.100.1", 9000)))  # type: ignore[arg-type]
    rig.local.wait_for(before + 1)


class TestIdle:
    def test_one_that_nobody_answered_ends_after_a_minute(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client())
        rig.send(entry, b"x")
        assert tick(rig, nat.ONE_WAY_SECONDS) == 0
        assert tick(rig, 2) == 1
        assert not len(rig.table) and not rig.table.entries

    def test_one_that_was_answered_lives_for_the_configured_time(self, rig: NatRig) -> None:
        """RFC 4787 REQ-5."""
        entry = rig.opened(rig.client())
        rig.send(entry, b"x")
        answer(rig, entry.session)
        assert tick(rig, IDLE) == 0
        assert tick(rig, 2) == 1

    def test_what_goes_out_keeps_it_alive(self, rig: NatRig) -> None:
        """RFC 4787 REQ-6, HAZARDS 35."""
        entry = rig.opened(rig.client())
        for _ in range(10):
            rig.send(entry, b"x")
            assert tick(rig, nat.ONE_WAY_SECONDS - 1) == 0

    def test_what_comes_in_does_not(self, rig: NatRig) -> None:
        """HAZARDS 35: or a stranger could hold it open."""
        entry = rig.opened(rig.client())
        rig.send(entry, b"x")
        for _ in range(4):
            answer(rig, entry.session)
            tick(rig, IDLE / 4)
        answer(rig, entry.session)
        assert tick(rig, 2) == 1

    def test_a_shorter_time_holds_for_one_way_as_well(self, rig: NatRig) -> None:
        rig.policy(idle=2.0)
        rig.opened(rig.client())
        assert tick(rig, 2) == 0
        assert tick(rig, 1) == 1

    def test_the_next_datagram_makes_a_new_one(self, rig: NatRig) -> None:
        """HAZARDS 34: no black hole."""
        client = rig.client()
        first = rig.opened(client)
        tick(rig, nat.ONE_WAY_SECONDS + 2)
        assert (client.peer, TARGET.encode()) not in rig.table.entries
        second = rig.opened(client)
        assert second.session is not first.session
        rig.send(second, b"x")
        assert conn_of(second.session).sent

    def test_a_clock_that_stands_still_ends_nothing(self, rig: NatRig) -> None:
        rig.opened(rig.client())
        assert [rig.expire() for _ in range(100)] == [0] * 100


class TestEviction:
    def test_is_out_of_the_table_before_it_is_closed(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client())
        tick(rig, nat.ONE_WAY_SECONDS)
        rig.later(2)
        (close,) = rig.table.expire(rig.clock.now)
        assert not rig.table.entries and not len(rig.table)
        assert not conn_of(entry.session).shut.is_set() and not rig.records.records
        close()
        assert conn_of(entry.session).closed.wait(5)

    def test_is_counted_and_recorded_once(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client())
        rig.send(entry, b"four", b"fo")
        answer(rig, entry.session)
        tick(rig, IDLE + 2)
        (record,) = rig.records.records
        assert (record.flow, record.upstream, record.ended) == (rig.dialer.flows[0], "fake", "idle")
        assert (record.sent, record.datagrams_sent, record.received, record.datagrams_received) == (
            6,
            2,
            6,
            1,
        )
        assert rig.counts.of("sessions_evicted", "idle") == 1

    def test_while_it_is_dialled_closes_what_is_dialled(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"x")
        rig.table.end("association")
        rig.workers.run()
        assert rig.dialer.conns[0].closed.wait(5)
        assert not rig.dialer.conns[0].sent
        assert rig.waiting() == 0

    def test_while_a_name_is_looked_up(self, rig: NatRig) -> None:
        client = rig.client()
        rig.opened(client)
        rig.workers.eager = False
        entry = rig.opened(client, "example.com:9000")
        rig.send(entry, b"x")
        rig.table.end("association")
        rig.workers.run()
        assert rig.waiting() == 0
        assert conn_of(entry.session).closed.wait(5)

    def test_of_a_session_whose_dial_had_failed(self, rig: NatRig) -> None:
        rig.workers.full = True
        rig.opened(rig.client())
        assert tick(rig, nat.ONE_WAY_SECONDS + 2) == 1
        assert not len(rig.table)

    def test_a_datagram_for_an_entry_that_has_gone_does_not_bring_it_back(
        self, rig: NatRig
    ) -> None:
        rig.workers.full = True
        entry = rig.opened(rig.client())
        rig.table.end("association")
        rig.workers.full = False
        rig.later(entry_module.RETRY_SECONDS + 1)
        rig.send(entry, b"x")
        assert not rig.dialer.flows and not rig.table.entries and rig.waiting() == 0


class TestEnd:
    def test_ends_all_of_an_owner_and_nobody_else(self, rig: NatRig) -> None:
        """HAZARDS 25."""
        other_way = FakeDialer("other")
        ours = [
            rig.opened(client, target, dialer)
            for client in (rig.client(1, owner="a"), rig.client(2, owner="a"))
            for target, dialer in ((TARGET, rig.dialer), ("198.51.100.2:9000", other_way))
        ]
        other = rig.opened(rig.client(3, owner="b"))
        rig.table.end("a")
        assert all(conn_of(entry.session).closed.wait(5) for entry in ours)
        assert not conn_of(other.session).shut.is_set()
        assert [client.address.port for client in rig.table.clients.values()] == [3]
        assert list(rig.table.entries.values()) == [other]
        assert {record.ended for record in rig.records.records} == {"association ended"}

    def test_of_one_without_sessions_forgets_its_client(self, rig: NatRig) -> None:
        rig.client(owner="a")
        rig.table.end("a")
        rig.table.end("a")
        assert not rig.table.clients

    def test_close_ends_everything(self, rig: NatRig) -> None:
        entries = [rig.opened(rig.client(port)) for port in (1, 2)]
        rig.table.close()
        assert all(conn_of(entry.session).closed.wait(5) for entry in entries)
        assert not rig.table.entries and not rig.table.clients and not rig.table._quota._held
        assert {record.ended for record in rig.records.records} == {"shutdown"}


class TestLimits:
    def test_of_all_sessions(self, rig: NatRig) -> None:
        """HAZARDS 33: new ones are refused, old ones go on; it recovers."""
        rig.policy(2, 2)
        first, _ = rig.opened(rig.client(1)), rig.opened(rig.client(2, "192.0.2.2"))
        third = rig.client(3, "192.0.2.3")
        assert rig.open(third) is None
        assert rig.counts.of("drops", "session limit") == 1
        assert rig.log.of("limited") == ["192.0.2.3: no room for another UDP session"]
        rig.send(first, b"x")
        assert conn_of(first.session).sent
        tick(rig, nat.ONE_WAY_SECONDS + 2)
        assert rig.open(third) is not None

    def test_of_one_address(self, rig: NatRig) -> None:
        rig.policy(10, 2)
        for port in (1, 2):
            rig.opened(rig.client(port))
        assert rig.open(rig.client(3)) is None
        assert rig.open(rig.client(3, "192.0.2.2")) is not None
        assert (
            rig.open(rig.client(2), "198.51.100.9:9000") is None
        )  # known by another local address: a new client

    def test_a_known_session_takes_more_targets_at_the_limit(self, rig: NatRig) -> None:
        rig.policy(1, 1)
        client = rig.client()
        assert rig.opened(client).session is rig.opened(client, "198.51.100.2:9000").session

    def test_the_one_that_was_idle_longest_yields(self, rig: NatRig) -> None:
        rig.policy(2, 2)
        first = rig.opened(rig.client(1))
        tick(rig, 2)
        second = rig.opened(rig.client(2))
        tick(rig, IDLE_TO_YIELD + 2)
        third = rig.open(rig.client(3))
        assert third is not None and len(rig.table) == 2
        assert conn_of(first.session).closed.wait(5)
        assert not conn_of(second.session).shut.is_set()
        assert [record.ended for record in rig.records.records] == ["yielded"]
        assert rig.counts.of("sessions_evicted", "yielded") == 1

    def test_one_that_has_just_sent_does_not_yield(self, rig: NatRig) -> None:
        rig.policy(1, 1)
        entry = rig.opened(rig.client(1))
        tick(rig, IDLE_TO_YIELD + 2)
        rig.send(entry, b"x")
        assert rig.open(rig.client(2)) is None
        tick(rig, IDLE_TO_YIELD - 2)
        assert rig.open(rig.client(2)) is None

    def test_at_the_limit_of_an_address_only_its_own_yield(self, rig: NatRig) -> None:
        rig.policy(10, 1)
        other = rig.opened(rig.client(9, "192.0.2.9"))
        tick(rig, 5)
        own = rig.opened(rig.client(1))
        tick(rig, IDLE_TO_YIELD + 2)
        assert rig.open(rig.client(2)) is not None
        assert conn_of(own.session).closed.wait(5)
        assert not conn_of(other.session).shut.is_set()

    def test_at_both_limits_nobody_yields_for_one_that_gets_no_room_by_it(
        self, rig: NatRig
    ) -> None:
        """An address at its own limit must not push others out: its own oldest yields, or none."""
        rig.policy(2, 1)
        other = rig.opened(rig.client(9, "192.0.2.9"))
        tick(rig, IDLE_TO_YIELD + 5)
        busy = rig.opened(rig.client(1))
        rig.send(busy, b"x")
        assert rig.open(rig.client(2)) is None
        assert not conn_of(other.session).shut.is_set()
        assert len(rig.table) == 2

    def test_a_client_without_owner_keeps_its_place_when_one_of_its_own_yields(
        self, rig: NatRig
    ) -> None:
        """A forward's client: it must be found again, or its next target gets another upstream port."""
        rig.policy(1, 1)
        client = rig.client(owner=None)
        rig.opened(client)
        tick(rig, IDLE_TO_YIELD + 2)
        assert rig.open(client, "198.51.100.2:9000", FakeDialer("other")) is not None
        assert rig.table.clients.get(client.peer) is client

    def test_a_client_without_owner_goes_with_its_last_session(self, rig: NatRig) -> None:
        rig.opened(rig.client(owner=None))
        tick(rig, nat.ONE_WAY_SECONDS + 2)
        assert not rig.table.clients

    def test_the_counts_by_address_are_right_in_the_end(self, rig: NatRig) -> None:
        for port in range(20):
            rig.opened(rig.client(port, f"192.0.2.{port % 3}", owner=port % 2))
        rig.table.end(0)
        held = rig.table._quota._held
        assert (
            sum(count for (kind, _), count in held.items() if kind == "client")
            == len(rig.table)
            == 10
        )
        tick(rig, nat.ONE_WAY_SECONDS + 2)
        assert not rig.table._quota._held and not rig.table._sessions


class TestEntries:
    def test_are_bounded_in_a_session_and_the_oldest_yields(
        self, rig: NatRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """HAZARDS 31."""
        monkeypatch.setattr(nat, "ENTRIES_LIMIT", 3)
        client = rig.client()
        for port in range(1, 6):
            rig.opened(client, f"198.51.100.1:{port}")
        assert [key[1] for key in rig.table.entries] == [
            f"198.51.100.1:{port}".encode() for port in (3, 4, 5)
        ]
        assert len(rig.table) == len(rig.dialer.conns) == 1
        rig.send(rig.opened(client, "198.51.100.1:1"), b"x")  # and may come back
        assert rig.dialer.conns[0].sent == [(b"x", "to 198.51.100.1:1")]

    def test_that_yield_while_they_wait_give_back_their_room(
        self, rig: NatRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nat, "ENTRIES_LIMIT", 1)
        rig.workers.eager = False
        client = rig.client()
        for port in range(1, 6):
            rig.send(rig.opened(client, f"198.51.100.1:{port}"), b"x")
        assert rig.waiting() == 1
        rig.workers.run()
        assert rig.waiting() == 0

    def test_ten_thousand_targets_are_one_upstream(self, rig: NatRig) -> None:
        """HAZARDS 31."""
        client = rig.client()
        for number in range(10000):
            rig.opened(client, f"198.51.{number >> 8}.{number & 255}:9000")
        assert len(rig.dialer.conns) == 1
        assert len(rig.table.entries) == nat.ENTRIES_LIMIT
