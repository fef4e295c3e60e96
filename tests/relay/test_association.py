"""Associations: who may send on a relay port, and what passes to a successor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.relay.association import DISPLACED_LIMIT, ENDPOINTS_LIMIT, Association, Associations
from netproxy.relay.client import Client, no_header
from tests.support.sockets import Task
from tests.support.upstreams import FakeSocket

SOCKET, OTHER_SOCKET = object(), object()
HOST = "192.0.2.1"


@pytest.fixture
def live() -> Associations:
    return Associations()


def associate(
    live: Associations, hint: int = 0, host: str = HOST, local: object = SOCKET, user: str = ""
) -> Association:
    association = Association(host, hint, user, local)
    live.add(association)
    return association


def claim(live: Associations, endpoint: Address, local: object) -> Association | None:
    """Return the association of a datagram."""
    claimed = live.claim(endpoint, local, 0.0)  # type: ignore[arg-type]
    return claimed.association if claimed else None


def at(port: int, host: str = HOST) -> Address:
    return Address(host, port)


def test_sender_without_any_association_is_unknown(live: Associations) -> None:
    assert claim(live, at(1), SOCKET) is None


def test_sender_from_another_address_is_unknown(live: Associations) -> None:
    """Hazards 21, 23."""
    association = associate(live)
    assert claim(live, at(1, "192.0.2.2"), SOCKET) is None
    assert claim(live, at(1), SOCKET) is association


def test_endpoint_is_new_once(live: Associations) -> None:
    associate(live)
    claims: Any = [live.claim(at(port), SOCKET, 0.0) for port in (1, 1, 2, 1)]  # type: ignore[arg-type]
    assert [claimed.is_new for claimed in claims] == [True, False, True, False]


def test_endpoint_keeps_its_association(live: Associations) -> None:
    first = associate(live)
    assert claim(live, at(1), SOCKET) is first
    associate(live)
    assert claim(live, at(1), SOCKET) is first


def test_sender_from_another_port_than_the_named_one_is_unknown(live: Associations) -> None:
    """Hazard 22."""
    association = associate(live, hint=1)
    claim(live, at(1), SOCKET)
    assert claim(live, at(2), SOCKET) is None
    assert claim(live, at(1), SOCKET) is association


def test_association_whose_request_named_the_port_comes_first(live: Associations) -> None:
    named, newest = associate(live, hint=7), associate(live)
    assert claim(live, at(7), SOCKET) is named
    assert claim(live, at(8), SOCKET) is newest


def test_newest_association_without_an_endpoint_is_guessed(live: Associations) -> None:
    first, second, third = associate(live), associate(live), associate(live)
    assert [claim(live, at(port), SOCKET) for port in (1, 2, 3, 4)] == [third, second, first, third]


def test_wrong_hint_does_no_harm(live: Associations) -> None:
    """Hazard 26.  Many clients name their target, or rubbish."""
    association = associate(live, hint=53)
    assert claim(live, at(40000), SOCKET) is association


def test_named_port_is_admitted_whoever_was_first(live: Associations) -> None:
    """A late datagram of a client that has gone must not keep out the next client there."""
    association = associate(live, hint=7)
    others = range(100, 100 + ENDPOINTS_LIMIT)
    assert {claim(live, at(port), SOCKET) for port in others} == {association}
    assert claim(live, at(7), SOCKET) is association
    assert len(association.endpoints) == ENDPOINTS_LIMIT
    # From now on the port that the client has named is known to be right.
    assert claim(live, at(9), SOCKET) is None
    assert claim(live, at(7), SOCKET) is claim(live, at(others[-1]), SOCKET) is association


def test_associations_that_named_no_port_are_guessed_first(live: Associations) -> None:
    free, named = associate(live), associate(live, hint=7)
    assert claim(live, at(9), SOCKET) is free
    assert claim(live, at(7), SOCKET) is named


def test_association_admits_on_its_relay_socket_only(live: Associations) -> None:
    association = associate(live, local=OTHER_SOCKET)
    assert claim(live, at(1), SOCKET) is None
    assert claim(live, at(1), OTHER_SOCKET) is association


def test_association_ends_with_its_control_connection(live: Associations) -> None:
    first, second = associate(live), associate(live)
    claim(live, at(1), SOCKET)
    live.remove(second)
    assert second.ended and not first.ended
    assert claim(live, at(1), SOCKET) is first
    live.remove(first)
    assert claim(live, at(1), SOCKET) is None


class TestFurtherEndpoints:
    """Hazard 23: whoever is first, the client is admitted as well."""

    def test_association_admits_several_endpoints(self, live: Associations) -> None:
        association = associate(live)
        ports = range(1, ENDPOINTS_LIMIT + 1)
        assert {claim(live, at(port), SOCKET) for port in ports} == {association}
        assert [endpoint.port for endpoint in association.endpoints] == list(ports)
        assert not association.guessed

    def test_forged_port_0_is_not_taken_for_a_named_one(self, live: Associations) -> None:
        association = associate(live)
        assert claim(live, at(0), SOCKET) is claim(live, at(1), SOCKET) is association

    def test_association_without_endpoint_comes_before_one_with_room(
        self, live: Associations
    ) -> None:
        free = associate(live)
        newest = associate(live)
        claim(live, at(1), SOCKET)
        assert newest.endpoints and claim(live, at(2), SOCKET) is free
        assert claim(live, at(3), SOCKET) is newest

    def test_association_with_room_comes_before_a_newer_full_one(self, live: Associations) -> None:
        older = associate(live)
        claim(live, at(1), SOCKET)
        full = associate(live)
        ports = range(2, ENDPOINTS_LIMIT + 2)
        assert {claim(live, at(port), SOCKET) for port in ports} == {full}
        assert claim(live, at(99), SOCKET) is older

    def test_association_that_holds_its_named_endpoint_gets_no_further_one(
        self, live: Associations
    ) -> None:
        other = associate(live)
        claim(live, at(1), SOCKET)
        named = associate(live, hint=7)
        assert claim(live, at(7), SOCKET) is named
        assert claim(live, at(9), SOCKET) is other

    def test_endpoint_with_least_to_lose_is_displaced(self, live: Associations) -> None:
        association = associate(live)
        clients = [
            noted(live, association, port, *use)
            for port, use in enumerate([(3, 9.0, 9), (0, 9.0, 9), (3, 0.0, 5), (3, 0.0, 1)])
        ]
        for port in range(4, ENDPOINTS_LIMIT):
            clients.append(noted(live, association, port, 3, 5.0, port))
        order = []
        for port in range(100, 100 + ENDPOINTS_LIMIT - 1):
            displaced = live.claim(at(port), SOCKET, 0.0).displaced
            order.append(clients.index(displaced))
            noted(live, association, port, 9, 99.0, 9)
        # No reply; then the shortest use, with the fewest datagrams.
        assert order == [1, 3, 2, *range(4, ENDPOINTS_LIMIT)]
        assert live.claim(at(999), SOCKET, 0.0).displaced is clients[0]

    def test_endpoint_without_sessions_is_displaced_first(self, live: Associations) -> None:
        association = associate(live)
        for port in range(ENDPOINTS_LIMIT - 1):
            noted(live, association, port, 0, 0.0, 1)
        silent = Client(99, at(99), FakeSocket(), no_header, association)
        assert live.claim(at(99), SOCKET, 0.0).displaced is None
        live.note(association, silent)
        assert live.claim(at(100), SOCKET, 0.0).displaced is silent

    def test_displacing_is_bounded_within_a_second_but_not_for_the_named_endpoint(
        self, live: Associations
    ) -> None:
        association = associate(live, hint=7)
        total = ENDPOINTS_LIMIT + DISPLACED_LIMIT
        assert all(live.claim(at(1000 + port), SOCKET, 5.0) for port in range(total))
        assert live.claim(at(9000), SOCKET, 5.9) is None
        assert live.claim(at(9000), SOCKET, 6.0)
        assert all(live.claim(at(1000 + port), SOCKET, 7.0) for port in range(DISPLACED_LIMIT))
        assert live.claim(at(7), SOCKET, 7.0)
        assert len(association.endpoints) == ENDPOINTS_LIMIT


def noted(
    live: Associations, association: Association, port: int, received: int, span: float, sent: int
) -> Client:
    """Return the client of an endpoint with one session."""
    claimed = live.claim(at(port), SOCKET, 0.0)
    assert claimed is not None and claimed.association is association
    client = Client(port, at(port), FakeSocket(), no_header, association)
    session: Any = SimpleNamespace(received=received, started=1.0, seen=1.0 + span)
    session.datagrams_sent = sent
    client.mappings["dialer"] = SimpleNamespace(session=session)  # type: ignore[assignment]
    live.note(association, client)
    return client


class TestSuccessor:
    """A guess which endpoint belongs to which association must not cut off the wrong client."""

    def test_guessed_endpoint_passes_to_another_association_of_the_client(
        self, live: Associations
    ) -> None:
        first, second = associate(live), associate(live)
        claim(live, at(1), SOCKET)
        claim(live, at(2), SOCKET)
        assert live.remove(second) is first
        assert claim(live, at(1), SOCKET) is claim(live, at(2), SOCKET) is first
        assert live.remove(first) is None
        assert claim(live, at(1), SOCKET) is None

    def test_guessed_endpoint_passes_to_an_association_without_endpoint(
        self, live: Associations
    ) -> None:
        first, second = associate(live), associate(live)
        claim(live, at(1), SOCKET)
        assert live.remove(second) is first
        assert claim(live, at(1), SOCKET) is first

    def test_successor_does_not_end_before_the_transfer(self, live: Associations) -> None:
        """Both control connections end at once.

        What came to the successor after its end would live until it is idle.
        """
        first, second = associate(live), associate(live)
        claim(live, at(1), SOCKET)
        events: list[str] = []
        tasks: list[Task] = []

        def end_successor() -> None:
            live.remove(first)
            events.append("ended")

        class Sessions:
            def transfer(self, owner: object, successor: object) -> None:
                assert (owner, successor) == (second, first) and live._lock.locked()
                tasks.append(Task(end_successor))
                events.append("transferred")

        assert live.remove(second, Sessions()) is first
        tasks[0].result()
        assert events == ["transferred", "ended"] and first.ended

    def test_named_endpoint_has_no_successor(self, live: Associations) -> None:
        named, _ = associate(live, hint=7), associate(live)
        assert claim(live, at(7), SOCKET) is named
        assert live.remove(named) is None
        assert named.ended

    def test_association_without_endpoint_has_no_successor(self, live: Associations) -> None:
        first, _ = associate(live), associate(live)
        assert live.remove(first) is None

    def test_successor_still_admits_its_own_endpoint(self, live: Associations) -> None:
        first, second = associate(live), associate(live)
        claim(live, at(1), SOCKET)
        live.remove(second)
        assert claim(live, at(2), SOCKET) is first
        assert first.inherited == (at(1),) and list(first.endpoints) == [at(2)]

    def test_inherited_endpoints_are_bounded(self, live: Associations) -> None:
        """Clients come and go, and what they leave behind must not grow without end."""
        associate(live)
        claim(live, at(1), SOCKET)
        for port in range(2, 200):
            guest = associate(live)
            assert claim(live, at(port), SOCKET) is guest
            live.remove(guest)
        (left,) = live._live[HOST]
        assert len(left.inherited) + len(left.endpoints) < 100

    @pytest.mark.parametrize(
        "other", [{"user": "bob"}, {"local": OTHER_SOCKET}, {"host": "192.0.2.9"}]
    )
    def test_successor_has_the_same_user_socket_and_client(
        self, live: Associations, other: dict
    ) -> None:
        associate(live, **other)
        association = associate(live, user="alice")
        claim(live, at(1), SOCKET)
        assert live.remove(association) is None


def test_removed_associations_leave_nothing_behind(live: Associations) -> None:
    associations = [associate(live, host=host) for host in (HOST, HOST, "::1")]
    assert len(live) == 3
    for association in associations:
        live.remove(association)
        # Twice does no harm.
        live.remove(association)
    assert len(live) == 0
    assert not live._live
