"""Sessions that are resumed, on the bridge, by agents played by hand; and who may not do so."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import BridgePort, Hello, Registration
from netproxy.tunnel import bridge as bridge_module
from netproxy.tunnel.control.login import Arrival
from netproxy.tunnel.control.session import HELD_SECONDS
from netproxy.tunnel.path.flows import FlowTable, PathFlow
from tests.support.agents import NONCE, OTHER_TOKEN, TOKEN, BridgeRig, PlayedAgent
from tests.support.sockets import Task, read_to_end, wait_until

SSH = BridgePort("tcp", 8022)
FLOW = Flow("tcp", Address("203.0.113.9", 50000), Address("a.test", 80), "main", "")


class PlayedPath:
    """A path that is up, as a session sees it."""

    def __init__(self) -> None:
        self.number = 1
        self.up = self.holds_flows = True
        self.probes = 0
        self.alone: list[PathFlow] = []
        self.flows = FlowTable(self)  # type: ignore[arg-type]  # nothing is sent

    def probe(self) -> None:
        self.probes += 1

    def left_alone(self, flow: PathFlow) -> None:
        self.alone.append(flow)

    def describe(self) -> None:
        return None


@pytest.fixture(autouse=True)
def within_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all connections for such as have come within TLS."""
    sealed = partial(_arrival, True)
    monkeypatch.setattr(bridge_module, "arrival_of", sealed)


def _arrival(is_sealed: bool, stream: Any, client: Address) -> Arrival:
    return Arrival(client, 7000, is_sealed)


@pytest.fixture
def path() -> Iterator[PlayedPath]:
    yield PlayedPath()


def begin(rig: BridgeRig, path: PlayedPath, resumes: bool = True) -> PlayedAgent:
    """Return an agent with a path, whose port is open."""
    agent = rig.agent()
    agent.send(tunnel.encode_register(Registration([SSH], True, False, True, resumes)))
    agent.read(tunnel.REGISTERED)
    rig.session().path = path  # type: ignore[assignment]  # played
    return agent


def ask(rig: BridgeRig, hello: Hello, token: bytes = TOKEN) -> PlayedAgent:
    """Return a connection whose proof was sent and whose answer was not read."""
    return PlayedAgent(rig, hello, token)


def resume(rig: BridgeRig, session: bytes) -> PlayedAgent:
    return ask(rig, Hello(tunnel.RESUME, "home", NONCE, session)).welcomed()


def lose(rig: BridgeRig, agent: PlayedAgent) -> None:
    """Lose the control connection of an agent, and wait until the bridge has seen that."""
    agent.close()
    rig.log.wait_for("agent 'home' is to connect again: closed by the peer")
    assert rig.session().is_held


def expire(rig: BridgeRig, now: float) -> None:
    """Do what the janitor does."""
    for close in rig.sessions.expire(now):
        close()


def test_session_goes_on_after_its_connection_was_lost(rig: BridgeRig, path: PlayedPath) -> None:
    """Hazard 173: its ports stay open, and its name stays its own."""
    agent = begin(rig, path)
    session = rig.session()
    lose(rig, agent)
    assert path.probes == 1, "a path whose agent has died must be noticed"
    expire(rig, 0.0)
    again = resume(rig, agent.session)
    assert again.session == agent.session and rig.session() is session
    assert again.register(SSH, is_exit=True) == {SSH: tunnel.SERVED}
    assert [port for _, port, _ in rig.ports.opened] == [SSH] and not rig.ports.closed
    assert not session.is_held and rig.counts.of("tunnel_handshakes", "resumed") == 1
    rig.log.wait_for("agent 'home' goes on from 127.0.0.1")


def test_newest_connection_has_the_session(rig: BridgeRig, path: PlayedPath) -> None:
    """Hazard 173: the bridge may not know yet that the one before is dead."""
    agent = begin(rig, path)
    work = rig.work(agent)
    wait_until(lambda: rig.bridge.describe()[0]["idle"] == 1)
    again = resume(rig, agent.session)
    # Idle work connections are of the former address.
    assert agent.is_closed() and work.is_closed()
    third = resume(rig, agent.session)
    assert again.is_closed()
    third.send(tunnel.encode_message(tunnel.PING, b"01234567"))
    assert third.read(tunnel.PONG) == b"01234567"
    assert not any("disconnected" in line for line in rig.log.lines)


