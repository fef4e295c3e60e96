"""A queue in front of a thread pool that gives each client its share of the threads.

A client gets another thread only while it has fewer than are free.  A client alone thus has
half of the threads, N clients have 1/(N+1) each, and a thread is free for a client that has
none, however long the tasks of the others take.  Among the clients that wait, those with the
fewest threads are first, in turn.  If too many tasks wait, the client with most of them
loses its oldest.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from netproxy.interfaces.fairness import FairTable, client_key
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.fairness import ClientTask
    from netproxy.listener.pool import ThreadPool


class FairQueue:
    """Runs the tasks of clients on a pool that it has for itself.  Thread: any."""

    def __init__(self, pool: ThreadPool, waiting_limit: int) -> None:
        """Use all threads of `pool`; at most `waiting_limit` tasks wait for one."""
        self._pool, self._waiting_limit = pool, waiting_limit
        self._begin()

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked, as the pool does."""
        self._pool.begin_in_child()
        self._begin()

    def _begin(self) -> None:
        # Guards everything below.
        self._lock = threading.Lock()
        self._waiting: FairTable[ClientTask] = FairTable(self._waiting_limit)
        # Tasks that run, in total and by client.
        self._running = 0
        self._running_by_client: dict[str, int] = {}
        # The clients that wait, by the number of tasks that they run; each in its turn.
        self._turns: dict[int, OrderedDict[str, None]] = {}
        self._stopped = False

    def submit(self, task: ClientTask) -> None:
        """Run a task as soon as it is its client's turn.  Does not block.

        Drops a task, this one or another, if too many wait, and this one if no thread can be
        had or the queue has stopped.
        """
        client = client_key(task.client)
        dropped: ClientTask | None = None
        with self._lock:
            starts = not self._stopped and self._may_start(client)
            if starts:
                self._count(client, 1)
            elif self._stopped:
                dropped = task
            else:
                dropped = self._enqueue(client, task)
        if starts:
            self._start(client, task)
        if dropped is not None:
            dropped.drop()

    def stop(self, seconds: float) -> None:
        """Drop the tasks that wait; wait at most `seconds` for those that run."""
        with self._lock:
            self._stopped = True
            dropped = self._waiting.clear()
            self._turns.clear()
        for task in dropped:
            task.drop()
        self._pool.stop(seconds)

    @property
    def threads(self) -> int:
        """The number of threads."""
        return self._pool.threads

    @property
    def busy(self) -> int:
        """The number of tasks that run or wait."""
        return self._running + len(self._waiting)

    def _start(self, client: str, task: ClientTask) -> None:
        """Hand a task that was counted in to the pool."""
        # Urgent: this queue has the pool's limits.
        if not self._pool.submit(_Running(self, client, task), urgent=True):
            self._end(client)
            task.drop()

    def _end(self, client: str) -> None:
        """Count a task out, and start those whose turn it is."""
        starting: list[tuple[str, ClientTask]] = []
        with self._lock:
            self._count(client, -1)
            while self._waiting and (next_client := self._next_client()) is not None:
                starting.append((next_client, self._dequeue(next_client)))
        for next_client, task in starting:
            self._start(next_client, task)

    # -- under the lock

    def _may_start(self, client: str) -> bool:
        """Return whether a new task needs not wait."""
        if self._waiting.held(client):
            return False
        return self._running_by_client.get(client, 0) < self._pool.limit - self._running

    def _next_client(self) -> str | None:
        """Return the client whose turn it is, None if all that wait have their share."""
        for running in range(self._pool.limit - self._running):
            clients = self._turns.get(running)
            if clients:
                return next(iter(clients))
        return None

    def _enqueue(self, client: str, task: ClientTask) -> ClientTask | None:
        """Let a task wait; return the task that had to yield, None if there was room."""
        self._turns.setdefault(self._running_by_client.get(client, 0), OrderedDict())[client] = None
        yielded = self._waiting.put(client, task)
        if yielded is not None:
            self._leave_if_idle(client_key(yielded.client))
        return yielded

    def _dequeue(self, client: str) -> ClientTask:
        """Remove and return the oldest task of a client, and count it in."""
        task = self._waiting.take(client)
        self._leave_if_idle(client)
        self._count(client, 1)
        return task

    def _leave_if_idle(self, client: str) -> None:
        """Remove a client from the turns if no task of it waits."""
        if not self._waiting.held(client):
            running = self._running_by_client.get(client, 0)
            del self._turns[running][client]

    def _count(self, client: str, change: int) -> None:
        """Count a task of a client in (1) or out (-1); it is the last among its equals then."""
        before = self._running_by_client.get(client, 0)
        self._running += change
        if before + change:
            self._running_by_client[client] = before + change
        else:
            del self._running_by_client[client]
        if self._waiting.held(client):
            del self._turns[before][client]
            self._turns.setdefault(before + change, OrderedDict())[client] = None


class _Running:
    """A task on its thread."""

    __slots__ = ("_queue", "_client", "_task")

    def __init__(self, queue: FairQueue, client: str, task: ClientTask) -> None:
        self._queue = queue
        self._client = client
        self._task = task

    def __call__(self) -> None:
        try:
            self._task.run()
        finally:
            self._queue._end(self._client)
