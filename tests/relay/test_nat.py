"""The NAT table's way of a datagram: hit, miss, what waits for a dial, and what a failed one does."""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.relay import nat
from netproxy.relay import entry as entry_module
from netproxy.relay.session import Session
from tests.support.nat import TARGET, NatRig, conn_of
from tests.support.upstreams import FakeDialer

REFUSED = DialError(Reason.REFUSED, "upstream")


class TestAMiss:
    def test_opens_once_and_sends_what_waited(self, rig: NatRig) -> None:
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

    def test_is_in_the_table_by_its_key(self, rig: NatRig) -> None:
        client = rig.client()
        entry = rig.opened(client)
        assert rig.table.entries[client.peer, TARGET.encode()] is entry
        assert len(rig.table) == 1
        assert rig.counts.of("sessions_opened") == 1

    def test_of_another_target_uses_the_session_that_is_there(self, rig: NatRig) -> None:
        """RFC 4787 REQ-1: one upstream, hence one port, for all targets of a client."""
        client = rig.client()
        first, second = rig.opened(client), rig.opened(client, "198.51.100.2:9000")
        assert first.session is second.session
        rig.send(second, b"x")
        assert len(rig.dialer.conns) == len(rig.table) == 1
        assert rig.dialer.conns[0].sent == [(b"x", "to 198.51.100.2:9000")]

    def test_of_another_target_while_the_dial_is_under_way_does_not_dial_again(
        self, rig: NatRig
    ) -> None:
        rig.workers.eager = False
        client = rig.client()
        first, second = rig.opened(client), rig.opened(client, "198.51.100.2:9000")
        rig.send(first, b"1")
        rig.send(second, b"2")
        rig.workers.run()
        assert len(rig.dialer.conns) == 1
        assert rig.dialer.conns[0].sent == [(b"1", f"to {TARGET}"), (b"2", "to 198.51.100.2:9000")]

    def test_by_another_way_out_has_a_session_of_its_own(self, rig: NatRig) -> None:
        client = rig.client()
        other = FakeDialer("other")
        first, second = rig.opened(client), rig.opened(client, "198.51.100.2:9000", other)
        assert first.session is not second.session
        assert (len(rig.dialer.conns), len(other.conns), len(rig.table)) == (1, 1, 2)

    def test_of_another_endpoint_has_a_session_of_its_own(self, rig: NatRig) -> None:
        """RFC 4787 REQ-3: ports are not shared."""
        first, second = rig.opened(rig.client(5000)), rig.opened(rig.client(5001))
        assert first.session is not second.session
        assert len(rig.dialer.conns) == 2

    def test_of_a_client_whose_association_has_just_ended(self, rig: NatRig) -> None:
        client = rig.client()
        rig.table.end("association")
        assert rig.open(client) is None
        assert not len(rig.table)


