"""The commands of the control socket.

Each method answers one command of netproxyctl, on the thread of the client that asks.  What
only the main thread may do is handed to it by a signal to this process.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Mapping, Protocol, Sequence

from netproxy.admin.control_client import ActAfterAnswer
from netproxy.admin.control_socket import CommandError
from netproxy.interfaces.services import DaemonState
from netproxy.observe.log import LEVELS

if TYPE_CHECKING:
    from netproxy.admin.accounts import AccountCommands
    from netproxy.admin.control_client import Command, CommandRequest
    from netproxy.admin.control_socket import ReloadRequests
    from netproxy.admin.stats import Stats
    from netproxy.admin.view import DaemonView
    from netproxy.interfaces.answers import FlowRow, JsonObject, StatusAnswer, TrafficAnswer
    from netproxy.interfaces.answers import UpstreamRow, VerdictRow
    from netproxy.interfaces.flows import LiveFlow
    from netproxy.observe.log import Log

FILTERS = ("user", "client", "listener", "upstream", "target")
"""Keys of a request that select flows by a value; "ids" selects them by number."""

ACCOUNT_COMMANDS = ("users", "clients", "limit", "ban", "unban")
"""The commands of admin.accounts."""


class StatsSource(Protocol):
    """Makes the statistics when somebody first asks for them: they cost memory."""

    @property
    def stats(self) -> Stats:
        """The statistics."""


class Commands:
    """Answers requests."""

    def __init__(
        self, daemon: DaemonView, source: StatsSource, reloads: ReloadRequests, log: Log
    ) -> None:
        self._daemon = daemon
        self._source = source
        self._reloads = reloads
        self._log = log
        # Guards _accounts, which is made when it is first needed.
        self._lock = threading.Lock()
        self._accounts: AccountCommands | None = None

    def table(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return {
            "status": self.status,
            "upstreams": self.upstreams,
            "tunnels": self.tunnels,
            "connections": self.connections,
            "sessions": self.sessions,
            "flows": self.flows,
            "traffic": self.traffic,
            "explain": self.explain,
            "verdicts": self.verdicts,
            "kill": self.kill,
            "log": self.set_level,
            "reload": self.reload,
            "drain": self.drain,
            **{name: self._about_accounts for name in ACCOUNT_COMMANDS},
        }

    def _about_accounts(self, request: CommandRequest) -> object:
        """Answer a command about users and clients."""
        # Imported late: few daemons are ever asked.
        from netproxy.admin.accounts import AccountCommands

        with self._lock:
            if self._accounts is None:
                self._accounts = AccountCommands(self._daemon, self._log)
        return self._accounts.table()[str(request["command"])](request)

    # -- looking

    def status(self, request: CommandRequest) -> StatusAnswer:
        """Return the state, listeners and counters."""
        return self._source.stats.status()

    def upstreams(self, request: CommandRequest) -> Sequence[UpstreamRow]:
        """Return the upstreams with their statistics."""
        return self._daemon.upstreams()

    def tunnels(self, request: CommandRequest) -> Mapping[str, object]:
        """Return a TunnelsAnswer."""
        return self._daemon.tunnels()

    def connections(self, request: CommandRequest) -> list[FlowRow]:
        """Return the TCP flows that pass the filters."""
        return self._source.stats.flows(FlowFilter(request, "tcp").passes)

    def sessions(self, request: CommandRequest) -> list[FlowRow]:
        """Return the UDP sessions that pass the filters."""
        return self._source.stats.flows(FlowFilter(request, "udp").passes)

    def flows(self, request: CommandRequest) -> list[FlowRow]:
        """Return the flows of both networks that pass the filters."""
        return self._source.stats.flows(FlowFilter(request).passes)

    def traffic(self, request: CommandRequest) -> TrafficAnswer:
        """Return totals, and the bytes of each flow."""
        return self._source.stats.traffic()

    def explain(self, request: CommandRequest) -> list[str]:
        """Return lines that tell what would happen to the flow of the key "flow"."""
        return list(self._daemon.explain(str(request.get("flow", ""))))

    def verdicts(self, request: CommandRequest) -> JsonObject | list[VerdictRow]:
        """Return what `via: auto` has found out; with "clear", forget it."""
        verdicts = self._daemon.verdicts
        if request.get("clear"):
            return {"cleared": verdicts.clear()}
        return [
            {"target": str(target), "upstream": upstream, "seconds": round(seconds)}
            for target, upstream, seconds in verdicts.items()
        ]

    # -- acting

    def kill(self, request: CommandRequest) -> JsonObject:
        """End the flows that pass the filters, of which there must be one."""
        if not any(request.get(key) for key in ("ids", *FILTERS)):
            raise CommandError("nothing to kill: give an id or a filter")
        killed = self._daemon.flows.kill(FlowFilter(request).passes)
        if not killed:
            raise CommandError("no such flow")
        return {"killed": killed}

    def set_level(self, request: CommandRequest) -> JsonObject:
        """Set the level of the log if the request has one; return the level."""
        level = request.get("level")
        if level is not None:
            if not isinstance(level, str) or level not in LEVELS:
                raise CommandError(f"unknown level (known: {', '.join(LEVELS)})")
            self._log.level = level
        return {"level": self._log.level}

    def reload(self, request: CommandRequest) -> JsonObject:
        """Reload, and wait until that is done."""
        if self._daemon.state != DaemonState.SERVING:
            raise CommandError(f"the daemon is {self._daemon.state}")
        self._reloads.request()
        return {"reloaded": True}

    def drain(self, request: CommandRequest) -> ActAfterAnswer:
        """Drain and stop.

        The answer goes first: with nothing to wait for, the daemon ends at once.  A daemon that
        drains refuses, because a second signal would stop it at once.
        """
        if self._daemon.state == DaemonState.DRAINING:
            raise CommandError("the daemon is draining")
        return ActAfterAnswer({"connections": self._daemon.live}, _signal_drain)


class FlowFilter:
    """The flows that a request is about."""

    def __init__(self, request: CommandRequest, network: str = "") -> None:
        """Read the filters of a request; `network` "" stands for both.

        Raises CommandError if "ids" is not a list of numbers.
        """
        ids = request.get("ids") or ()
        if not isinstance(ids, (list, tuple)) or not all(isinstance(item, int) for item in ids):
            raise CommandError("ids: not a list of numbers")
        self._network = network
        self._ids = frozenset(ids)
        self._values = [(key, request[key]) for key in FILTERS if request.get(key)]

    def passes(self, live: LiveFlow) -> bool:
        """Return whether a flow is among them."""
        flow = live.flow
        if self._network and flow.network != self._network:
            return False
        if self._ids and live.number not in self._ids:
            return False
        if not self._values:
            return True
        fields = {
            "user": flow.user,
            "client": flow.client.host,
            "listener": flow.listener,
            "upstream": live.dialer.name,
            "target": flow.target.host,
        }
        return all(fields[key] == value for key, value in self._values)


def signal_reload() -> None:
    """Make the main thread reload."""
    os.kill(os.getpid(), signal.SIGHUP)


def _signal_drain() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
