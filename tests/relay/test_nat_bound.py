"""Mappings whose connection is for fewer targets than it was dialled for, and clients whose address
at targets must stay."""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, FlowRefused, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Route
from netproxy.relay.client import Client
from netproxy.relay.entry import EntryState
from netproxy.relay.nat import RETRY_SECONDS
from netproxy.relay.quota import EVICTABLE_SECONDS
from tests.support.nat import IDLE, NatRig, conn_of
from tests.support.sockets import SECONDS
from tests.support.upstreams import FakeConn, FakeDialer, FakePool

FIRST, SECOND, THIRD = "198.51.100.1:9000", "198.51.100.2:9000", "198.51.100.3:9000"


def address(target: str) -> Address:
    host, _, port = target.rpartition(":")
    return Address(host, int(port))


class OldProxy(FakeDialer):
    """A dialer that learns with its first dial that each connection is for one target."""

    symmetric = False
    knows_bound = True

    def dial_packet(self, flow: Flow) -> FakeConn:
        conn = super().dial_packet(flow)
        self.symmetric = True
        conn.only = flow.target
        return conn


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> NatRig:
    """Return a rig whose dials wait for the test."""
    rig = NatRig(FakePool(eager=False))
    rig.use_clock(monkeypatch)
    return rig


class TestStrays:
    def test_targets_that_a_connection_does_not_reach_get_their_own_and_lose_nothing(
        self, slow: NatRig
    ) -> None:
        """Hazard 178: all of them were waiting for the one connection."""
        dialer, client = OldProxy(), slow.client()
        entries = [slow.opened(client, target, dialer) for target in (FIRST, SECOND, THIRD)]
        for number, entry in enumerate(entries):
            slow.send(entry, b"%d" % number)
        assert len(slow.table) == 1
        slow.workers.run()
        assert [flow.target for flow in dialer.flows] == [*map(address, (FIRST, SECOND, THIRD))]
        assert [entry.state for entry in entries] == [EntryState.READY] * 3
        assert [[data for data, _ in conn.sent] for conn in dialer.conns] == [
            [b"0"],
            [b"1"],
            [b"2"],
        ]
        assert len(slow.table) == 3 and not slow.counts.counts.get(("drops", "upstream failed"))
        slow.close()

    def test_target_that_waits_for_a_retry_starts_again(self, slow: NatRig) -> None:
        dialer, client = OldProxy(), slow.client()
        entry = slow.opened(client, FIRST, dialer)
        stray = slow.opened(client, SECOND, dialer)
        dialer.refusal = DialError(Reason.TIMEOUT)
        slow.workers.run()
        assert stray.state is EntryState.FAILED
        dialer.refusal = None
        slow.later(RETRY_SECONDS + 1)
        slow.send(entry, b"x")
        slow.workers.run()
        assert (entry.state, stray.state) == (EntryState.READY, EntryState.GONE)
        again = slow.opened(client, SECOND, dialer)
        slow.workers.run()
        assert again.state is EntryState.READY and len(dialer.conns) == 2
        slow.close()

    def test_stray_without_room_is_dropped_and_counted(self, slow: NatRig) -> None:
        dialer, client = OldProxy(), slow.client()
        slow.policy(per_client=1)
        slow.opened(client, FIRST, dialer)
        stray = slow.opened(client, SECOND, dialer)
        slow.send(stray, b"x")
        slow.workers.run()
        assert stray.state is EntryState.GONE
        assert slow.counts.of("drops", "session limit") == 1
        slow.close()

    def test_later_target_that_an_open_connection_does_not_reach_gets_its_own(
        self, rig: NatRig
    ) -> None:
        """The proxy may be asked again meanwhile, and its older connections stay."""
        dialer, client = OldProxy(), rig.client()
        rig.opened(client, FIRST, dialer)
        dialer.symmetric = False
        second = rig.opened(client, SECOND, dialer)
        rig.send(second, b"x")
        assert len(rig.table) == 2 and dialer.conns[1].sent

    def test_name_has_a_connection_of_its_own_where_addresses_share_one(self, rig: NatRig) -> None:
        dialer, client = FakeDialer(), rig.client()
        dialer.knows_bound = True
        for target in ("game.test:9000", FIRST, SECOND, "other.test:9000"):
            rig.opened(client, target, dialer)
        assert len(rig.table) == 3 and len(client.mappings) == 3


