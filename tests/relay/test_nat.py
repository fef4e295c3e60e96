"""Datagrams in the NAT table: hits, misses, what waits for a dial, and what a failed dial does."""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.relay.table import waiting_datagrams
from netproxy.relay.nat import RETRY_SECONDS
from netproxy.relay.session import Session
from tests.support.nat import TARGET, NatRig, conn_of
from tests.support.upstreams import FakeDialer

REFUSED = DialError(Reason.REFUSED, "upstream")


class TestMiss:
    def test_miss_dials_once_and_sends_what_waited(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"one", b"two")
        rig.send(entry, b"three")
        assert not rig.dialer.flows
        rig.workers.run()
        assert rig.dialer.flows == [
            Flow("udp", Address("192.0.2.1", 5000), Address("198.51.100.1", 9000), "main", "")
        ]
        assert rig.dialer.conns[0].sent == [
            (payload, f"to {TARGET}") for payload in (b"one", b"two", b"three")
        ]
        rig.send(entry, b"four")
        assert rig.dialer.conns[0].sent[-1] == (b"four", f"to {TARGET}")
        assert not rig.counts.of("drops", "waiting queue full")

    def test_new_entry_is_in_the_table_by_its_key(self, rig: NatRig) -> None:
        client = rig.client()
        entry = rig.opened(client)
        assert rig.table.entries[client.peer, TARGET.encode()] is entry
        assert len(rig.table) == 1
        assert rig.counts.of("sessions_opened") == 1

    def test_another_target_uses_the_same_session(self, rig: NatRig) -> None:
        """RFC 4787 REQ-1: one upstream, hence one port, for all targets of a client."""
        client = rig.client()
        first, second = rig.opened(client), rig.opened(client, "198.51.100.2:9000")
        assert first.session is second.session
        rig.send(second, b"x")
        assert len(rig.dialer.conns) == len(rig.table) == 1
        assert rig.dialer.conns[0].sent == [(b"x", "to 198.51.100.2:9000")]

    def test_another_target_during_the_dial_does_not_dial_again(self, rig: NatRig) -> None:
        rig.workers.eager = False
        client = rig.client()
        first, second = rig.opened(client), rig.opened(client, "198.51.100.2:9000")
        rig.send(first, b"1")
        rig.send(second, b"2")
        rig.workers.run()
        assert len(rig.dialer.conns) == 1
        assert rig.dialer.conns[0].sent == [(b"1", f"to {TARGET}"), (b"2", "to 198.51.100.2:9000")]

    def test_another_upstream_has_its_own_session(self, rig: NatRig) -> None:
        client = rig.client()
        other = FakeDialer("other")
        first, second = rig.opened(client), rig.opened(client, "198.51.100.2:9000", other)
        assert first.session is not second.session
        assert (len(rig.dialer.conns), len(other.conns), len(rig.table)) == (1, 1, 2)

    def test_another_client_endpoint_has_its_own_session(self, rig: NatRig) -> None:
        """RFC 4787 REQ-3: ports are not shared."""
        first, second = rig.opened(rig.client(5000)), rig.opened(rig.client(5001))
        assert first.session is not second.session
        assert len(rig.dialer.conns) == 2

    def test_client_whose_association_has_ended_gets_no_entry(self, rig: NatRig) -> None:
        client = rig.client()
        rig.table.end("association")
        assert rig.open(client) is None
        assert not len(rig.table)


