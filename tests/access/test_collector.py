"""What users move in worker processes: collected in the parent, with quotas that it publishes."""

from __future__ import annotations

import pytest

from netproxy.access.accounts import collector
from netproxy.access.accounts.ledger import UP, digest_of
from netproxy.access.accounts.standing import Terms
from netproxy.access.accounts.usage import OTHERS
from netproxy.errors import FlowRefused
from tests.access.test_accounts import Live
from tests.access.test_standing import Clock
from tests.support.accounts import a_flow
from tests.support.processes import Parent, Worker, kill_after, seen_by


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Rig:
    """A parent and its workers, with some users that are configured."""

    def __init__(self, clock: Clock, slots: int = 64, **terms: Terms) -> None:
        self.clock = clock
        self.parent = Parent(2, clock, slots)
        self.configure(**terms)
        self.parent.collector.collect()
        self.workers = [Worker(self.parent, index) for index in (0, 1)]

    def configure(self, **terms: Terms) -> None:
        """Apply terms in the parent; workers that are made later have them too."""
        self.parent.usage.reserve(terms)
        self.parent.collector.configure(terms)
        self.parent.standing.configure(terms)

    def move(self, index: int, user: str, up: int, down: int = 0) -> None:
        """Let a flow of a user begin, carry bytes and end."""
        flow = a_flow(user)
        account = self.workers[index].book.open(flow)
        account.attach(Live(flow, up, down))
        account.close()

    def total(self, user: str) -> tuple[int, int]:
        """Collect; return what a user has moved in total."""
        self.parent.collector.collect()
        return self.parent.usage.of(user)[2]

    def refused(self, user: str) -> list[bool]:
        """Return whether the workers refuse a user."""
        refusals = [worker.standing.refusal(user, "") for worker in self.workers]
        assert set(refusals) <= {"", "quota used up"}
        return [bool(refusal) for refusal in refusals]


