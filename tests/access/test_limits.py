"""Who may connect to a listener, and how many at once (HAZARDS 95)."""

from __future__ import annotations

import pytest

from netproxy.access import limits
from netproxy.access.limits import Admission
from netproxy.interfaces import fairness
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.listeners import ALL_CLIENTS, AllowedClients
from netproxy.interfaces.networks import IpNetwork
from tests.support.sockets import Task

A, B = "192.0.2.1", "192.0.2.2"
ALLOWED = AllowedClients(([IpNetwork.parse("192.0.2.0/31")], ()))


def test_admits_everybody_where_no_networks_are_named() -> None:
    assert Admission(ALL_CLIENTS, 10, 10).enter("2001:db8::1") == ""


def test_admits_those_of_its_networks_only() -> None:
    door = Admission(ALLOWED, 10, 10)
    assert [door.enter(client) for client in ("192.0.2.1", "192.0.2.2", "::1")] == [
        "",
        "client not allowed",
        "client not allowed",
    ]


def test_a_client_has_its_own_limit() -> None:
    door = Admission(ALL_CLIENTS, 10, 2)
    assert [door.enter(client) for client in (A, A, A, B)] == ["", "", "client limit", ""]
    door.leave(A)
    assert door.enter(A) == ""


def test_all_together_have_a_limit() -> None:
    door = Admission(ALL_CLIENTS, 2, 2)
    assert [door.enter(client) for client in (A, B, "192.0.2.3")] == ["", "", "connection limit"]
    door.leave(B)
    assert door.enter("192.0.2.3") == ""


def test_one_that_was_refused_does_not_count() -> None:
    door = Admission(ALL_CLIENTS, 2, 1)
    door.enter(A)
    for _ in range(5):
        assert door.enter(A) == "client limit"
    assert door.enter(B) == ""


def test_remembers_nobody_who_has_left() -> None:
    door = Admission(ALL_CLIENTS, 100, 100)
    for number in range(50):
        door.enter(f"192.0.2.{number}")
    for number in range(50):
        door.leave(f"192.0.2.{number}")
    assert not door._occupancy.by_client and not door.live


@pytest.mark.parametrize("threads", [4])
def test_counts_right_from_many_threads(threads: int) -> None:
    door = Admission(ALL_CLIENTS, 3, 3)

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
    before = Admission(ALL_CLIENTS, 10, 10)
    assert before.enter(A) == ""
    after = before.with_limits(ALL_CLIENTS, 2, 1)
    assert [after.enter(client) for client in (A, B, "192.0.2.3")] == [
        "client limit",
        "",
        "connection limit",
    ]
    before.leave(B)
    after.leave(A)
    assert (before.live, after.live, after.entered) == (0, 0, 2)


def test_other_limits_leave_those_before_as_they_were() -> None:
    before = Admission(ALL_CLIENTS, 10, 10)
    before.with_limits(ALLOWED, 1, 1)
    assert [before.enter(client) for client in (A, A, "::1")] == ["", "", ""]


class Resident:
    """A connection that has entered; it remembers that it must end."""

    def __init__(self, admission: Admission, host: str, handshaking: bool = False) -> None:
        assert admission.enter(host) == ""
        self.client = Address(host, 1)
        self.handshaking = handshaking
        self.seconds = 0.0
        self.must_end = False
        self._admission = admission
        admission.residents[self] = None

    def idle(self) -> float:
        return self.seconds

    def evict(self) -> None:
        self.must_end = True

    def leave(self) -> None:
        self._admission.leave(self.client.host, self)


class TestSharing:
    """Hazard 137: all connections are taken."""

    def fill(self, admission: Admission, *hosts: str) -> list[Resident]:
        return [Resident(admission, host) for host in hosts]

    def ending(self, residents: list[Resident]) -> list[int]:
        """Return the numbers of the connections that must end."""
        return [number for number, resident in enumerate(residents) if resident.must_end]

    def test_client_with_most_connections_loses_one_for_another_client(self) -> None:
        door = Admission(ALL_CLIENTS, 8, 8)
        residents = self.fill(door, *"BAAAABAA")
        residents += self.fill(door, "C", "D")
        assert self.ending(residents) == [1, 2]
        assert door.live == 10
        residents[1].leave()
        residents[2].leave()
        assert door.live == 8

    def test_newcomer_is_refused_if_nobody_has_more(self) -> None:
        door = Admission(ALL_CLIENTS, 4, 4)
        residents = self.fill(door, *"AABB")
        assert [door.enter(client) for client in "AB"] == ["connection limit"] * 2
        residents += self.fill(door, "C")
        assert [door.enter(client) for client in "ABCD"] == ["connection limit"] * 4
        assert self.ending(residents) == [0]

    def test_unfinished_handshake_ends_first_then_what_is_idle_longest(self) -> None:
        door = Admission(ALL_CLIENTS, 8, 8)
        residents = self.fill(door, *"AAAAAAA")
        residents.append(Resident(door, "A", handshaking=True))
        residents[5].seconds = 9.0
        self.fill(door, "B", "C")
        assert self.ending(residents) == [5, 7]

    def test_connections_beyond_the_limit_are_few_until_the_others_have_ended(self) -> None:
        door = Admission(ALL_CLIENTS, 8, 8)
        residents = self.fill(door, *"A" * 8)
        residents += self.fill(door, "B", "C")
        assert door.enter("D") == "connection limit"
        next(resident for resident in residents if resident.must_end).leave()
        assert door.enter("D") == ""
        assert door.live == 10

    def test_client_of_an_address_is_looked_up_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looked_up: list[str] = []

        def client_key(host: str) -> str:
            looked_up.append(host)
            return fairness.client_key(host)

        monkeypatch.setattr(limits, "client_key", client_key)
        door = Admission(ALL_CLIENTS, 8, 8)
        hosts = [f"2001:db8::{number}" for number in range(8)]
        residents = self.fill(door, *hosts)
        others = [f"2001:db8:1:{number}::1" for number in range(6)] + ["192.0.2.1"]
        for host in others:
            residents += self.fill(door, host)
            next(resident for resident in residents if resident.must_end).leave()
            residents = [resident for resident in residents if not resident.must_end]
        assert self.ending(residents) == [] and door.live == 8
        for resident in residents:
            resident.leave()
        assert looked_up == hosts + others[:-1]
        occupancy = door._occupancy
        assert not (door.residents or occupancy.of_client or occupancy.keys or occupancy.evicted)

    def test_ipv6_network_is_one_client_and_the_limit_of_a_client_is_for_an_address(self) -> None:
        door = Admission(ALL_CLIENTS, 4, 2)
        residents = self.fill(door, *[f"2001:db8::{number}" for number in (1, 1, 2, 3)])
        assert door.enter("2001:db8::1") == "client limit"
        assert door.enter("2001:db8::4") == "connection limit"
        residents += self.fill(door, "2001:db8:0:1::1")
        assert self.ending(residents) == [0]
        for resident in residents:
            resident.leave()
        assert not (door.live or door.residents or door._occupancy.by_client)
        assert not (door._occupancy.by_address or door._occupancy.evicted)
        assert not (door._occupancy.of_client or door._occupancy.keys)
