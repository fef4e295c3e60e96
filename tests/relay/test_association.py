"""ARCHITECTURE section 6: who may send on a relay port."""

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


def test_nobody_is_a_stranger(live: Associations) -> None:
    assert live.claim(at(1), SOCKET) is None


def test_another_address_is_a_stranger(live: Associations) -> None:
    """HAZARDS 21, 23."""
    association = associate(live)
    assert live.claim(at(1, "192.0.2.2"), SOCKET) is None
    assert live.claim(at(1), SOCKET) is association


def test_an_endpoint_keeps_its_association(live: Associations) -> None:
    first = associate(live)
    assert live.claim(at(1), SOCKET) is first
    associate(live)
    assert live.claim(at(1), SOCKET) is first


def test_another_port_after_the_endpoint_is_a_stranger(live: Associations) -> None:
    """HAZARDS 22."""
    association = associate(live)
    live.claim(at(1), SOCKET)
    assert live.claim(at(2), SOCKET) is None
    assert live.claim(at(1), SOCKET) is association


def test_the_request_that_named_the_port_comes_first(live: Associations) -> None:
    named, newest = associate(live, hint=7), associate(live)
    assert live.claim(at(7), SOCKET) is named
    assert live.claim(at(8), SOCKET) is newest


def test_else_the_newest_without_an_endpoint(live: Associations) -> None:
    first, second, third = associate(live), associate(live), associate(live)
    assert [live.claim(at(port), SOCKET) for port in (1, 2, 3, 4)] == [third, second, first, None]


def test_a_hint_that_was_wrong_does_no_harm(live: Associations) -> None:
    """HAZARDS 26: many clients name their target, or rubbish."""
    association = associate(live, hint=53)
    assert live.claim(at(40000), SOCKET) is association


def test_the_port_that_was_named_displaces_a_guess(live: Associations) -> None:
    """A late datagram of a client that has gone must not keep the next one of that address out."""
    association = associate(live, hint=7)
    assert live.claim(at(9), SOCKET) is association
    assert live.claim(at(7), SOCKET) is association
    assert live.claim(at(9), SOCKET) is None
    assert live.claim(at(7), SOCKET) is association


def test_those_that_named_no_port_are_guessed_first(live: Associations) -> None:
    free, named = associate(live), associate(live, hint=7)
    assert live.claim(at(9), SOCKET) is free
    assert live.claim(at(7), SOCKET) is named


def test_only_by_the_relay_socket_it_was_given(live: Associations) -> None:
    association = associate(live, local=OTHER_SOCKET)
    assert live.claim(at(1), SOCKET) is None
    assert live.claim(at(1), OTHER_SOCKET) is association


def test_ends_with_its_control_connection(live: Associations) -> None:
    first, second = associate(live), associate(live)
    live.claim(at(1), SOCKET)
    live.remove(second)
    assert second.ended and not first.ended
    assert live.claim(at(1), SOCKET) is first
    live.remove(first)
    assert live.claim(at(1), SOCKET) is None


class TestHeirs:
    """Which of several endpoints of a client is whose was a guess, which must not cut off the wrong one."""

    def test_an_endpoint_passes_to_another_association_of_the_client(
        self, live: Associations
    ) -> None:
        first, second = associate(live), associate(live)
        live.claim(at(1), SOCKET)
        live.claim(at(2), SOCKET)
        assert live.remove(second) is first
        assert live.claim(at(1), SOCKET) is live.claim(at(2), SOCKET) is first
        assert live.remove(first) is None
        assert live.claim(at(1), SOCKET) is None

    def test_also_to_one_that_still_waits_for_its_own(self, live: Associations) -> None:
        first, second = associate(live), associate(live)
        live.claim(at(1), SOCKET)
        assert live.remove(second) is first
        assert live.claim(at(1), SOCKET) is first

    def test_an_heir_does_not_end_before_it_has_inherited(self, live: Associations) -> None:
        """Both control connections end at once: what came to it afterwards would live until it is idle."""
        first, second = associate(live), associate(live)
        live.claim(at(1), SOCKET)
        said: list[str] = []

        def end_the_heir() -> None:
            live.remove(first)
            said.append("ended")

        def bequeath(association: Association, heir: Association) -> None:
            assert (association, heir) == (second, first) and live._lock.locked()
            tasks.append(Task(end_the_heir))
            said.append("inherited")

        tasks: list[Task] = []
        assert live.remove(second, bequeath) is first
        tasks[0].result()
        assert said == ["inherited", "ended"] and first.ended

    def test_one_that_the_request_named_passes_to_nobody(self, live: Associations) -> None:
        named, _ = associate(live, hint=7), associate(live)
        assert live.claim(at(7), SOCKET) is named
        assert live.remove(named) is None
        assert named.ended

    def test_one_without_an_endpoint_has_nothing_to_pass_on(self, live: Associations) -> None:
        first, _ = associate(live), associate(live)
        assert live.remove(first) is None

    def test_one_that_has_inherited_still_admits_its_own(self, live: Associations) -> None:
        first, second = associate(live), associate(live)
        live.claim(at(1), SOCKET)
        live.remove(second)
        assert live.claim(at(2), SOCKET) is first
        assert live.claim(at(3), SOCKET) is None

    def test_what_one_inherits_is_bounded(self, live: Associations) -> None:
        """Clients come and go, and what they leave must not grow without end."""
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
    def test_not_to_another_user_port_or_client(self, live: Associations, other: dict) -> None:
        associate(live, **other)
        association = associate(live, user="alice")
        live.claim(at(1), SOCKET)
        assert live.remove(association) is None


def test_is_counted_while_it_lives_and_leaves_nothing_behind(live: Associations) -> None:
    several = [associate(live, host=host) for host in (HOST, HOST, "::1")]
    assert len(live) == 3
    for one in several:
        live.remove(one)
        live.remove(one)  # twice does no harm
    assert len(live) == 0
    assert not live._live
