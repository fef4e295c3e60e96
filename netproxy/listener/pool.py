"""A bounded pool of threads: reused, started on demand, ended when idle.

Tasks run in the order they come.  A task's exception is logged once and ends
only that task.  Used for TCP connections, for dials and for name lookups.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Callable

from netproxy.interfaces.services import Log

IDLE_SECONDS = 10.0  # a thread without work ends after that: a burst's memory comes back soon
STALL_SECONDS = 0.01  # that a task may wait for a thread at work before another is started
STACK = (
    256 * 1024
)  # bytes: smaller ones crash on deep recursion, larger ones only cost address space

Task = Callable[[], None]


def set_stack_size() -> None:
    """For all threads that are started from now on."""
    threading.stack_size(STACK)


class ThreadPool:
    def __init__(self, name: str, limit: int, waiting_limit: int, log: Log, eager: int = 0) -> None:
        """At most `limit` threads; at most `waiting_limit` tasks more than can run at once.

        `eager`: with more threads than that, another is started only for a task that nobody has taken for a moment:
        many threads at once wait for the interpreter's lock more than they work.  0: always at once.
        """
        self._name = name
        self.limit = limit
        self._waiting_limit = waiting_limit
        self._log = log
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._eager = eager
        self._lock = threading.Lock()  # guards all below; _room is told of each task that ends
        self._room = threading.Condition(self._lock)
        self._stalled = False  # a task found no thread free: a thread of its own looks after that
        self._taken = 0  # tasks, since the pool began
        self._threads: set[threading.Thread] = set()
        self._busy = 0  # tasks running or waiting
        self._number = 0
        self._stopped = False

    def submit(self, task: Task, urgent: bool = False) -> bool:
        """False, and the task is not run, when too many wait, no thread can be had, or the pool has stopped.

        An urgent task waits however many there are: for work that was admitted before.
        """
        with self._lock:
            if self._stopped or (self._busy >= self.limit + self._waiting_limit and not urgent):
                return False
            if self._busy >= len(self._threads) and len(self._threads) < self.limit:
                if self._eager and len(self._threads) >= self._eager:
                    self._tell_of_stall()
                elif not self._grow() and not self._threads:
                    return False
            self._busy += 1
        self._tasks.put(task)
        return True

    def wait_for_room(self, seconds: float) -> bool:
        """Whether a task could be taken, within `seconds`."""
        with self._lock:
            return self._room.wait_for(
                lambda: self._stopped or self._busy < self.limit + self._waiting_limit, seconds
            )

    def stop(self, seconds: float) -> None:
        """No new tasks; waits `seconds` for those that run."""
        with self._lock:
            self._stopped = True
            threads = list(self._threads)
            self._room.notify_all()
        for _ in threads:
            self._tasks.put(None)
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def threads(self) -> int:
        return len(self._threads)

    @property
    def busy(self) -> int:
        return self._busy

    def _grow(self) -> bool:
        self._number += 1
        thread = threading.Thread(
            target=self._work, name=f"{self._name}-{self._number}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # can't start new thread: those that run will take the task
            self._log.limited(
                ("threads", self._name), "%s: cannot start another thread", self._name
            )
            return False
        self._threads.add(thread)
        return True

    def _tell_of_stall(self) -> None:
        if not self._stalled:
            self._stalled = True
            try:
                threading.Thread(
                    target=self._watch, name=f"{self._name}-stalls", daemon=True
                ).start()
            except RuntimeError:
                self._stalled = False
                self._grow()

    def _watch(self) -> None:
        """Starts threads for tasks that those at work do not get to; ends when none waits."""
        while True:
            with self._lock:
                waiting, taken = self._busy - len(self._threads), self._taken
                if waiting <= 0 or self._stopped:
                    self._stalled = False
                    return
            time.sleep(STALL_SECONDS)
            with self._lock:
                missing = waiting - (self._taken - taken)
                while (
                    missing > 0
                    and not self._stopped
                    and len(self._threads) < self.limit
                    and self._grow()
                ):
                    missing -= 1

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            try:
                task = self._tasks.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._busy >= len(self._threads):
                        continue  # a task was counted on this thread a moment ago
                    self._threads.discard(me)
                return
            if task is None:
                with self._lock:
                    self._threads.discard(me)
                return
            self._taken += 1  # close enough: two at once may count as one
            try:
                task()
            except Exception:
                self._log.exception(f"working as {me.name}")
            del task
            with self._lock:
                self._busy -= 1
                self._room.notify()