class Ends:
    """Notes that the session of a client has ended."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


class TestBound:
    def bound(self, rig: NatRig) -> tuple[Client, Ends]:
        client, ends = rig.client(owner="stream"), Ends()
        flow = Flow("udp", client.address, UNSPECIFIED_ADDRESS, "main", "")
        session = rig.table.open_bound(client, Route(rig.dialer, flow))
        assert session.flow.target == UNSPECIFIED_ADDRESS
        assert rig.table.keep_bound(client, ends)
        return client, ends

    def test_session_opens_without_a_target_and_serves_all(self, rig: NatRig) -> None:
        client, ends = self.bound(rig)
        for target in (FIRST, SECOND):
            rig.send(rig.opened(client, target), b"x")
        assert len(rig.dialer.conns) == 1 and len(rig.dialer.conns[0].sent) == 2
        assert ends.count == 0 and len(rig.table) == 1
        rig.table.end("stream")
        [record] = rig.records.records
        assert record.flow.target == address(FIRST)
        assert ends.count == 1

    def test_session_is_never_idle(self, rig: NatRig) -> None:
        client, ends = self.bound(rig)
        rig.later(100 * IDLE)
        assert rig.expire() == 0
        rig.later(100 * IDLE)
        assert rig.expire() == 0 and ends.count == 0

    def test_busy_table_evicts_it_and_the_stream_is_told(self, rig: NatRig) -> None:
        """Hazard 177: what is never idle is bounded all the same."""
        client, ends = self.bound(rig)
        rig.policy(per_client=1)
        rig.expire()
        rig.later(EVICTABLE_SECONDS + 1)
        rig.opened(rig.client(port=5001), FIRST)
        assert ends.count == 1 and len(rig.table) == 1
        # What the client still sends opens no other session.
        assert rig.open(client, SECOND) is None
        assert rig.counts.of("drops", "association ended") == 1

    def test_end_of_the_upstream_is_the_end(self, rig: NatRig) -> None:
        client, ends = self.bound(rig)
        [mapping] = client.mappings.values()
        conn_of(mapping.session).shutdown()
        assert conn_of(mapping.session).closed.wait(SECONDS)
        assert ends.count == 1 and not len(rig.table)

    def test_target_with_another_upstream_ends_it(self, rig: NatRig) -> None:
        """Hazard 179: a reload has changed the rules."""
        client, ends = self.bound(rig)
        rig.opened(client, FIRST)
        assert rig.open(client, SECOND, FakeDialer("other")) is None
        assert ends.count == 1 and not len(rig.table)
        assert rig.counts.of("drops", "rerouted") == 1
        [refusal] = rig.counts.refusals
        assert refusal.decided == "default leads to other"

    def test_target_that_is_not_reached_costs_only_its_datagrams(self, rig: NatRig) -> None:
        client, ends = self.bound(rig)
        rig.dialer.conns[0].only = address(FIRST)
        assert rig.open(client, SECOND) is None
        rig.send(rig.opened(client, FIRST), b"x")
        assert ends.count == 0 and len(rig.dialer.conns[0].sent) == 1

    def test_proxy_that_no_longer_agrees_for_others_keeps_what_it_has(self, rig: NatRig) -> None:
        client, ends = self.bound(rig)
        rig.dialer.symmetric = True
        rig.send(rig.opened(client, FIRST), b"x")
        assert ends.count == 0 and len(rig.dialer.conns) == 1

    def test_failed_dial_leaves_nothing_once_the_stream_ends(self, rig: NatRig) -> None:
        client = rig.client(owner="stream")
        rig.dialer.refusal = DialError(Reason.REFUSED)
        flow = Flow("udp", client.address, UNSPECIFIED_ADDRESS, "main", "")
        with pytest.raises(DialError):
            rig.table.open_bound(client, Route(rig.dialer, flow))
        rig.table.end("stream")
        assert not len(rig.table) and not rig.table.clients

    def test_client_without_room_or_without_place_is_refused(self, rig: NatRig) -> None:
        client = rig.client(owner="stream")
        flow = Flow("udp", client.address, UNSPECIFIED_ADDRESS, "main", "")
        rig.policy(per_client=0)
        with pytest.raises(FlowRefused):
            rig.table.open_bound(client, Route(rig.dialer, flow))
        rig.table.end("stream")
        with pytest.raises(FlowRefused):
            rig.table.open_bound(client, Route(rig.dialer, flow))

    def test_session_that_has_ended_at_once_is_not_kept(self, rig: NatRig) -> None:
        client, ends = rig.client(owner="stream"), Ends()
        flow = Flow("udp", client.address, UNSPECIFIED_ADDRESS, "main", "")
        session = rig.table.open_bound(client, Route(rig.dialer, flow))
        session.kill()
        assert not rig.table.keep_bound(client, ends) and ends.count == 0
