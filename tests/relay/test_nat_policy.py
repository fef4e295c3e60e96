"""The policy of the NAT table (RFC 4787): mapping, filtering, name servers, limits of users."""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, Reason
from netproxy.relay.entry import DNS_SECONDS
from netproxy.relay.session import Session
from netproxy.relay.table.reply_sources import (
    ADDRESS_AND_PORT_DEPENDENT,
    ADDRESS_DEPENDENT,
    ENDPOINT_INDEPENDENT,
)
from tests.support.flows import OneUpstream
from tests.support.nat import IDLE, NatRig, conn_of
from tests.support.sockets import SECONDS
from tests.support.upstreams import FakeDialer

FIRST, SECOND, NAMED = "198.51.100.1:9000", "198.51.100.2:9000", "example.com:9000"
DNS, SERVER = "198.51.100.1:53", ("198.51.100.1", 53)


def answered(rig: NatRig, session: Session, *peers: tuple[str, int]) -> list[bytes]:
    """Let peers send "x" and a permitted source "end"; return what the client receives before."""
    before = len(rig.local.sent)
    conn = conn_of(session)
    for peer in peers:
        conn.offer((b"x", peer))
    conn.offer((b"end", ("198.51.100.1", 9000)))
    with rig.local.changed:
        assert rig.local.changed.wait_for(
            lambda: rig.local.sent[-1:] and rig.local.sent[-1][0].endswith(b"end"), 5
        )
    received = [data for data, _ in rig.local.sent[before:]]
    # The next call must wait for an "end" of its own.
    rig.local.sent.append((b"", ""))
    return received[:-1]


class TestMapping:
    def test_symmetric_mapping_gives_each_target_its_own_upstream(self, rig: NatRig) -> None:
        rig.policy(symmetric=True)
        client = rig.client()
        first, second = rig.opened(client, FIRST), rig.opened(client, SECOND)
        assert first.session is not second.session
        assert len(rig.dialer.conns) == 2
        rig.send(first, b"1")
        rig.send(second, b"2")
        assert [[payload for payload, _ in conn.sent] for conn in rig.dialer.conns] == [
            [b"1"],
            [b"2"],
        ]

    def test_sessions_keep_their_mapping_over_a_reload(self, rig: NatRig) -> None:
        client = rig.client()
        first = rig.opened(client, FIRST)
        rig.policy(symmetric=True)
        second = rig.opened(client, SECOND)
        assert first.session is not second.session
        rig.policy()
        assert rig.opened(client, "198.51.100.3:9000").session is first.session
        rig.table.end("association")
        assert not rig.table.entries and not len(rig.table)


class TestFiltering:
    """RFC 4787 REQ-8, hazard 30."""

    @pytest.mark.parametrize(
        "filtering, passed",
        [
            (ENDPOINT_INDEPENDENT, [b"<198.51.100.1:1>x", b"<198.51.100.9:9000>x"]),
            (ADDRESS_DEPENDENT, [b"<198.51.100.1:1>x"]),
            (ADDRESS_AND_PORT_DEPENDENT, []),
        ],
    )
    def test_filtering_decides_which_sources_may_reply(
        self, rig: NatRig, filtering: str, passed: list[bytes]
    ) -> None:
        rig.policy(filtering=filtering)
        entry = rig.opened(rig.client(), FIRST)
        assert answered(rig, entry.session, ("198.51.100.1", 1), ("198.51.100.9", 9000)) == passed
        assert rig.counts.of("drops", "filtered") == 2 - len(passed)

    def test_target_may_reply_once_it_has_been_sent_to(self, rig: NatRig) -> None:
        rig.policy(filtering=ADDRESS_DEPENDENT)
        client = rig.client()
        entry = rig.opened(client, FIRST)
        assert answered(rig, entry.session, ("198.51.100.2", 1)) == []
        rig.opened(client, SECOND)
        assert answered(rig, entry.session, ("198.51.100.2", 1)) == [b"<198.51.100.2:1>x"]

    def test_named_target_permits_its_address(self, rig: NatRig) -> None:
        rig.policy(filtering=ADDRESS_AND_PORT_DEPENDENT)
        client = rig.client()
        entry = rig.opened(client, FIRST)
        rig.opened(client, NAMED)
        assert answered(rig, entry.session, ("203.0.113.9", 9000), ("203.0.113.9", 1)) == [
            b"<203.0.113.9:9000>x"
        ]


