"""What failed logins lead to: the delay of their refusal, and penalties."""

from __future__ import annotations

import pytest

from netproxy.access import backoff
from netproxy.access.backoff import BackOff, Penalty


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


# -- penalties

GUESSER = "192.0.2.1"


def guarded(after: int = 3, first: float = 10.0, longest: float = 40.0) -> BackOff:
    back_off = BackOff(0.25)
    back_off.rules = Penalty(after, first, longest)
    return back_off


def fail(back_off: BackOff, now: float, times: int = 1, host: str = GUESSER) -> None:
    for _ in range(times):
        back_off.next_delay(host, now)


def test_penalty_begins_with_the_last_of_the_failures_and_ends_after_its_time() -> None:
    """Hazard 110."""
    back_off = guarded()
    fail(back_off, 100.0, 2)
    assert back_off.penalty(GUESSER, 100.0) == 0.0
    fail(back_off, 101.0)
    assert [back_off.penalty(GUESSER, now) for now in (101.0, 110.5, 111.0)] == [10.0, 0.5, 0.0]
    assert back_off.penalty("192.0.2.2", 101.0) == 0.0


def test_each_failure_after_a_penalty_begins_one_twice_as_long() -> None:
    """Hazard 110."""
    back_off, now, seen = guarded(), 100.0, []
    fail(back_off, now, 2)
    for _ in range(4):
        fail(back_off, now)
        seen.append(back_off.penalty(GUESSER, now))
        now += seen[-1]
    assert seen == [10.0, 20.0, 40.0, 40.0]


def test_failure_of_a_login_that_began_before_the_penalty_does_not_extend_it() -> None:
    back_off = guarded()
    fail(back_off, 100.0, 20)
    assert back_off.penalty(GUESSER, 100.0) == 10.0


def test_failures_of_more_than_a_minute_lead_to_no_penalty() -> None:
    back_off = guarded()
    for number in range(20):
        fail(back_off, 100.0 + 31.0 * number)
        assert back_off.penalty(GUESSER, 100.0 + 31.0 * number) == 0.0


def test_minute_of_the_failures_slides() -> None:
    """Hazard 110."""
    back_off = guarded(after=5)
    # A minute that began with the first failure would end between these two.
    fail(back_off, 100.0)
    fail(back_off, 159.5, 3)
    assert back_off.penalty(GUESSER, 159.5) == 0.0
    fail(back_off, 160.5)
    assert back_off.penalty(GUESSER, 160.5) == 0.0
    fail(back_off, 161.0)
    assert back_off.penalty(GUESSER, 161.0) == 10.0


def test_times_of_failures_are_bounded() -> None:
    back_off = guarded(after=5)
    fail(back_off, 100.0, 100)
    assert back_off._failures[GUESSER].times == [100.0] * 5


def test_client_is_forgotten_a_minute_after_its_penalty() -> None:
    back_off = guarded(first=300.0, longest=600.0)
    fail(back_off, 100.0, 3)
    fail(back_off, 459.0)
    assert back_off.penalty(GUESSER, 459.0) == 600.0
    fail(back_off, 459.0 + 660.0)
    assert back_off.penalty(GUESSER, 459.0 + 660.0) == 0.0


def test_right_login_resets_the_failures_but_ends_no_penalty() -> None:
    back_off = guarded()
    fail(back_off, 100.0, 2)
    back_off.succeeded(GUESSER, 100.0)
    fail(back_off, 101.0, 2)
    assert back_off.penalty(GUESSER, 101.0) == 0.0
    fail(back_off, 102.0)
    back_off.succeeded(GUESSER, 103.0)
    assert back_off.penalty(GUESSER, 103.0) == 9.0
    back_off.succeeded(GUESSER, 112.0)
    fail(back_off, 112.0, 2)
    assert back_off.penalty(GUESSER, 112.0) == 0.0


def test_hosts_of_one_ipv6_network_share_a_penalty() -> None:
    back_off = guarded()
    for host in range(3):
        fail(back_off, 100.0, host=f"2001:db8::{host}")
    assert back_off.penalty("2001:db8::99", 100.0) == 10.0
    assert back_off.penalty("2001:db8:0:1::1", 100.0) == 0.0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_loopback_addresses_get_no_penalty(host: str) -> None:
    back_off = guarded()
    fail(back_off, 100.0, 100, host)
    assert back_off.penalty(host, 100.0) == 0.0


def test_penalties_are_switched_off_by_zero() -> None:
    back_off = guarded(after=0)
    fail(back_off, 100.0, 100)
    assert back_off.penalty(GUESSER, 100.0) == 0.0
    back_off.rules = Penalty(1, 10.0, 10.0)
    fail(back_off, 100.0)
    back_off.rules = Penalty()
    assert back_off.penalty(GUESSER, 100.0) == 0.0


def test_failures_of_100000_addresses_leave_a_bounded_table() -> None:
    """Hazard 110."""
    back_off = guarded(after=1)
    for number in range(100_000):
        fail(back_off, 100.0, host=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(back_off) == backoff.CLIENTS_LIMIT
    assert back_off.penalty("10.0.0.0", 100.0) == 0.0  # the oldest is forgotten
    assert back_off.penalty(f"10.1.{99_999 >> 8 & 255}.{99_999 & 255}", 100.0) == 10.0


def test_remembered_user_passes_a_penalty_until_somebody_guesses_the_password() -> None:
    """Hazard 110: the exception must not be a way to guess without a delay."""
    back_off = guarded()
    fail(back_off, 100.0, 3)
    assert back_off.passes(GUESSER, "alice", True)
    assert not back_off.passes(GUESSER, "alice", False)
    assert not back_off.passes(GUESSER, "alice", True)
    assert back_off.passes(GUESSER, "bob", True)
    fail(back_off, 120.0)  # the next penalty begins anew
    assert back_off.passes(GUESSER, "alice", True)


def test_guesses_for_many_users_end_the_exception_for_all() -> None:
    back_off = guarded()
    fail(back_off, 100.0, 3)
    for number in range(2 * backoff.GUESSED_LIMIT):
        back_off.passes(GUESSER, f"user{number}", False)
    assert not back_off.passes(GUESSER, "alice", True)
    assert len(back_off._failures[GUESSER].guessed) == backoff.GUESSED_LIMIT
