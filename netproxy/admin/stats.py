"""What the daemon is like, in figures: for netproxyctl, for Prometheus and for the status page.

Only reads, on the thread of whoever asks.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple, Protocol

from netproxy import __version__
from netproxy.interfaces.flows import LiveFlow, Traffic
from netproxy.interfaces.services import DaemonState
from netproxy.observe import exposition
from netproxy.observe.exposition import COUNTER, GAUGE, Family, Sample, single
from netproxy.observe.flows import Flows, Key, Total, describe_flows
from netproxy.observe.log import Log
from netproxy.observe.metrics import Counters

PAGE_FLOWS = 60  # shown to the page, which chooses the fastest of those that carried most
# Counters that tell of trouble, as the page calls them
TROUBLE = {
    "drops": "datagrams dropped",
    "connections_refused": "connections refused",
    "dial_failures": "targets not reached",
    "authentication": "logins refused",
    "lookups": "names not found",
    "accept_errors": "connections not accepted",
}


class Pool(Protocol):
    @property
    def threads(self) -> int: ...

    @property
    def busy(self) -> int:
        """Tasks that run or wait."""


class DaemonView(Protocol):
    """The daemon, as far as it is looked at."""

    counters: Counters
    flows: Flows
    pools: Mapping[str, Pool]
    state: DaemonState  # a DaemonState

    @property
    def live(self) -> int:
        """Connections of clients."""

    def listening(self) -> list[dict[str, Any]]:
        """name, network, address, live, accepted: one for each listener."""

    def upstreams(self) -> list[dict[str, Any]]:
        """As report.upstreams."""

    def status(self) -> Any:
        """Lines for the log."""


class Reloaded(NamedTuple):
    """How the last reload went; the start counts as one."""

    at: float  # seconds since the epoch
    fine: bool


class Stats:
    def __init__(self, daemon: DaemonView, log: Log, began: float) -> None:
        """`began`: when the daemon did (monotonic)."""
        self._daemon = daemon
        self._log = log
        self._began = began
        self._began_at = time.time() - self._uptime()
        self.reloaded = Reloaded(self._began_at, True)

    def note_reload(self, fine: bool) -> None:
        self.reloaded = Reloaded(time.time(), fine)

    # -- netproxyctl

    def status(self) -> dict[str, Any]:
        """Everything, as one mapping, and as lines."""
        daemon = self._daemon
        return {
            "version": __version__,
            "state": daemon.state,
            "pid": os.getpid(),
            "uptime": round(self._uptime(), 1),
            "log": self._log.level,
            "reloaded": self.reloaded._asdict(),
            **self._load(),
            "listeners": daemon.listening(),
            "counters": [list(item) for item in daemon.counters.items()],
            "lines": list(daemon.status()),
        }

    def flows(self, wanted: Callable[[LiveFlow], bool]) -> list[dict[str, Any]]:
        return describe_flows(filter(wanted, self._daemon.flows.live()), time.monotonic())

    def traffic(self) -> dict[str, Any]:
        """What top needs each second: totals, and for each flow what it has carried."""
        return {
            "at": time.monotonic(),
            "state": self._daemon.state,
            "uptime": round(self._uptime(), 1),
            **self._load(),
            "bytes": self._bytes(self._daemon.flows.totals()),
            "drops": self._dropped(),
            "flows": [
                [one.number, traffic.sent, traffic.received]
                for one in self._daemon.flows.live()
                for traffic in [one.traffic()]
            ],
        }

    # -- the status page

    def page(self) -> dict[str, Any]:
        daemon = self._daemon
        live = daemon.flows.live()
        carried = sorted(live, key=_carried, reverse=True)[:PAGE_FLOWS]
        return {
            "version": f"netproxyd {__version__}",
            "host": socket.gethostname(),
            "state": daemon.state,
            "uptime": round(self._uptime(), 2),
            **self._load(),
            "bytes": self._bytes(daemon.flows.totals()),
            "drops": self._dropped(),
            "trouble": [
                [TROUBLE[name], reason, value]
                for name, reason, value in daemon.counters.items()
                if name in TROUBLE
            ],
            "listeners": daemon.listening(),
            "upstreams": daemon.upstreams(),
            "flows": describe_flows(carried, time.monotonic()),
            "flows_live": len(live),
            "failures": [one._asdict() for one in daemon.flows.failures()],
            "notices": [one._asdict() for one in list(self._log.recent)],
        }

    # -- Prometheus

    def metrics(self) -> bytes:
        daemon = self._daemon
        families = [
            single("build_info", GAUGE, "The version that runs.", 1, version=__version__),
            single(
                "ready",
                GAUGE,
                "Whether new connections are taken.",
                daemon.state == DaemonState.SERVING,
            ),
            single(
                "config_last_reload_successful",
                GAUGE,
                "Whether the last reload did what it was asked.",
                self.reloaded.fine,
            ),
            single(
                "config_last_reload_timestamp_seconds",
                GAUGE,
                "When the configuration was read last.",
                self.reloaded.at,
            ),
            *self._listeners(),
            *exposition.totals(daemon.flows.totals()),
            *exposition.counted(daemon.counters.items()),
            exposition.dials(daemon.flows.dials()),
            *exposition.upstreams(daemon.upstreams()),
            single("threads", GAUGE, "Threads.", threading.active_count()),
        ]
        for name, pool in daemon.pools.items():
            families += [
                single(f"{name}_pool_threads", GAUGE, f"Threads of the {name} pool.", pool.threads),
                single(
                    f"{name}_pool_tasks",
                    GAUGE,
                    f"Tasks of the {name} pool that run or wait.",
                    pool.busy,
                ),
            ]
        return exposition.render([*families, *exposition.process(self._began_at)])

    def _listeners(self) -> list[Family]:
        rows = self._daemon.listening()
        return [
            Family(
                "connections_total",
                COUNTER,
                "Connections of clients that were let in.",
                [
                    Sample({"listener": row["name"]}, row["accepted"])
                    for row in rows
                    if row["network"] != "udp"
                ],
            ),
            Family(
                "connections",
                GAUGE,
                "Connections of clients that live.",
                [
                    Sample({"listener": row["name"]}, row["live"])
                    for row in rows
                    if row["network"] != "udp"
                ],
            ),
        ]

    # -- parts

    def _uptime(self) -> float:
        return time.monotonic() - self._began

    def _load(self) -> dict[str, Any]:
        sessions = sum(one.flow.network == "udp" for one in self._daemon.flows.live())
        return {
            "connections": self._daemon.live,
            "sessions": sessions,
            "threads": threading.active_count(),
            "memory": exposition.resident(),
        }

    def _dropped(self) -> int:
        return sum(value for name, _, value in self._daemon.counters.items() if name == "drops")

    @staticmethod
    def _bytes(totals: Mapping[Key, Total]) -> dict[str, int]:
        return {
            "up": sum(total.traffic.sent for total in totals.values()),
            "down": sum(total.traffic.received for total in totals.values()),
        }


def _carried(live: LiveFlow) -> int:
    traffic: Traffic = live.traffic()
    return traffic.sent + traffic.received
