"""Rates: leases of a bucket, shares of its flows, turns.  The clock is the tests'."""

from __future__ import annotations

import threading
import pytest

from netproxy.access.accounts import pacing
from netproxy.access.accounts.ledger import LEASED_UP, UP, Ledger, Slot
from netproxy.access.accounts.pacing import LEASE_LEAST, Bucket, LeasedPace, Level, default_burst
from netproxy.interfaces.accounts import UNLIMITED

RATE = 1_000_000
STEP = 0.01
"""Seconds between two looks of a flow."""


class Clock:
    """Stands in for the time module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    return clock


class Sender:
    """A flow that wants to carry as much as it may, or a given number of bytes a turn."""

    def __init__(self, *buckets: Bucket, wants: int = UNLIMITED) -> None:
        self.pace = LeasedPace(threading.Lock())
        self.pace.configure(buckets, True)
        self.moved = 0
        self._wants = wants

    def send(self) -> None:
        """Carry what the turn allows."""
        left = self._wants
        while left > 0:
            room = self.pace.mark - self.moved
            if room <= 0 and not (room := self.pace.renew(self.moved)):
                return
            part = min(left, room, 1 << 40)
            self.moved += part
            left -= part


def slot() -> Slot:
    return Ledger().slot("user", "alice")


def bucket(rate: int = RATE, burst: int = 100_000) -> Bucket:
    return Bucket("users.alice.limits.rate_up", slot(), LEASED_UP, rate, burst)


def run(clock: Clock, seconds: float, *senders: Sender, step: float = STEP) -> list[int]:
    """Let senders carry bytes for a time; return what each has carried."""
    before = [sender.moved for sender in senders]
    for _ in range(round(seconds / step)):
        clock.now += step
        for sender in senders:
            sender.send()
    return [sender.moved - old for sender, old in zip(senders, before, strict=True)]


class TestLevel:
    def test_level_grows_with_time_up_to_the_burst(self) -> None:
        level = Level(100, 50, 0, 0.0)
        assert level.update(50, 0.0) == 0
        assert level.update(50, 0.1) == 10
        assert level.update(50, 10.0) == 50

    def test_level_goes_below_zero_and_recovers(self) -> None:
        level = Level(100, 50, 0, 0.0)
        assert level.update(150, 0.0) == -100
        assert level.update(150, 1.5) == 50


class TestPace:
    def test_without_a_bucket_there_is_no_limit(self) -> None:
        pace = LeasedPace(threading.Lock())
        assert pace.mark == UNLIMITED and pace.renew(5) == UNLIMITED - 5

    def test_flow_carries_the_burst_and_then_the_rate(self, clock: Clock) -> None:
        sender = Sender(bucket())
        (burst,) = run(clock, STEP, sender)
        assert 100_000 - pacing.LEASE_SECONDS * RATE < burst <= 100_000
        assert run(clock, 10.0, sender) == pytest.approx([10 * RATE], abs=LEASE_LEAST)

    def test_rate_is_kept_although_the_flow_wakes_up_late(self, clock: Clock) -> None:
        sender = Sender(bucket())
        run(clock, STEP, sender)
        assert run(clock, 10.0, sender, step=0.1) == pytest.approx([10 * RATE], abs=LEASE_LEAST)

    @pytest.mark.parametrize("rate", [1, 100, 8_000, 125_000, 125_000_000, 10_000_000_000])
    def test_every_rate_is_kept(self, clock: Clock, rate: int) -> None:
        sender = Sender(bucket(rate, default_burst(rate)))
        run(clock, 2.0, sender)
        seconds = max(60.0, 3 * LEASE_LEAST / rate)
        step = max(STEP, seconds / 4000)
        moved = sum(run(clock, seconds, sender, step=step))
        assert moved == pytest.approx(seconds * rate, rel=0.01, abs=LEASE_LEAST)

    def test_nothing_is_carried_before_the_next_lease(self, clock: Clock) -> None:
        sender = Sender(bucket())
        run(clock, STEP, sender)
        assert sender.pace.renew(sender.moved) == 0
        assert 0 < sender.pace.delay() <= pacing.LEASE_SECONDS
        assert sender.pace.decided() == "users.alice.limits.rate_up"

    def test_datagram_beyond_the_mark_is_paid_for_later(self, clock: Clock) -> None:
        sender = Sender(bucket())
        run(clock, STEP, sender)
        sender.moved += 60_000
        assert sum(run(clock, 10.0, sender)) == pytest.approx(10 * RATE - 60_000, abs=LEASE_LEAST)

    def test_bytes_of_the_next_lease_are_counted_before_it_begins(self, clock: Clock) -> None:
        """A flow that carries them early, and ends, has carried nothing that was not leased."""
        owner = slot()
        sender = Sender(Bucket("key", owner, LEASED_UP, RATE, 100_000))
        run(clock, STEP, sender)
        assert 0 < sender.pace.lease <= owner.sum(LEASED_UP) - sender.moved
        sender.moved += sender.pace.lease
        sender.pace.close(sender.moved)
        assert owner.sum(LEASED_UP) == sender.moved and sender.pace.lease == 0

    def test_slower_of_two_buckets_counts(self, clock: Clock) -> None:
        fast, slow = bucket(RATE), bucket(RATE // 4)
        sender, other = Sender(fast, slow), Sender(fast)
        run(clock, 1.0, sender, other)
        moved = run(clock, 10.0, sender, other)
        assert sum(moved) == pytest.approx(10 * RATE, rel=0.01)
        assert 10 * RATE / 4 * 0.75 < moved[0] <= 10 * RATE / 4

    def test_unused_lease_is_returned_at_the_end(self, clock: Clock) -> None:
        owner = slot()
        shared = Bucket("key", owner, LEASED_UP, RATE, 100_000)
        for _ in range(1000):
            sender = Sender(shared, wants=10)
            sender.send()
            sender.pace.close(sender.moved)
        assert owner.sum(LEASED_UP) == 10_000 and owner.sum(UP) == 0

    def test_changed_rate_counts_for_a_running_flow(self, clock: Clock) -> None:
        shared = bucket()
        sender = Sender(shared)
        run(clock, 1.0, sender)
        shared.configure(RATE * 3, 300_000)
        run(clock, 1.0, sender)
        assert sum(run(clock, 10.0, sender)) == pytest.approx(30 * RATE, abs=300_000)

    def test_limit_begins_with_what_a_running_flow_has_carried(self, clock: Clock) -> None:
        sender = Sender(wants=10_000_000)
        sender.send()
        assert sender.moved == 10_000_000
        sender.pace.configure([bucket()], False)
        (burst,) = run(clock, STEP, sender)
        assert 100_000 - pacing.LEASE_SECONDS * RATE < burst <= 100_000
        sender.pace.configure([], False)
        assert run(clock, STEP, sender) == [10_000_000]


class TestFairness:
    @pytest.mark.parametrize("number", [2, 8, 100])
    def test_flows_that_want_everything_get_equal_shares(self, clock: Clock, number: int) -> None:
        shared = bucket()
        senders = [Sender(shared) for _ in range(number)]
        run(clock, 2.0, *senders)
        moved = run(clock, 20.0, *senders)
        assert sum(moved) == pytest.approx(20 * RATE, abs=100_000)
        assert min(moved) >= 0.94 * max(moved)

    def test_flows_whose_data_comes_at_different_times_get_equal_shares(self, clock: Clock) -> None:
        """A flow that always asks while few wait gets no larger leases than the others."""
        shared = bucket(1_250_000, 312_500)
        senders = [Sender(shared, wants=14_000) for _ in range(8)]
        phases = [50, 8, 57, 14, 14, 37, 47, 19]
        before: list[int] = []
        for millisecond in range(22_000):
            clock.now += 0.001
            if millisecond == 2000:
                before = [sender.moved for sender in senders]
            for sender, phase in zip(senders, phases, strict=True):
                if millisecond % 60 == phase:
                    sender.send()
        moved = [sender.moved - old for sender, old in zip(senders, before, strict=True)]
        assert sum(moved) == pytest.approx(20 * 1_250_000, rel=0.01)
        assert min(moved) >= 0.94 * max(moved)

    def test_flow_that_wants_little_leaves_the_rest_to_the_others(self, clock: Clock) -> None:
        shared = bucket()
        modest = [Sender(shared, wants=100) for _ in range(20)]
        greedy = Sender(shared)
        run(clock, 2.0, *modest, greedy)
        *little, rest = run(clock, 10.0, *modest, greedy)
        assert set(little) == {100 * 1000}
        assert 0.9 * (10 * RATE - sum(little)) < rest <= 10 * RATE

    def test_newcomers_do_not_exceed_the_rate(self, clock: Clock) -> None:
        shared = bucket()
        moved = 0
        for _ in range(1000):
            clock.now += STEP
            sender = Sender(shared)
            sender.send()
            moved += sender.moved
            sender.pace.close(sender.moved)
        assert moved == pytest.approx(1000 * STEP * RATE, abs=200_000)

    def test_flow_that_has_ended_has_no_share(self, clock: Clock) -> None:
        shared = bucket()
        first, second = Sender(shared), Sender(shared)
        run(clock, 1.0, first, second)
        first.pace.close(first.moved)
        run(clock, 0.2, second)
        assert run(clock, 10.0, second) == pytest.approx([10 * RATE], abs=100_000)

    def test_flows_of_a_slow_user_leave_the_rest_of_a_listener_to_others(
        self, clock: Clock
    ) -> None:
        listener, user = bucket(12_500_000, 3_125_000), bucket(125_000, 65_536)
        slow = [Sender(listener, user) for _ in range(50)]
        fast = Sender(listener)
        run(clock, 2.0, *slow, fast)
        *little, rest = run(clock, 10.0, *slow, fast)
        assert sum(little) == pytest.approx(10 * 125_000, rel=0.15)
        assert rest > 0.95 * 10 * (12_500_000 - 125_000)

    @pytest.mark.parametrize(
        "number, user, listener", [(300, 64_000, 100_000), (1000, 125_000, 250_000)]
    )
    def test_no_flow_starves_under_two_limits(
        self, clock: Clock, number: int, user: int, listener: int
    ) -> None:
        of_listener, of_user = bucket(listener, 65_536), bucket(user, 65_536)
        senders = [Sender(of_listener, of_user) for _ in range(number)]
        run(clock, 20.0, *senders, step=0.1)
        moved = run(clock, 60.0, *senders, step=0.1)
        assert sum(moved) == pytest.approx(60 * user, rel=0.03)
        assert min(moved) > 0

    def test_debt_of_a_flow_that_has_ended_is_paid_by_the_next(self, clock: Clock) -> None:
        """A new UDP session for each large datagram carries no more than the rate."""
        shared, moved = bucket(125_000, 65_536), 0
        for _ in range(1000):
            clock.now += 0.05
            sender = Sender(shared)
            if sender.pace.mark > 0 or sender.pace.renew(0):
                moved += 60_000
                sender.moved = 60_000
            sender.pace.close(sender.moved)
        assert moved == pytest.approx(50 * 125_000, rel=0.1)
