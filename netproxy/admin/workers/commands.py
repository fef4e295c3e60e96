"""The commands about flows, in the parent: all workers are asked, and their answers merged.

Same names and answers as admin.commands.FlowCommands.  Thread: that of the client that asks.
"""

from __future__ import annotations

import time

from netproxy.admin.accounts import SpreadAnswers
from netproxy.admin.flow_commands import set_level
from netproxy.admin.flow_filter import FlowFilter, require_filter
from netproxy.admin.control.client import CommandError, PartialAnswer
from netproxy.admin.diagnosis.why import answer, find
from netproxy.admin.workers.lines import ASK_SECONDS
from netproxy.admin.workers.rows import merge_flows, merge_tunnels, merge_verdicts
from netproxy.typed import TYPE_CHECKING, Callable, ContextManager, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.admin.control.client import Command, CommandRequest
    from netproxy.admin.workers.view import ParentView
    from netproxy.interfaces.answers import JsonValue, WhyAnswer
    from netproxy.admin.workers.lines import Answer, WorkerLines
    from netproxy.observe.log import Log

TEST_SECONDS = 40.0
"""For a worker to dial a target: what a test may take, and some more."""
EXPLAIN_SECONDS = 30.0
"""For workers to explain a flow, which may need a name lookup."""
NAT_SECONDS = 60.0
"""For a worker to ask STUN servers (admin.nat.upstream)."""


class MergedCommands:
    """Answers requests about the flows of all workers."""

    def __init__(
        self, view: ParentView, lines: WorkerLines, log: Log, guard: ContextManager[object]
    ) -> None:
        """`guard` is held while objects are changed that workers inherit."""
        self._view = view
        self._lines = lines
        self._log = log
        self._guard = guard

    def table(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return {
            "tunnels": self.tunnels,
            "connections": self.flows,
            "sessions": self.flows,
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

    def tunnels(self, request: CommandRequest) -> PartialAnswer:
        """Return a TunnelsAnswer: the agents of all workers."""
        return self._merged(request, merge_tunnels)

    def flows(self, request: CommandRequest) -> PartialAnswer:
        """Return the flows of all workers that pass the filters."""
        FlowFilter(request)
        # A worker without such a flow refuses a name that the configuration has not.
        return self._merged(request, merge_flows, all_must_agree=False)

    def verdicts(self, request: CommandRequest) -> PartialAnswer:
        """Return what `via: auto` has found out in any worker; with "clear", forget it."""
        return self._merged(request, _cleared if request.get("clear") else merge_verdicts)

    def explain(self, request: CommandRequest) -> list[str]:
        """Return the lines of one worker: all have the same configuration."""
        return list(self._ask_any(request, EXPLAIN_SECONDS))

    def nat(self, request: CommandRequest) -> object:
        """Return what one worker finds out about the NAT of an upstream."""
        return self._ask_any(request, NAT_SECONDS)

    def why(self, request: CommandRequest) -> PartialAnswer:
        """Return why something was refused or has failed, in any process."""
        incidents = self._view.incidents
        own = find(incidents, str(request.get("about", "")))

        def merge(answers: Sequence[WhyAnswer]) -> WhyAnswer:
            rows = [row for part in answers for row in part["incidents"]]
            remembered = len(incidents) + sum(part["remembered"] for part in answers)
            return answer([*own, *rows], remembered, self._view.config)

        return self._merged(request, merge)

    def test(self, request: CommandRequest) -> JsonValue:
        """Return the steps of a test in one worker: all have the same configuration."""
        return self._ask_any(request, TEST_SECONDS)

    # -- acting

    def kill(self, request: CommandRequest) -> PartialAnswer:
        """End the flows that pass the filters, of which one worker must have one."""
        require_filter(request)
        wanted = FlowFilter(request)
        answers = self._lines.ask_all(request)
        # A worker that has no such flow refuses.
        killed = sum(answer.result["killed"] for answer in answers if answer.result is not None)
        faults = [answer.fault for answer in answers if answer.fault]
        if not killed:
            wanted.check_names(self._view.config)
            raise CommandError("; ".join(["no such flow", *faults]))
        return PartialAnswer({"killed": killed}, faults)

    def set_level(self, request: CommandRequest) -> PartialAnswer:
        """Set the level of the log in all processes; return the level."""
        with self._guard:
            answer = set_level(self._log, request)
        if request.get("level") is None:
            return PartialAnswer(answer, ())
        return PartialAnswer(answer, spread(self._lines, request).warnings)

    def _ask_any(self, request: CommandRequest, seconds: float) -> JsonValue:
        """Return the result of the first worker that answers.

        Raises CommandError.
        """
        deadline = time.monotonic() + seconds
        faults = []
        for line in self._lines.current():
            answer = line.ask(request, deadline - time.monotonic())
            if not answer.fault:
                return _result(answer)
            faults.append(answer.fault)
        raise CommandError("; ".join(faults) or "there is no worker")

    def _merged(
        self,
        request: CommandRequest,
        merge: Callable[[Sequence[JsonValue]], object],
        all_must_agree: bool = True,
    ) -> PartialAnswer:
        """Return the merged answers of all workers.

        Raises CommandError if a worker refuses, or all do unless `all_must_agree`, or if none
        answers.
        """
        answers = self._lines.ask_all(request, ASK_SECONDS)
        faults = [answer.fault for answer in answers if answer.fault]
        refused = [answer for answer in answers if answer.refusal]
        if refused and (all_must_agree or len(refused) + len(faults) == len(answers)):
            raise CommandError(refused[0].refusal)
        results = [answer.result for answer in answers if not answer.fault and not answer.refusal]
        if not results:
            raise CommandError("; ".join(faults) or "there is no worker")
        return PartialAnswer(merge(results), faults)


def spread(lines: WorkerLines, request: CommandRequest) -> SpreadAnswers:
    """Have all workers carry out a request, too."""
    answers = lines.ask_all(request)
    return SpreadAnswers(
        [answer.result for answer in answers if answer.result is not None],
        [answer.fault for answer in answers if answer.fault],
    )


def _result(answer: Answer) -> JsonValue:
    """Return the result of an answer.  Raises CommandError if the worker has refused."""
    if answer.refusal:
        raise CommandError(answer.refusal)
    return answer.result


def _cleared(parts: Sequence[Mapping[str, int]]) -> object:
    return {"cleared": sum(part["cleared"] for part in parts)}
