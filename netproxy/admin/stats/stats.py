"""Statistics of the daemon, for netproxyctl, for Prometheus and for the status page.

Only reads, on the thread of the caller: the control socket's or the metrics listener's.  All
numbers come from a Snapshot; users, clients and bans are looked up in the daemon.
"""

from __future__ import annotations

import os
import socket
import time

from netproxy import __version__
from netproxy.admin.stats import families
from netproxy.admin.stats.account_rows import ban_rows, client_rows, user_rows, users_over_quota
from netproxy.admin.stats.snapshot import BUSIEST, CLIENTS, EVENTS, FLOWS, USERS
from netproxy.interfaces.services import DaemonState
from netproxy.observe.exposition import text_format
from netproxy.observe.exposition.text_format import GAUGE, Family, single
from netproxy.observe.flows import sum_of
from netproxy.observe.exposition.reasons import IN_WORDS, in_words, with_zeros
from netproxy.typed import TYPE_CHECKING, ContextManager, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.admin.stats.snapshot import Snapshot, SnapshotSource
    from netproxy.admin.view import AccountsView
    from netproxy.interfaces.answers import (
        ClientsAnswer,
        Directions,
        JsonObject,
        Load,
        StatusAnswer,
        TrafficAnswer,
        UpstreamRow,
        UsersAnswer,
        WorkersShown,
    )
    from netproxy.observe.flows import FlowTotal, TotalKey
    from netproxy.observe.log import Log

PAGE_ACCOUNTS = 60
"""Users, and clients, for the status page: those with flows that have moved the most, first."""
TROUBLE = (
    *("drops", "connections_refused", "requests_refused", "dial_failures", "authentication"),
    *("lookups", "accept_errors", "log_dropped"),
)
"""Counters of trouble, which the status page shows."""


class ReloadOutcome(NamedTuple):
    """How the last reload ended; the start counts as one."""

    at: float
    """Seconds since the epoch."""
    fine: bool


