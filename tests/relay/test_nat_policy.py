"""What a configuration may ask of the NAT: mapping, filtering, name servers, users' limits; RFC 4787."""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, Reason
from netproxy.relay import nat
from netproxy.relay.session import ADDRESS, ADDRESS_AND_PORT, INDEPENDENT
from tests.support.flows import OneWay
from tests.support.nat import IDLE, NatRig, conn_of
from tests.support.upstreams import FakeDialer

FIRST, SECOND, NAMED = "198.51.100.1:9000", "198.51.100.2:9000", "example.com:9000"
DNS = "198.51.100.1:53"


def tick(rig: NatRig, seconds: float) -> int:
    closed = 0
    for _ in range(int(seconds)):
        rig.later(1)
        closed += rig.expire()
    return closed


def answered(rig: NatRig, session: object, *peers: tuple[str, int]) -> list[bytes]:
    """What the client gets when these peers send "x", and in the end one that may always."""
    before = len(rig.local.sent)
    conn = conn_of(session)  # type: ignore[arg-type]
    for peer in peers:
        conn.offer((b"x", peer))
    conn.offer((b"end", ("198.51.100.1", 9000)))
    with rig.local.changed:
        assert rig.local.changed.wait_for(
            lambda: rig.local.sent[-1:] and rig.local.sent[-1][0].endswith(b"end"), 5
        )
    found = [data for data, _ in rig.local.sent[before:]]
    rig.local.sent.append((b"", ""))  # so that the next "end" is waited for
    return found[:-1]


class TestMapping:
    def test_symmetric_gives_each_target_an_upstream_of_its_own(self, rig: NatRig) -> None:
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

    def test_a_reload_leaves_the_sessions_that_live(self, rig: NatRig) -> None:
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
    """RFC 4787 REQ-8, HAZARDS 30."""

    @pytest.mark.parametrize(
        "filtering, passed",
        [
            (INDEPENDENT, [b"<198.51.100.1:1>x", b"<198.51.100.9:9000>x"]),
            (ADDRESS, [b"<198.51.100.1:1>x"]),
            (ADDRESS_AND_PORT, []),
        ],
    )
    def test_who_may_answer(self, rig: NatRig, filtering: str, passed: list[bytes]) -> None:
        rig.policy(filtering=filtering)
        entry = rig.opened(rig.client(), FIRST)
        assert answered(rig, entry.session, ("198.51.100.1", 1), ("198.51.100.9", 9000)) == passed
        assert rig.counts.of("drops", "filtered") == 2 - len(passed)

    def test_one_that_is_sent_to_may_answer_from_then_on(self, rig: NatRig) -> None:
        rig.policy(filtering=ADDRESS)
        client = rig.client()
        entry = rig.opened(client, FIRST)
        assert answered(rig, entry.session, ("198.51.100.2", 1)) == []
        rig.opened(client, SECOND)
        assert answered(rig, entry.session, ("198.51.100.2", 1)) == [b"<198.51.100.2:1>x"]

    def test_a_name_permits_the_address_it_stands_for(self, rig: NatRig) -> None:
        rig.policy(filtering=ADDRESS_AND_PORT)
        client = rig.client()
        entry = rig.opened(client, FIRST)
        rig.opened(client, NAMED)
        assert answered(rig, entry.session, ("203.0.113.9", 9000), ("203.0.113.9", 1)) == [
            b"<203.0.113.9:9000>x"
        ]


class TestNameServers:
    """A session that only ever spoke to port 53 ends when every query is answered, or after ten seconds."""

    def test_ends_when_every_query_is_answered(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client(), DNS)
        rig.send(entry, b"query")
        answer(rig, entry.session)
        assert tick(rig, 3) == 1
        assert [record.ended for record in rig.records.records] == ["idle"]

    def test_waits_for_the_answer_but_not_long(self, rig: NatRig) -> None:
        entry = rig.opened(rig.client(), DNS)
        rig.send(entry, b"one", b"two")
        answer(rig, entry.session)
        assert tick(rig, nat.DNS_SECONDS) == 0
        assert tick(rig, 2) == 1

    def test_lives_as_others_once_it_speaks_to_others(self, rig: NatRig) -> None:
        client = rig.client()
        entry = rig.opened(client, DNS)
        rig.opened(client, FIRST)
        rig.send(entry, b"query")
        answer(rig, entry.session)
        assert tick(rig, IDLE) == 0
        assert tick(rig, 2) == 1

    def test_does_not_end_before_its_query_could_be_sent(self, rig: NatRig) -> None:
        """The upstream is dialled, or the server's name looked up, and the query waits."""
        rig.workers.eager = False
        entry = rig.opened(rig.client(), "dns.example:53")
        rig.send(entry, b"query")
        assert tick(rig, 4) == 0
        rig.workers.run()
        assert conn_of(entry.session).sent == [(b"query", "to dns.example:53")]

    def test_is_found_again_after_its_dial_has_failed(self, rig: NatRig) -> None:
        rig.dialer.refusal = DialError(Reason.REFUSED)
        client = rig.client()
        rig.opened(client, DNS)
        tick(rig, 4)
        rig.dialer.refusal = None
        entry = rig.table.entries.get((client.peer, DNS.encode())) or rig.opened(client, DNS)
        rig.send(entry, b"query")
        assert rig.dialer.conns[0].sent == [(b"query", f"to {DNS}")]