def test_dials_that_wait_are_served_by_the_next_connection(
    rig: BridgeRig, path: PlayedPath
) -> None:
    agent = begin(rig, path)
    lose(rig, agent)
    dial = Task(rig.dialer.dial, FLOW)
    wait_until(lambda: rig.session()._waiting == 1)
    again = resume(rig, agent.session)
    assert tunnel.parse_number(again.read(tunnel.WANT)) == 1
    work = rig.work(again)
    assert tunnel.parse_open(work.read(tunnel.OPEN)).target == FLOW.target
    work.send(tunnel.encode_accept())
    dial.result().close()


@pytest.mark.parametrize("why", ["path down", "too long", "no path"])
def test_session_is_given_up_if_nobody_comes(rig: BridgeRig, path: PlayedPath, why: str) -> None:
    agent = begin(rig, path)
    lose(rig, agent)
    if why == "path down":
        path.up = False
    elif why == "no path":
        rig.session().path = None
    expire(rig, math.inf if why == "too long" else 0.0)
    rig.log.wait_for("agent 'home' disconnected: it has not connected again")
    assert rig.ports.closed == [SSH] and not rig.sessions.all()
    hello = Hello(tunnel.RESUME, "home", NONCE, agent.session)
    assert ask(rig, hello).answer() == tunnel.NO_SESSION
    assert HELD_SECONDS > 0


def test_agent_that_begins_anew_gets_the_name_of_a_held_session(
    rig: BridgeRig, path: PlayedPath
) -> None:
    """It has been started again: nobody answers for the session, and nothing is waited for."""
    lose(rig, begin(rig, path))
    again = rig.agent()
    assert rig.ports.closed == [SSH]
    assert again.register(SSH) == {SSH: tunnel.SERVED}


@pytest.mark.parametrize("case", ["said so", "old agent", "path down", "no path"])
def test_session_ends_with_its_connection_if_nothing_goes_on(
    rig: BridgeRig, path: PlayedPath, case: str
) -> None:
    agent = begin(rig, path, resumes=case != "old agent")
    if case == "said so":
        agent.send(tunnel.encode_number(tunnel.CLOSE, tunnel.STOPPING))
    elif case == "path down":
        path.up = False
    elif case == "no path":
        rig.session().path = None
    agent.close()
    wait_until(lambda: not rig.sessions.all())
    assert rig.ports.closed == [SSH]


# -- who may not resume a session


def test_session_of_another_agent_is_not_resumed(rig: BridgeRig, path: PlayedPath) -> None:
    """Hazard 175: whoever has learned it needs the agent's token as well."""
    agent = begin(rig, path)
    rig.agent("away", OTHER_TOKEN)
    for kind in (tunnel.RESUME, tunnel.ATTACH, tunnel.WORK):
        hello = Hello(kind, "away", NONCE, agent.session)
        assert ask(rig, hello, OTHER_TOKEN).answer() == tunnel.NO_SESSION
    agent.send(tunnel.encode_message(tunnel.PING, b"01234567"))
    assert agent.read(tunnel.PONG) == b"01234567"
    assert rig.session().identifier == agent.session


@pytest.mark.parametrize("kind", [tunnel.RESUME, tunnel.ATTACH])
def test_session_is_not_resumed_without_the_token(
    rig: BridgeRig, path: PlayedPath, kind: int
) -> None:
    """Hazard 175: refused as any wrong token is, after a delay."""
    rig.bridge._refusals._back_off = _NoDelay()
    agent = begin(rig, path)
    assert ask(rig, Hello(kind, "home", NONCE, agent.session), OTHER_TOKEN).answer() == (
        tunnel.NOT_PROVEN
    )
    assert rig.session().control.stream.open


class _NoDelay:
    """A RefusalDelays that delays nothing."""

    def next_delay(self, host: str, now: float) -> float:
        return 0.01