class TestWaiting:
    def test_waiting_datagrams_of_an_entry_are_bounded(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        for number in range(waiting_datagrams.ENTRY_WAITING_LIMIT + 5):
            rig.send(entry, b"%d" % number)
        assert rig.counts.of("drops", "waiting queue full") == 5
        rig.workers.run()
        assert [payload for payload, _ in rig.dialer.conns[0].sent] == [
            b"%d" % number for number in range(waiting_datagrams.ENTRY_WAITING_LIMIT)
        ]

    def test_waiting_datagrams_of_a_table_are_bounded(self, rig: NatRig) -> None:
        rig.table._waiting._held.limit = 10
        rig.workers.eager = False
        entries = [rig.opened(rig.client(port)) for port in range(5000, 5004)]
        for entry in entries:
            rig.send(entry, b"a", b"b", b"c")
        assert rig.counts.of("drops", "waiting queue full") == 2
        rig.workers.run()
        assert sum(len(conn.sent) for conn in rig.dialer.conns) == 10
        assert rig.waiting() == 0
        # There is room again.
        for entry in entries:
            rig.send(entry, b"d")
        assert rig.counts.of("drops", "waiting queue full") == 2

    def test_datagrams_that_come_during_the_flush_go_behind_the_queue(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"1")
        rig.send(entry, b"2")
        tasks = rig.workers.tasks
        conn = None

        def late() -> None:
            rig.send(entry, b"3")
            assert conn is not None
            conn.while_sending = lambda: rig.send(entry, b"4")

        dial = rig.dialer.dial_packet

        def dial_packet(flow: Flow) -> object:
            nonlocal conn
            conn = dial(flow)
            conn.while_sending = late
            return conn

        rig.dialer.dial_packet = dial_packet  # type: ignore[method-assign]
        while tasks:
            tasks.pop(0)()
        assert conn is not None
        assert [payload for payload, _ in conn.sent] == [b"1", b"2", b"3", b"4"]
        rig.send(entry, b"5")
        assert conn.sent[-1][0] == b"5"

    def test_waiting_datagram_is_a_copy(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"first")
        rig.arena.view[:5] = b"other"
        rig.workers.run()
        assert rig.dialer.conns[0].sent == [(b"first", f"to {TARGET}")]

    def test_empty_datagram_waits_as_any_other(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"")
        rig.workers.run()
        assert rig.dialer.conns[0].sent == [(b"", f"to {TARGET}")]


class TestName:
    def test_name_is_prepared_by_a_worker(self, rig: NatRig) -> None:
        """Hazard 39.  The reader thread never resolves; a slow lookup delays no other target."""
        client = rig.client()
        rig.opened(client)
        rig.workers.eager = False
        named = rig.opened(client, "example.com:9000")
        rig.send(named, b"wait")
        literal = rig.opened(client, "198.51.100.2:9000")
        rig.send(literal, b"go")
        conn = conn_of(literal.session)
        assert conn.sent == [(b"go", "to 198.51.100.2:9000")]
        assert Address("example.com", 9000) not in conn.prepared
        rig.workers.run()
        assert conn.sent[1:] == [(b"wait", "to example.com:9000")]

    def test_name_that_is_not_found_drops_what_waited(self, rig: NatRig) -> None:
        rig.dialer.refuse_names = DialError(Reason.NAME, "example.com")
        rig.workers.eager = False
        entry = rig.opened(rig.client(), "example.com:9000")
        rig.send(entry, b"1", b"2")
        rig.workers.run()
        assert rig.counts.of("drops", "name not resolved") == 2
        rig.send(entry, b"3")
        assert rig.counts.of("drops", "target failed") == 1
        assert not rig.workers.tasks

    def test_name_is_looked_up_again_after_a_while_on_the_same_upstream(self, rig: NatRig) -> None:
        rig.dialer.refuse_names = DialError(Reason.NAME, "example.com")
        entry = rig.opened(rig.client(), "example.com:9000")
        conn = conn_of(entry.session)
        conn.refusal = None
        rig.later(RETRY_SECONDS)
        rig.send(entry, b"again")
        assert conn.sent == [(b"again", "to example.com:9000")]
        assert len(rig.dialer.conns) == 1

    def test_name_that_finds_the_lookup_queue_full_is_retried_later(self, rig: NatRig) -> None:
        client = rig.client()
        rig.opened(client)
        rig.workers.full = True
        entry = rig.opened(client, "example.com:9000")
        rig.send(entry, b"lost")
        assert rig.counts.of("drops", "target failed") == 1
        rig.workers.full = False
        rig.later(RETRY_SECONDS)
        rig.send(entry, b"found")
        assert conn_of(entry.session).sent == [(b"found", "to example.com:9000")]


class TestFailedDial:
    def test_failed_dial_drops_and_counts_what_waited(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"1", b"2")
        rig.workers.run()
        assert rig.counts.of("drops", "connection refused") == 2
        assert rig.log.of("limited") == ["udp by fake: upstream: connection refused"]
        assert rig.waiting() == 0

    def test_failed_dial_is_not_repeated_too_soon(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        client = rig.client()
        entry = rig.opened(client)
        rig.later(RETRY_SECONDS - 0.1)
        rig.send(entry, b"1", b"2")
        assert rig.counts.of("drops", "target failed") == 2
        other = rig.opened(client, "198.51.100.2:9000")
        rig.send(other, b"3")
        assert rig.counts.of("drops", "target failed") == 3
        assert len(rig.dialer.flows) == 1

    def test_failed_dial_is_repeated_by_a_datagram_after_a_while(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        client = rig.client()
        first, second = rig.opened(client), rig.opened(client, "198.51.100.2:9000")
        rig.dialer.refusal = None
        rig.later(RETRY_SECONDS)
        rig.send(first, b"1")
        rig.send(second, b"2")
        assert rig.dialer.conns[0].sent == [(b"1", f"to {TARGET}"), (b"2", "to 198.51.100.2:9000")]
        assert len(rig.dialer.flows) == 2

    def test_repeated_dial_that_fails_is_repeated_again(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        entry = rig.opened(rig.client())
        for attempt in range(2, 5):
            rig.later(RETRY_SECONDS)
            rig.send(entry, b"x")
            assert len(rig.dialer.flows) == attempt
        assert rig.counts.of("drops", "connection refused") == 3

    def test_new_target_during_a_repeated_dial_waits_for_it(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        client = rig.client()
        first = rig.opened(client)
        rig.dialer.refusal = None
        rig.later(RETRY_SECONDS)
        rig.workers.eager = False
        rig.send(first, b"1")
        rig.send(rig.opened(client, "198.51.100.2:9000"), b"2")
        rig.workers.run()
        assert [payload for payload, _ in rig.dialer.conns[0].sent] == [b"1", b"2"]
        assert len(rig.dialer.flows) == 2

    def test_dial_that_finds_no_worker_is_repeated_later(self, rig: NatRig) -> None:
        rig.workers.full = True
        entry = rig.opened(rig.client())
        rig.send(entry, b"1")
        assert rig.counts.of("drops", "target failed") == 1
        rig.workers.full = False
        rig.later(RETRY_SECONDS)
        rig.send(entry, b"2")
        assert rig.dialer.conns[0].sent == [(b"2", f"to {TARGET}")]

    def test_session_without_a_thread_closes_its_upstream_and_is_retried(
        self, rig: NatRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 94."""

        def start(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(Session, "start", start)
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"1")
        rig.workers.run()
        assert rig.dialer.conns[0].closed.is_set()
        assert rig.counts.of("drops", "failed") == 1
        monkeypatch.undo()
        rig.use_clock(monkeypatch)
        rig.later(RETRY_SECONDS)
        rig.workers.eager = True
        rig.send(entry, b"2")
        assert rig.dialer.conns[1].sent == [(b"2", f"to {TARGET}")]
