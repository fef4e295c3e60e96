"""The queue in front of a pool: shares of threads, turns, what is dropped, how it stops.

The pool has no threads: a task runs until the test ends it.
"""

from __future__ import annotations

from typing import Any, Callable

import pytest

from netproxy.listener.fair_queue import FairQueue
from netproxy.listener.pool import ThreadPool
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, Task, wait_until


class StubPool:
    """A ThreadPool whose tasks the test runs."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running: list[Callable[[], None]] = []
        self.has_room = True
        self.stopped_within: list[float] = []

    @property
    def threads(self) -> int:
        return len(self.running)

    def submit(self, task: Callable[[], None], urgent: bool = False) -> bool:
        assert urgent
        if self.has_room:
            self.running.append(task)
        return self.has_room

    def stop(self, seconds: float) -> None:
        self.stopped_within.append(seconds)


class Work:
    """A ClientTask that records what becomes of it."""

    def __init__(self, client: str, log: list[str], failure: Exception | None = None) -> None:
        self.client = client
        self._log = log
        self._failure = failure

    def run(self) -> None:
        self._log.append(f"ran {self.client}")
        if self._failure:
            raise self._failure

    def drop(self) -> None:
        self._log.append(f"dropped {self.client}")


class Rig:
    """A queue, its pool, and what became of the tasks."""

    def __init__(self, limit: int, waiting: int) -> None:
        self.pool = StubPool(limit)
        pool: Any = self.pool
        self.queue = FairQueue(pool, waiting)
        self.log: list[str] = []

    def submit(self, *clients: str) -> None:
        for client in clients:
            self.queue.submit(Work(client, self.log))

    @property
    def running(self) -> dict[str, int]:
        """The number of running tasks by client."""
        clients = [task._task.client for task in self.pool.running]  # type: ignore[attr-defined]
        return {client: clients.count(client) for client in clients}

    def end(self, client: str) -> None:
        """End the oldest running task of a client."""
        for index, task in enumerate(self.pool.running):
            if task._task.client == client:  # type: ignore[attr-defined]
                del self.pool.running[index]
                task()
                return
        raise AssertionError(f"no task of {client} runs")


class TestShares:
    def test_client_alone_has_half_of_the_threads(self) -> None:
        rig = Rig(8, 100)
        rig.submit(*["a"] * 20)
        assert rig.running == {"a": 4} and rig.queue.busy == 20

    @pytest.mark.parametrize("attackers, share", [(1, 32), (2, 21), (50, 1)])
    def test_thread_is_free_for_a_client_that_has_none(self, attackers: int, share: int) -> None:
        """Hazard 138.  The attackers' tasks never end."""
        rig = Rig(64, 256)
        names = [f"attacker {number}" for number in range(attackers)]
        for _ in range(100):
            rig.submit(*names)
        assert all(share <= count <= share + 1 for count in rig.running.values())
        rig.submit("good")
        assert rig.running["good"] == 1
        for _ in range(500):
            rig.submit("good", *names)
            rig.end("good")
        assert rig.log.count("ran good") == 500 and "dropped good" not in rig.log

    def test_networks_of_ipv6_count_as_one_client(self) -> None:
        rig = Rig(8, 100)
        rig.submit(*[f"2001:db8::{number:x}" for number in range(1, 20)])
        assert sum(rig.running.values()) == 4
        rig.submit("2001:db8:0:1::1")
        assert sum(rig.running.values()) == 5

    def test_single_thread_is_given_to_whoever_comes(self) -> None:
        rig = Rig(1, 10)
        rig.submit("a", "a", "b")
        assert rig.running == {"a": 1}
        rig.end("a")
        assert rig.running == {"b": 1}
        rig.end("b")
        assert rig.running == {"a": 1}