class TestNameServers:
    """A session that has only sent to port 53 ends with its last reply, or after ten seconds."""

    def test_dns_session_ends_when_every_query_is_answered(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client(), DNS)
        rig.send(entry, b"query")
        rig.answer(entry.session, SERVER)
        assert rig.tick(3) == 1
        assert [record.ended for record in rig.records.records] == ["idle"]

    def test_dns_session_without_reply_ends_after_ten_seconds(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client(), DNS)
        rig.send(entry, b"one", b"two")
        rig.answer(entry.session, SERVER)
        assert rig.tick(DNS_SECONDS) == 0
        assert rig.tick(2) == 1

    def test_session_to_a_name_server_and_another_target_has_the_full_idle_time(
        self, rig: NatRig
    ) -> None:
        client = rig.client()
        entry = rig.opened(client, DNS)
        rig.opened(client, FIRST)
        rig.send(entry, b"query")
        rig.answer(entry.session, SERVER)
        assert rig.tick(IDLE) == 0
        assert rig.tick(2) == 1

    def test_dns_session_does_not_end_before_its_query_is_sent(self, rig: NatRig) -> None:
        """The query waits while the upstream is dialled or the server's name looked up."""
        rig.workers.eager = False
        entry = rig.opened(rig.client(), "dns.example:53")
        rig.send(entry, b"query")
        assert rig.tick(4) == 0
        rig.workers.run()
        assert conn_of(entry.session).sent == [(b"query", "to dns.example:53")]

    def test_dns_session_is_dialled_again_after_its_dial_has_failed(self, rig: NatRig) -> None:
        rig.dialer.refusal = DialError(Reason.REFUSED)
        client = rig.client()
        rig.opened(client, DNS)
        rig.tick(4)
        rig.dialer.refusal = None
        entry = rig.table.entries.get((client.peer, DNS.encode())) or rig.opened(client, DNS)
        rig.send(entry, b"query")
        assert rig.dialer.conns[0].sent == [(b"query", f"to {DNS}")]


class TestUsers:
    def test_user_limit_counts_all_client_addresses(self, rig: NatRig) -> None:
        rig.policy(per_user={"alice": 2})
        for number in (1, 2):
            rig.opened(rig.client(number, f"192.0.2.{number}"), user="alice")
        assert rig.open(rig.client(3, "192.0.2.3"), user="alice") is None
        assert rig.counts.refusals[-1].decided == "users.alice.limits.sessions"
        assert rig.open(rig.client(4, "192.0.2.3"), user="bob") is not None
        assert rig.open(rig.client(5, "192.0.2.3")) is not None

    def test_user_limit_evicts_the_users_own_sessions_only(self, rig: NatRig) -> None:
        rig.policy(per_user={"alice": 1})
        other = rig.opened(rig.client(1), user="bob")
        rig.tick(5)
        own = rig.opened(rig.client(2), user="alice")
        rig.tick(15)
        assert rig.open(rig.client(3, "192.0.2.9"), user="alice") is not None
        assert conn_of(own.session).closed.wait(SECONDS)
        assert not conn_of(other.session).shut.is_set()

    def test_sessions_above_a_lowered_user_limit_go_on(self, rig: NatRig) -> None:
        rig.policy(per_user={"alice": 3})
        entries = [rig.opened(rig.client(number), user="alice") for number in range(3)]
        rig.policy(per_user={"alice": 1})
        assert rig.open(rig.client(9), user="alice") is None
        rig.send(entries[0], b"goes on")
        assert conn_of(entries[0].session).sent


class TestMoving:
    """An endpoint that sends to another of our addresses has another key and the same sessions."""

    def test_moved_client_keeps_its_sessions(self, rig: NatRig) -> None:
        client = rig.client()
        first = rig.opened(client)
        assert rig.table.move_client("association", client.address, "other key") is client
        second = rig.table.open(
            ("other key", b"k"), client, first.session.flow, OneUpstream(rig.dialer)
        )
        assert second is not None and second.session is first.session
        assert len(rig.dialer.conns) == 1

    def test_unknown_endpoint_is_not_moved(self, rig: NatRig) -> None:
        client = rig.client()
        assert rig.table.move_client("stranger", client.address, "key") is None
        assert rig.table.move_client("association", client.address._replace(port=1), "key") is None
        assert list(rig.table.clients) == [client.peer]

    def test_moved_client_ends_under_both_keys(self, rig: NatRig) -> None:
        client = rig.client()
        entry = rig.opened(client)
        rig.table.move_client("association", client.address, "other key")
        rig.table.end("association")
        assert not rig.table.clients and not rig.table.entries
        assert conn_of(entry.session).closed.wait(SECONDS)
        assert len(rig.records.records) == 1


class TestTransfer:
    def test_transferred_sessions_end_with_the_successor(self, rig: NatRig) -> None:
        entry, other = rig.opened(rig.client(1, owner="a")), rig.opened(rig.client(2, owner="b"))
        rig.table.transfer("a", "b")
        rig.table.end("a")
        assert not conn_of(entry.session).shut.is_set()
        rig.table.end("b")
        assert conn_of(entry.session).closed.wait(SECONDS)
        assert conn_of(other.session).closed.wait(SECONDS)
        assert not rig.table.clients and not rig.table.entries


class TestWithoutOwner:
    def test_client_without_owner_that_gets_no_session_is_removed(self, rig: NatRig) -> None:
        """Hazard 32.  Unknown senders leave nothing behind."""
        rig.policy(1, 1)
        rig.opened(rig.client(1))
        assert rig.open(rig.client(2, owner=None)) is None
        assert [client.address.port for client in rig.table.clients.values()] == [1]

    def test_client_without_owner_is_removed_if_evicting_its_own_session_makes_no_room(
        self, rig: NatRig
    ) -> None:
        forward = rig.client(2, owner=None)
        rig.opened(forward)
        rig.tick(15)
        rig.opened(rig.client(1))
        # A reload lowers the limit below the sessions that exist.
        rig.policy(1, 100)
        assert rig.open(forward, SECOND, FakeDialer("other")) is None
        assert [client.address.port for client in rig.table.clients.values()] == [1]
