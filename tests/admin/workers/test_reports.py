"""The reports of workers, kept by the parent, when workers answer, are silent, die and return."""

from __future__ import annotations

import threading
from typing import Any, Iterator

import pytest

from netproxy.admin.stats.snapshot import EVENTS, FLOWS, Details, Snapshot
from netproxy.admin.workers import reports as reports_module
from netproxy.admin.workers.lines import WorkerLines
from netproxy.admin.workers.report import encode
from netproxy.admin.workers.reports import Reports
from netproxy.admin.workers.view import WorkerInfo
from netproxy.interfaces.flows import Traffic
from netproxy.observe.flows import FlowTotal, TotalKey
from netproxy.observe.history import SAMPLE_SECONDS
from netproxy.observe.incidents import REFUSED
from netproxy.observe.process import ProcessUse
from tests.admin.workers.test_merge import listener
from tests.support.sockets import wait_until
from tests.support.workers import PATIENCE, FakeWorker, Gate, Parent

MAIN = TotalKey("tcp", "main", "direct")


def snapshot(number: int, **fields: Any) -> Snapshot:
    """Return a snapshot whose counters and gauges are all `number`."""
    return Snapshot(
        connections=number,
        listeners=[listener("main", number, number)],
        counters={("drops", "x"): number},
        totals={MAIN: FlowTotal(number, number, Traffic(number, number))},
        process=ProcessUse(float(number), number, number, number, number, number),
        lines=[f"connections={number}"],
    )._replace(**fields)


class Rig:
    """Two workers that answer, and their reports."""

    def __init__(self) -> None:
        self.parent = Parent()
        self.workers = [FakeWorker(0), FakeWorker(1)]
        self.lines = WorkerLines([worker.line for worker in self.workers])
        log: Any = self.parent.log
        log.recent = []
        self.reports = Reports(self.parent, self.lines, log, threading.Lock())

    def set(self, *numbers: int) -> None:
        for worker, number in zip(self.workers, numbers, strict=True):
            worker.snapshot = snapshot(number)

    def replace(self, index: int) -> None:
        """Put a successor in the place of a worker."""
        before = self.workers[index]
        self.workers[index] = FakeWorker(index)
        self.lines.replace(self.workers[index].line)
        before.close()

    def counters(self) -> tuple[int, int, int]:
        """Return a counter, the accepted connections and the bytes up."""
        now = self.reports.read()
        accepted = sum(row["accepted"] for row in now.listeners)
        return now.counters[("drops", "x")], accepted, now.totals[MAIN].traffic.sent

    def gauges(self) -> tuple[int, int, int]:
        now = self.reports.read()
        live = sum(row["live"] for row in now.listeners)
        return now.connections, live, now.totals[MAIN].live

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(WorkerLines.ask_all, "__defaults__", (PATIENCE,))
    rig = Rig()
    yield rig
    rig.close()


