"""Dials a target through the running configuration, and tells each step with its time.

netproxyctl test asks for it.  The dial is real: the upstreams count it.  It uses up no limit of a
user, and is no flow in lists and records.  A pool thread dials; the thread of the client that asks
waits, and aborts the dial when its time is up.
"""

from __future__ import annotations

import threading
import time

from netproxy.admin.control.client import CommandError
from netproxy.admin.diagnosis.conversation import DNS_PORT, ask_name_server, speak
from netproxy.admin.diagnosis.explain import addresses_text, rule_text, upstream_text
from netproxy.admin.diagnosis.flow_text import AskedFlow, parse_flow
from netproxy.admin.diagnosis.why import explain_incident, place_of
from netproxy.errors import DialError, FlowRefused, NetProxyError, Reason
from netproxy.interfaces.fairness import client_key
from netproxy.interfaces.flows import Failure, Record
from netproxy.interfaces.listeners import decided_by
from netproxy.interfaces.routing import Route
from netproxy.net.connect import AbortableDials
from netproxy.observe.incidents import FAILED, Incident
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple

if TYPE_CHECKING:
    from netproxy.access.accounts.standing import Standing
    from netproxy.admin.control.client import CommandRequest
    from netproxy.config.schema import Config
    from netproxy.dialer.factory import DialerFactory
    from netproxy.interfaces.answers import ExplainedIncident, TestAnswer, TestStep
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer
    from netproxy.net.datagram import ArenaPool
    from netproxy.router.router import RuleRouter

SECONDS = 30.0
"""For a test in total: a chain dials its hops one after the other, a group its members."""
STOP_SECONDS = 2.0
"""For an aborted dial to end."""
LOOK_SECONDS = 0.1
"""Between two looks of the waiting thread."""
NOT_THE_WAY = "the way to the target is open: it is the target that does not answer as it should"
"""What to do if the target was reached, but not what it should be."""
TESTS_LIMIT = 4
"""Tests at once: each holds a thread of the pool for dials of the daemon itself."""


class Paths(NamedTuple):
    """What of the running configuration a test uses."""

    config: Config
    router: RuleRouter
    dialers: DialerFactory
    upstreams: Mapping[str, Dialer]
    """By name, "direct" among them."""
    entrances: Mapping[str, str]
    """Where flows come in, each with the reason why no rule applies there, or ""."""
    arenas: ArenaPool
    standing: Standing
    submit: Callable[[Callable[[], None]], bool]
    """submit(task) runs a task that may block on a pool thread; False if there is no room."""


class DialTests:
    """Runs tests, at most TESTS_LIMIT at once."""

    def __init__(self) -> None:
        self._room = threading.Semaphore(TESTS_LIMIT)

    def run(self, paths: Paths, request: CommandRequest) -> TestAnswer:
        """Run the test of a request: "target", and perhaps "via", "user", "listener" and "udp".

        Raises CommandError if there is no room, or FlowError.
        """
        test = _DialTest(paths, _flow_of(paths, request), _text(request, "via"))
        if not self._room.acquire(blocking=False):
            raise CommandError(f"{TESTS_LIMIT} tests are running: try again")
        try:
            if not paths.submit(test.run):
                raise CommandError("no thread is free: try again")
            return test.answer()
        finally:
            self._room.release()


