"""The ledger of several processes: slots that are kept, gauges of the dead, counts of subjects."""

from __future__ import annotations

import pytest

from netproxy.access.accounts.ledger import (
    CONNECTIONS,
    DOWN,
    LEASED_UP_UNTIL,
    SESSIONS,
    UP,
    Ledger,
    LedgerFull,
    digest_of,
)
from tests.support.processes import kill_after, seen_by


def test_killed_worker_leaves_its_counters_and_frees_its_gauges() -> None:
    ledger = Ledger(3)
    parent = seen_by(2, ledger)

    def work() -> None:
        own = seen_by(0, ledger)
        slot = own.slot("user", "alice")
        slot.enter(CONNECTIONS, True)
        slot.enter(SESSIONS, True)
        slot.add(UP, 10)
        slot.add(DOWN, 20)

    kill_after(work)
    other = seen_by(1, ledger).slot("user", "alice")
    assert [other.sum(word) for word in (CONNECTIONS, SESSIONS, UP, DOWN)] == [1, 1, 10, 20]
    parent.clear_gauges(0)
    assert [other.sum(word) for word in (CONNECTIONS, SESSIONS, UP, DOWN)] == [0, 0, 10, 20]


def test_other_workers_keep_their_gauges_when_one_has_died() -> None:
    ledger = Ledger(3)
    for index in (0, 1):
        seen_by(index, ledger).slot("client", "192.0.2.1").add(CONNECTIONS, 1)
    ledger.clear_gauges(0)
    assert ledger.sum(digest_of("client", "192.0.2.1"), CONNECTIONS) == 1


def test_successor_goes_on_with_the_table_of_the_dead_worker() -> None:
    ledger = Ledger(3, slots=2)
    before = seen_by(0, ledger)
    for name in ("first", "second", "first"):
        before.slot("client", name).add(UP, 1)
    successor = seen_by(0, ledger)
    # What the dead worker has used last is still younger than what it has used before.
    successor.slot("client", "third").add(UP, 7)
    assert successor.sum(digest_of("client", "first"), UP) == 2
    assert successor.sum(digest_of("client", "second"), UP) == 0
    successor.slot("client", "fourth")
    assert successor.sum(digest_of("client", "third"), UP) == 7


def test_slot_that_was_only_listed_when_its_worker_died_is_listed_once() -> None:
    ledger = Ledger(3)
    own = seen_by(0, ledger)
    own.slot("user", "alice")
    own._list(own.listed(0)[0] + own._words)
    assert len(own.listed(0)) == 2
    successor = seen_by(0, ledger)
    assert len(successor.listed(0)) == 1


def test_slot_of_a_user_is_kept_until_two_collections_have_passed() -> None:
    """The one that is under way may have passed the slot already."""
    ledger = Ledger(3, slots=1)
    parent, worker = seen_by(2, ledger), seen_by(0, ledger)
    slot = worker.slot("user", "alice")
    slot.enter(CONNECTIONS, True)
    slot.add(UP, 5)
    slot.leave(CONNECTIONS)
    for _ in range(2):
        with pytest.raises(LedgerFull):
            worker.slot("client", "192.0.2.1")
        parent.end_collection()
    assert worker.slot("client", "192.0.2.1").sum(UP) == 0


def test_slot_of_a_user_of_a_dead_worker_is_kept_until_it_is_collected() -> None:
    ledger = Ledger(3, slots=1)
    parent = seen_by(2, ledger)
    seen_by(0, ledger).slot("user", "alice").enter(CONNECTIONS, True)
    parent.clear_gauges(0)
    successor = seen_by(0, ledger)
    with pytest.raises(LedgerFull):
        successor.slot("client", "192.0.2.1")
    parent.end_collection()
    parent.end_collection()
    successor.slot("client", "192.0.2.1")


def test_slot_of_a_client_is_given_away_at_once() -> None:
    worker = seen_by(0, Ledger(3, slots=1))
    slot = worker.slot("client", "192.0.2.1")
    slot.enter(CONNECTIONS, True)
    slot.leave(CONNECTIONS)
    assert worker.slot("client", "192.0.2.2").sum(CONNECTIONS) == 0


def test_published_quota_is_never_given_away_and_can_be_withdrawn() -> None:
    ledger = Ledger(3, slots=1)
    parent, worker = seen_by(2, ledger), seen_by(0, ledger)
    key = digest_of("user", "alice")
    assert worker.quota(key) == 0
    parent.publish("alice", 1 << 60)
    assert worker.quota(key) == 1 << 60
    with pytest.raises(LedgerFull):
        parent.publish("bob", 5)
    parent.publish("alice", 0)
    parent.publish("bob", 5)
    assert (worker.quota(key), worker.quota(digest_of("user", "bob"))) == (0, 5)


def test_latest_time_is_that_of_all_processes() -> None:
    ledger = Ledger(3)
    slots = [seen_by(index, ledger).slot("user", "alice") for index in (0, 1)]
    assert slots[0].latest(LEASED_UP_UNTIL) == -float("inf")
    slots[0].note(LEASED_UP_UNTIL, 12.5)
    slots[1].note(LEASED_UP_UNTIL, 11.0)
    assert [slot.latest(LEASED_UP_UNTIL) for slot in slots] == [12.5, 12.5]


def test_ledger_of_one_process_has_slots_of_eighty_bytes_and_no_lists() -> None:
    assert len(Ledger(slots=4)._memory) == 4 * 80