class TestReading:
    def test_workers_and_the_parent_are_added(self, rig: Rig) -> None:
        rig.set(10, 20)
        rig.parent.counters.count("drops", "x", 3)
        now = rig.reports.read()
        assert (now.connections, now.counters[("drops", "x")]) == (30, 33)
        assert now.lines == ["worker 0: connections=10", "worker 1: connections=20"]
        assert now.process.threads > 30

    def test_details_are_those_that_were_asked_for(self, rig: Rig) -> None:
        rig.workers[0].snapshot = snapshot(1, details=Details(flows=[(1, 5, 6)]))
        rig.workers[1].snapshot = snapshot(1, details=Details(flows=[(2, 7, 8)]))
        flows = [list(flow) for flow in rig.reports.read((FLOWS,)).details.flows]
        assert flows == [[1, 5, 6], [2, 7, 8]]
        assert [worker.asked[-1]["with"] for worker in rig.workers] == [[FLOWS], [FLOWS]]

    def test_events_of_the_parent_are_shown(self, rig: Rig) -> None:
        rig.parent.incidents.add(REFUSED, "192.0.2.1", {"reason": "metrics token"})
        (row,) = rig.reports.read((EVENTS,)).details.refusals
        assert row["reason"] == "metrics token" and row["id"]

    def test_silent_worker_has_the_numbers_of_its_last_report(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig.set(10, 20)
        gate, answers = Gate(), [encode(snapshot(30))]
        slow = FakeWorker(2, report=lambda request: answers.pop() if answers else gate(request))
        rig.workers.append(slow)
        rig.lines.replace(slow.line)
        rig.parent.infos.append(WorkerInfo(2, 1002, 0, True))
        assert rig.reports.renew() == []
        monkeypatch.setattr(WorkerLines.ask_all, "__defaults__", (1.0,))
        now = rig.reports.read()
        assert (now.connections, now.counters[("drops", "x")]) == (60, 60)
        assert [row["state"] for row in now.workers][2] == "silent"
        assert 2 in rig.reports.renew()
        gate.open()

    def test_report_that_is_none_counts_as_silence(self, rig: Rig) -> None:
        strange = FakeWorker(2, report=lambda request: {"connections": 5})
        rig.workers.append(strange)
        rig.lines.replace(strange.line)
        assert rig.reports.renew() == [2]


class TestWorkers:
    def test_row_has_the_state_and_the_use_of_each_worker(self, rig: Rig) -> None:
        rig.set(10, 20)
        rig.parent.infos[1] = WorkerInfo(1, 77, 3, True)
        rig.parent.infos.append(WorkerInfo(2, 0, 9, False))
        assert rig.reports.read().workers == [
            {
                "index": 0,
                "pid": 1000,
                "state": "serving",
                "cpu": 0.0,
                "memory": 10,
                "connections": 10,
                "sessions": 0,
                "restarts": 0,
            },
            {
                "index": 1,
                "pid": 77,
                "state": "serving",
                "cpu": 0.0,
                "memory": 20,
                "connections": 20,
                "sessions": 0,
                "restarts": 3,
            },
            {
                "index": 2,
                "pid": 0,
                "state": "starting",
                "cpu": 0.0,
                "memory": 0,
                "connections": 0,
                "sessions": 0,
                "restarts": 9,
            },
        ]

    def test_worker_that_does_not_serve_yet_is_starting(self, rig: Rig) -> None:
        rig.parent.infos[0] = WorkerInfo(0, 55, 1, False)
        assert [row["state"] for row in rig.reports.read().workers] == ["starting", "serving"]

    def test_use_of_the_processor_is_measured_between_reports(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1000.0
        cases = [(0.0, 1.0, 0.0), (2.0, 2.0, 0.5), (0.1, 2.1, 0.5), (3.9, 2.4, 0.1)]
        for passed, used, expected in cases:
            now += passed
            monkeypatch.setattr(reports_module, "time", Clock(now))
            rig.workers[0].snapshot = snapshot(1, process=ProcessUse(cpu=used))
            assert rig.reports.read().workers[0]["cpu"] == expected


class TestDeath:
    def test_no_counter_goes_down_when_a_worker_dies_and_its_successor_begins(
        self, rig: Rig
    ) -> None:
        rig.set(10, 20)
        assert (rig.counters(), rig.gauges()) == ((30, 30, 30), (30, 30, 30))
        rig.workers[1].die()
        wait_until(lambda: rig.workers[1].line.ended)
        assert (rig.counters(), rig.gauges()) == ((30, 30, 30), (10, 10, 10))
        rig.replace(1)
        assert (rig.counters(), rig.gauges()) == ((30, 30, 30), (10, 10, 10))
        rig.set(10, 5)
        assert (rig.counters(), rig.gauges()) == ((35, 35, 35), (15, 15, 15))

    def test_what_was_shown_counts_also_if_the_heartbeat_has_not_seen_it(self, rig: Rig) -> None:
        rig.set(10, 20)
        rig.reports.renew()
        rig.set(10, 25)
        assert rig.counters()[0] == 35
        rig.workers[1].die()
        rig.replace(1)
        assert rig.counters()[0] == 35

    def test_each_of_many_deaths_counts_once(self, rig: Rig) -> None:
        for number in range(1, 6):
            rig.set(0, 10)
            assert rig.counters()[0] == 10 * number
            rig.replace(1)
        assert rig.counters()[0] == 50

    def test_older_report_of_a_slower_thread_is_not_kept(self, rig: Rig) -> None:
        rig.set(0, 20)
        assert rig.counters()[0] == 20
        rig.workers[1].snapshot = snapshot(15)
        assert rig.counters()[0] == 20


class TestHistory:
    def test_history_has_the_flows_of_all_workers_and_outlives_them(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def renew(now: float, *numbers: int) -> None:
            rig.set(*numbers)
            monkeypatch.setattr(reports_module, "time", Clock(now))
            rig.reports.renew()

        renew(1000.0, 10, 20)
        renew(1000.0 + SAMPLE_SECONDS, 11, 25)
        rig.replace(1)
        renew(1000.0 + 2 * SAMPLE_SECONDS, 15, 7)
        assert rig.reports.history()["samples"] == [[6, 6, 36], [11, 11, 22]]


class Clock:
    """Stands in for the module time of one module."""

    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now
