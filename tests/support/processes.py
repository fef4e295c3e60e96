"""Worker processes for tests of what they count together: forked ones, and stand-ins for them."""

from __future__ import annotations

import copy
import mmap
import os
import signal
import socket
import traceback
from typing import Callable

from netproxy.access.accounts.book import AccountBook
from netproxy.access.accounts.collector import Collector
from netproxy.access.accounts.gauges import ListenerCounts
from netproxy.access.accounts.ledger import Ledger
from netproxy.access.accounts.standing import Standing
from netproxy.access.accounts.usage import UsageBook
from netproxy.access.accounts.worker_usage import WorkerUsage


ROUNDS = 1500
"""How often a process of a Race takes all that it gets."""


def seen_by(index: int, ledger: Ledger) -> Ledger:
    """Return a ledger over the same memory, as another process has it."""
    other = copy.copy(ledger)
    other.use_table(index)
    return other


def counts_seen_by(index: int, counts: ListenerCounts) -> ListenerCounts:
    """Return the counts of listeners as another process has them."""
    other = copy.copy(counts)
    other.ledger = seen_by(index, counts.ledger)
    return other


class Worker:
    """What a worker process has of the accounts, without the process."""

    def __init__(self, parent: Parent, index: int) -> None:
        self.ledger = seen_by(index, parent.ledger)
        self.usage = WorkerUsage(self.ledger)
        self.standing = Standing(self.usage, parent.clock)
        self.standing.configure(parent.standing.restricted)
        self.book = AccountBook(self.usage, self.standing, self.ledger)


class Parent:
    """What the parent of workers has of the accounts."""

    def __init__(self, workers: int, clock: Callable[[], float], slots: int = 64) -> None:
        self.clock = clock
        self.ledger = Ledger(workers + 1, slots)
        self.ledger.use_table(workers)
        self.usage = UsageBook(None, clock)
        self.standing = Standing(self.usage, clock)
        self.collector = Collector(self.ledger, self.usage, self.standing)


class Child:
    """A forked process that runs a function, and ends with it or is killed."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def join(self) -> int:
        """Wait for the end; return the exit status, or the number of the signal as negative."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """End the process with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.join() == -signal.SIGKILL


def kill_after(function: Callable[[], None]) -> None:
    """Run a function in a child, which is killed when it has returned."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        ours.close()
        function()
        theirs.send(b"!")
        # Until it is killed, or until this process is no more.
        theirs.recv(1)

    with ours:
        child = Child(run)
        theirs.close()
        try:
            assert ours.recv(1) == b"!"
        finally:
            child.kill()


class Race:
    """Counts what racing processes were admitted to, in memory that they share."""

    def __init__(self, processes: int, limit: int) -> None:
        self._limit = limit
        # By process: what it has, how often it was admitted, how often there were too many.
        self._words = memoryview(mmap.mmap(-1, processes * 3 * 8)).cast("q")

    def run(self, enter: Callable[[int], Callable[[], bool]], leave: Callable[[], None]) -> None:
        """Let all processes enter and leave; `enter` returns the worker's own call of it."""
        processes = range(len(self._words) // 3)

        def run(index: int) -> None:
            begin = enter(index)
            for _ in range(ROUNDS):
                held = 0
                while held < self._limit and begin():
                    held += 1
                    self._words[index * 3] = held
                    self._words[index * 3 + 1] += 1
                    together = sum(self._words[other * 3] for other in processes)
                    self._words[index * 3 + 2] += together > self._limit
                if not held:
                    os.sched_yield()  # to the one that has everything
                for _ in range(held):
                    # Counted out here first: what is seen is never more than what is admitted.
                    self._words[index * 3] -= 1
                    leave()

        children = [Child(lambda index=index: run(index)) for index in processes]
        assert [child.join() for child in children] == [0] * len(children)

    @property
    def admitted(self) -> int:
        """How often a process was admitted."""
        return sum(self._words[1::3])

    @property
    def too_many(self) -> int:
        """How often there were more than the limit."""
        return sum(self._words[2::3])