def test_replayed_resumption_is_refused(rig: BridgeRig, path: PlayedPath) -> None:
    """Hazard 175: the proof is for one challenge."""
    rig.bridge._refusals._back_off = _NoDelay()
    agent = begin(rig, path)
    again = resume(rig, agent.session)
    sock = rig.connect()
    sock.sendall(tunnel.encode_hello(again.hello) + again.proof)
    assert read_to_end(sock)[33:] == b"\3\1"
    again.send(tunnel.encode_message(tunnel.PING, b"01234567"))
    assert again.read(tunnel.PONG) == b"01234567"


def test_session_identity_is_of_one_session(rig: BridgeRig, path: PlayedPath) -> None:
    """Hazard 175: that of an ended session, or of a bridge before its restart, is of no use."""
    agent = begin(rig, path)
    path.up = False
    agent.close()
    wait_until(lambda: not rig.sessions.all())
    hello = Hello(tunnel.RESUME, "home", NONCE, agent.session)
    assert ask(rig, hello).answer() == tunnel.NO_SESSION
    path.up = True
    other = begin(rig, path)
    assert other.session != agent.session
    assert ask(rig, hello).answer() == tunnel.NO_SESSION


def test_session_is_not_resumed_in_plain_text(
    rig: BridgeRig, path: PlayedPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 175: keys would be told to everybody on the way."""
    agent = begin(rig, path)
    monkeypatch.setattr(bridge_module, "arrival_of", partial(_arrival, False))
    hello = Hello(tunnel.RESUME, "home", NONCE, agent.session)
    assert ask(rig, hello).answer() == tunnel.NO_SESSION
    agent.send(tunnel.encode_message(tunnel.PING, b"01234567"))
    assert agent.read(tunnel.PONG) == b"01234567"


def test_reload_that_removes_the_agent_ends_a_held_session(
    rig: BridgeRig, path: PlayedPath
) -> None:
    """Hazard 175."""
    agent = begin(rig, path)
    lose(rig, agent)
    rig.bridge.configure({})
    assert rig.ports.closed == [SSH] and not rig.sessions.all()
    rig.bridge._refusals._back_off = _NoDelay()
    hello = Hello(tunnel.RESUME, "home", NONCE, agent.session)
    assert ask(rig, hello).answer() == tunnel.NOT_PROVEN


# -- work connections that are attached to flows


def attach(agent: PlayedAgent, path: int, flow: int) -> Hello:
    return Hello(tunnel.ATTACH, "home", NONCE, agent.session, path, flow)


def test_work_connection_is_attached_to_its_flow(rig: BridgeRig, path: PlayedPath) -> None:
    """Hazard 173: the welcome comes first, then what the flow sends."""
    agent = begin(rig, path)
    flow = path.flows.new(False)
    taken: list[Any] = []

    def take(stream: Any) -> bool:
        taken.append(stream)
        return True

    flow.attach = take
    connection = ask(rig, attach(agent, 1, flow.number)).welcomed()
    wait_until(lambda: taken)
    (stream,) = taken
    stream.write(b"a frame")
    assert connection.socket.recv(7) == b"a frame"
    assert rig.counts.of("tunnel_handshakes", "attached") == 1
    # The agent may close the connection before as soon as it is welcomed.
    assert flow.awaited == 1
    stream.close()


def test_flow_that_has_ended_gets_no_work_connection(rig: BridgeRig, path: PlayedPath) -> None:
    agent = begin(rig, path)
    flow = path.flows.new(False)
    for hello in (attach(agent, 1, flow.number + 1), attach(agent, 2, flow.number)):
        assert ask(rig, hello).answer() == tunnel.NO_FLOW
    rig.session().path = None
    assert ask(rig, attach(agent, 1, flow.number)).answer() == tunnel.NO_FLOW


def test_flow_that_ends_meanwhile_closes_the_work_connection(
    rig: BridgeRig, path: PlayedPath
) -> None:
    agent = begin(rig, path)
    flow = path.flows.new(False)
    connection = ask(rig, attach(agent, 1, flow.number)).welcomed()
    assert connection.is_closed()
    assert not rig.counts.of("tunnel_handshakes", "attached")
