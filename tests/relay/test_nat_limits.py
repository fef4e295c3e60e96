"""What ends sessions of the NAT table, and when: idle times, limits, their associations.

A session is always removed from the table first and closed second.
"""

from __future__ import annotations

from typing import Any, Hashable, Mapping

import pytest

from netproxy.interfaces import fairness
from netproxy.interfaces.services import Refusal
from netproxy.relay import client as client_module
from netproxy.relay import nat
from netproxy.relay.client import Client
from netproxy.relay.entry import ONE_WAY_SECONDS
from netproxy.relay.quota import EVICTABLE_SECONDS
from tests.support.nat import IDLE, TARGET, NatRig, conn_of
from tests.support.sockets import SECONDS
from tests.support.upstreams import FakeDialer


class TestIdle:
    def test_session_without_reply_ends_after_a_minute(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client())
        rig.send(entry, b"x")
        assert rig.tick(ONE_WAY_SECONDS) == 0
        assert rig.tick(2) == 1
        assert not len(rig.table) and not rig.table.entries

    def test_session_with_a_reply_lives_for_the_configured_time(self, rig: NatRig) -> None:
        """RFC 4787 REQ-5."""
        entry = rig.opened(rig.client())
        rig.send(entry, b"x")
        rig.answer(entry.session)
        assert rig.tick(IDLE) == 0
        assert rig.tick(2) == 1

    def test_datagrams_of_the_client_keep_a_session_alive(self, rig: NatRig) -> None:
        """RFC 4787 REQ-6, hazard 35."""
        entry = rig.opened(rig.client())
        for _ in range(10):
            rig.send(entry, b"x")
            assert rig.tick(ONE_WAY_SECONDS - 1) == 0

    def test_replies_do_not_keep_a_session_alive(self, rig: NatRig) -> None:
        """Hazard 35.  Otherwise anyone could keep the session open."""
        entry = rig.opened(rig.client())
        rig.send(entry, b"x")
        for _ in range(4):
            rig.answer(entry.session)
            rig.tick(IDLE / 4)
        rig.answer(entry.session)
        assert rig.tick(2) == 1

    def test_shorter_configured_time_holds_for_sessions_without_reply(self, rig: NatRig) -> None:
        rig.policy(idle=2.0)
        rig.opened(rig.client())
        assert rig.tick(2) == 0
        assert rig.tick(1) == 1

    def test_next_datagram_makes_a_new_session(self, rig: NatRig) -> None:
        """Hazard 34.  There is no black hole."""
        client = rig.client()
        first = rig.opened(client)
        rig.tick(ONE_WAY_SECONDS + 2)
        assert (client.peer, TARGET.encode()) not in rig.table.entries
        second = rig.opened(client)
        assert second.session is not first.session
        rig.send(second, b"x")
        assert conn_of(second.session).sent

    def test_clock_that_stands_still_ends_no_session(self, rig: NatRig) -> None:
        rig.opened(rig.client())
        assert [rig.expire() for _ in range(100)] == [0] * 100


class TestEviction:
    def test_session_is_removed_before_it_is_closed(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client())
        rig.tick(ONE_WAY_SECONDS)
        rig.later(2)
        (close,) = rig.table.expire(rig.clock.now)
        assert not rig.table.entries and not len(rig.table)
        assert not conn_of(entry.session).shut.is_set() and not rig.records.records
        close()
        assert conn_of(entry.session).closed.wait(SECONDS)

    def test_evicted_session_is_counted_and_recorded_once(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client())
        rig.send(entry, b"four", b"fo")
        rig.answer(entry.session)
        rig.tick(IDLE + 2)
        (record,) = rig.records.records
        assert (record.flow, record.upstream, record.ended) == (rig.dialer.flows[0], "fake", "idle")
        assert (record.sent, record.datagrams_sent, record.received, record.datagrams_received) == (
            6,
            2,
            6,
            1,
        )
        assert rig.counts.of("sessions_evicted", "idle") == 1

    def test_session_removed_during_its_dial_is_closed_after_it(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"x")
        rig.table.end("association")
        rig.workers.run()
        assert rig.dialer.conns[0].closed.wait(SECONDS)
        assert not rig.dialer.conns[0].sent
        assert rig.waiting() == 0

    def test_session_removed_during_a_lookup_sends_nothing(self, rig: NatRig) -> None:
        client = rig.client()
        rig.opened(client)
        rig.workers.eager = False
        entry = rig.opened(client, "example.com:9000")
        rig.send(entry, b"x")
        rig.table.end("association")
        rig.workers.run()
        assert rig.waiting() == 0
        assert conn_of(entry.session).closed.wait(SECONDS)

    def test_session_whose_dial_has_failed_is_evicted_when_idle(self, rig: NatRig) -> None:
        rig.workers.full = True
        rig.opened(rig.client())
        assert rig.tick(ONE_WAY_SECONDS + 2) == 1
        assert not len(rig.table)

    def test_datagram_for_a_removed_entry_is_dropped_and_counted(self, rig: NatRig) -> None:
        rig.workers.full = True
        entry = rig.opened(rig.client())
        rig.table.end("association")
        rig.workers.full = False
        rig.later(nat.RETRY_SECONDS + 1)
        rig.send(entry, b"x")
        assert not rig.dialer.flows and not rig.table.entries and rig.waiting() == 0
        assert rig.counts.of("drops", "evicted") == 1


