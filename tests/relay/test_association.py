"""Associations: who may send on a relay port, and what passes to a successor."""

from __future__ import annotations

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.relay.association import Association, Associations
from tests.support.sockets import Task

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


def at(port: int, host: str = HOST) -> Address:
    return Address(host, port)


def test_sender_without_any_association_is_unknown(live: Associations) -> None:
    assert live.claim(at(1), SOCKET) is None


def test_sender_from_another_address_is_unknown(live: Associations) -> None:
    """Hazards 21, 23."""
    association = associate(live)
    assert live.claim(at(1, "192.0.2.2"), SOCKET) is None
    assert live.claim(at(1), SOCKET) is association


def test_endpoint_keeps_its_association(live: Associations) -> None:
    first = associate(live)
    assert live.claim(at(1), SOCKET) is first
    associate(live)
    assert live.claim(at(1), SOCKET) is first


def test_sender_from_another_port_than_the_endpoint_is_unknown(live: Associations) -> None:
    """Hazard 22."""
    association = associate(live)
    live.claim(at(1), SOCKET)
    assert live.claim(at(2), SOCKET) is None
    assert live.claim(at(1), SOCKET) is association


def test_association_whose_request_named_the_port_comes_first(live: Associations) -> None:
    named, newest = associate(live, hint=7), associate(live)
    assert live.claim(at(7), SOCKET) is named
    assert live.claim(at(8), SOCKET) is newest


def test_newest_association_without_an_endpoint_is_guessed(live: Associations) -> None:
    first, second, third = associate(live), associate(live), associate(live)
    assert [live.claim(at(port), SOCKET) for port in (1, 2, 3, 4)] == [third, second, first, None]


def test_wrong_hint_does_no_harm(live: Associations) -> None:
    """Hazard 26.  Many clients name their target, or rubbish."""
    association = associate(live, hint=53)
    assert live.claim(at(40000), SOCKET) is association


def test_named_port_displaces_a_guess(live: Associations) -> None:
    """A late datagram of a client that has gone must not keep out the next client there."""
    association = associate(live, hint=7)
    assert live.claim(at(9), SOCKET) is association
    assert live.claim(at(7), SOCKET) is association
    assert live.claim(at(9), SOCKET) is None
    assert live.claim(at(7), SOCKET) is association


def test_associations_that_named_no_port_are_guessed_first(live: Associations) -> None:
    free, named = associate(live), associate(live, hint=7)
    assert live.claim(at(9), SOCKET) is free
    assert live.claim(at(7), SOCKET) is named


def test_association_admits_on_its_relay_socket_only(live: Associations) -> None:
    association = associate(live, local=OTHER_SOCKET)
    assert live.claim(at(1), SOCKET) is None
    assert live.claim(at(1), OTHER_SOCKET) is association


def test_association_ends_with_its_control_connection(live: Associations) -> None:
    first, second = associate(live), associate(live)
    live.claim(at(1), SOCKET)
    live.remove(second)
    assert second.ended and not first.ended
    assert live.claim(at(1), SOCKET) is first
    live.remove(first)
    assert live.claim(at(1), SOCKET) is None


class TestSuccessor:
    """A guess which endpoint belongs to which association must not cut off the wrong client."""

    def test_guessed_endpoint_passes_to_another_association_of_the_client(
        self, live: Associations
    ) -> None:
        first, second = associate(live), associate(live)
        live.claim(at(1), SOCKET)
        live.claim(at(2), SOCKET)
        assert live.remove(second) is first
        assert live.claim(at(1), SOCKET) is live.claim(at(2), SOCKET) is first
        assert live.remove(first) is None
        assert live.claim(at(1), SOCKET) is None

    def test_guessed_endpoint_passes_to_an_association_without_endpoint(
        self, live: Associations
    ) -> None:
        first, second = associate(live), associate(live)
        live.claim(at(1), SOCKET)
        assert live.remove(second) is first
        assert live.claim(at(1), SOCKET) is first

    def test_successor_does_not_end_before_the_transfer(self, live: Associations) -> None:
        """Both control connections end at once.

        What came to the successor after its end would live until it is idle.
        """
        first, second = associate(live), associate(live)
        live.claim(at(1), SOCKET)
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
        assert live.claim(at(7), SOCKET) is named
        assert live.remove(named) is None
        assert named.ended

    def test_association_without_endpoint_has_no_successor(self, live: Associations) -> None:
        first, _ = associate(live), associate(live)
        assert live.remove(first) is None

    def test_successor_still_admits_its_own_endpoint(self, live: Associations) -> None:
        first, second = associate(live), associate(live)
        live.claim(at(1), SOCKET)
        live.remove(second)
        assert live.claim(at(2), SOCKET) is first
        assert live.claim(at(3), SOCKET) is None

    def test_inherited_endpoints_are_bounded(self, live: Associations) -> None:
        """Clients come and go, and what they leave behind must not grow without end."""
        associate(live)
        live.claim(at(1), SOCKET)
        for port in range(2, 200):
            guest = associate(live)
            assert live.claim(at(port), SOCKET) is guest
            live.remove(guest)
        assert sum(live.claim(at(port), SOCKET) is not None for port in range(2, 200)) < 100

    @pytest.mark.parametrize(
        "other", [{"user": "bob"}, {"local": OTHER_SOCKET}, {"host": "192.0.2.9"}]
    )
    def test_successor_has_the_same_user_socket_and_client(
        self, live: Associations, other: dict
    ) -> None:
        associate(live, **other)
        association = associate(live, user="alice")
        live.claim(at(1), SOCKET)
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