class TestUsers:
    def test_have_a_limit_over_all_their_addresses(self, rig: NatRig) -> None:
        rig.policy(per_user={"alice": 2})
        for number in (1, 2):
            rig.opened(rig.client(number, f"192.0.2.{number}"), user="alice")
        assert rig.open(rig.client(3, "192.0.2.3"), user="alice") is None
        assert rig.open(rig.client(4, "192.0.2.3"), user="bob") is not None
        assert rig.open(rig.client(5, "192.0.2.3")) is not None

    def test_at_their_limit_only_their_own_yield(self, rig: NatRig) -> None:
        rig.policy(per_user={"alice": 1})
        other = rig.opened(rig.client(1), user="bob")
        tick(rig, 5)
        own = rig.opened(rig.client(2), user="alice")
        tick(rig, 15)
        assert rig.open(rig.client(3, "192.0.2.9"), user="alice") is not None
        assert conn_of(own.session).closed.wait(5)
        assert not conn_of(other.session).shut.is_set()

    def test_a_reload_may_lower_a_limit(self, rig: NatRig) -> None:
        rig.policy(per_user={"alice": 3})
        entries = [rig.opened(rig.client(number), user="alice") for number in range(3)]
        rig.policy(per_user={"alice": 1})
        assert rig.open(rig.client(9), user="alice") is None
        rig.send(entries[0], b"goes on")
        assert conn_of(entries[0].session).sent


class TestMoving:
    """One endpoint that comes to another of our addresses has another key, and keeps its sessions."""

    def test_keeps_the_sessions(self, rig: NatRig) -> None:
        client = rig.client()
        first = rig.opened(client)
        assert rig.table.move_client("association", client.address, "other key") is client
        second = rig.table.open(("other key", b"k"), client, first.session.flow, OneWay(rig.dialer))
        assert second is not None and second.session is first.session
        assert len(rig.dialer.conns) == 1

    def test_of_nobody_is_none(self, rig: NatRig) -> None:
        client = rig.client()
        assert rig.table.move_client("stranger", client.address, "key") is None
        assert rig.table.move_client("association", client.address._replace(port=1), "key") is None
        assert list(rig.table.clients) == [client.peer]

    def test_ends_under_both_keys(self, rig: NatRig) -> None:
        client = rig.client()
        entry = rig.opened(client)
        rig.table.move_client("association", client.address, "other key")
        rig.table.end("association")
        assert not rig.table.clients and not rig.table.entries
        assert conn_of(entry.session).closed.wait(5)
        assert len(rig.records.records) == 1


class TestHeirs:
    def test_what_is_bequeathed_ends_with_the_heir(self, rig: NatRig) -> None:
        entry, other = rig.opened(rig.client(1, owner="a")), rig.opened(rig.client(2, owner="b"))
        rig.table.bequeath("a", "b")
        rig.table.end("a")
        assert not conn_of(entry.session).shut.is_set()
        rig.table.end("b")
        assert conn_of(entry.session).closed.wait(5) and conn_of(other.session).closed.wait(5)
        assert not rig.table.clients and not rig.table.entries


class TestWithoutOwner:
    def test_a_client_that_gets_no_session_is_forgotten(self, rig: NatRig) -> None:
        """HAZARDS 32: strangers leave nothing behind."""
        rig.policy(1, 1)
        rig.opened(rig.client(1))
        assert rig.open(rig.client(2, owner=None)) is None
        assert [client.address.port for client in rig.table.clients.values()] == [1]

    def test_nor_where_its_own_session_yielded_and_there_is_still_no_room(
        self, rig: NatRig
    ) -> None:
        forward = rig.client(2, owner=None)
        rig.opened(forward)
        tick(rig, 15)
        rig.opened(rig.client(1))
        rig.policy(1, 100)  # a reload: two live where one may
        assert rig.open(forward, SECOND, FakeDialer("other")) is None
        assert [client.address.port for client in rig.table.clients.values()] == [1]


def answer(rig: NatRig, session: object) -> None:
    before = len(rig.local.sent)
    conn_of(session).offer((b"answer", ("198.51.100.1", 53)))  # type: ignore[arg-type]
    rig.local.wait_for(before + 1)
