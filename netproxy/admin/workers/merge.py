"""Merges the snapshots of several workers into that of one daemon.  Pure.

What workers share, such as the ledger, is not added up.  Of a worker that has ended only the
counters stay, so that no counter goes down.
"""

from __future__ import annotations

from netproxy.admin.stats.account_rows import SubjectUse
from netproxy.admin.stats.snapshot import EVENTS_LIMIT, PAGE_FLOWS, Details, PoolUse, Snapshot
from netproxy.admin.workers.rows import merge_listeners, merge_upstreams
from netproxy.interfaces.flows import Traffic
from netproxy.observe.flows import OTHER, TOTALS_LIMIT, FlowTotal, TotalKey
from netproxy.observe.metrics import Histogram
from netproxy.observe.process import ProcessUse
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, Iterable, Mapping, Sequence, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces.answers import FlowRow, JsonObject

EMPTY = Snapshot()
"""Of no process."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def merge(present: Sequence[Snapshot], departed: Snapshot = EMPTY) -> Snapshot:
    """Return the snapshot of all processes together.

    `departed` has the counters of processes that have ended.  Listeners and upstreams are those of
    the `present` ones.
    """
    every = [*present, departed]
    return Snapshot(
        connections=sum(part.connections for part in present),
        parked=sum(part.parked for part in present),
        listeners=merge_listeners([part.listeners for part in present], departed.listeners),
        upstreams=merge_upstreams([part.upstreams for part in present], departed.upstreams),
        direct=[row for part in present for row in part.direct],
        counters=_sorted(_sums((part.counters for part in every), _add_numbers)),
        totals=_sums((part.totals for part in every), _add_totals),
        dial_times=_sums((part.dial_times for part in every), _add_histograms),
        pools=_sums((part.pools for part in present), _add_pools),
        process=_add_processes([part.process for part in every]),
        lines=[line for part in present for line in part.lines],
        details=_merge_details([part.details for part in present]),
    )


def counters_of(snapshot: Snapshot) -> Snapshot:
    """Return what stays of a process that has ended."""
    return Snapshot(
        listeners=[{**row, "live": 0} for row in snapshot.listeners],
        upstreams=snapshot.upstreams,
        counters=snapshot.counters,
        totals={key: total._replace(live=0) for key, total in snapshot.totals.items()},
        dial_times=snapshot.dial_times,
        process=ProcessUse(cpu=snapshot.process.cpu),
    )


def add_departed(departed: Snapshot, ended: Snapshot) -> Snapshot:
    """Return the counters of one more process that has ended, added to those before.

    Names are those of configurations.  After many of them with other names, further ones go under
    OTHER.
    """
    both = merge([departed, counters_of(ended)])
    totals: dict[TotalKey, FlowTotal] = {}
    for key, total in both.totals.items():
        if key not in totals and len(totals) >= TOTALS_LIMIT:
            key = TotalKey(key.network, OTHER, OTHER)
        totals[key] = _add_totals(totals[key], total) if key in totals else total
    dial_times: dict[str, Histogram] = {}
    for name, histogram in both.dial_times.items():
        if name not in dial_times and len(dial_times) >= TOTALS_LIMIT:
            name = OTHER
        before = dial_times.get(name)
        dial_times[name] = _add_histograms(before, histogram) if before else histogram
    return both._replace(
        totals=totals,
        dial_times=dial_times,
        listeners=both.listeners[-TOTALS_LIMIT:],
        upstreams=both.upstreams[-TOTALS_LIMIT:],
    )


# -- sums


def _sums(
    parts: Iterable[Mapping[Key, Value]], add: Callable[[Value, Value], Value]
) -> dict[Key, Value]:
    """Return the sums by key, in the order in which the keys first come."""
    sums: dict[Key, Value] = {}
    for part in parts:
        for key, value in part.items():
            sums[key] = add(sums[key], value) if key in sums else value
    return sums


def _sorted(counters: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    return dict(sorted(counters.items()))


def _add_numbers(first: int, second: int) -> int:
    return first + second


def _add_totals(first: FlowTotal, second: FlowTotal) -> FlowTotal:
    traffic = Traffic(*map(sum, zip(first.traffic, second.traffic, strict=True)))
    return FlowTotal(first.flows + second.flows, first.live + second.live, traffic)


def _add_histograms(first: Histogram, second: Histogram) -> Histogram:
    """Return the sum of two histograms with the same bounds."""
    both = first.copy()
    both.counts = [sum(pair) for pair in zip(first.counts, second.counts, strict=True)]
    both.sum += second.sum
    return both


def _add_pools(first: PoolUse, second: PoolUse) -> PoolUse:
    return PoolUse(first.threads + second.threads, first.tasks + second.tasks)


def _add_processes(uses: Sequence[ProcessUse]) -> ProcessUse:
    return ProcessUse(*map(sum, zip(*uses, strict=True)))


# -- details


def _merge_details(parts: Sequence[Details]) -> Details:
    return Details(
        flows=[flow for part in parts for flow in part.flows],
        busiest=_busiest([row for part in parts for row in part.busiest]),
        users=merge_subjects([part.users for part in parts]),
        clients=merge_subjects([part.clients for part in parts]),
        refusals=_newest([row for part in parts for row in part.refusals]),
        failures=_newest([row for part in parts for row in part.failures]),
        notices=_newest([row for part in parts for row in part.notices]),
    )


def _busiest(rows: Sequence[FlowRow]) -> list[FlowRow]:
    return sorted(rows, key=_carried, reverse=True)[:PAGE_FLOWS]


def _carried(row: FlowRow) -> int:
    return row["sent"] + row["received"]


def _newest(rows: Sequence[JsonObject]) -> list[JsonObject]:
    """Return the last events in the order of time."""
    return sorted(rows, key=_time)[-EVENTS_LIMIT:]


def _time(row: JsonObject) -> float:
    at = row["at"]
    return at if isinstance(at, float) else 0.0


def merge_subjects(parts: Iterable[Sequence[SubjectUse]]) -> list[SubjectUse]:
    """Return users or clients by name.

    All workers read the same ledger: the greatest number is the newest.
    """
    by_name: dict[str, SubjectUse] = {}
    for use in (use for part in parts for use in part):
        before = by_name.get(use.name)
        by_name[use.name] = use if before is None else _greatest(before, use)
    return list(by_name.values())


def _greatest(first: SubjectUse, second: SubjectUse) -> SubjectUse:
    return SubjectUse(
        first.name,
        max(first.connections, second.connections),
        max(first.sessions, second.sessions),
        max(first.up, second.up),
        max(first.down, second.down),
        first.limits or second.limits,
    )
