"""A pool with eager threads: others only start for tasks that the running threads do not take."""

from __future__ import annotations

import threading
from typing import Callable, Iterator

import pytest

from netproxy.listener import pool as pool_module
from netproxy.listener.pool import ThreadPool
from tests.support.doubles import Lines
from tests.support.pools import Gate
from tests.support.sockets import SECONDS, wait_until

NAME = "pool-under-test"

Make = Callable[..., ThreadPool]


@pytest.fixture
def make(log: Lines, gate: Gate) -> Iterator[Make]:
    pools: list[ThreadPool] = []

    def make(limit: int, waiting: int = 0) -> ThreadPool:
        pools.append(ThreadPool(NAME, limit, waiting, log, eager=2))
        return pools[-1]

    yield make
    gate.let_go()
    for pool in pools:
        pool.stop(5)
    wait_until(lambda: not stall_threads())


def stall_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"{NAME}-stalls"]


def submit_gates(pool: ThreadPool, gate: Gate, number: int) -> None:
    assert [pool.submit(gate) for _ in range(number)] == [True] * number


def test_eager_threads_start_at_once(make: Make, gate: Gate) -> None:
    pool = make(8)
    submit_gates(pool, gate, 2)
    assert pool.threads == 2 and not stall_threads()
    gate.wait_for(2)


def test_no_further_thread_starts_while_tasks_are_taken_quickly(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "STALL_SECONDS", 0.2)
    pool = make(8, 10000)
    done: list[int] = []
    for number in range(3000):
        assert pool.submit(lambda number=number: done.append(number))
    wait_until(lambda: not pool.busy)
    assert sorted(done) == list(range(3000)) and pool.threads == 2
    wait_until(lambda: not stall_threads())
    assert pool.threads == 2


def test_stalled_task_gets_a_thread(make: Make, gate: Gate) -> None:
    pool = make(8)
    submit_gates(pool, gate, 2)
    gate.wait_for(2)
    done = threading.Event()
    assert pool.submit(done.set)
    assert done.wait(SECONDS)
    wait_until(lambda: pool.busy == 2 and pool.threads == 3)


@pytest.mark.parametrize("more", [1, 3, 6])
def test_many_stalled_tasks_get_threads_at_once(make: Make, gate: Gate, more: int) -> None:
    pool = make(8)
    submit_gates(pool, gate, 2)
    gate.wait_for(2)
    submit_gates(pool, gate, more)
    gate.wait_for(2 + more)
    wait_until(lambda: pool.threads == pool.busy == 2 + more)


def test_each_further_stalled_task_gets_a_thread(make: Make, gate: Gate) -> None:
    pool = make(6)
    for number in range(1, 7):
        submit_gates(pool, gate, 1)
        gate.wait_for(number)
    wait_until(lambda: pool.threads == 6)


def test_pool_grows_to_its_limit_and_refuses_what_may_not_wait(make: Make, gate: Gate) -> None:
    pool = make(4, 3)
    submit_gates(pool, gate, 7)
    assert not pool.submit(gate)
    gate.wait_for(4)
    assert pool.submit(gate, urgent=True)
    assert (pool.threads, pool.busy, gate.running) == (4, 8, 4)
    gate.let_go()
    gate.wait_for(8)
    wait_until(lambda: not pool.busy)
    assert pool.threads == 4


def test_clients_take_turns_below_the_limit(
    make: Make, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadPool, "_watch_stall", lambda pool: None)
    pool, first = make(1024, 10), Gate()
    assert pool.submit(first)
    submit_gates(pool, gate, 1)
    order: list[str] = []
    for _ in range(400):
        assert pool.submit(lambda: order.append("A"), client="192.0.2.1")
    for host in ("2001:db8::1", "2001:db8::2"):
        assert pool.submit(lambda: order.append("B"), client=host)
    # One thread alone runs the tasks, so that their order is certain.
    first.let_go()
    wait_until(lambda: pool.busy == 1)
    assert order == ["A", "B"] * 2 + ["A"] * 398 and pool.threads == 2


def test_stall_thread_ends_when_no_task_waits(make: Make, gate: Gate) -> None:
    pool = make(4, 10)
    submit_gates(pool, gate, 8)
    gate.wait_for(4)
    assert len(stall_threads()) == 1
    gate.let_go()
    gate.wait_for(8)
    wait_until(lambda: not stall_threads())
    wait_until(lambda: not pool.busy)


def test_stall_thread_starts_again_with_the_next_stall(make: Make, gate: Gate) -> None:
    pool = make(8)
    submit_gates(pool, gate, 3)
    gate.wait_for(3)
    wait_until(lambda: not stall_threads())
    submit_gates(pool, gate, 2)
    gate.wait_for(5)
    wait_until(lambda: not stall_threads())
    assert pool.threads == 5


def test_stall_thread_ends_with_the_pool(make: Make, gate: Gate) -> None:
    pool = make(3, 10)
    submit_gates(pool, gate, 8)
    gate.wait_for(3)
    assert len(stall_threads()) == 1
    pool.stop(0)
    wait_until(lambda: not stall_threads())
    assert gate.running == 3


def test_stalled_task_waits_for_a_running_thread_if_no_other_can_start(
    make: Make, gate: Gate, log: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make(4)
    submit_gates(pool, gate, 2)
    gate.wait_for(2)

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done = threading.Event()
    monkeypatch.setattr(threading.Thread, "start", start)
    assert pool.submit(done.set)
    monkeypatch.undo()
    assert log.of("limited") == [f"{NAME} pool: cannot start another thread"] and pool.threads == 2
    gate.let_go()
    assert done.wait(SECONDS)