class TestWaiting:
    def test_is_bounded_for_an_entry(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        for number in range(entry_module.WAITING_LIMIT + 5):
            rig.send(entry, b"%d" % number)
        assert rig.counts.of("drops", "waiting queue full") == 5
        rig.workers.run()
        assert [payload for payload, _ in rig.dialer.conns[0].sent] == [
            b"%d" % number for number in range(entry_module.WAITING_LIMIT)
        ]

    def test_is_bounded_in_the_whole_table(
        self, rig: NatRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(entry_module, "WAITING_TOTAL", 10)
        rig.workers.eager = False
        entries = [rig.opened(rig.client(port)) for port in range(5000, 5004)]
        for entry in entries:
            rig.send(entry, b"a", b"b", b"c")
        assert rig.counts.of("drops", "waiting queue full") == 2
        rig.workers.run()
        assert sum(len(conn.sent) for conn in rig.dialer.conns) == 10
        assert rig.waiting() == 0
        for entry in entries:  # and there is room again
            rig.send(entry, b"d")
        assert rig.counts.of("drops", "waiting queue full") == 2

    def test_what_comes_while_the_queue_is_sent_goes_behind_it(self, rig: NatRig) -> None:
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

    def test_copies_what_it_keeps(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"first")
        rig.arena.view[:5] = b"other"
        rig.workers.run()
        assert rig.dialer.conns[0].sent == [(b"first", f"to {TARGET}")]

    def test_keeps_an_empty_datagram(self, rig: NatRig) -> None:
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"")
        rig.workers.run()
        assert rig.dialer.conns[0].sent == [(b"", f"to {TARGET}")]


class TestAName:
    def test_is_prepared_by_a_worker(self, rig: NatRig) -> None:
        """HAZARDS 39: the reader never resolves, and a slow lookup holds up no other target."""
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

    def test_that_is_not_found_drops_what_waited(self, rig: NatRig) -> None:
        rig.dialer.refuse_names = DialError(Reason.NAME, "example.com")
        rig.workers.eager = False
        entry = rig.opened(rig.client(), "example.com:9000")
        rig.send(entry, b"1", b"2")
        rig.workers.run()
        assert rig.counts.of("drops", "name not resolved") == 2
        rig.send(entry, b"3")
        assert rig.counts.of("drops", "target failed") == 1
        assert not rig.workers.tasks

    def test_is_looked_up_again_after_a_while_on_the_same_upstream(self, rig: NatRig) -> None:
        rig.dialer.refuse_names = DialError(Reason.NAME, "example.com")
        entry = rig.opened(rig.client(), "example.com:9000")
        conn = conn_of(entry.session)
        conn.refusal = None
        rig.later(entry_module.RETRY_SECONDS)
        rig.send(entry, b"again")
        assert conn.sent == [(b"again", "to example.com:9000")]
        assert len(rig.dialer.conns) == 1

    def test_finds_the_queue_of_lookups_full(self, rig: NatRig) -> None:
        client = rig.client()
        rig.opened(client)
        rig.workers.full = True
        entry = rig.opened(client, "example.com:9000")
        rig.send(entry, b"lost")
        assert rig.counts.of("drops", "target failed") == 1
        rig.workers.full = False
        rig.later(entry_module.RETRY_SECONDS)
        rig.send(entry, b"found")
        assert conn_of(entry.session).sent == [(b"found", "to example.com:9000")]


class TestAFailedDial:
    def test_drops_and_counts_what_waited(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        rig.workers.eager = False
        entry = rig.opened(rig.client())
        rig.send(entry, b"1", b"2")
        rig.workers.run()
        assert rig.counts.of("drops", "connection refused") == 2
        assert rig.log.of("limited") == ["udp by fake: upstream: connection refused"]
        assert rig.waiting() == 0

    def test_is_not_tried_again_too_soon(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        client = rig.client()
        entry = rig.opened(client)
        rig.later(entry_module.RETRY_SECONDS - 0.1)
        rig.send(entry, b"1", b"2")
        assert rig.counts.of("drops", "target failed") == 2
        other = rig.opened(client, "198.51.100.2:9000")
        rig.send(other, b"3")
        assert rig.counts.of("drops", "target failed") == 3
        assert len(rig.dialer.flows) == 1

    def test_is_tried_again_by_a_datagram_after_a_while(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        client = rig.client()
        first, second = rig.opened(client), rig.opened(client, "198.51.100.2:9000")
        rig.dialer.refusal = None
        rig.later(entry_module.RETRY_SECONDS)
        rig.send(first, b"1")
        rig.send(second, b"2")
        assert rig.dialer.conns[0].sent == [(b"1", f"to {TARGET}"), (b"2", "to 198.51.100.2:9000")]
        assert len(rig.dialer.flows) == 2

    def test_fails_again_and_is_tried_again(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        entry = rig.opened(rig.client())
        for attempt in range(2, 5):
            rig.later(entry_module.RETRY_SECONDS)
            rig.send(entry, b"x")
            assert len(rig.dialer.flows) == attempt
        assert rig.counts.of("drops", "connection refused") == 3

    def test_a_new_target_while_the_dial_is_tried_again_waits_for_it(self, rig: NatRig) -> None:
        rig.dialer.refusal = REFUSED
        client = rig.client()
        first = rig.opened(client)
        rig.dialer.refusal = None
        rig.later(entry_module.RETRY_SECONDS)
        rig.workers.eager = False
        rig.send(first, b"1")
        rig.send(rig.opened(client, "198.51.100.2:9000"), b"2")
        rig.workers.run()
        assert [payload for payload, _ in rig.dialer.conns[0].sent] == [b"1", b"2"]
        assert len(rig.dialer.flows) == 2

    def test_for_want_of_workers(self, rig: NatRig) -> None:
        rig.workers.full = True
        entry = rig.opened(rig.client())
        rig.send(entry, b"1")
        assert rig.counts.of("drops", "target failed") == 1
        rig.workers.full = False
        rig.later(entry_module.RETRY_SECONDS)
        rig.send(entry, b"2")
        assert rig.dialer.conns[0].sent == [(b"2", f"to {TARGET}")]

    def test_for_want_of_a_thread(self, rig: NatRig, monkeypatch: pytest.MonkeyPatch) -> None:
        """HAZARDS 94."""

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
        monkeypatch.setattr(nat, "time", rig.clock)
        monkeypatch.setattr(entry_module, "time", rig.clock)
        rig.later(entry_module.RETRY_SECONDS)
        rig.workers.eager = True
        rig.send(entry, b"2")
        assert rig.dialer.conns[1].sent == [(b"2", f"to {TARGET}")]
