"""The bounded pool of threads: how it grows and shrinks, what it refuses, and its stop."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Callable, Iterator

import pytest

from netproxy.listener import pool as pool_module
from netproxy.listener.pool import ThreadPool
from tests.support.doubles import Lines
from tests.support.pools import Gate
from tests.support.sockets import SECONDS, Task, wait_until

NAME = "pool-under-test"

Make = Callable[..., ThreadPool]


@pytest.fixture
def make(log: Lines, gate: Gate) -> Iterator[Make]:
    pools: list[ThreadPool] = []

    def make(limit: int, waiting: int = 0) -> ThreadPool:
        pools.append(ThreadPool(NAME, limit, waiting, log))
        return pools[-1]

    yield make
    gate.let_go()
    for pool in pools:
        pool.stop(5)


def run(pool: ThreadPool) -> threading.Thread:
    """Run a task and return its thread."""
    threads: list[threading.Thread] = []
    done = threading.Event()

    def task() -> None:
        threads.append(threading.current_thread())
        done.set()

    assert pool.submit(task)
    assert done.wait(SECONDS)
    wait_until(lambda: not pool.busy)
    return threads[0]


def test_pool_without_work_has_no_thread(make: Make) -> None:
    assert make(4).threads == 0


def test_thread_is_used_again(make: Make) -> None:
    pool = make(4)
    assert len({run(pool) for _ in range(10)}) == 1
    assert pool.threads == 1


def test_pool_grows_to_its_limit_and_refuses_what_may_not_wait(make: Make, gate: Gate) -> None:
    pool = make(3, 2)
    assert [pool.submit(gate) for _ in range(6)] == [True] * 5 + [False]
    gate.wait_for(3)
    assert (pool.threads, pool.busy, gate.running) == (3, 5, 3)
    gate.let_go()
    gate.wait_for(5)
    wait_until(lambda: not pool.busy)
    assert pool.submit(lambda: None)


def test_tasks_run_in_the_order_they_came(make: Make, gate: Gate) -> None:
    pool = make(1, 10)
    order: list[int] = []
    pool.submit(gate)
    for number in range(5):
        pool.submit(lambda number=number: order.append(number))
    gate.let_go()
    wait_until(lambda: not pool.busy)
    assert order == [0, 1, 2, 3, 4]


def test_idle_threads_end(make: Make, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.02)
    pool = make(5)
    for _ in range(5):
        pool.submit(gate)
    gate.wait_for(5)
    gate.let_go()
    wait_until(lambda: not pool.threads)
    run(pool)  # another thread is started


def test_thread_about_to_end_takes_the_task_that_counts_on_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.0005)
    pool = make(2)
    for _ in range(300):
        run(pool)


def test_exception_ends_only_its_task(make: Make, log: Lines) -> None:
    """Hazard 97."""
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
    """Hazard 94: "can't start new thread", a RuntimeError."""

    @pytest.fixture
    def refuse(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        def start(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        return monkeypatch

    def test_task_is_refused_if_the_first_thread_cannot_start(
        self, make: Make, log: Lines, refuse: pytest.MonkeyPatch
    ) -> None:
        pool = make(4, 4)
        assert not pool.submit(lambda: None)
        assert (pool.threads, pool.busy) == (0, 0)
        assert log.of("limited") == [f"{NAME} pool: cannot start another thread"]
        refuse.undo()
        run(pool)

    def test_task_waits_for_a_running_thread_if_another_cannot_start(
        self, make: Make, gate: Gate, monkeypatch: pytest.MonkeyPatch
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
        assert done.wait(SECONDS)


class TestHasRoom:
    def test_unused_pool_has_room(self, make: Make) -> None:
        assert make(1).has_room

    def test_full_pool_has_no_room(self, make: Make, gate: Gate) -> None:
        pool = make(1)
        pool.submit(gate)
        assert not pool.has_room

    def test_ended_task_makes_room(self, make: Make, gate: Gate) -> None:
        pool = make(1)
        pool.submit(gate)
        gate.wait_for(1)
        gate.let_go()
        wait_until(lambda: pool.has_room)

    def test_larger_limit_makes_room(self, make: Make, gate: Gate) -> None:
        """A reload changes it."""
        pool = make(1)
        pool.submit(gate)
        assert not pool.submit(gate)
        pool.limit = 2
        assert pool.has_room and pool.submit(gate)
        gate.wait_for(2)

    def test_urgent_task_waits_without_room(self, make: Make, gate: Gate, log: Lines) -> None:
        """It continues work that was admitted before."""
        pool = make(1)
        done = threading.Event()
        pool.submit(gate)
        assert not pool.submit(done.set) and pool.submit(done.set, urgent=True)
        assert log.of("limited") == [f"{NAME} pool: all threads are busy"]
        gate.let_go()
        assert done.wait(SECONDS)


class TestStop:
    def test_stop_waits_for_running_tasks_and_ends_all_threads(
        self, make: Make, gate: Gate
    ) -> None:
        pool = make(3)
        for _ in range(3):
            pool.submit(gate)
        gate.wait_for(3)
        stopping = Task(pool.stop, 5.0)
        gate.let_go()
        stopping.result()
        assert not pool.threads

    def test_stopped_pool_takes_no_task(self, make: Make) -> None:
        pool = make(1)
        pool.stop(0)
        assert not pool.submit(lambda: None)

    def test_tasks_taken_before_the_stop_run(self, make: Make, gate: Gate) -> None:
        pool = make(1, 5)
        done: list[int] = []
        pool.submit(gate)
        for number in range(3):
            pool.submit(lambda number=number: done.append(number))
        stopping = Task(pool.stop, 5.0)
        gate.let_go()
        stopping.result()
        assert done == [0, 1, 2]

    def test_stop_waits_no_longer_than_its_seconds(self, make: Make, gate: Gate) -> None:
        pool = make(1)
        pool.submit(gate)
        gate.wait_for(1)
        Task(pool.stop, 0.01).result()
        assert pool.threads == 1

    def test_second_stop_does_no_harm(self, make: Make) -> None:
        pool = make(1)
        run(pool)
        pool.stop(5)
        pool.stop(5)


def test_no_task_of_many_submitters_is_lost(make: Make) -> None:
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


def test_clients_take_turns_while_all_threads_are_busy(make: Make, gate: Gate) -> None:
    """One client cannot keep the threads from the others, however many tasks it has."""
    pool, order, all_done = make(1), [], threading.Event()
    assert pool.submit(gate, urgent=True, client="192.0.2.1")
    gate.wait_for(1)
    hosts = [*["192.0.2.1"] * 5, "192.0.2.2", *["2001:db8::1", "2001:db8::2"] * 2, "192.0.2.2"]
    for number, host in enumerate(hosts):

        def task(number: int = number) -> None:
            order.append(number)
            if len(order) == len(hosts):
                all_done.set()

        assert pool.submit(task, urgent=True, client=host)
    gate.let_go()
    assert all_done.wait(SECONDS)
    # An IPv6 network is one client; a client's own tasks keep their order.
    assert order == [0, 5, 6, 1, 10, 7, 2, 8, 3, 9, 4]
    wait_until(lambda: not pool.busy)
    assert not pool._turns


class ForgetfulQueue:
    """A SimpleQueue that does not tell one thread, of those that come later, of its deadline."""

    def __init__(self) -> None:
        self.later = False
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._first = threading.Lock()
        self.put = self._queue.put

    def get(self, timeout: float) -> Callable[[], None]:
        forgets = self.later and self._first.acquire(blocking=False)
        return self._queue.get() if forgets else self._queue.get(timeout=timeout)


def test_thread_that_ends_has_another_one_look_at_the_time(
    make: Make, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads were seen to wait in SimpleQueue.get() long after their deadline (Python 3.11)."""
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.02)
    pool, queue = make(2), ForgetfulQueue()
    monkeypatch.setattr(pool, "_tasks", queue)
    for _ in range(2):
        pool.submit(gate)
    gate.wait_for(2)
    queue.later = True
    gate.let_go()
    wait_until(lambda: not pool.threads)