class Steps(AbortableDials):
    """The steps of a test so far; also those that dialers tell of the dial on its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()
        self.steps: list[TestStep] = []

    def step(self, name: str, text: str) -> None:
        """Note a step.  Thread: that of the test."""
        at = round(time.monotonic() - self.began, 6)
        self.steps.append({"step": name, "at": at, "text": text})


class _DialTest:
    """One test."""

    def __init__(self, paths: Paths, asked: AskedFlow, via: str) -> None:
        self._paths, self._asked, self._via = paths, asked, via
        self._steps = Steps()
        # As far as it has come.
        self._route: Route | None = None
        self._error: NetProxyError | None = None
        # Ends what the pool thread waits for.
        self._interrupt: Callable[[], None] = _nothing
        # When a datagram must have been answered, monotonic seconds.
        self._reply_until = float("inf")
        self._done = threading.Event()

    # -- the thread of the client

    def answer(self) -> TestAnswer:
        """Wait for the end of the test, and return what it has come to."""
        deadline = self._steps.began + SECONDS
        while not self._done.wait(LOOK_SECONDS):
            now = time.monotonic()
            if now > min(deadline, self._reply_until):
                self._steps.abort()
                self._interrupt()
            if now > deadline:
                break
        ended, seconds = self._done.wait(STOP_SECONDS), time.monotonic() - self._steps.began
        error = self._error
        if not ended:
            error = DialError(Reason.TIMEOUT, said=f"not done within {SECONDS:g} s")
        return {
            "fine": error is None,
            "seconds": round(seconds, 6),
            "steps": list(self._steps.steps),
            "failure": None if error is None else self._failure(error, seconds),
        }

    def _failure(self, error: NetProxyError, seconds: float) -> ExplainedIncident:
        flow, upstream, rule = self._asked.flow, "", ""
        if self._route is not None:
            dialer, flow, rule = self._route
            upstream = dialer.name
        record = Record(flow, upstream, 0, 0, seconds, str(error), rule=rule)
        if isinstance(error, DialError):
            record = record._replace(failure=Failure.of(error), decided=error.decided_by(rule))
        row = Incident("", time.time(), FAILED, flow.client.host, {}, record).row(0.0)
        explained = explain_incident(row, self._paths.config)
        if not isinstance(error, DialError):
            explained["advice"] = NOT_THE_WAY
        return explained

    # -- the pool thread

    def run(self) -> None:
        """Make the test."""
        try:
            with self._steps.watched():
                self._test()
        except NetProxyError as error:
            self._error = error
        finally:
            self._done.set()

    def _test(self) -> None:
        """Take the steps.  Raises NetProxyError."""
        flow = self._enter()
        self._route = route = self._choose(flow)
        dialer, flow, _ = route
        self._steps.step("upstream", upstream_text(dialer, self._paths.dialers, flow))
        if text := addresses_text(dialer, flow):
            self._steps.step("addresses", text)
        if flow.network not in dialer.carries:
            raise DialError(dialer.refusal, said=f"{dialer.name} carries no {flow.network.upper()}")
        if flow.network == "udp":
            self._try_datagrams(dialer, flow)
            return
        stream = dialer.dial(flow)
        self._interrupt = stream.shutdown
        try:
            member = f" by {stream.member}" if stream.member else ""
            self._steps.step("connected", f"to {flow.target}{member}")
            speak(stream, self._asked.scheme, self._asked.flow.target.host, self._steps.step)
        finally:
            stream.close()

    def _enter(self) -> Flow:
        """Return the flow with the name of its target.  Raises DialError if it may not begin."""
        paths, flow = self._paths, self._asked.flow
        user = f"{flow.user}@" if flow.user else ""
        assumed = f" (assumed: {', '.join(self._asked.assumed)})" if self._asked.assumed else ""
        parties = f"{flow.network} {user}{flow.client.host} -> {flow.target}"
        self._steps.step("flow", f"{parties} on {flow.listener}{assumed}")
        refusal = paths.standing.refusal(flow.user, client_key(flow.client.host))
        if refusal:
            decided = decided_by(refusal, flow.user)
            raise FlowRefused(Reason.DENIED, said=refusal, decided=decided)
        if reason := paths.entrances[flow.listener]:
            raise DialError(Reason.DENIED, said=reason)
        return paths.router.named(flow)

    def _choose(self, flow: Flow) -> Route:
        """Return the route of the flow.  Raises DialError."""
        if self._via:
            self._steps.step("rule", "none is asked: --via")
            return Route(self._paths.upstreams[self._via], flow, "--via")
        rule, outcome = self._paths.router.explain(flow)
        place = place_of(rule, flow.listener, self._paths.config)
        self._steps.step("rule", f"{rule_text(rule)}{f' at {place}' if place else ''}")
        if isinstance(outcome, DialError):
            raise outcome
        return outcome

    def _try_datagrams(self, dialer: Dialer, flow: Flow) -> None:
        conn = dialer.dial_packet(flow)
        try:
            destination = conn.prepare(flow)
            member = f" by {conn.member}" if conn.member else ""
            self._steps.step("session", f"open to {flow.target}{member}")
            if flow.target.port == DNS_PORT:
                self._interrupt = conn.shutdown
                answer = ask_name_server(conn, destination, self._paths.arenas, self._expect)
                self._steps.step("answer", answer)
        finally:
            conn.close()

    def _expect(self, seconds: float) -> None:
        self._steps.step("asked", "a DNS query for the name servers of the root")
        self._reply_until = time.monotonic() + seconds


def _flow_of(paths: Paths, request: CommandRequest) -> AskedFlow:
    """Return the flow of a request.  Raises FlowError or CommandError."""
    asked = parse_flow(_text(request, "target"))
    flow, assumed = asked.flow, asked.assumed
    if request.get("udp"):
        flow = flow._replace(network="udp", command="connect")
        assumed = tuple(text for text in assumed if text != "network tcp")
    if user := _text(request, "user"):
        flow = flow._replace(user=user)
    if listener := _text(request, "listener"):
        flow = flow._replace(listener=listener)
    asked = asked._replace(flow=flow, assumed=assumed)
    asked = asked.on_default_listener(paths.config, paths.entrances)
    _require("listener", asked.flow.listener, paths.entrances)
    if via := _text(request, "via"):
        _require("upstream", via, paths.upstreams)
    return asked


def _require(kind: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise CommandError(f"there is no {kind} '{name}' (known: {', '.join(known) or 'none'})")


def _text(request: CommandRequest, key: str) -> str:
    return str(request.get(key) or "")


def _nothing() -> None:
    """Interrupt nothing."""
