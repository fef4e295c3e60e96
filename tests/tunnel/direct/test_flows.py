"""The flows of a direct path: what goes directly, and what is left to the relay."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.interfaces.datagrams import Batch, Run
from netproxy.net.datagram import Arena
from netproxy.tunnel.direct import flows
from netproxy.tunnel.direct.flows import AgentFlow, ClientFlow
from netproxy.tunnel.path.flows import FlowTable

TARGET, OTHER = b"\1\x09\x09\x09\x09\0\x35", b"\1\x08\x08\x08\x08\0\x35"


class FakePath:
    """A path that is up or down, and what it has been given to send."""

    def __init__(self) -> None:
        self.up = True
        self.sent: list[bytes] = []
        self.flows = FlowTable(self)

    def send(self, arena: Any, run: Run, prefix: bytes) -> bool:
        if self.up:
            self.sent.append(prefix)
        return self.up

    def note_active(self) -> None:
        pass


def send(flow: Any, prefix: bytes = b"") -> bool:
    taken: bool = flow.send(Arena(), Run((0,), 1, 1), prefix)
    return taken


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets: its only item."""
    now = [100.0]
    monkeypatch.setattr(flows.time, "monotonic", lambda: now[0])
    return now


def client_flow(path: FakePath) -> ClientFlow:
    return path.flows.put(ClientFlow(path, 1))  # type: ignore[arg-type]  # a path of the test


def test_client_sends_directly_while_the_path_is_up(clock: list[float]) -> None:
    path = FakePath()
    flow = client_flow(path)
    assert send(flow)
    path.up = False
    assert not send(flow)
    path.up = True
    assert send(flow) and path.sent == [b"\1", b"\1"]


def test_relay_is_used_now_and_then(clock: list[float]) -> None:
    """Hazard 183: the bridge's session, and the NATs on the way to it, must not be idle."""
    flow = client_flow(FakePath())
    taken = []
    for _ in range(600):
        taken.append(send(flow))
        clock[0] += 0.125
    assert [index for index, is_taken in enumerate(taken) if not is_taken] == [160, 320, 480]


def test_client_waits_a_moment_for_an_agent_that_does_not_know_the_flow(clock: list[float]) -> None:
    path = FakePath()
    flow = client_flow(path)
    path.flows.end(1)
    assert not send(flow)
    clock[0] += flows.PAUSE_SECONDS
    assert send(flow)


def test_closed_flow_of_a_client_is_relayed_for_good(clock: list[float]) -> None:
    path = FakePath()
    flow = client_flow(path)
    flow.close()
    flow.end()
    clock[0] += 10
    assert not send(flow) and flow.closed and not path.sent


class Agent:
    """The agent's side: a flow that the bridge relays, with a shortcut."""

    def __init__(self) -> None:
        self.bridge, self.direct = FakePath(), FakePath()
        self.relayed = self.bridge.flows.add(7, True)
        shortcut = AgentFlow(self.direct, 1, self.relayed, TARGET)  # type: ignore[arg-type]  # as above
        self.shortcut = self.relayed.shortcut = self.direct.flows.put(shortcut)
        self.delivered: list[Any] = []
        self.relayed.sink = lambda batch: self.delivered.extend(batch.spans)

    def come_directly(self) -> bool:
        return self.shortcut.deliver(Batch(Arena(), [((5,), 3, 3, b"")]))


def test_agent_answers_directly_once_the_client_has_sent_directly() -> None:
    agent = Agent()
    assert send(agent.relayed, TARGET)
    assert (agent.bridge.sent, agent.direct.sent) == ([b"\7" + TARGET], [])
    assert agent.come_directly()
    assert send(agent.relayed, TARGET)
    assert agent.direct.sent == [b"\1"] and len(agent.bridge.sent) == 1


def test_what_comes_directly_goes_to_the_one_target() -> None:
    """Hazard 184: no packet of a client can name another target."""
    agent = Agent()
    assert agent.come_directly()
    assert agent.delivered == [((5,), 3, 3, TARGET)]
    assert agent.relayed.take_used()


def test_replies_of_others_are_relayed() -> None:
    """Hazard 184: the bridge decides about them."""
    agent = Agent()
    agent.come_directly()
    assert send(agent.relayed, OTHER)
    assert (agent.bridge.sent, agent.direct.sent) == ([b"\7" + OTHER], [])


def test_replies_are_relayed_while_the_direct_path_is_down() -> None:
    agent = Agent()
    agent.come_directly()
    agent.direct.up = False
    assert send(agent.relayed, TARGET) and agent.bridge.sent == [b"\7" + TARGET]


def test_client_that_has_no_such_flow_gets_replies_by_the_relay() -> None:
    agent = Agent()
    agent.come_directly()
    agent.direct.flows.end(1)
    assert send(agent.relayed, TARGET) and not agent.direct.sent


def test_shortcut_ends_with_the_relayed_flow() -> None:
    """Hazard 184: the bridge ends a flow at any time."""
    agent = Agent()
    agent.come_directly()
    agent.relayed.close()
    assert agent.shortcut.closed and agent.direct.flows.get(1) is None
    assert not agent.come_directly()


def test_flow_takes_the_place_of_another_with_its_number() -> None:
    path = FakePath()
    first, second = client_flow(path), client_flow(path)
    assert first.closed and not second.closed and path.flows.get(1) is second