class TestUsage:
    def test_bytes_of_all_workers_are_added_up_once(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(), bob=Terms())
        rig.move(0, "alice", 1, 2)
        rig.move(1, "alice", 10, 20)
        rig.move(1, "bob", 5)
        assert (rig.total("alice"), rig.total("bob")) == ((11, 22), (5, 0))
        rig.move(1, "alice", 100, 200)
        assert (rig.total("alice"), rig.total("bob")) == ((111, 222), (5, 0))

    def test_running_flows_are_collected_after_the_janitor_has_settled_them(
        self, clock: Clock
    ) -> None:
        rig = Rig(clock, alice=Terms())
        flow = a_flow()
        live = Live(flow, 3, 4)
        rig.workers[0].book.open(flow).attach(live)
        rig.workers[0].book.expire(1.0)
        assert rig.total("alice") == (3, 4)

    def test_bytes_of_a_killed_worker_are_kept_and_its_successor_goes_on(
        self, clock: Clock
    ) -> None:
        rig = Rig(clock, alice=Terms())
        rig.move(0, "alice", 1)
        assert rig.total("alice") == (1, 0)

        def work() -> None:
            rig.workers[0].book.open(a_flow())
            rig.move(0, "alice", 10)

        kill_after(work)
        rig.parent.ledger.clear_gauges(0)
        rig.workers[0] = Worker(rig.parent, 0)
        rig.move(0, "alice", 100)
        assert rig.total("alice") == (111, 0)

    def test_slot_that_another_user_gets_makes_no_usage_jump(self, clock: Clock) -> None:
        rig = Rig(clock, slots=2, alice=Terms(), bob=Terms())
        rig.workers[0].book.open(a_flow(""))  # has one of the slots
        rig.move(0, "alice", 1000)
        # The slot is kept until alice is collected: nothing of hers is lost.
        rig.move(0, "bob", 1)
        assert (rig.total("alice"), rig.total("bob")) == ((1000, 0), (0, 0))
        rig.parent.collector.collect()
        rig.move(0, "bob", 2000)
        assert (rig.total("alice"), rig.total("bob")) == ((1000, 0), (2000, 0))
        rig.parent.collector.collect()
        rig.move(0, "alice", 1500)
        assert (rig.total("alice"), rig.total("bob")) == ((2500, 0), (2000, 0))

    def test_user_who_gets_a_slot_back_is_counted_from_zero(self, clock: Clock) -> None:
        """Between two collections the slot was another one's, although it looks the same."""
        rig = Rig(clock, slots=2, alice=Terms())
        rig.workers[0].book.open(a_flow(""))  # has one of the slots
        rig.move(0, "alice", 1000)
        assert rig.total("alice") == (1000, 0)
        rig.parent.collector.collect()
        rig.workers[0].ledger.slot("client", "192.0.2.9")
        rig.move(0, "alice", 1500)
        assert rig.total("alice") == (2500, 0)

    def test_slot_that_is_being_given_away_is_left_for_the_next_time(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms())
        rig.move(0, "alice", 1000)
        (start,) = (
            start
            for start in rig.parent.ledger.listed(0)
            if rig.parent.ledger.tables[0][start] == digest_of("user", "alice")[0]
        )
        table = rig.parent.ledger.tables[0]
        high, low = table[start], table[start + 1]
        table[start] = table[start + 1] = 0
        assert rig.total("alice") == (0, 0)
        table[start], table[start + 1] = high, low
        assert rig.total("alice") == (1000, 0)

    def test_user_whom_a_worker_names_later_loses_nothing(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms())
        rig.workers[0].usage.reserve({"alice"})
        rig.move(0, "alice", 1)
        rig.move(0, "guest", 10, 20)
        rig.move(1, "guest", 1, 2)
        assert rig.total("guest") == (0, 0)
        assert rig.parent.collector.unknown == 1
        names = rig.workers[0].usage.names(0)
        assert names == ["guest"] and rig.workers[0].usage.names(1) == []
        rig.parent.collector.learn(names)
        assert rig.parent.collector.unknown == 0
        assert rig.total("guest") == (11, 22)
        rig.move(1, "guest", 100)
        assert rig.total("guest") == (111, 22)

    def test_users_without_names_are_bounded(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(collector, "UNKNOWN_LIMIT", 2)
        rig = Rig(clock)
        for user in ("a", "b", "c"):
            rig.move(0, user, 5)
            rig.parent.collector.collect()
        assert rig.parent.collector.unknown == 2
        assert rig.total(OTHERS) == (5, 0)

    def test_clients_are_not_collected(self, clock: Clock) -> None:
        rig = Rig(clock)
        rig.move(0, "", 5)
        rig.parent.collector.collect()
        assert rig.parent.collector.unknown == 0


class TestQuotas:
    def test_quota_used_up_in_one_worker_refuses_in_the_other(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(total=100), bob=Terms(total=100))
        rig.move(0, "alice", 30, 30)
        assert rig.refused("alice") == [False, False]
        # The sum counts before the parent has collected anything.
        rig.move(1, "alice", 40)
        assert rig.refused("alice") == [True, True]
        with pytest.raises(FlowRefused):
            rig.workers[0].book.open(a_flow())
        assert rig.refused("bob") == [False, False]

    def test_running_flows_end_in_every_worker(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(total=100))
        flow = a_flow()
        live = Live(flow, 1, 1)
        rig.workers[0].book.open(flow).attach(live)
        rig.move(1, "alice", 99)
        kills = rig.workers[0].book.expire(1.0)
        assert len(kills) == 1

    def test_what_was_collected_does_not_count_twice(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(total=100))
        for _ in range(9):
            rig.move(0, "alice", 10)
            rig.parent.collector.collect()
        assert rig.refused("alice") == [False, False]
        rig.move(1, "alice", 10)
        assert rig.refused("alice") == [True, True]
        rig.parent.collector.collect()
        assert rig.refused("alice") == [True, True]

    def test_usage_from_before_the_start_counts(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(total=100), bob=Terms(total=100))
        rig.parent.usage.moved("alice", 50, 50)
        rig.parent.usage.moved("bob", 50, 49)
        rig.parent.collector.collect()
        assert (rig.refused("alice"), rig.refused("bob")) == ([True, True], [False, False])
        rig.move(0, "bob", 1)
        assert rig.refused("bob") == [True, True]

    def test_quota_of_a_day_ends_at_midnight(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(day=100, month=150))
        rig.move(0, "alice", 100)
        rig.parent.collector.collect()
        assert rig.refused("alice") == [True, True]
        clock.now += 86400.0
        rig.parent.collector.collect()
        assert rig.refused("alice") == [False, False]
        rig.move(1, "alice", 99)
        assert rig.refused("alice") == [False, False]
        rig.move(1, "alice", 1)
        assert rig.refused("alice") == [True, True]

    def test_first_of_several_quotas_counts(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(day=100, total=60))
        rig.move(0, "alice", 60)
        assert rig.refused("alice") == [True, True]

    def test_changed_quota_counts_with_the_next_collection(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(total=100))
        rig.move(0, "alice", 100)
        assert rig.refused("alice") == [True, True]
        rig.configure(alice=Terms(total=200))
        rig.parent.collector.collect()
        assert rig.refused("alice") == [False, False]
        rig.configure()
        rig.parent.collector.collect()
        assert rig.workers[0].ledger.quota(digest_of("user", "alice")) == 0

    def test_quota_stays_used_up_although_the_slots_are_given_away(self, clock: Clock) -> None:
        rig = Rig(clock, slots=4, alice=Terms(total=100))
        rig.move(0, "alice", 100)
        for _ in range(3):
            rig.parent.collector.collect()
        for number in range(8):
            rig.workers[0].ledger.slot("client", str(number))
        assert rig.parent.ledger.sum(digest_of("user", "alice"), UP) == 0
        assert rig.refused("alice") == [True, True]
        rig.parent.collector.collect()
        assert rig.refused("alice") == [True, True]

    def test_many_users_have_room_by_urgency(self, clock: Clock) -> None:
        """A quarter of 64 slots: used up, then with running flows, then nearly used up."""
        terms = {f"user{number}": Terms(total=1000 + number) for number in range(40)}
        rig = Rig(clock, **terms)
        for number in range(5):
            rig.parent.usage.moved(f"user{number}", 2000, 0)
        running = [f"user{number}" for number in range(30, 40)]
        accounts = [rig.workers[1].book.open(a_flow(user)) for user in running]
        rig.parent.usage.moved("user20", 1000, 0)
        rig.parent.collector.collect()
        published = [user for user in terms if rig.workers[0].ledger.quota(digest_of("user", user))]
        assert published == [*(f"user{number}" for number in range(5)), "user20", *running]
        for account in accounts:
            account.close()
        rig.parent.collector.collect()
        published = [user for user in terms if rig.workers[0].ledger.quota(digest_of("user", user))]
        assert published == [*(f"user{number}" for number in range(15)), "user20"]

    def test_killed_worker_has_used_what_it_has_used(self, clock: Clock) -> None:
        rig = Rig(clock, alice=Terms(total=100))
        kill_after(lambda: rig.move(0, "alice", 100))
        rig.parent.ledger.clear_gauges(0)
        assert rig.refused("alice") == [True, True]
        rig.parent.collector.collect()
        assert rig.refused("alice") == [True, True] and rig.total("alice") == (100, 0)


def test_collection_reads_the_tables_of_all_workers_and_not_that_of_the_parent(
    clock: Clock,
) -> None:
    parent = Parent(3, clock)
    parent.collector.configure(["alice"])
    for index in range(4):
        seen_by(index, parent.ledger).slot("user", "alice").add(UP, 10**index)
    parent.collector.collect()
    assert parent.usage.of("alice")[2] == (111, 0)
