"""The delay of refused logins."""

from __future__ import annotations

from netproxy.access import backoff
from netproxy.access.backoff import BackOff


def test_delay_doubles_per_client_up_to_a_limit() -> None:
    """Hazard 110."""
    back_off = BackOff(1.0)
    assert [back_off.next_delay("192.0.2.1", float(now)) for now in range(6)] == [1, 2, 4, 8, 8, 8]
    assert back_off.next_delay("192.0.2.2", 6.0) == 1
    assert back_off.next_delay("192.0.2.1", 5.0 + backoff.FORGET_SECONDS) == 1


def test_hosts_of_one_ipv6_network_are_one_client() -> None:
    back_off = BackOff(0.5)
    assert [back_off.next_delay(f"2001:db8::{host}", 1.0) for host in (1, 2, 3)] == [0.5, 1, 2]
    assert back_off.next_delay("2001:db8:0:1::1", 1.0) == 0.5


def test_clients_that_are_remembered_are_bounded() -> None:
    """Hazard 110."""
    back_off = BackOff(1.0)
    for number in range(2 * backoff.CLIENTS_LIMIT):
        back_off.next_delay(f"10.{number // 256}.{number % 256}.1", 100.0)
    assert len(back_off) == backoff.CLIENTS_LIMIT
