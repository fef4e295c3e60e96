"""Rates that several worker processes share.  The clock is the tests'."""

from __future__ import annotations

import pytest

from netproxy.access.accounts import pacing, subject
from netproxy.access.accounts.book import AccountBook
from netproxy.access.accounts.ledger import LEASED_UP, Ledger
from netproxy.access.accounts.pacing import LEASE_LEAST, Bucket
from netproxy.access.accounts.subject import Limits, ListenerRates
from netproxy.errors import FlowRefused
from tests.access.test_pacing import RATE, STEP, Clock, Sender, run
from tests.support.accounts import a_flow
from tests.support.processes import Parent, Worker, seen_by

BURST = 100_000
LEASE = int(RATE * pacing.LEASE_SECONDS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    monkeypatch.setattr(subject, "time", clock)
    return clock


class Buckets:
    """The bucket of one user in several processes."""

    def __init__(self, workers: int = 2) -> None:
        self._ledger = Ledger(workers + 1)

    def of(self, index: int) -> Bucket:
        """Return the bucket that a process makes with the user's first flow."""
        slot = seen_by(index, self._ledger).slot("user", "alice")
        return Bucket("users.alice.limits.rate_up", slot, LEASED_UP, RATE, BURST)


class TestBytes:
    def test_two_workers_have_one_rate_and_one_burst(self, clock: Clock) -> None:
        buckets = Buckets()
        senders = [Sender(buckets.of(index)) for index in (0, 1)]
        assert sum(run(clock, STEP, *senders)) <= BURST
        moved = run(clock, 100.0, *senders)
        assert sum(moved) == pytest.approx(100 * RATE, abs=2 * LEASE)
        assert min(moved) > 0.9 * max(moved)

    def test_idle_worker_is_not_punished_for_what_another_one_has_used(self, clock: Clock) -> None:
        buckets = Buckets()
        busy, idle = Sender(buckets.of(0)), Sender(buckets.of(1), wants=10)
        run(clock, STEP, busy, idle)
        run(clock, 100.0, busy)
        # The 100 seconds are not owed: the second worker has its share at once.
        idle._wants = busy._wants
        moved = run(clock, 1.0, busy, idle)
        assert sum(moved) == pytest.approx(RATE, abs=2 * LEASE)
        assert moved[1] > 0.8 * moved[0]

    def test_worker_that_was_idle_has_no_burst_of_its_own(self, clock: Clock) -> None:
        """It cannot tell from sums whether the others used the rate long ago or just now."""
        buckets = Buckets()
        busy, idle = Sender(buckets.of(0)), Sender(buckets.of(1))
        run(clock, STEP, busy, idle)
        clock.now += 100.0
        before = sum(run(clock, 50.0, busy))
        assert before == pytest.approx(50 * RATE + BURST, abs=2 * LEASE)
        assert sum(run(clock, 10.0, busy, idle)) == pytest.approx(10 * RATE, abs=2 * LEASE)

    def test_worker_that_begins_later_has_no_burst_of_its_own(self, clock: Clock) -> None:
        buckets = Buckets(4)
        senders = [Sender(buckets.of(0))]
        run(clock, 5.0, *senders)
        for index in (1, 2, 3):
            senders.append(Sender(buckets.of(index)))
            assert sum(run(clock, 5.0, *senders)) == pytest.approx(5 * RATE, abs=4 * LEASE)

    def test_what_flows_give_back_is_used_by_others(self, clock: Clock) -> None:
        """Flows of ten bytes in one worker take nothing from the rate of the other one."""
        buckets = Buckets()
        short, greedy = buckets.of(0), Sender(buckets.of(1))
        run(clock, 1.0, greedy)
        little, rest = 0, 0
        for _ in range(1000):
            sender = Sender(short, wants=10)
            sender.send()
            sender.pace.close(sender.moved)
            little += sender.moved
            rest += sum(run(clock, STEP, greedy))
        assert little + rest == pytest.approx(10 * RATE, abs=2 * LEASE)

    def test_lease_that_was_given_back_is_free_although_another_worker_has_seen_it(
        self, clock: Clock
    ) -> None:
        buckets = Buckets()
        first, second = buckets.of(0), buckets.of(1)
        first.lease(50_000, clock.now)
        assert second.lease(60_000, clock.now) > clock.now
        first.give_back(50_000)
        assert first.lease(40_000, clock.now) <= clock.now
        assert second.lease(LEASE_LEAST, clock.now) > clock.now

    def test_dead_worker_takes_no_more_than_its_leases(self, clock: Clock) -> None:
        buckets = Buckets()
        alive, dead = Sender(buckets.of(0)), Sender(buckets.of(1))
        run(clock, 1.0, alive, dead)
        assert sum(run(clock, 10.0, alive)) == pytest.approx(10 * RATE, abs=3 * LEASE)
        successor = Sender(buckets.of(1))
        moved = sum(run(clock, 10.0, alive, successor))
        assert moved == pytest.approx(10 * RATE, abs=3 * LEASE)

    def test_bucket_is_full_when_no_process_has_used_it(self, clock: Clock) -> None:
        buckets = Buckets()
        used, other = buckets.of(0), buckets.of(1)
        used.lease(BURST, clock.now)
        assert not other.is_full(clock.now)
        assert other.is_full(clock.now + BURST / RATE + 0.001)
        assert LEASE_LEAST < BURST


class TestNewConnections:
    """The rate of new connections: a burst of one second's, over all workers."""

    def workers(self, clock: Clock, number: int) -> list[AccountBook]:
        parent = Parent(number, clock.monotonic)
        books = [Worker(parent, index).book for index in range(number)]
        for book in books:
            book.configure(
                {"alice": Limits(connection_rate=10.0)},
                {"main": ListenerRates(connections_per_client=10.0)},
            )
        return books

    def opened(self, books: list[AccountBook], tries: int = 100) -> int:
        """Try to open flows, the workers by turns; return how many there were."""
        opened = 0
        for number in range(tries):
            try:
                books[number % len(books)].open(a_flow()).close()
                opened += 1
            except FlowRefused:
                pass
        return opened

    def test_workers_have_one_rate_and_one_burst(self, clock: Clock) -> None:
        books = self.workers(clock, 4)
        assert self.opened(books) == 10
        assert self.opened(books) == 0
        clock.now += 0.5
        assert self.opened(books) == 5

    def test_idle_worker_has_what_the_others_leave(self, clock: Clock) -> None:
        first, second = self.workers(clock, 2)
        assert self.opened([first]) == 10
        assert self.opened([second]) == 0
        for _ in range(20):
            clock.now += 1.0
            assert self.opened([first]) == 10
        assert self.opened([second]) == 0
        clock.now += 1.0
        assert self.opened([second]) == 10
        assert self.opened([first]) == 0

    def test_worker_that_was_idle_has_no_burst_of_its_own(self, clock: Clock) -> None:
        """It cannot tell from sums whether the others used the rate long ago or just now."""
        first, second = self.workers(clock, 2)
        assert self.opened([second], 1) == 1
        clock.now += 100.0
        for _ in range(5):
            assert self.opened([first]) == 10
            clock.now += 1.0
        assert self.opened([first]) == 10
        assert self.opened([second]) == 0

    def test_arrivals_at_a_listener_have_one_rate(self, clock: Clock) -> None:
        books = self.workers(clock, 2)
        refusals = [books[number % 2].refuse_arrival("main", "192.0.2.1") for number in range(30)]
        assert refusals.count("") == 10