class TestTurns:
    def test_client_with_fewest_threads_is_next(self) -> None:
        rig = Rig(4, 100)
        rig.submit("a", "a", "b", "a", "b", "c", "d", "d")
        assert rig.running == {"a": 2, "b": 1, "c": 1}
        rig.end("a")
        assert rig.running == {"a": 1, "b": 1, "c": 1, "d": 1}

    def test_clients_with_equal_shares_take_turns(self) -> None:
        rig = Rig(1, 100)
        rig.submit("x", *["a"] * 3, *["b"] * 2, "c")
        order = []
        for _ in range(7):
            ((client, _),) = rig.running.items()
            order.append(client)
            rig.end(client)
        assert order == ["x", "a", "b", "c", "a", "b", "a"]

    def test_tasks_of_a_client_run_in_order(self) -> None:
        rig = Rig(1, 100)
        tasks = [Work("a", rig.log) for _ in range(4)]
        for task in tasks:
            rig.queue.submit(task)
        order = []
        for _ in tasks:
            (running,) = rig.pool.running
            order.append(running._task)  # type: ignore[attr-defined]
            rig.end("a")
        assert order == tasks

    def test_end_of_a_task_starts_all_whose_turn_it_is(self) -> None:
        rig = Rig(8, 100)
        rig.submit(*["a"] * 6, "b", "c", "d")
        assert rig.running == {"a": 4, "b": 1, "c": 1, "d": 1}
        for client in "bcd":
            rig.end(client)
        assert rig.running == {"a": 4}
        rig.end("a")
        assert rig.running == {"a": 4}


class TestDrops:
    def test_client_with_most_waiting_tasks_loses_its_oldest(self) -> None:
        rig = Rig(1, 3)
        rig.submit("x", "a", "a", "a")
        assert rig.log == []
        rig.submit("b")
        assert rig.log == ["dropped a"]
        rig.submit("a")
        assert rig.log == ["dropped a"] * 2 and rig.queue.busy == 4

    def test_task_that_may_run_at_once_drops_no_other(self) -> None:
        rig = Rig(4, 2)
        rig.submit("a", "a", "a", "a")
        assert rig.running == {"a": 2}
        rig.submit("b")
        assert rig.running == {"a": 2, "b": 1} and not rig.log

    def test_queue_without_room_drops_the_task_itself(self) -> None:
        rig = Rig(1, 0)
        rig.submit("a", "b", "b")
        assert rig.log == ["dropped b"] * 2 and rig.queue.busy == 1

    def test_task_without_a_thread_is_dropped(self) -> None:
        rig = Rig(4, 4)
        rig.pool.has_room = False
        rig.submit("a")
        assert rig.log == ["dropped a"] and not rig.queue.busy
        rig.pool.has_room = True
        rig.submit("a")
        assert rig.running == {"a": 1}

    def test_exception_of_a_task_frees_its_thread(self) -> None:
        rig = Rig(1, 4)
        rig.queue.submit(Work("a", rig.log, ZeroDivisionError()))
        rig.submit("b")
        with pytest.raises(ZeroDivisionError):
            rig.end("a")
        assert rig.running == {"b": 1}


class TestStop:
    def test_stop_drops_what_waits(self) -> None:
        rig = Rig(1, 4)
        rig.submit("a", "a", "b")
        rig.queue.stop(2.0)
        assert sorted(rig.log) == ["dropped a", "dropped b"]
        assert rig.pool.stopped_within == [2.0]
        rig.submit("c")
        assert rig.log[-1] == "dropped c"
        rig.end("a")
        assert not rig.queue.busy

    def test_every_task_ends_once_on_real_threads(self, log: Lines) -> None:
        queue = FairQueue(ThreadPool("pool-under-test", 4, 0, log), 8)
        outcomes: list[str] = []

        def submit_many(client: str) -> None:
            for _ in range(300):
                queue.submit(Work(client, outcomes))

        submitters = [Task(submit_many, client) for client in "abc"]
        for submitter in submitters:
            submitter.result()
        wait_until(lambda: len(outcomes) == 900)
        wait_until(lambda: not queue.busy)
        queue.stop(SECONDS)
        assert not queue._running_by_client and not any(queue._turns.values())
