"""The queue of the log: bounded, in order, and the least important records go first."""

from __future__ import annotations

import math

import pytest

from netproxy.observe.writing.log_queue import RECORD_BYTES, Line, LineQueue

DEBUG, INFO, WARNING, ERROR = LEVELS = (10, 20, 30, 40)


def make(limit: int) -> LineQueue:
    return LineQueue(LEVELS, limit)


def texts(lines: list[Line]) -> str:
    return b"".join(line.data for line in lines).decode()


def put_all(queue: LineQueue, *records: tuple[int, str]) -> list[int]:
    """Put records; return the levels of the dropped ones."""
    return [level for at, text in records for level in queue.put(at, text.encode())]


def test_records_of_all_levels_leave_in_the_order_in_which_they_came() -> None:
    queue = make(10)
    put_all(queue, (INFO, "a"), (ERROR, "b"), (DEBUG, "c"), (INFO, "d"), (WARNING, "e"))
    assert (len(queue), texts(queue.take(100)), len(queue)) == (5, "abcde", 0)


def test_records_are_taken_up_to_a_number_of_bytes_but_at_least_one() -> None:
    queue = make(10)
    put_all(queue, (INFO, "aaaa"), (INFO, "bb"), (ERROR, "cc"), (INFO, "d"))
    assert [texts(queue.take(3)) for _ in range(4)] == ["aaaa", "bb", "ccd", ""]


def test_new_record_is_dropped_if_nothing_less_important_waits() -> None:
    queue = make(2)
    assert put_all(queue, (INFO, "a"), (WARNING, "b"), (INFO, "c"), (DEBUG, "d")) == [INFO, DEBUG]
    assert texts(queue.take(100)) == "ab"


def test_newest_record_of_the_lowest_level_makes_room_for_a_more_important_one() -> None:
    queue = make(4)
    put_all(queue, (INFO, "a"), (DEBUG, "b"), (DEBUG, "c"), (WARNING, "d"))
    assert queue.put(INFO, b"e") == [DEBUG]
    assert queue.put(ERROR, b"f") == [DEBUG]
    assert texts(queue.take(100)) == "a"
    assert queue.take_gap() == (2, {DEBUG: 2})
    assert texts(queue.take(100)) == "def"


def test_errors_are_dropped_last() -> None:
    """Hazard 133."""
    queue = make(3)
    dropped = put_all(queue, *[(level, str(level)) for level in LEVELS for _ in range(3)])
    assert dropped == [DEBUG] * 3 + [INFO] * 3 + [WARNING] * 3
    assert queue.put(ERROR, b"one more") == [ERROR]
    assert queue.take_gap() == (1, {DEBUG: 3, INFO: 3, WARNING: 3, ERROR: 1})
    assert texts(queue.take(100)) == "404040"


def test_memory_of_long_records_is_bounded() -> None:
    queue = make(10)
    half = b"x" * (5 * RECORD_BYTES)
    assert [queue.put(INFO, half) for _ in range(3)] == [[], [], [INFO]]
    assert queue.put(ERROR, half + half) == [INFO, INFO]
    assert queue.take_gap() == (1, {INFO: 3})
    assert [line.data for line in queue.take(1)] == [half + half]


def test_record_that_is_longer_than_the_whole_queue_has_room_when_it_is_empty() -> None:
    queue = make(1)
    assert queue.put(INFO, b"x" * (2 * RECORD_BYTES)) == []
    assert queue.put(INFO, b"y") == [INFO]


def test_smaller_limit_drops_only_what_comes_later() -> None:
    queue = make(3)
    put_all(queue, (INFO, "a"), (INFO, "b"), (INFO, "c"))
    queue.limit = 1
    assert queue.put(INFO, b"d") == [INFO]
    assert texts(queue.take(100)) == "abc"


class TestGap:
    def test_gap_is_told_between_the_records_before_and_behind_it(self) -> None:
        queue = make(2)
        put_all(queue, (INFO, "a"), (INFO, "b"), (INFO, "c"), (INFO, "d"))
        assert queue.has_gap and queue.take_gap() is None
        assert texts(queue.take(1)) == "a"
        queue.put(INFO, b"e")
        assert queue.take_gap() is None
        assert texts(queue.take(100)) == "b"
        assert queue.take_gap() == (3, {INFO: 2})
        assert not queue.has_gap and queue.take_gap() is None
        assert texts(queue.take(100)) == "e"

    def test_gap_at_the_end_is_told_without_another_record(self) -> None:
        queue = make(1)
        put_all(queue, (INFO, "a"), (WARNING, "b"), (ERROR, "c"), (WARNING, "d"))
        queue.take(100)
        assert queue.take_gap() == (1, {INFO: 1, WARNING: 2})

    def test_lines_that_could_not_be_written_belong_to_the_gap(self) -> None:
        queue = make(10)
        put_all(queue, (INFO, "a"), (ERROR, "b"))
        for line in (*queue.take(1), Line(7, WARNING, b"report", {INFO: 5, DEBUG: 1})):
            queue.note_dropped(line)
        assert queue.take_gap() == (1, {INFO: 6, DEBUG: 1})
        assert texts(queue.take(100)) == "b"

    def test_new_queue_has_none(self) -> None:
        queue = make(1)
        assert not queue.has_gap and queue.take_gap() is None and queue._gap == math.inf


@pytest.mark.parametrize("limit", [1, 7])
def test_copy_is_empty_and_has_the_same_limit(limit: int) -> None:
    queue = make(limit)
    put_all(queue, *[(INFO, "a")] * 10)
    copy = queue.empty_copy()
    assert (len(copy), copy.limit, copy.has_gap) == (0, limit, False)
    assert put_all(copy, (DEBUG, "x"), *[(ERROR, "y")] * limit) == [DEBUG]
