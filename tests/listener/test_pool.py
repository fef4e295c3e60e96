"""The bounded pool of threads: when it grows, when it shrinks, what it refuses, what it survives."""

from __future__ import annotations

import threading
from typing import Iterator

import pytest

from netproxy.listener import pool as pool_module
from netproxy.listener.pool import ThreadPool
from tests.support.doubles import Lines
from tests.support.pools import Gate
from tests.support.sockets import Task, wait_until

NAME = "pool-under-test"


@pytest.fixture
def make(log: Lines, gate: Gate) -> Iterator[type]:
    pools: list[ThreadPool] = []

    def make(limit: int, waiting: int = 0) -> ThreadPool:
        pools.append(ThreadPool(NAME, limit, waiting, log))
        return pools[-1]

    yield make  # type: ignore[misc]
    gate.let_go()
    for pool in pools:
        pool.stop(5)


def run(pool: ThreadPool) -> threading.Thread:
    """The thread that a task of the pool ran on."""
    found: list[threading.Thread] = []
    done = threading.Event()

    def task() -> None:
        found.append(threading.current_thread())
        done.set()

    assert pool.submit(task)
    assert done.wait(5)
    wait_until(lambda: not pool.busy)
    return found[0]


def test_starts_no_thread_before_there_is_work(make: type) -> None:
    assert make(4).threads == 0


def test_a_thread_is_used_again(make: type) -> None:
    pool = make(4)
    assert len({run(pool) for _ in range(10)}) == 1
    assert pool.threads == 1


def test_grows_to_its_limit_and_no_further(make: type, gate: Gate) -> None:
    pool = make(3, 2)
    assert [pool.submit(gate) for _ in range(6)] == [True] * 5 + [False]
    gate.wait_for(3)
    assert (pool.threads, pool.busy, gate.running) == (3, 5, 3)
    gate.let_go()
    gate.wait_for(5)
    wait_until(lambda: not pool.busy)
    assert pool.submit(lambda: None)


def test_tasks_run_in_the_order_they_came(make: type, gate: Gate) -> None:
    pool = make(1, 10)
    order: list[int] = []
    pool.submit(gate)
    for number in range(5):
        pool.submit(lambda number=number: order.append(number))
    gate.let_go()
    wait_until(lambda: not pool.busy)
    assert order == [0, 1, 2, 3, 4]


def test_shrinks_when_idle(make: type, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.02)
    pool = make(5)
    for _ in range(5):
        pool.submit(gate)
    gate.wait_for(5)
    gate.let_go()
    wait_until(lambda: not pool.threads)
    run(pool)  # and grows again


def test_a_thread_about_to_end_takes_the_task_that_counts_on_it(
    make: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.0005)
    pool = make(2)
    for _ in range(300):
        run(pool)


def test_an_exception_ends_only_its_task(make: type, log: Lines) -> None:
    """HAZARDS 97."""
    pool = make(1)
    thread = run(pool)

    def broken() -> None:
        raise ValueError("broken")

    pool.submit(broken)
    log.wait_for("broken")
    wait_until(lambda: not pool.busy)
    assert run(pool) is thread
    assert log.of("exception") == [f"working as {NAME}-1: broken"]


class TestNoThread:
    """HAZARDS 94: can't start new thread, a RuntimeError."""

    @pytest.fixture
    def refuse(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        def start(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        return monkeypatch

    def test_at_all_refuses_the_task(
        self, make: type, log: Lines, refuse: pytest.MonkeyPatch
    ) -> None:
        pool = make(4, 4)
        assert not pool.submit(lambda: None)
        assert (pool.threads, pool.busy) == (0, 0)
        assert log.of("limited") == [f"{NAME}: cannot start another thread"]
        refuse.undo()
        run(pool)

    def test_more_leaves_the_task_to_those_there_are(
        self, make: type, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = make(4, 0)
        pool.submit(gate)
        gate.wait_for(1)

        def start(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        done = threading.Event()
        monkeypatch.setattr(threading.Thread, "start", start)
        assert pool.submit(done.set)
        monkeypatch.undo()
        gate.let_go()
        assert done.wait(5)


class TestRoom:
    def test_is_there(self, make: type) -> None:
        assert make(1).wait_for_room(0)

    def test_does_not_come(self, make: type, gate: Gate) -> None:
        pool = make(1)
        pool.submit(gate)
        assert not pool.wait_for_room(0.01)

    def test_comes_when_a_task_ends(self, make: type, gate: Gate) -> None:
        pool = make(1)
        pool.submit(gate)
        waiting = Task(pool.wait_for_room, 5.0)
        gate.wait_for(1)
        gate.let_go()
        assert waiting.result()

    def test_comes_with_a_larger_limit(self, make: type, gate: Gate) -> None:
        """After a reload."""
        pool = make(1)
        pool.submit(gate)
        assert not pool.submit(gate)
        pool.limit = 2
        assert pool.wait_for_room(0) and pool.submit(gate)
        gate.wait_for(2)

    def test_is_not_waited_for_once_it_stops(self, make: type, gate: Gate) -> None:
        pool = make(1)
        pool.submit(gate)
        waiting = Task(pool.wait_for_room, 5.0)
        pool.stop(0)
        waiting.result(2)


class TestStop:
    def test_waits_for_what_runs_and_ends_all_threads(self, make: type, gate: Gate) -> None:
        pool = make(3)
        for _ in range(3):
            pool.submit(gate)
        gate.wait_for(3)
        stopping = Task(pool.stop, 5.0)
        gate.let_go()
        stopping.result()
        assert not pool.threads

    def test_takes_no_more_tasks(self, make: type) -> None:
        pool = make(1)
        pool.stop(0)
        assert not pool.submit(lambda: None)

    def test_runs_what_was_taken_before(self, make: type, gate: Gate) -> None:
        pool = make(1, 5)
        done: list[int] = []
        pool.submit(gate)
        for number in range(3):
            pool.submit(lambda number=number: done.append(number))
        stopping = Task(pool.stop, 5.0)
        gate.let_go()
        stopping.result()
        assert done == [0, 1, 2]

    def test_does_not_wait_longer_than_it_may(self, make: type, gate: Gate) -> None:
        pool = make(1)
        pool.submit(gate)
        gate.wait_for(1)
        Task(pool.stop, 0.01).result(2)
        assert pool.threads == 1

    def test_twice_does_no_harm(self, make: type) -> None:
        pool = make(1)
        run(pool)
        pool.stop(5)
        pool.stop(5)


def test_many_submitters_lose_nothing(make: type) -> None:
    pool = make(4, 10000)
    lock = threading.Lock()
    done = 0

    def task() -> None:
        nonlocal done
        with lock:
            done += 1

    def submit() -> None:
        for _ in range(200):
            assert pool.submit(task)

    for submitting in [Task(submit) for _ in range(5)]:
        submitting.result()
    wait_until(lambda: not pool.busy)
    assert done == 1000 and pool.threads <= 4
