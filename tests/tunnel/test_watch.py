"""How an agent finds out early that its control connection is dead; and its flows' connections."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Callable

import pytest

from netproxy.errors import StreamError
from netproxy.interfaces.addresses import Address
from netproxy.net.local.interfaces import has_address
from netproxy.tunnel.control import watch
from netproxy.tunnel.control.watch import SILENT_SECONDS, ControlWatch
from netproxy.tunnel.path.flows import FlowTable, PathFlow
from netproxy.tunnel.streams.attaching import DIALLING_LIMIT, FlowAttacher
from tests.support.doubles import Lines


class Signs:
    """What the paths know (watch.PathSigns)."""

    def __init__(self) -> None:
        self.last_heard = 0.0
        self.has_moved = False
        self.probes = 0

    def take_moved(self) -> bool:
        has_moved, self.has_moved = self.has_moved, False
        return has_moved

    def probe(self) -> None:
        self.probes += 1


class Control:
    """A control connection from an address, whose PINGs are noted."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.stream = SimpleNamespace(local_address=lambda: Address(host, 4000))
        self.asked: float | None = None
        self.pings = 0

    def ping(self) -> None:
        self.pings += 1


def watched(control: Control, signs: Signs) -> ControlWatch:
    return ControlWatch(control, signs)  # type: ignore[arg-type]  # a double


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_machine_has_its_addresses(host: str) -> None:
    assert has_address(host)


@pytest.mark.parametrize("host", ["192.0.2.77", "2001:db8::77"])
def test_machine_does_not_have_the_address_of_another_one(host: str) -> None:
    assert not has_address(host)


def test_connection_from_an_address_that_has_gone_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 173."""
    monkeypatch.setattr(watch, "has_address", lambda host: True)
    control_watch = watched(Control("192.0.2.77"), Signs())
    control_watch.check(0.0)
    monkeypatch.setattr(watch, "has_address", lambda host: host != "192.0.2.77")
    with pytest.raises(StreamError, match="no longer has the address 192.0.2.77"):
        control_watch.check(1.0)


def test_address_that_cannot_be_asked_for_says_nothing() -> None:
    """That of a VRF is in use, and no socket outside the VRF may have it."""
    watched(Control("192.0.2.77"), Signs()).check(0.0)


def test_connection_that_is_silent_while_the_path_answers_is_dead() -> None:
    """Hazard 173: a NAT has forgotten it."""
    control, signs = Control(), Signs()
    control_watch = watched(control, signs)
    control.asked = 10.0
    control_watch.check(10.0)
    assert signs.probes == 1, "the path is asked as well, once"
    signs.last_heard = 10.1
    control_watch.check(10.0 + SILENT_SECONDS / 2)
    assert signs.probes == 1
    with pytest.raises(StreamError, match="silent"):
        control_watch.check(10.0 + SILENT_SECONDS)


def test_connection_that_is_silent_as_the_path_is_may_live() -> None:
    """The network does not work at all: its heartbeat decides."""
    control, signs = Control(), Signs()
    control_watch = watched(control, signs)
    control.asked, signs.last_heard = 10.0, 9.9
    control_watch.check(10.0 + 2 * SILENT_SECONDS)
    control_watch.check(10.0 + 3 * SILENT_SECONDS)
    # The next silence is looked at anew.
    control.asked = None
    control_watch.check(20.0)
    control.asked = 30.0
    control_watch.check(30.0)
    assert signs.probes == 2


def test_agent_that_has_moved_asks_on_its_connection() -> None:
    control, signs = Control(), Signs()
    control_watch = watched(control, signs)
    signs.has_moved = True
    control_watch.check(1.0)
    control_watch.check(2.0)
    assert control.pings == 1


# -- work connections of flows


class Carrier:
    """A path that holds its flows, or does not."""

    holds_flows = True

    def left_alone(self, flow: PathFlow) -> None:
        pass


class Attaching:
    """A FlowAttacher whose dials wait until the test runs them."""

    def __init__(self) -> None:
        self.tasks: list[Callable[[], None]] = []
        self.dialled: list[tuple[int, int]] = []
        self.outcome: Any = None
        """What a dial returns or raises."""
        self.is_full = False
        self.log = Lines()
        self.attacher = FlowAttacher(self._dial, self._submit, self.log)  # type: ignore[arg-type]
        self.table = FlowTable(Carrier())  # type: ignore[arg-type]  # nothing is sent

    def flow(self) -> PathFlow:
        """Return a flow that takes any stream."""
        flow = self.table.new(False)
        flow.attach = lambda stream: True
        return flow

    def run(self) -> None:
        """Run the dials that wait."""
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            task()

    def _submit(self, task: Callable[[], None]) -> bool:
        if not self.is_full:
            self.tasks.append(task)
        return not self.is_full

    def _dial(self, path: int, flow: int) -> Any:
        self.dialled.append((path, flow))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Connection:
    """A stream that notes its end."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_flow_is_dialled_for_once_at_a_time() -> None:
    rig = Attaching()
    rig.outcome = Connection()
    flow = rig.flow()
    for _ in range(3):
        rig.attacher.add(1, flow)
        rig.attacher.fill()
    assert len(rig.tasks) == 1 and flow.awaited == 1
    rig.run()
    rig.attacher.fill()
    assert rig.dialled == [(1, flow.number)] and not rig.tasks and not rig.outcome.closed


def test_dials_at_once_are_limited() -> None:
    rig = Attaching()
    rig.outcome = Connection()
    for _ in range(DIALLING_LIMIT + 3):
        rig.attacher.add(1, rig.flow())
    rig.attacher.fill()
    assert len(rig.tasks) == DIALLING_LIMIT
    rig.run()
    assert len(rig.tasks) == 3


def test_dial_that_fails_is_repeated() -> None:
    rig = Attaching()
    rig.outcome = StreamError("no route")
    flow = rig.flow()
    rig.attacher.add(1, flow)
    rig.attacher.fill()
    rig.run()
    assert not rig.tasks and flow.awaited == 1
    rig.outcome = Connection()
    rig.is_full = True
    rig.attacher.fill()
    rig.is_full = False
    rig.attacher.fill()
    rig.run()
    assert len(rig.dialled) == 2


@pytest.mark.parametrize("is_alone", [True, False])
def test_flow_that_the_bridge_does_not_have_ends_if_it_has_no_stream(is_alone: bool) -> None:
    rig = Attaching()
    flow = rig.flow()
    ended: list[bool] = []
    flow.gone = lambda: ended.append(True)
    rig.attacher.add(1, flow)
    assert not is_alone or flow.hold(True)
    rig.attacher.fill()
    rig.run()
    assert ended == [True] * is_alone and flow.awaited == 0


def test_connection_of_a_flow_that_has_ended_is_closed() -> None:
    rig = Attaching()
    rig.outcome = Connection()
    flow = rig.flow()
    flow.attach = lambda stream: False
    rig.attacher.add(1, flow)
    rig.attacher.fill()
    rig.run()
    assert rig.outcome.closed
    flow.close()
    rig.attacher.add(1, flow)
    rig.attacher.fill()
    rig.run()
    assert len(rig.dialled) == 1, "nobody is there for another one"


def test_nothing_is_dialled_after_the_end() -> None:
    rig = Attaching()
    rig.attacher.add(1, rig.flow())
    rig.attacher.close()
    rig.attacher.add(1, rig.flow())
    rig.attacher.fill()
    assert not rig.tasks
