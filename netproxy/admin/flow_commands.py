"""The commands of the control socket about the flows of this process.

With workers, each worker answers them to its parent, and admin.workers merges the answers.
Thread: that of the client that asks.
"""

from __future__ import annotations

import threading
import time

from netproxy.admin.control.client import CommandError
from netproxy.admin.flow_filter import FlowFilter, require_filter
from netproxy.observe.flows import describe_flows
from netproxy.observe.log import LEVELS
from netproxy.typed import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.admin.control.client import Command, CommandRequest
    from netproxy.admin.diagnosis.dial_test import DialTests
    from netproxy.admin.view import DaemonView
    from netproxy.interfaces.answers import FlowRow, JsonObject, TestAnswer, VerdictRow, WhyAnswer
    from netproxy.observe.log import Log


class FlowCommands:
    """Answers requests about the flows of this process."""

    def __init__(self, daemon: DaemonView, log: Log) -> None:
        self._daemon = daemon
        self._log = log
        # Guards _tests.
        self._lock = threading.Lock()
        # Made with the first one.
        self._tests: DialTests | None = None

    def table(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return {
            "tunnels": self.tunnels,
            "connections": self.connections,
            "sessions": self.sessions,
            "flows": self.flows,
            "explain": self.explain,
            "why": self.why,
            "test": self.test,
            "nat": self.nat,
            "verdicts": self.verdicts,
            "kill": self.kill,
            "log": self.set_level,
        }

    # -- looking

    def tunnels(self, request: CommandRequest) -> Mapping[str, object]:
        """Return a TunnelsAnswer."""
        return self._daemon.tunnels()

    def connections(self, request: CommandRequest) -> list[FlowRow]:
        """Return the TCP flows that pass the filters."""
        return self._flows(FlowFilter(request, "tcp"))

    def sessions(self, request: CommandRequest) -> list[FlowRow]:
        """Return the UDP sessions that pass the filters."""
        return self._flows(FlowFilter(request, "udp"))

    def flows(self, request: CommandRequest) -> list[FlowRow]:
        """Return the flows of both networks that pass the filters."""
        return self._flows(FlowFilter(request))

    def explain(self, request: CommandRequest) -> list[str]:
        """Return lines that tell what would happen to the flow of the key "flow"."""
        return list(self._daemon.questions.explain(str(request.get("flow", ""))))

    def nat(self, request: CommandRequest) -> JsonObject:
        """Ask STUN servers, the key "servers", about the NAT of an upstream, the key "via"."""
        return self._daemon.questions.probe_nat(str(request.get("via", "")), request.get("servers"))

    def why(self, request: CommandRequest) -> WhyAnswer:
        """Return why something was refused or has failed: an id, a client or a target, "about"."""
        from netproxy.admin.diagnosis import why  # late: few daemons are ever asked

        incidents = self._daemon.incidents
        rows = why.find(incidents, str(request.get("about", "")))
        return why.answer(rows, len(incidents), self._daemon.config)

    def test(self, request: CommandRequest) -> TestAnswer:
        """Dial a target through the running configuration; return the steps."""
        from netproxy.admin.diagnosis.dial_test import DialTests  # late: few are ever asked

        with self._lock:
            if self._tests is None:
                self._tests = DialTests()
        return self._tests.run(self._daemon.questions.paths(), request)

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
        require_filter(request)
        wanted = FlowFilter(request)
        killed = self._daemon.flows.kill(wanted.passes)
        if not killed:
            wanted.check_names(self._daemon.config)
            raise CommandError("no such flow")
        return {"killed": killed}

    def set_level(self, request: CommandRequest) -> JsonObject:
        """Set the level of the log if the request has one; return the level."""
        return set_level(self._log, request)

    def _flows(self, wanted: FlowFilter) -> list[FlowRow]:
        live = filter(wanted.passes, self._daemon.flows.live())
        rows = describe_flows(live, time.monotonic())
        if not rows:
            wanted.check_names(self._daemon.config)
        return rows


def set_level(log: Log, request: CommandRequest) -> JsonObject:
    """Set the level of the log if the request has one; return the level."""
    level = request.get("level")
    if level is not None:
        if not isinstance(level, str) or level not in LEVELS:
            raise CommandError(f"unknown level (known: {', '.join(LEVELS)})")
        log.level = level
    return {"level": log.level}
