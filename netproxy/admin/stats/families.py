"""Metrics of listeners, workers and threads.  Pure; observe.exposition has the others."""

from __future__ import annotations

from netproxy.admin.stats.snapshot import SERVING
from netproxy.interfaces.flows import Traffic
from netproxy.observe.exposition.text_format import COUNTER, GAUGE, Family, Sample, single
from netproxy.observe.flows import DIAL_BOUNDS, FlowTotal, TotalKey
from netproxy.observe.metrics import Histogram
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import Config
    from netproxy.admin.stats.snapshot import Snapshot
    from netproxy.interfaces.answers import WorkerRow

_WITHOUT_FLOWS = ("dns", "tunnel", "pac")
"""Protocols of listeners whose clients open no flow."""


def listener_families(now: Snapshot) -> list[Family]:
    """Return the connections of clients, by listener."""
    rows = [row for row in now.listeners if row["network"] != "udp"]
    accepted = [Sample({"listener": row["name"]}, row["accepted"]) for row in rows]
    live = [Sample({"listener": row["name"]}, row["live"]) for row in rows]
    mapped = [
        Sample({"listener": row["name"], "network": mapping["network"]}, bool(mapping["external"]))
        for row in now.listeners
        for mapping in row["mappings"]
    ]
    return [
        Family("connections_total", COUNTER, "Accepted client connections.", accepted),
        Family("connections", GAUGE, "Open client connections.", live),
        Family("port_mapping_up", GAUGE, "1 if the router maps the port, else 0.", mapped),
    ]


def from_the_start(
    now: Snapshot, config: Config
) -> tuple[dict[TotalKey, FlowTotal], dict[str, Histogram]]:
    """Return the totals of flows and the times of dials, also those that have none yet.

    These are those of each listener with the upstream of what no rule decides.
    """
    totals: dict[TotalKey, FlowTotal] = {}
    dial_times: dict[str, Histogram] = {}
    for listener in config.listeners:
        if listener.protocol in _WITHOUT_FLOWS:
            continue
        upstream = listener.upstream or config.default
        name = upstream.name or upstream.text
        # connect-udp comes within the TCP connections of an http listener.
        networks = {*listener.network, *(["udp"] if listener.protocol == "http" else [])}
        for network in sorted(networks):
            totals[TotalKey(network, listener.name, name)] = FlowTotal(0, 0, Traffic(0, 0))
        dial_times[name] = Histogram(DIAL_BOUNDS)
    return {**totals, **now.totals}, {**dial_times, **now.dial_times}


def worker_families(workers: Sequence[WorkerRow]) -> list[Family]:
    """Return the families about workers; none in a daemon of one process."""
    if not workers:
        return []
    serving = sum(row["state"] == SERVING for row in workers)
    restarts = sum(row["restarts"] for row in workers)
    return [
        single("workers", GAUGE, "Worker processes that serve.", serving),
        single("worker_restarts_total", COUNTER, "Worker processes that were replaced.", restarts),
    ]


def thread_families(now: Snapshot) -> list[Family]:
    """Return the threads, and those of each pool."""
    families = [single("threads", GAUGE, "Threads.", now.process.threads)]
    for name, pool in now.pools.items():
        tasks_text = f"Tasks of the {name} pool that run or wait."
        families += [
            single(f"{name}_pool_threads", GAUGE, f"Threads of the {name} pool.", pool.threads),
            single(f"{name}_pool_tasks", GAUGE, tasks_text, pool.tasks),
        ]
    return families
