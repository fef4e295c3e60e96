"""The ledger: slots of subjects, sums over the tables of several processes."""

from __future__ import annotations

import os

import pytest

from netproxy.access.accounts.ledger import CONNECTIONS, DOWN, OPENED, PROBES, SESSIONS, UP, Ledger
from netproxy.access.accounts.ledger import LedgerFull


def test_counts_of_subjects_are_kept_apart() -> None:
    ledger = Ledger()
    alice, bob, client = (
        ledger.slot(kind, name) for kind, name in (("user", "a"), ("user", "b"), ("client", "a"))
    )
    alice.add(CONNECTIONS, 2)
    alice.add(UP, 1 << 50)
    bob.add(CONNECTIONS, 1)
    assert [slot.sum(CONNECTIONS) for slot in (alice, bob, client)] == [2, 1, 0]
    assert (alice.sum(UP), alice.sum(DOWN)) == (1 << 50, 0)


def test_slot_of_a_known_subject_goes_on_counting() -> None:
    ledger = Ledger()
    ledger.slot("user", "alice").add(OPENED, 3)
    ledger.slot("user", "alice").add(OPENED, 4)
    assert ledger.slot("user", "alice").sum(OPENED) == 7


def test_slot_without_flows_is_given_to_a_new_subject_the_oldest_first() -> None:
    ledger = Ledger(slots=2)
    for name in ("first", "second"):
        ledger.slot("user", name).add(UP, 5)
    ledger.slot("user", "first")
    assert ledger.slot("user", "third").sum(UP) == 0
    assert ledger.slot("user", "first").sum(UP) == 5
    assert ledger.slot("user", "second").sum(UP) == 0


def test_slot_with_a_connection_or_a_session_is_never_given_away() -> None:
    ledger = Ledger(slots=2)
    ledger.slot("user", "first").add(CONNECTIONS, 1)
    ledger.slot("user", "second").add(SESSIONS, 1)
    with pytest.raises(LedgerFull):
        ledger.slot("user", "third")
    assert ledger.slot("user", "first").sum(CONNECTIONS) == 1


def test_search_for_a_slot_is_bounded() -> None:
    ledger = Ledger(slots=PROBES * 4)
    with pytest.raises(LedgerFull):
        for number in range(PROBES * 4 + 1):
            ledger.slot("client", str(number)).add(CONNECTIONS, 1)


def test_sum_is_that_of_all_processes_and_each_writes_its_own_table() -> None:
    """Two processes that were forked from the one that made the tables."""
    ledger = Ledger(processes=3)
    ledger.slot("user", "alice").add(UP, 1)
    child = os.fork()
    if not child:
        ledger.use_table(2)
        slot = ledger.slot("user", "alice")
        slot.add(UP, 10)
        slot.add(CONNECTIONS, 1)
        os._exit(slot.sum(UP))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
    slot = ledger.slot("user", "alice")
    assert (slot.sum(UP), slot.sum(CONNECTIONS)) == (11, 1)
    assert ledger.slot("user", "bob").sum(UP) == 0
