"""Counters of any thread."""

from __future__ import annotations

from netproxy.observe.metrics import Counters
from tests.support.sockets import Task


def test_counters_add_up_by_name_and_reason() -> None:
    counters = Counters()
    counters.count("drops", "refused")
    counters.count("drops", "refused", 3)
    counters.count("drops", "full", 2)
    counters.count("accepted", "")
    assert counters.value("drops", "refused") == 4
    assert counters.value("accepted") == 1
    assert counters.value("drops", "never") == 0
    assert counters.items() == [("accepted", "", 1), ("drops", "full", 2), ("drops", "refused", 4)]


def test_child_begins_with_nothing_although_the_lock_is_held() -> None:
    counters = Counters()
    counters.count("drops", "refused")
    with counters._lock:
        counters.begin_in_child()
        counters.count("drops", "full")
    assert counters.items() == [("drops", "full", 1)]


def test_concurrent_counts_are_not_lost() -> None:
    counters = Counters()

    def count() -> None:
        for _ in range(5000):
            counters.count("a", "b")

    for task in [Task(count) for _ in range(4)]:
        task.result()
    assert counters.value("a", "b") == 20000
