"""Standing: bans, expiry and quotas."""

from __future__ import annotations

import time

import pytest

from netproxy.access.accounts.standing import BANS_LIMIT, Standing, Terms
from netproxy.access.accounts.usage import UsageBook


class Clock:
    """A clock of the tests, in seconds since the epoch: noon of a day."""

    def __init__(self) -> None:
        self.now = time.mktime((2027, 1, 31, 12, 0, 0, 0, 0, -1))

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def usage(clock: Clock) -> UsageBook:
    return UsageBook(None, clock)


@pytest.fixture
def standing(usage: UsageBook, clock: Clock) -> Standing:
    return Standing(usage, clock)


def test_nobody_is_refused_at_first(standing: Standing) -> None:
    assert standing.refusal("alice", "192.0.2.1") == standing.refusal("", "192.0.2.1") == ""


def test_ban_of_a_user_ends_with_its_time(standing: Standing, clock: Clock) -> None:
    standing.ban_user("alice", 60.0)
    assert standing.refusal("alice", "192.0.2.1") == "user banned"
    assert standing.refusal("bob", "192.0.2.1") == standing.refusal("", "192.0.2.1") == ""
    assert [ban.name for ban in standing.bans()[0]] == ["alice"]
    clock.now += 61.0
    assert standing.refusal("alice", "192.0.2.1") == "" and standing.bans() == ([], [])


def test_ban_of_an_ipv6_address_is_that_of_its_network(standing: Standing, clock: Clock) -> None:
    standing.ban_client("2001:db8::1")
    assert standing.refusal("alice", "2001:db8::/64") == "client banned"
    clock.now += 10 * 365 * 86400.0
    assert standing.refusal("", "2001:db8::/64") == "client banned"
    assert standing.unban("2001:db8::5") and not standing.unban("2001:db8::5")
    assert standing.refusal("", "2001:db8::/64") == ""


def test_unban_takes_a_user_and_a_network_by_name(standing: Standing) -> None:
    standing.ban_user("alice")
    standing.ban_client("2001:db8::1")
    assert standing.unban("alice") and standing.unban("2001:db8::/64")
    assert standing.bans() == ([], [])


def test_bans_are_bounded(standing: Standing) -> None:
    for number in range(BANS_LIMIT + 10):
        standing.ban_user(str(number))
    assert len(standing.bans()[0]) == BANS_LIMIT


def test_user_expires_at_the_end_of_the_last_day(standing: Standing, clock: Clock) -> None:
    standing.configure({"alice": Terms(expires="2027-01-31")})
    assert standing.refusal("alice", "") == ""
    clock.now += 11.9 * 3600
    assert standing.refusal("alice", "") == ""
    clock.now += 0.2 * 3600
    assert standing.refusal("alice", "") == "user expired"
    assert standing.refusal("bob", "") == ""


@pytest.mark.parametrize("terms", [Terms(day=1000), Terms(month=1000), Terms(total=1000)])
def test_quota_counts_both_directions(standing: Standing, usage: UsageBook, terms: Terms) -> None:
    standing.configure({"alice": terms})
    usage.moved("alice", 400, 599)
    usage.moved("bob", 4000, 0)
    assert standing.refusal("alice", "") == ""
    usage.moved("alice", 0, 1)
    assert standing.refusal("alice", "") == "quota used up"


def test_day_and_month_begin_anew(standing: Standing, usage: UsageBook, clock: Clock) -> None:
    usage.moved("alice", 1000, 0)
    standing.configure({"alice": Terms(day=1000, month=1000, total=2000)})
    assert standing.refusal("alice", "") == "quota used up"
    clock.now += 86400.0
    assert standing.refusal("alice", "") == ""
    usage.moved("alice", 999, 0)
    assert standing.refusal("alice", "") == ""
    usage.moved("alice", 1, 0)
    assert standing.refusal("alice", "") == "quota used up"
