"""What the parent of several workers does again and again, on its janitor's thread.

What workers inherit is changed under the parent's guard: no worker is forked while a table is half
changed, or its lock is held.
"""

from __future__ import annotations

import threading

from netproxy.admin.workers.reports import RENEW_SECONDS
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.access.accounts.counting import Counting
    from netproxy.admin.workers.lines import WorkerLine, WorkerLines
    from netproxy.admin.workers.reports import Reports
    from netproxy.daemon.workers.state import ParentState
    from netproxy.interfaces.services import Expirable

NAMES = "names"
"""The command that asks a worker for the names of users who are not configured."""


class GuardedTables:
    """Has the janitor sweep the parent's tables under the guard.  Expirable.

    No worker is forked while a table is half changed, or its lock is held.
    """

    def __init__(self, guard: threading.Lock, tables: Sequence[Expirable]) -> None:
        self._guard = guard
        self._tables = tables

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Sweep the tables and make their calls; nothing is left for the janitor."""
        for table in self._tables:
            with self._guard:
                for call in table.expire(now):
                    call()
        return ()


class CollectedUsage:
    """Collects what users have moved in the workers.  Expirable."""

    def __init__(self, counting: Counting) -> None:
        self._counting = counting

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Collect; nothing expires."""
        assert self._counting.collector is not None
        self._counting.collector.collect()
        return ()


class Heartbeat:
    """Asks the workers how they are, every RENEW_SECONDS.  Expirable."""

    def __init__(
        self,
        state: ParentState,
        lines: WorkerLines,
        reports: Reports,
        counting: Counting,
        guard: threading.Lock,
    ) -> None:
        self._state = state
        self._lines = lines
        self._reports = reports
        self._counting = counting
        self._guard = guard
        self._due = 0.0
        self._named: dict[WorkerLine, int] = {}
        """How many names each worker has told."""
        self.silent: Sequence[int] = ()
        """The workers that serve, and have not answered the last time."""

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Ask if it is time to; nothing expires."""
        if now >= self._due:
            self._due = now + RENEW_SECONDS
            serving = {info.number for info in self._state.workers() if info.pid and info.ready}
            self.silent = [number for number in self._reports.renew() if number in serving]
            self._learn_names()
        return ()

    def _learn_names(self) -> None:
        """Learn the names of users who have moved bytes and are not configured."""
        collector = self._counting.collector
        assert collector is not None
        if not collector.unknown:
            return
        lines = self._lines.current()
        self._named = {line: self._named.get(line, 0) for line in lines}
        for line in lines:
            answer = line.ask({"command": NAMES, "after": self._named[line]})
            if not (answer.fault or answer.refusal):
                self._named[line] += len(answer.result)
                with self._guard:
                    collector.learn(answer.result)