class TestEnd:
    def test_end_closes_the_sessions_of_one_owner_only(self, rig: NatRig) -> None:
        """Hazard 25."""
        other_dialer = FakeDialer("other")
        ours = [
            rig.opened(client, target, dialer)
            for client in (rig.client(1, owner="a"), rig.client(2, owner="a"))
            for target, dialer in ((TARGET, rig.dialer), ("198.51.100.2:9000", other_dialer))
        ]
        other = rig.opened(rig.client(3, owner="b"))
        rig.table.end("a")
        assert all(conn_of(entry.session).closed.wait(SECONDS) for entry in ours)
        assert not conn_of(other.session).shut.is_set()
        assert [client.address.port for client in rig.table.clients.values()] == [3]
        assert list(rig.table.entries.values()) == [other]
        assert {record.ended for record in rig.records.records} == {"association ended"}

    def test_end_of_a_client_removes_all_its_keys_without_a_look_at_the_others(
        self, rig: NatRig
    ) -> None:
        """Forged endpoints displace up to 64 of an association in a second."""

        class Clients(dict[Hashable, Client]):
            def __iter__(self) -> Any:
                raise AssertionError("a look at all clients")

            items = values = keys = __iter__

        gone, other = rig.client(1), rig.client(2)
        rig.opened(gone)
        assert rig.table.move_client(gone.owner, gone.address, "second key") is gone
        rig.table.clients = clients = Clients(rig.table.clients)
        rig.table.end_client(gone, "displaced")
        assert len(clients) == 1 and clients[other.peer] is other
        assert rig.counts.of("sessions_evicted", "displaced") == 1
        rig.table.clients = {other.peer: other}

    def test_end_removes_a_client_without_sessions(self, rig: NatRig) -> None:
        rig.client(owner="a")
        rig.table.end("a")
        rig.table.end("a")
        assert not rig.table.clients

    def test_close_ends_every_session(self, rig: NatRig) -> None:
        entries = [rig.opened(rig.client(port)) for port in (1, 2)]
        rig.table.close()
        assert all(conn_of(entry.session).closed.wait(SECONDS) for entry in entries)
        assert not rig.table.entries and not rig.table.clients and not rig.table._quota._held
        assert {record.ended for record in rig.records.records} == {"shutdown"}


