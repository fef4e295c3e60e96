"""The last report of each worker, merged: the SnapshotSource of the parent.

A thread of the parent calls renew() every RENEW_SECONDS.  When a worker has ended, the counters
of its last report stay in all later snapshots, so that no counter goes down.  Thread: any.
"""

from __future__ import annotations

import threading
import time

from netproxy.admin.stats.snapshot import (
    EVENTS,
    SERVING,
    SILENT,
    STARTING,
    Details,
    Snapshot,
    notice_rows,
    refusal_rows,
)
from netproxy.admin.workers.merge import add_departed, counters_of, merge
from netproxy.admin.workers.report import REPORT, decode
from netproxy.observe.flows import Carried, sum_of
from netproxy.observe.history import History
from netproxy.observe.process import process_use
from netproxy.typed import TYPE_CHECKING, Collection, ContextManager, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.admin.workers.lines import Answer, WorkerLine, WorkerLines
    from netproxy.admin.workers.view import ParentView, WorkerInfo
    from netproxy.interfaces.answers import HistoryRow, WorkerRow
    from netproxy.observe.log import Log

RENEW_SECONDS = 2.0
"""Between two calls of renew(): what the counters of a worker that dies can lose."""
CPU_SECONDS = 0.5
"""The least time in which the use of the processor is measured."""


class _LastReport(NamedTuple):
    """What is known of the worker of a line."""

    snapshot: Snapshot
    """Without details."""
    measured_at: float
    """When `measured` was the processor time; monotonic seconds."""
    measured: float
    cpu: float = 0.0
    """The part of a core that it used until then."""

    def followed_by(self, snapshot: Snapshot, now: float) -> _LastReport:
        """Return what is known after one more report."""
        used = snapshot.process.cpu
        if used < self.snapshot.process.cpu:
            # Two threads have asked: this report is the older one.
            return self
        seconds = now - self.measured_at
        if seconds < CPU_SECONDS:
            return self._replace(snapshot=snapshot)
        return _LastReport(snapshot, now, used, (used - self.measured) / seconds)


class Reports:
    """Asks workers for their reports, and merges them."""

    def __init__(
        self, view: ParentView, lines: WorkerLines, log: Log, guard: ContextManager[object]
    ) -> None:
        """`guard` is held while objects are read that workers inherit."""
        self._view = view
        self._lines = lines
        self._log = log
        self._guard = guard
        self._history = History(self, view.state_folder)
        # Guards everything below.
        self._lock = threading.Lock()
        self._last: dict[WorkerLine, _LastReport] = {}
        self._departed = Snapshot()

    def renew(self) -> list[int]:
        """Ask all workers; return the numbers of those that do not answer."""
        fresh = self._ask(())
        for call in self._history.expire(time.monotonic()):
            call()
        return [line.index for line in self._lines.current() if line not in fresh]

    def read(self, wanted: Collection[str] = ()) -> Snapshot:
        """Ask all workers; return the snapshot of all processes, with the details `wanted`.

        A worker that does not answer has the numbers of its last report; one that has ended has
        only its counters.
        """
        fresh = self._ask(wanted)
        infos, own = self._view.workers(), self._own(wanted)
        with self._lock:
            present, departed = [own], self._departed
            for line in self._lines.current():
                if line in fresh:
                    # Not the fresh one: another thread may have a newer one, and has shown it.
                    present.append(_with_details(self._last[line].snapshot, fresh[line], line))
                elif line in self._last and line.ended:
                    departed = merge([departed, counters_of(self._last[line].snapshot)])
                elif line in self._last:
                    present.append(self._last[line].snapshot)
            rows = self._rows(infos, fresh)
        return merge(present, departed)._replace(workers=rows)

    def history(self) -> HistoryRow:
        """Return what flows have moved in the last day."""
        return self._history.row()

    def carried(self) -> Carried:
        """Return the sums of the last reports.  Asks nobody."""
        with self._lock:
            snapshots = [
                counters_of(last.snapshot) if line.ended else last.snapshot
                for line, last in self._last.items()
            ]
            snapshots.append(self._departed)
        return sum_of(total for snapshot in snapshots for total in snapshot.totals.values())

    def _ask(self, wanted: Collection[str]) -> dict[WorkerLine, Snapshot]:
        """Ask all workers, note their reports, and return those."""
        answers = self._lines.ask_all({"command": REPORT, "with": list(wanted)})
        fresh = {}
        for answer in answers:
            snapshot = _snapshot_of(answer)
            if snapshot is not None:
                fresh[answer.line] = snapshot
        now = time.monotonic()
        with self._lock:
            current = set(self._lines.current())
            for line in [line for line in self._last if line not in current]:
                self._departed = add_departed(self._departed, self._last.pop(line).snapshot)
            # Also a line that was replaced while it answered: its report was too late to count.
            fresh = {line: snapshot for line, snapshot in fresh.items() if line in current}
            for line, snapshot in fresh.items():
                bare = snapshot._replace(details=Details(), lines=())
                last = self._last.get(line)
                if last is None:
                    self._last[line] = _LastReport(bare, now, bare.process.cpu)
                else:
                    self._last[line] = last.followed_by(bare, now)
        return fresh

    def _own(self, wanted: Collection[str]) -> Snapshot:
        """Return the snapshot of the parent."""
        view = self._view
        with self._guard:
            counters = {(name, reason): value for name, reason, value in view.counters.items()}
        details = Details()
        if EVENTS in wanted:
            refusals = refusal_rows(view.incidents.all())
            details = Details(refusals=refusals, notices=notice_rows(self._log))
        return Snapshot(counters=counters, process=process_use(True), details=details)

    def _rows(
        self, infos: Sequence[WorkerInfo], fresh: Mapping[WorkerLine, Snapshot]
    ) -> list[WorkerRow]:
        """Return a row for each worker.  Under the lock."""
        lines = {line.index: line for line in self._lines.current()}
        return [self._row(info, lines.get(info.number), fresh) for info in infos]

    def _row(
        self, info: WorkerInfo, line: WorkerLine | None, fresh: Mapping[WorkerLine, Snapshot]
    ) -> WorkerRow:
        last = None if line is None or line.ended else self._last.get(line)
        snapshot = Snapshot() if last is None else last.snapshot
        is_ready = info.pid and info.ready
        return {
            "index": info.number,
            "pid": info.pid,
            "state": STARTING if not is_ready else SERVING if line in fresh else SILENT,
            "cpu": round(last.cpu, 3) if last is not None else 0.0,
            "memory": snapshot.process.share,
            "connections": snapshot.connections,
            "sessions": snapshot.sessions,
            "restarts": info.restarts,
        }


def _snapshot_of(answer: Answer) -> Snapshot | None:
    """Return the snapshot of an answer, None if there is none."""
    if answer.fault or answer.refusal:
        return None
    try:
        return decode(answer.result)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def _with_details(last: Snapshot, fresh: Snapshot, line: WorkerLine) -> Snapshot:
    """Return a snapshot with the details of another one, and with lines that name the worker."""
    lines = [f"worker {line.index}: {text}" for text in fresh.lines]
    return last._replace(lines=lines, details=fresh.details)
