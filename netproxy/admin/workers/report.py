"""The report of a worker: its snapshot as JSON, and the commands that a worker answers its parent.

Users never see the command `report`.  Thread: "questions" of a worker; decode() in the parent.
"""

from __future__ import annotations

import threading

from netproxy.admin.accounts import AccountCommands
from netproxy.admin.flow_commands import FlowCommands
from netproxy.admin.stats.account_rows import SubjectUse
from netproxy.admin.stats.snapshot import Details, PoolUse, Snapshot, take
from netproxy.interfaces.flows import Traffic
from netproxy.observe.flows import FlowTotal, TotalKey
from netproxy.observe.metrics import Histogram
from netproxy.observe.process import ProcessUse
from netproxy.typed import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.admin.control.client import Command, CommandRequest
    from netproxy.admin.view import DaemonView
    from netproxy.interfaces.answers import JsonObject, JsonValue
    from netproxy.observe.log import Log

REPORT = "report"
"""The command.  Its key "with" lists the details that the parent wants."""
NUMBERS = 1_000_000
"""Ids of flows for each worker in a place: who kills by an old id ends no flow of its successor."""


def begin_in_child(daemon: DaemonView, index: int, workers: int, restarts: int) -> None:
    """Begin to count in a worker that was forked: the parent has what was counted before.

    `index` is its number, from 0, of `workers`; `restarts` is how many were there before it.  Call
    it before the first flow.
    """
    daemon.counters.begin_in_child()
    daemon.refusals.begin_in_child()
    # The numbers of the parent's own are between those of its workers.
    daemon.incidents.use_numbers(index + 1 + restarts * NUMBERS * (workers + 1))
    daemon.incidents.begin_in_child()
    daemon.flows.use_numbers(index + 1 + restarts * NUMBERS * workers, workers)


def worker_commands(daemon: DaemonView, log: Log) -> Mapping[str, Command]:
    """Return the commands that a worker answers its parent, by name.

    The parent writes the records of what users have asked for.
    """
    return {
        **FlowCommands(daemon, log).table(),
        **AccountCommands(daemon, log.debug, threading.Lock()).table(),
        REPORT: _Reporter(daemon, log).report,
    }


class _Reporter:
    def __init__(self, daemon: DaemonView, log: Log) -> None:
        self._daemon = daemon
        self._log = log

    def report(self, request: CommandRequest) -> JsonObject:
        wanted = request.get("with")
        details = wanted if isinstance(wanted, list) else ()
        return encode(take(self._daemon, self._log, details, with_share=True))


def encode(snapshot: Snapshot) -> JsonObject:
    """Return a snapshot of one process as a JSON object."""
    return {
        "connections": snapshot.connections,
        "parked": snapshot.parked,
        "listeners": snapshot.listeners,
        "upstreams": snapshot.upstreams,
        "direct": snapshot.direct,
        "counters": [(*key, value) for key, value in snapshot.counters.items()],
        "totals": [
            (*key, total.flows, total.live, *total.traffic)
            for key, total in snapshot.totals.items()
        ],
        "dial_times": {
            upstream: (histogram.bounds, histogram.counts, histogram.sum)
            for upstream, histogram in snapshot.dial_times.items()
        },
        "pools": dict(snapshot.pools),
        "process": snapshot.process,
        "lines": snapshot.lines,
        "details": snapshot.details._asdict(),
    }


def decode(report: JsonValue) -> Snapshot:
    """Return the snapshot of a report.

    Raises TypeError, ValueError or KeyError if it is none.
    """
    details = report["details"]
    return Snapshot(
        connections=report["connections"],
        parked=report["parked"],
        listeners=report["listeners"],
        upstreams=report["upstreams"],
        direct=report["direct"],
        counters={(name, reason): value for name, reason, value in report["counters"]},
        totals={TotalKey(*row[:3]): _total(*row[3:]) for row in report["totals"]},
        dial_times={upstream: _histogram(*row) for upstream, row in report["dial_times"].items()},
        pools={name: PoolUse(*row) for name, row in report["pools"].items()},
        process=ProcessUse(*report["process"]),
        lines=report["lines"],
        details=Details(
            **{
                **details,
                "users": [SubjectUse(*row) for row in details["users"]],
                "clients": [SubjectUse(*row) for row in details["clients"]],
            }
        ),
    )


def _total(flows: int, live: int, *traffic: int) -> FlowTotal:
    return FlowTotal(flows, live, Traffic(*traffic))


def _histogram(bounds: list[float], counts: list[int], sum_of_values: float) -> Histogram:
    histogram = Histogram(tuple(bounds))
    histogram.counts, histogram.sum = counts, sum_of_values
    return histogram
