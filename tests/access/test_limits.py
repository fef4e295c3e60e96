"""Admission: networks of clients, limits, and the counts behind them."""

from __future__ import annotations

from netproxy.access.limits import Admission
from netproxy.interfaces.networks import IpNetwork, NetworkList
from tests.support.sockets import Task

A, B = "192.0.2.1", "192.0.2.2"


def test_admission_without_networks_admits_every_address() -> None:
    assert Admission(None, 10, 10).enter("2001:db8::1") == ""


def test_admission_admits_only_clients_of_its_networks() -> None:
    admission = Admission(NetworkList([IpNetwork.parse("192.0.2.0/31")]), 10, 10)
    assert admission.enter("192.0.2.1") == ""
    assert admission.enter("192.0.2.2") == "client not allowed"
    assert admission.enter("::1") == "client not allowed"


def test_admission_limits_the_connections_of_one_client() -> None:
    admission = Admission(None, 10, 2)
    assert [admission.enter(client) for client in (A, A, A, B)] == ["", "", "client limit", ""]
    admission.leave(A)
    assert admission.enter(A) == ""


def test_admission_limits_all_connections_together() -> None:
    admission = Admission(None, 2, 2)
    assert [admission.enter(client) for client in (A, B, "192.0.2.3")] == [
        "",
        "",
        "connection limit",
    ]
    admission.leave(B)
    assert admission.enter("192.0.2.3") == ""


def test_refused_connection_does_not_count() -> None:
    admission = Admission(None, 2, 1)
    admission.enter(A)
    for _ in range(5):
        assert admission.enter(A) == "client limit"
    assert admission.enter(B) == ""


def test_admission_keeps_nothing_about_clients_that_have_left() -> None:
    admission = Admission(None, 100, 100)
    for number in range(50):
        admission.enter(f"192.0.2.{number}")
    for number in range(50):
        admission.leave(f"192.0.2.{number}")
    assert not admission._by_client and not admission._count


def test_counts_are_right_after_use_by_many_threads() -> None:
    admission = Admission(None, 3, 3)

    def come_and_go() -> int:
        admitted = 0
        for _ in range(2000):
            if not admission.enter(A):
                admitted += 1
                admission.leave(A)
        return admitted

    assert all(task.result() for task in [Task(come_and_go) for _ in range(4)])
    assert not admission._count
