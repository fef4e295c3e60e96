"""What a daemon holds and has done until now: the numbers that all statistics are made of.

A daemon of one process makes a Snapshot of itself.  With workers, each worker makes one and the
parent merges them (admin.workers).  Thread: that of the client that asks.
"""

from __future__ import annotations

import time
from types import MappingProxyType

from netproxy.access.accounts.subject import CLIENT, USER
from netproxy.admin.stats.account_rows import SubjectUse, subject_uses
from netproxy.observe.incidents import FAILED, REFUSED
from netproxy.observe.flows import FlowTotal, TotalKey, carried_by, describe_flows
from netproxy.observe.process import ProcessUse, process_use
from netproxy.typed import TYPE_CHECKING, Collection, Mapping, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.admin.view import DaemonView
    from netproxy.interfaces.answers import DirectRow, FlowRow, HistoryRow, JsonObject, ListenerRow
    from netproxy.interfaces.answers import UpstreamRow, WorkerRow
    from netproxy.interfaces.flows import LiveFlow
    from netproxy.observe.incidents import Incident
    from netproxy.observe.log import Log
    from netproxy.observe.metrics import Histogram

PAGE_FLOWS = 60
"""Flows for the status page, which shows the fastest of those that have carried the most."""
EVENTS_LIMIT = 20
"""Events of a kind for the status page."""
FLOWS, BUSIEST, USERS, CLIENTS, EVENTS = "flows", "busiest", "users", "clients", "events"
"""Details, which cost time for each flow or much text: a snapshot has only those that were asked
for."""

SERVING, SILENT, STARTING = "serving", "silent", "starting"
"""The states of workers."""


class PoolUse(NamedTuple):
    """A thread pool."""

    threads: int
    tasks: int
    """Tasks that run or wait."""


class Details(NamedTuple):
    """The parts of a snapshot that have to be asked for; empty if they were not."""

    flows: Sequence[tuple[int, int, int]] = ()
    """FLOWS: id, bytes sent and bytes received of each flow."""
    busiest: Sequence[FlowRow] = ()
    """BUSIEST: the PAGE_FLOWS that have carried the most, first those."""
    users: Sequence[SubjectUse] = ()
    """USERS: those with flows."""
    clients: Sequence[SubjectUse] = ()
    """CLIENTS: those with flows."""
    refusals: Sequence[JsonObject] = ()
    """EVENTS: the last refusals, the newest last, as the other two."""
    failures: Sequence[JsonObject] = ()
    notices: Sequence[JsonObject] = ()


class Snapshot(NamedTuple):
    """What a daemon, or one of its workers, holds and has done until now."""

    connections: int = 0
    """Connections of clients."""
    listeners: Sequence[ListenerRow] = ()
    upstreams: Sequence[UpstreamRow] = ()
    counters: Mapping[tuple[str, str], int] = MappingProxyType({})
    """By name and reason."""
    totals: Mapping[TotalKey, FlowTotal] = MappingProxyType({})
    dial_times: Mapping[str, Histogram] = MappingProxyType({})
    """By upstream."""
    pools: Mapping[str, PoolUse] = MappingProxyType({})
    process: ProcessUse = ProcessUse()
    lines: Sequence[str] = ()
    """What SIGUSR1 writes to the log."""
    details: Details = Details()
    workers: Sequence[WorkerRow] = ()
    """The workers; none in a daemon of one process."""
    parked: int = 0
    """Waits of connections that hold no thread."""
    direct: Sequence[DirectRow] = ()
    """Direct paths between clients and agents."""

    @property
    def sessions(self) -> int:
        """The running UDP sessions."""
        return sum(total.live for key, total in self.totals.items() if key.network == "udp")

    @property
    def drops(self) -> int:
        """Datagrams that were not forwarded."""
        return sum(value for (name, _), value in self.counters.items() if name == "drops")


class SnapshotSource(Protocol):
    """Where snapshots come from.  Thread: any."""

    def read(self, wanted: Collection[str] = ()) -> Snapshot:
        """Return a snapshot with the details `wanted`."""

    def history(self) -> HistoryRow:
        """Return what flows have moved in the last day."""


class OwnSnapshots:
    """The SnapshotSource of a daemon of one process."""

    def __init__(self, daemon: DaemonView, log: Log) -> None:
        self._daemon = daemon
        self._log = log

    def read(self, wanted: Collection[str] = ()) -> Snapshot:
        """Return a snapshot with the details `wanted`."""
        return take(self._daemon, self._log, wanted)

    def history(self) -> HistoryRow:
        """Return what flows have moved in the last day."""
        return self._daemon.history.row()


def take(
    daemon: DaemonView, log: Log, wanted: Collection[str] = (), with_share: bool = False
) -> Snapshot:
    """Return a snapshot of this process; `with_share`: with its share of memory."""
    return Snapshot(
        connections=daemon.connections,
        parked=daemon.parked,
        listeners=daemon.listening(),
        upstreams=daemon.upstreams(),
        direct=daemon.direct_paths(),
        counters={(name, reason): value for name, reason, value in daemon.counters.items()},
        totals=daemon.flows.totals(),
        dial_times=daemon.flows.dial_times(),
        pools={name: PoolUse(pool.threads, pool.busy) for name, pool in daemon.pools.items()},
        process=process_use(with_share),
        lines=list(daemon.status()),
        details=_details(daemon, log, wanted),
    )


def _details(daemon: DaemonView, log: Log, wanted: Collection[str]) -> Details:
    live = daemon.flows.live() if FLOWS in wanted or BUSIEST in wanted else []
    busiest = sorted(live, key=carried_by, reverse=True)[:PAGE_FLOWS] if BUSIEST in wanted else []
    details = Details(
        flows=_amounts(live) if FLOWS in wanted else (),
        busiest=describe_flows(busiest, time.monotonic()),
        users=subject_uses(daemon, USER) if USERS in wanted else (),
        clients=subject_uses(daemon, CLIENT) if CLIENTS in wanted else (),
    )
    if EVENTS not in wanted:
        return details
    incidents = daemon.incidents.all()
    return details._replace(
        refusals=refusal_rows(incidents), failures=failure_rows(incidents), notices=notice_rows(log)
    )


def _amounts(flows: Sequence[LiveFlow]) -> list[tuple[int, int, int]]:
    amounts = []
    for live in flows:
        traffic = live.traffic()
        amounts.append((live.number, traffic.sent, traffic.received))
    return amounts


def refusal_rows(incidents: Sequence[Incident]) -> list[JsonObject]:
    """Return the last refusals as the status page shows them."""
    refused = [incident for incident in incidents if incident.kind == REFUSED]
    return [
        {"at": incident.at, "id": incident.id, **incident.fields}
        for incident in refused[-EVENTS_LIMIT:]
    ]


def failure_rows(incidents: Sequence[Incident]) -> list[JsonObject]:
    """Return the last flows that have not begun as the status page shows them."""
    failed = [incident for incident in incidents if incident.kind == FAILED][-EVENTS_LIMIT:]
    return [
        {
            "at": incident.at,
            "id": incident.id,
            "target": str(incident.record.flow.target),
            "upstream": incident.record.upstream,
            "why": incident.record.ended,
        }
        for incident in failed
        if incident.record is not None
    ]


def notice_rows(log: Log) -> list[JsonObject]:
    """Return the last warnings and errors as the status page shows them."""
    return [notice._asdict() for notice in list(log.recent)]