class Stats:
    """The answers that consist of statistics."""

    def __init__(
        self,
        view: AccountsView,
        source: SnapshotSource,
        log: Log,
        began: float,
        guard: ContextManager[object],
    ) -> None:
        """`began`: when the daemon started, in monotonic seconds.

        `guard` is held while users, clients and bans are looked up.
        """
        self._view = view
        self._source = source
        self._log = log
        self._began = began
        self._guard = guard
        self._began_at = time.time() - self._uptime()
        self.reloaded = ReloadOutcome(self._began_at, True)

    @property
    def state(self) -> DaemonState:
        """Whether the daemon serves."""
        return self._view.state

    def note_reload(self, fine: bool, at: float) -> None:
        """Note that a reload has ended; `at`: in seconds since 1970."""
        self.reloaded = ReloadOutcome(at, fine)

    # -- netproxyctl

    def connections(self) -> int:
        """Return the number of client connections."""
        return self._source.read().connections

    def upstreams(self) -> Sequence[UpstreamRow]:
        """Return the upstreams."""
        return self._source.read().upstreams

    def status(self) -> StatusAnswer:
        """Return the answer to `status`."""
        now = self._source.read()
        return {
            "version": __version__,
            "state": self.state,
            "pid": os.getpid(),
            "uptime": round(self._uptime(), 1),
            "log": self._log.level,
            "reloaded": {"at": self.reloaded.at, "fine": self.reloaded.fine},
            **_load(now),
            "listeners": list(now.listeners),
            "counters": [[*key, value] for key, value in now.counters.items()],
            "bytes": _directions(now.totals),
            "events": in_words((*key, value) for key, value in now.counters.items()),
            "lines": list(now.lines),
            **_workers(now),
        }

    def traffic(self) -> TrafficAnswer:
        """Return the answer to `traffic`: totals, and the bytes of each flow."""
        now = self._source.read((FLOWS,))
        return {
            "at": time.monotonic(),
            "state": self.state,
            "uptime": round(self._uptime(), 1),
            **_load(now),
            "bytes": _directions(now.totals),
            "drops": now.drops,
            "flows": list(now.details.flows),
            **_workers(now),
        }

    def users(self) -> UsersAnswer:
        """Return the answer to `users`: what they use and have moved."""
        active = self._source.read((USERS,)).details.users
        with self._guard:
            return {"at": time.monotonic(), "users": user_rows(self._view, active)}

    def clients(self) -> ClientsAnswer:
        """Return the answer to `clients`: what they use."""
        active = self._source.read((CLIENTS,)).details.clients
        with self._guard:
            return {"at": time.monotonic(), "clients": client_rows(self._view, active)}

    # -- the status page

    def page(self) -> JsonObject:
        """Return what the status page shows."""
        now = self._source.read((BUSIEST, USERS, CLIENTS, EVENTS))
        return {
            "version": f"netproxyd {__version__}",
            "host": socket.gethostname(),
            "state": self.state,
            "uptime": round(self._uptime(), 2),
            **_load(now),
            "bytes": _directions(now.totals),
            "drops": now.drops,
            "trouble": [
                [IN_WORDS[name], reason, value]
                for (name, reason), value in now.counters.items()
                if name in TROUBLE
            ],
            "listeners": now.listeners,
            "upstreams": now.upstreams,
            "direct": now.direct,
            "flows": now.details.busiest,
            "flows_live": sum_of(now.totals.values()).live,
            **self._account_rows(now),
            "history": self._source.history(),
            "refusals": now.details.refusals,
            "failures": now.details.failures,
            "notices": now.details.notices,
            **_workers(now),
        }

    def _account_rows(self, now: Snapshot) -> JsonObject:
        """Return the users and clients of the status page, and the bans."""
        with self._guard:
            return {
                "users": user_rows(self._view, now.details.users, PAGE_ACCOUNTS),
                "clients": client_rows(self._view, now.details.clients, PAGE_ACCOUNTS),
                "bans": ban_rows(self._view),
            }

    # -- Prometheus

    def metrics(self) -> bytes:
        """Return the text of /metrics."""
        now = self._source.read((USERS, CLIENTS))
        counters = ((*key, value) for key, value in with_zeros(now.counters).items())
        totals, dial_times = families.from_the_start(now, self._view.config)
        return text_format.render(
            [
                *self._daemon_families(),
                *families.worker_families(now.workers),
                *families.listener_families(now),
                *self._account_families(now),
                *text_format.flow_families(totals),
                *text_format.counter_families(counters),
                text_format.dial_family(dial_times),
                *text_format.upstream_families(now.upstreams),
                *families.thread_families(now),
                *text_format.process_families(self._began_at, now.process),
            ]
        )

    def _daemon_families(self) -> list[Family]:
        success, time_text = "1 if the last reload succeeded, else 0.", "Time of the last reload."
        reloaded, serving = self.reloaded, self.state == DaemonState.SERVING
        return [
            single("build_info", GAUGE, "The running version.", 1, version=__version__),
            single("ready", GAUGE, "1 if new connections are accepted, else 0.", serving),
            single("config_last_reload_successful", GAUGE, success, reloaded.fine),
            single("config_last_reload_timestamp_seconds", GAUGE, time_text, reloaded.at),
        ]

    def _account_families(self, now: Snapshot) -> list[Family]:
        view = self._view
        users, clients = now.details.users, now.details.clients
        with self._guard:
            banned_users, banned_clients = (len(bans) for bans in view.standing.bans())
            over = users_over_quota(view)
            named = user_rows(view, users) if view.config.metrics_users else None
        shown = [
            single("active_users", GAUGE, "Users with running flows.", len(users)),
            single("active_clients", GAUGE, "Client addresses with running flows.", len(clients)),
            single("banned_users", GAUGE, "Users who are banned.", banned_users),
            single("banned_clients", GAUGE, "Client addresses that are banned.", banned_clients),
            single("users_over_quota", GAUGE, "Users whose quota is used up.", over),
        ]
        return shown + (text_format.user_families(named) if named is not None else [])

    def _uptime(self) -> float:
        return time.monotonic() - self._began


# -- parts


def _load(now: Snapshot) -> Load:
    process = now.process
    return {
        "connections": now.connections,
        "sessions": now.sessions,
        "threads": process.threads,
        "memory": process.share or process.memory,
    }


def _workers(now: Snapshot) -> WorkersShown:
    return {"workers": list(now.workers)} if now.workers else {}


def _directions(totals: Mapping[TotalKey, FlowTotal]) -> Directions:
    carried = sum_of(totals.values())
    return {"up": carried.up, "down": carried.down}
