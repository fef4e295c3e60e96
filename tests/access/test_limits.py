"""Who may connect to a listener, and how many at once (HAZARDS 95)."""

from __future__ import annotations

import pytest

from netproxy.interfaces.networks import NetworkSet
from netproxy.access.limits import Admission
from netproxy.interfaces.networks import IpNetwork
from tests.support.sockets import Task

A, B = "192.0.2.1", "192.0.2.2"


def test_admits_everybody_where_no_networks_are_named() -> None:
    assert Admission(None, 10, 10).enter("2001:db8::1") == ""


def test_admits_those_of_its_networks_only() -> None:
    door = Admission(NetworkSet([IpNetwork.parse("192.0.2.0/31")]), 10, 10)
    assert [door.enter(client) for client in ("192.0.2.1", "192.0.2.2", "::1")] == [
        "",
        "client not allowed",
        "client not allowed",
    ]


def test_a_client_has_its_own_limit() -> None:
    door = Admission(None, 10, 2)
    assert [door.enter(client) for client in (A, A, A, B)] == ["", "", "client limit", ""]
    door.leave(A)
    assert door.enter(A) == ""


def test_all_together_have_a_limit() -> None:
    door = Admission(None, 2, 2)
    assert [door.enter(client) for client in (A, B, "192.0.2.3")] == ["", "", "connection limit"]
    door.leave(B)
    assert door.enter("192.0.2.3") == ""


def test_one_that_was_refused_does_not_count() -> None:
    door = Admission(None, 2, 1)
    door.enter(A)
    for _ in range(5):
        assert door.enter(A) == "client limit"
    assert door.enter(B) == ""


def test_remembers_nobody_who_has_left() -> None:
    door = Admission(None, 100, 100)
    for number in range(50):
        door.enter(f"192.0.2.{number}")
    for number in range(50):
        door.leave(f"192.0.2.{number}")
    assert not door._occupancy.by_client and not door.live


@pytest.mark.parametrize("threads", [4])
def test_counts_right_from_many_threads(threads: int) -> None:
    door = Admission(None, 3, 3)

    def come_and_go() -> int:
        admitted = 0
        for _ in range(2000):
            if not door.enter(A):
                admitted += 1
                door.leave(A)
        return admitted

    assert all(task.result() for task in [Task(come_and_go) for _ in range(threads)])
    assert not door.live


def test_other_limits_count_the_same_connections() -> None:
    before = Admission(None, 10, 10)
    assert before.enter(A) == ""
    after = before.with_limits(None, 2, 1)
    assert [after.enter(client) for client in (A, B, "192.0.2.3")] == [
        "client limit",
        "",
        "connection limit",
    ]
    before.leave(B)
    after.leave(A)
    assert (before.live, after.live, after.entered) == (0, 0, 2)


def test_other_limits_leave_those_before_as_they_were() -> None:
    before = Admission(None, 10, 10)
    before.with_limits(NetworkSet([IpNetwork.parse("192.0.2.0/31")]), 1, 1)
    assert [before.enter(client) for client in (A, A, "::1")] == ["", "", ""]