class TestLimits:
    def test_dial_is_a_task_of_its_client(
        self, rig: NatRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The pool of dials can be fair then."""
        clients: list[str] = []
        monkeypatch.setattr(rig.workers, "submit_fairly", lambda task: clients.append(task.client))
        rig = NatRig(rig.workers)
        rig.opened(rig.client(1, "192.0.2.7"))
        assert clients == ["192.0.2.7"]

    def test_limit_of_a_table_refuses_new_sessions(self, rig: NatRig) -> None:
        """Hazard 33.  New sessions are refused, old ones go on, and the table recovers."""
        rig.policy(2, 2)
        first, _ = rig.opened(rig.client(1)), rig.opened(rig.client(2, "192.0.2.2"))
        third = rig.client(3, "192.0.2.3")
        assert rig.open(third) is None
        assert rig.counts.of("drops", "session limit") == 1
        (refusal,) = rig.counts.refusals
        assert refusal.client == "192.0.2.3" and refusal.decided == "udp.max_sessions"
        rig.send(first, b"x")
        assert conn_of(first.session).sent
        rig.tick(ONE_WAY_SECONDS + 2)
        assert rig.open(third) is not None

    def test_limit_of_a_client_address_refuses_new_sessions(self, rig: NatRig) -> None:
        rig.policy(10, 2)
        for port in (1, 2):
            rig.opened(rig.client(port))
        assert rig.open(rig.client(3)) is None
        assert rig.open(rig.client(3, "192.0.2.2")) is not None
        # A second Client object with the same endpoint stands for another local address.
        assert rig.open(rig.client(2), "198.51.100.9:9000") is None

    @pytest.mark.parametrize(
        ("per_client", "key"), [(1, "max_sessions_per_client"), (2, "max_sessions")]
    )
    def test_refusal_names_the_limit_that_is_one(
        self, rig: NatRig, per_client: int, key: str
    ) -> None:
        """On loopback one client may have all sessions, and nobody has set its limit."""
        rig.policy(sessions=2, per_client=per_client)
        while rig.open(rig.client(5000 + len(rig.table))) is not None:
            pass
        assert len(rig.table) == per_client
        assert rig.counts.refusals[-1].decided == f"udp.{key}"

    def test_session_takes_more_targets_at_the_limit(self, rig: NatRig) -> None:
        rig.policy(1, 1)
        client = rig.client()
        assert rig.opened(client).session is rig.opened(client, "198.51.100.2:9000").session

    def test_session_idle_longest_is_evicted_at_the_limit(self, rig: NatRig) -> None:
        rig.policy(2, 2)
        first = rig.opened(rig.client(1))
        rig.tick(2)
        second = rig.opened(rig.client(2))
        rig.tick(EVICTABLE_SECONDS + 2)
        third = rig.open(rig.client(3))
        assert third is not None and len(rig.table) == 2
        assert conn_of(first.session).closed.wait(SECONDS)
        assert not conn_of(second.session).shut.is_set()
        assert [record.ended for record in rig.records.records] == ["evicted"]
        assert rig.counts.of("sessions_evicted", "evicted") == 1

    def test_session_that_has_just_sent_is_not_evicted(self, rig: NatRig) -> None:
        rig.policy(1, 1)
        entry = rig.opened(rig.client(1))
        rig.tick(EVICTABLE_SECONDS + 2)
        rig.send(entry, b"x")
        assert rig.open(rig.client(2)) is None
        rig.tick(EVICTABLE_SECONDS - 2)
        assert rig.open(rig.client(2)) is None

    def test_limit_of_a_client_address_evicts_its_own_sessions_only(self, rig: NatRig) -> None:
        rig.policy(10, 1)
        other = rig.opened(rig.client(9, "192.0.2.9"))
        rig.tick(5)
        own = rig.opened(rig.client(1))
        rig.tick(EVICTABLE_SECONDS + 2)
        assert rig.open(rig.client(2)) is not None
        assert conn_of(own.session).closed.wait(SECONDS)
        assert not conn_of(other.session).shut.is_set()

    def test_no_session_is_evicted_if_that_makes_no_room(self, rig: NatRig) -> None:
        """A client at its own limit pushes no other out: it evicts its own oldest, or none."""
        rig.policy(2, 1)
        other = rig.opened(rig.client(9, "192.0.2.9"))
        rig.tick(EVICTABLE_SECONDS + 5)
        busy = rig.opened(rig.client(1))
        rig.send(busy, b"x")
        assert rig.open(rig.client(2)) is None
        assert not conn_of(other.session).shut.is_set()
        assert len(rig.table) == 2

    def test_client_with_most_sessions_yields_one_although_it_is_busy(self, rig: NatRig) -> None:
        """Hazard 33: sessions that an attacker keeps busy leave room for a good client."""
        rig.policy(4, 4)
        few = rig.opened(rig.client(9, "192.0.2.9"))
        busy = [rig.opened(rig.client(port)) for port in (1, 2, 3)]
        rig.answer(busy[0].session)
        rig.tick(1)
        for entry in (*busy, few):
            rig.send(entry, b"x")
        assert rig.open(rig.client(8, "192.0.2.8")) is not None
        # It has never got a reply.
        assert conn_of(busy[1].session).closed.wait(SECONDS)
        # Now two, one and one: nobody has more than another newcomer of 192.0.2.8 would have.
        assert rig.open(rig.client(7, "192.0.2.8")) is None
        assert rig.open(rig.client(4)) is None
        assert len(rig.table) == 4 and not conn_of(few.session).shut.is_set()

    def test_client_with_most_sessions_takes_none_of_the_others(self, rig: NatRig) -> None:
        rig.policy(3, 3)
        idle = rig.opened(rig.client(9, "192.0.2.9"))
        rig.tick(EVICTABLE_SECONDS + 2)
        busy = [rig.opened(rig.client(port)) for port in (1, 2)]
        assert rig.open(rig.client(3)) is None
        assert not conn_of(idle.session).shut.is_set()
        rig.tick(EVICTABLE_SECONDS + 2)
        assert rig.open(rig.client(4)) is not None
        assert conn_of(busy[0].session).closed.wait(SECONDS)

    def test_sender_without_association_takes_no_busy_session(self, rig: NatRig) -> None:
        """The address of a forward's client may be forged."""
        rig.policy(3, 3)
        for port in (1, 2, 3):
            rig.opened(rig.client(port))
        assert rig.open(rig.client(8, "192.0.2.8", owner=None)) is None
        rig.tick(EVICTABLE_SECONDS + 2)
        assert rig.open(rig.client(8, "192.0.2.8", owner=None)) is not None

    def test_ipv6_network_is_one_client(self, rig: NatRig) -> None:
        rig.policy(3, 3)
        few = rig.opened(rig.client(9, "2001:db8:9::1"))
        many = [rig.opened(rig.client(1, f"2001:db8:1::{number}")) for number in (1, 2)]
        assert rig.open(rig.client(8, "2001:db8:8::1")) is not None
        assert conn_of(many[0].session).closed.wait(SECONDS)
        assert not conn_of(few.session).shut.is_set()

    def test_share_of_a_client_is_looked_up_once(
        self, rig: NatRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked_up: list[str] = []

        def client_key(host: str) -> str:
            looked_up.append(host)
            return fairness.client_key(host)

        monkeypatch.setattr(client_module, "client_key", client_key)
        rig.policy(sessions=4)
        hosts = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1", "192.0.2.2"]
        for port, host in enumerate(hosts):
            rig.workers.eager = False
            entry = rig.opened(rig.client(port, host))
            for _ in range(3):
                rig.send(entry, b"x")
            rig.workers.eager = True
            rig.workers.run()
        assert not rig.counts.of("drops") and len(rig.table) == 4
        rig.table.close()
        assert looked_up == hosts

    def test_client_without_owner_stays_when_its_own_session_is_evicted(self, rig: NatRig) -> None:
        """If a forward's client were lost, its next target would get another upstream port."""
        rig.policy(1, 1)
        client = rig.client(owner=None)
        rig.opened(client)
        rig.tick(EVICTABLE_SECONDS + 2)
        assert rig.open(client, "198.51.100.2:9000", FakeDialer("other")) is not None
        assert rig.table.clients.get(client.peer) is client

    def test_client_without_owner_goes_with_its_last_session(self, rig: NatRig) -> None:
        rig.opened(rig.client(owner=None))
        rig.tick(ONE_WAY_SECONDS + 2)
        assert not rig.table.clients

    def test_quota_counts_are_right_after_all_sessions_have_ended(self, rig: NatRig) -> None:
        for port in range(20):
            rig.opened(rig.client(port, f"192.0.2.{port % 3}", owner=port % 2))
        rig.table.end(0)
        held = rig.table._quota._held
        assert sum(held.values()) == len(rig.table) == 10
        rig.tick(ONE_WAY_SECONDS + 2)
        assert not rig.table._quota._held and not rig.table._mappings


class TestEntries:
    def test_entries_of_a_session_are_bounded_and_the_oldest_is_evicted(
        self, rig: NatRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 31."""
        monkeypatch.setattr(nat, "ENTRIES_LIMIT", 3)
        client = rig.client()
        for port in range(1, 6):
            rig.opened(client, f"198.51.100.1:{port}")
        assert [key[1] for key in rig.table.entries] == [
            f"198.51.100.1:{port}".encode() for port in (3, 4, 5)
        ]
        assert len(rig.table) == len(rig.dialer.conns) == 1
        # An evicted entry may come back.
        rig.send(rig.opened(client, "198.51.100.1:1"), b"x")
        assert rig.dialer.conns[0].sent == [(b"x", "to 198.51.100.1:1")]

    def test_entry_evicted_while_its_datagrams_wait_releases_their_room(
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

    def test_ten_thousand_targets_share_one_upstream(self, rig: NatRig) -> None:
        """Hazard 31."""
        client = rig.client()
        for number in range(10000):
            rig.opened(client, f"198.51.{number >> 8}.{number & 255}:9000")
        assert len(rig.dialer.conns) == 1
        assert len(rig.table.entries) == nat.ENTRIES_LIMIT


def test_records_are_written_without_the_lock_of_the_table(
    rig: NatRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def refuse(refusal: Refusal, amount: int = 1) -> None:
        assert not rig.table._lock._lock.locked()
        written.append(refusal.reason)

    def record(level: int, fields: Mapping[str, object]) -> None:
        assert not rig.table._lock._lock.locked()
        written.append(str(fields["step"]))

    monkeypatch.setattr(rig.counts, "refuse", refuse)
    monkeypatch.setattr(rig.log, "record", record)
    rig.log.tracing, rig.workers.eager = True, False
    client = rig.client()
    entry = rig.opened(client)
    rig.send(entry, b"x")
    rig.table.end_client(client, "displaced")
    assert written == ["routed", "evicted", "ended"]
    assert rig.open(client) is None
    assert written[3:] == ["association ended"]
