"""Statistics of the daemon, for netproxyctl, for Prometheus and for the status page.

Only reads, on the thread of the caller: the control socket's or the metrics listener's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Callable, Mapping, NamedTuple

from netproxy import __version__
from netproxy.access.accounts.subject import CLIENT, USER
from netproxy.admin.account_rows import ban_rows, client_rows, user_rows, users_over_quota
from netproxy.interfaces.services import DaemonState
from netproxy.observe import exposition
from netproxy.observe.exposition import COUNTER, GAUGE, Family, Sample, single
from netproxy.observe.flows import describe_flows

if TYPE_CHECKING:
    from netproxy.admin.view import DaemonView
    from netproxy.interfaces.answers import (
        Directions,
        FlowRow,
        JsonObject,
        Load,
        StatusAnswer,
        TrafficAnswer,
    )
    from netproxy.interfaces.flows import LiveFlow
    from netproxy.observe.flows import FlowTotal, TotalKey
    from netproxy.observe.log import Log

PAGE_FLOWS = 60
"""Flows for the status page, which shows the fastest of those that have carried the most."""
PAGE_ACCOUNTS = 60
"""Users, and clients, for the status page: those with flows that have moved the most, first."""
TROUBLE = {
    "drops": "datagrams dropped",
    "connections_refused": "connections refused",
    "requests_refused": "requests refused",
    "dial_failures": "targets not reached",
    "authentication": "logins refused",
    "lookups": "names not found",
    "accept_errors": "connections not accepted",
    "log_dropped": "log records not written",
}
"""Counters of trouble, and what the status page calls them."""


class ReloadOutcome(NamedTuple):
    """How the last reload ended; the start counts as one."""

    at: float
    """Seconds since the epoch."""
    fine: bool


class Stats:
    """The answers that consist of statistics."""

    def __init__(self, daemon: DaemonView, log: Log, began: float) -> None:
        """`began`: when the daemon started, in monotonic seconds."""
        self._daemon = daemon
        self._log = log
        self._began = began
        self._began_at = time.time() - self._uptime()
        self.reloaded = ReloadOutcome(self._began_at, True)

    @property
    def state(self) -> DaemonState:
        """Whether the daemon serves."""
        return self._daemon.state

    def note_reload(self, fine: bool) -> None:
        """Note that a reload has ended now."""
        self.reloaded = ReloadOutcome(time.time(), fine)

    # -- netproxyctl

    def status(self) -> StatusAnswer:
        """Return the answer to `status`."""
        daemon = self._daemon
        return {
            "version": __version__,
            "state": daemon.state,
            "pid": os.getpid(),
            "uptime": round(self._uptime(), 1),
            "log": self._log.level,
            "reloaded": {"at": self.reloaded.at, "fine": self.reloaded.fine},
            **self._load(),
            "listeners": list(daemon.listening()),
            "counters": [list(item) for item in daemon.counters.items()],
            "lines": list(daemon.status()),
        }

    def flows(self, wanted: Callable[[LiveFlow], bool]) -> list[FlowRow]:
        """Return the running flows for which `wanted` is true."""
        return describe_flows(filter(wanted, self._daemon.flows.live()), time.monotonic())

    def traffic(self) -> TrafficAnswer:
        """Return the answer to `traffic`: totals, and the bytes of each flow."""
        daemon = self._daemon
        flows = []
        for live in daemon.flows.live():
            traffic = live.traffic()
            flows.append((live.number, traffic.sent, traffic.received))
        return {
            "at": time.monotonic(),
            "state": daemon.state,
            "uptime": round(self._uptime(), 1),
            **self._load(),
            "bytes": _directions(daemon.flows.totals()),
            "drops": self._dropped(),
            "flows": flows,
        }

    # -- the status page

    def page(self) -> JsonObject:
        """Return what the status page shows."""
        daemon = self._daemon
        live = daemon.flows.live()
        biggest = sorted(live, key=_carried, reverse=True)[:PAGE_FLOWS]
        return {
            "version": f"netproxyd {__version__}",
            "host": socket.gethostname(),
            "state": daemon.state,
            "uptime": round(self._uptime(), 2),
            **self._load(),
            "bytes": _directions(daemon.flows.totals()),
            "drops": self._dropped(),
            "trouble": [
                [TROUBLE[name], reason, value]
                for name, reason, value in daemon.counters.items()
                if name in TROUBLE
            ],
            "listeners": daemon.listening(),
            "upstreams": daemon.upstreams(),
            "flows": describe_flows(biggest, time.monotonic()),
            "flows_live": len(live),
            "users": user_rows(daemon, PAGE_ACCOUNTS),
            "clients": client_rows(daemon, PAGE_ACCOUNTS),
            "bans": ban_rows(daemon),
            "history": daemon.history.row(),
            "refusals": [{"at": at, **fields} for at, fields in list(daemon.refusals.recent)],
            "failures": [failure._asdict() for failure in daemon.flows.failures()],
            "notices": [notice._asdict() for notice in list(self._log.recent)],
        }

    # -- Prometheus

    def metrics(self) -> bytes:
        """Return the text of /metrics."""
        daemon = self._daemon
        return exposition.render(
            [
                *self._daemon_families(),
                *self._listener_families(),
                *self._account_families(),
                *exposition.flow_families(daemon.flows.totals()),
                *exposition.counter_families(daemon.counters.items()),
                exposition.dial_family(daemon.flows.dial_times()),
                *exposition.upstream_families(daemon.upstreams()),
                *self._thread_families(),
                *exposition.process_families(self._began_at),
            ]
        )

    def _daemon_families(self) -> list[Family]:
        serving = self._daemon.state == DaemonState.SERVING
        success, time_text = "1 if the last reload succeeded, else 0.", "Time of the last reload."
        reloaded = self.reloaded
        return [
            single("build_info", GAUGE, "The running version.", 1, version=__version__),
            single("ready", GAUGE, "1 if new connections are accepted, else 0.", serving),
            single("config_last_reload_successful", GAUGE, success, reloaded.fine),
            single("config_last_reload_timestamp_seconds", GAUGE, time_text, reloaded.at),
        ]

    def _listener_families(self) -> list[Family]:
        rows = [row for row in self._daemon.listening() if row["network"] != "udp"]
        accepted = [Sample({"listener": row["name"]}, row["accepted"]) for row in rows]
        live = [Sample({"listener": row["name"]}, row["live"]) for row in rows]
        return [
            Family("connections_total", COUNTER, "Accepted client connections.", accepted),
            Family("connections", GAUGE, "Open client connections.", live),
        ]

    def _account_families(self) -> list[Family]:
        daemon = self._daemon
        banned_users, banned_clients = (len(bans) for bans in daemon.standing.bans())
        users, clients = (len(daemon.accounts.stats(kind)) for kind in (USER, CLIENT))
        over = users_over_quota(daemon)
        families = [
            single("active_users", GAUGE, "Users with running flows.", users),
            single("active_clients", GAUGE, "Client addresses with running flows.", clients),
            single("banned_users", GAUGE, "Users who are banned.", banned_users),
            single("banned_clients", GAUGE, "Client addresses that are banned.", banned_clients),
            single("users_over_quota", GAUGE, "Users whose quota is used up.", over),
        ]
        if daemon.metrics_users:
            families += exposition.user_families(user_rows(daemon))
        return families

    def _thread_families(self) -> list[Family]:
        families = [single("threads", GAUGE, "Threads.", threading.active_count())]
        for name, pool in self._daemon.pools.items():
            tasks_text = f"Tasks of the {name} pool that run or wait."
            families += [
                single(f"{name}_pool_threads", GAUGE, f"Threads of the {name} pool.", pool.threads),
                single(f"{name}_pool_tasks", GAUGE, tasks_text, pool.busy),
            ]
        return families

    # -- parts

    def _uptime(self) -> float:
        return time.monotonic() - self._began

    def _load(self) -> Load:
        flows = self._daemon.flows.live()
        return {
            "connections": self._daemon.live,
            "sessions": sum(live.flow.network == "udp" for live in flows),
            "threads": threading.active_count(),
            "memory": exposition.resident_memory(),
        }

    def _dropped(self) -> int:
        return sum(value for name, _, value in self._daemon.counters.items() if name == "drops")


def _directions(totals: Mapping[TotalKey, FlowTotal]) -> Directions:
    return {
        "up": sum(total.traffic.sent for total in totals.values()),
        "down": sum(total.traffic.received for total in totals.values()),
    }


def _carried(live: LiveFlow) -> int:
    """Return the bytes that a flow has carried in both directions."""
    traffic = live.traffic()
    return traffic.sent + traffic.received
