"""A bounded pool of threads: reused, started on demand, ended when idle.

Tasks run in the order in which they come.  While all threads are busy, clients take turns: a
client with a thousand tasks delays the task of another client by one task.
The exception of a task is logged once and ends only that task.  Used for connections, dials
and name lookups.
"""

from __future__ import annotations

from _queue import Empty, SimpleQueue  # without queue, which costs 0.1 MiB
import threading
import time
from collections import OrderedDict, deque

from netproxy.interfaces.fairness import client_key
from netproxy.typed import TYPE_CHECKING, Callable, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log

# Seconds without work after which a thread ends, so that the memory of a burst comes back soon.
IDLE_SECONDS = 10.0
# Seconds that a task may wait for a busy thread before another thread is started.
STALL_SECONDS = 0.01
# Bytes of a thread's stack: smaller ones crash on deep recursion, larger ones only cost
# address space.
STACK = 256 * 1024

Task: TypeAlias = Callable[[], None]


def _look() -> None:
    """Stand for a look at the time, which a thread that ends asks of another one.

    With Python 3.11 some threads were seen to wait in SimpleQueue.get() long after their deadline.
    """


def set_stack_size() -> None:
    """Set the stack size of all threads that are started from now on."""
    threading.stack_size(STACK)


class ThreadPool:
    """A pool of named threads.  Thread: any."""

    def __init__(self, name: str, limit: int, waiting_limit: int, log: Log, eager: int = 0) -> None:
        """Run at most `limit` threads, and let at most `waiting_limit` more tasks wait.

        Beyond `eager` threads another is started only for a task that has waited for a
        moment: many threads wait for the interpreter's lock more than they work.
        0: start one at once, always.
        """
        self._name = name
        self.limit = limit
        self._waiting_limit = waiting_limit
        self._log = log
        self._eager = eager
        self.begin_in_child()

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked: the threads are those of its parent."""
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        # Guards all below.
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        # Threads started since the pool began, for their names.
        self._number = 0
        # Tasks that run or wait.
        self._busy = 0
        # Tasks that found all threads busy, by client; the client whose turn it is comes first.
        self._turns: OrderedDict[str, deque[Task]] = OrderedDict()
        # Tasks that threads have taken since the pool began.
        self._taken = 0
        # True while a thread of its own starts threads for tasks that wait too long.
        self._stalled = False
        self._stopped = False

    def submit(self, task: Task, urgent: bool = False, client: str = "") -> bool:
        """Run a task of a client's host on a thread of the pool; client "": of the daemon.

        Returns False, and does not run it, if too many tasks wait, no thread can be had or
        the pool has stopped.  An `urgent` task waits however many there are: it continues
        work that was admitted before.
        """
        with self._lock:
            if self._stopped or (not urgent and not self.has_room):
                return False
            if self._busy >= len(self._threads) and len(self._threads) < self.limit:
                if self._eager and len(self._threads) >= self._eager:
                    self._watch_stall()
                elif not self._grow() and not self._threads:
                    return False
            self._busy += 1
            full = self._busy > self.limit and self._busy - self._is_own_thread() > self.limit
            if client and self._busy > len(self._threads):
                self._turns.setdefault(client_key(client), deque()).append(task)
                task = self._run_next
        self._tasks.put(task)
        if full and urgent:
            self._log.limited(("full", self._name), "%s pool: all threads are busy", self._name)
        return True

    def stop(self, seconds: float) -> None:
        """Take no new tasks; wait up to `seconds` for those that run."""
        with self._lock:
            self._stopped = True
            threads = list(self._threads)
        for _ in threads:
            self._tasks.put(None)
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def has_room(self) -> bool:
        """True if another task may run or wait."""
        return self._busy < self.limit + self._waiting_limit

    @property
    def threads(self) -> int:
        """The number of threads."""
        return len(self._threads)

    @property
    def busy(self) -> int:
        """The number of tasks that run or wait."""
        return self._busy

    def _is_own_thread(self) -> bool:
        """Return whether a thread of the pool asks: the task that it runs is about to end."""
        return threading.current_thread() in self._threads

    def _run_next(self) -> None:
        """Run a task of the client whose turn it is."""
        with self._lock:
            client, tasks = self._turns.popitem(last=False)
            task = tasks.popleft()
            if tasks:
                self._turns[client] = tasks
        task()

    def _grow(self) -> bool:
        self._number += 1
        thread = threading.Thread(
            target=self._work, name=f"{self._name}-{self._number}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # "can't start new thread": a running one will take the task.
            self._log.limited(
                ("threads", self._name), "%s pool: cannot start another thread", self._name
            )
            return False
        self._threads.add(thread)
        return True

    def _watch_stall(self) -> None:
        if self._stalled:
            return
        self._stalled = True
        try:
            threading.Thread(
                target=self._end_stall, name=f"{self._name}-stalls", daemon=True
            ).start()
        except RuntimeError:
            self._stalled = False
            self._grow()

    def _end_stall(self) -> None:
        """Start threads for tasks that the busy threads do not get to; end when none waits."""
        while True:
            with self._lock:
                waiting, taken = self._busy - len(self._threads), self._taken
                if waiting <= 0 or self._stopped:
                    self._stalled = False
                    return
            time.sleep(STALL_SECONDS)
            with self._lock:
                missing = waiting - (self._taken - taken)
                while missing > 0 and not self._stopped and len(self._threads) < self.limit:
                    if not self._grow():
                        break
                    missing -= 1

    def _work(self) -> None:
        thread = threading.current_thread()
        until = time.monotonic() + IDLE_SECONDS
        while True:
            try:
                task = self._tasks.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                with self._lock:
                    if self._busy < len(self._threads):
                        self._threads.discard(thread)
                        self._tasks.put(_look)
                        return
                # A task that was submitted just now counts on this thread.
                until = time.monotonic() + IDLE_SECONDS
                continue
            if task is _look:
                continue
            if task is None:
                with self._lock:
                    self._threads.discard(thread)
                return
            # Without the lock, which is exact enough: two at once may count as one.
            self._taken += 1
            try:
                task()
            except Exception:
                self._log.exception(f"working as {thread.name}")
            del task
            until = time.monotonic() + IDLE_SECONDS
            with self._lock:
                self._busy -= 1
