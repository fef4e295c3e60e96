"""The way out through an agent that is played by hand: what is asked of it, and what comes of its answers."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Arena
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Opening, Service
from netproxy.tunnel import sessions
from netproxy.tunnel.dialer import TRIES, TunnelDialer
from tests.support.agents import BridgeRig, Played
from tests.support.sockets import Task, read_exactly, read_to_end, wait_until

CLIENT, TARGET = Address("203.0.113.9", 50000), Address("printer.lan", 9100)
FLOW = Flow("tcp", CLIENT, TARGET, "main", "alice")
SSH = Service("tcp", 8022)


@pytest.fixture
def agent(rig: BridgeRig) -> Played:
    """An exit."""
    agent = rig.agent()
    agent.register(leads_out=True)
    return agent


def work(rig: BridgeRig, agent: Played) -> Played:
    """A work connection that waits."""
    before = rig.bridge.describe()[0]["idle"]
    made = rig.work(agent)
    wait_until(lambda: rig.bridge.describe()[0]["idle"] > before)
    return made


def opening(work: Played) -> Opening:
    return tunnel.parse_open(work.read(tunnel.OPEN))


def failure(dial: Any) -> DialError:
    with pytest.raises(DialError) as caught:
        dial()
    return caught.value


def test_stream_to_an_address(rig: BridgeRig, agent: Played) -> None:
    waiting = work(rig, agent)
    dial = Task(rig.dialer.dial, FLOW)
    assert opening(waiting) == Opening("tcp", CLIENT, TARGET)
    waiting.send(tunnel.encode(0x17) + tunnel.encode_accept() + b"first")
    stream = dial.result()
    assert stream.read_exactly(5) == b"first"
    stream.write(b"hello")
    assert read_exactly(waiting.socket, 5) == b"hello"
    assert rig.bridge.describe()[0]["streams"] == 1
    stream.close()
    assert read_to_end(waiting.socket) == b""
    figures = rig.bridge.describe()[0]
    assert (
        (figures["streams"], figures["opened"]) == (0, 1)
        and figures["sent"] > 5
        and figures["received"] > 5
    )


def test_stream_to_a_service(rig: BridgeRig, agent: Played) -> None:
    waiting = work(rig, agent)
    dial = Task(TunnelDialer("home", rig.sessions, 3.0, rig.counts, SSH).dial, FLOW)
    assert opening(waiting) == Opening("tcp", CLIENT, SSH)
    waiting.send(tunnel.encode_accept())
    dial.result().close()


@pytest.mark.parametrize("reason", list(Reason))
def test_refusal_is_the_targets(rig: BridgeRig, agent: Played, reason: Reason) -> None:
    waiting = work(rig, agent)
    dial = Task(failure, lambda: rig.dialer.dial(FLOW))
    opening(waiting)
    waiting.send(tunnel.encode_refuse(reason))
    error = dial.result()
    assert (error.reason, error.upstream, error.hop) == (reason, False, "tunnel://home")
    assert waiting.ended()


def test_no_agent_is_said_at_once(rig: BridgeRig) -> None:
    error = failure(lambda: rig.dialer.dial(FLOW))
    assert (error.reason, error.upstream) == (Reason.HOST_UNREACHABLE, True)
    assert str(error) == "tunnel://home: agent 'home' is not connected"
    assert failure(lambda: rig.dialer.dial_packet(FLOW)).reason is Reason.HOST_UNREACHABLE


def test_agent_that_is_no_exit_is_not_asked(rig: BridgeRig) -> None:
    rig.agent()
    error = failure(lambda: rig.dialer.dial(FLOW))
    assert (error.reason, str(error)) == (Reason.DENIED, "tunnel://home: agent 'home' is no exit")


def test_agent_is_asked_for_more_where_none_waits(rig: BridgeRig, agent: Played) -> None:
    dials = [Task(rig.dialer.dial, FLOW) for _ in range(3)]
    assert [tunnel.parse_number(agent.read(tunnel.WANT)) for _ in dials] == [1, 1, 1]
    made = [rig.work(agent) for _ in dials]
    for one in made:
        opening(one)
        one.send(tunnel.encode_accept())
    for dial in dials:
        dial.result().close()


def test_agent_that_dials_nothing_is_not_waited_for_for_ever(rig: BridgeRig, agent: Played) -> None:
    error = failure(lambda: TunnelDialer("home", rig.sessions, 0.1, rig.counts).dial(FLOW))
    assert (error.reason, error.upstream) == (Reason.TIMEOUT, True)


def test_agent_that_does_not_answer_is_not_waited_for_for_ever(
    rig: BridgeRig, agent: Played
) -> None:
    waiting = work(rig, agent)
    error = failure(lambda: TunnelDialer("home", rig.sessions, 0.1, rig.counts).dial(FLOW))
    assert (error.reason, error.upstream) == (Reason.TIMEOUT, True)
    assert waiting.ended()


def test_openings_that_wait_are_bounded(
    rig: BridgeRig, agent: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "WAITING_LIMIT", 1)
    waiting = Task(failure, lambda: rig.dialer.dial(FLOW))
    agent.read(tunnel.WANT)
    assert failure(lambda: rig.dialer.dial(FLOW)).reason is Reason.GENERAL
    agent.close()
    assert waiting.result().reason is Reason.HOST_UNREACHABLE


def test_agents_end_ends_the_waiting(rig: BridgeRig, agent: Played) -> None:
    dial = Task(failure, lambda: rig.dialer.dial(FLOW))
    agent.read(tunnel.WANT)
    agent.close()
    assert str(dial.result()) == "tunnel://home: the agent has gone"


def test_connection_that_ends_before_its_answer_is_replaced_by_another(
    rig: BridgeRig, agent: Played
) -> None:
    waiting = [work(rig, agent) for _ in range(2)]
    dial = Task(rig.dialer.dial, FLOW)
    opening(waiting[1])  # the last is taken first
    waiting[1].close()
    opening(waiting[0])
    waiting[0].send(tunnel.encode_accept())
    dial.result().close()


def test_not_more_than_a_few_are_tried(rig: BridgeRig, agent: Played) -> None:
    waiting = [work(rig, agent) for _ in range(TRIES + 1)]
    dial = Task(failure, lambda: rig.dialer.dial(FLOW))
    for one in reversed(waiting[1:]):
        opening(one)
        one.close()
    error = dial.result()
    assert error.upstream and rig.bridge.describe()[0]["idle"] == 1


def test_closed_connection_is_not_used(rig: BridgeRig, agent: Played) -> None:
    waiting = [work(rig, agent) for _ in range(2)]
    waiting[1].close()
    wait_until(lambda: not rig.sessions.get("home")._idle[1].quiet())
    dial = Task(rig.dialer.dial, FLOW)
    opening(waiting[0])
    waiting[0].send(tunnel.encode_accept())
    dial.result().close()


@pytest.mark.parametrize(
    "answer", [b"\xff" * 16, tunnel.encode(tunnel.REFUSE), b"HTTP/1.1 200 OK\r\n\r\n"]
)
def test_answer_that_is_none_ends_the_connection(
    rig: BridgeRig, agent: Played, answer: bytes
) -> None:
    waiting = work(rig, agent)
    dial = Task(failure, lambda: TunnelDialer("home", rig.sessions, 0.5, rig.counts).dial(FLOW))
    opening(waiting)
    waiting.send(answer)
    assert waiting.ended()
    assert dial.result().upstream


# -- datagrams


def open_packets(
    rig: BridgeRig, agent: Played, dialer: TunnelDialer, flow: Flow
) -> tuple[Any, Played, Opening]:
    waiting = work(rig, agent)
    dial = Task(dialer.dial_packet, flow)
    asked = opening(waiting)
    waiting.send(tunnel.encode_accept())
    return dial.result(), waiting, asked


def test_datagrams_to_many_targets_by_one_connection(rig: BridgeRig, agent: Played) -> None:
    conn, waiting, asked = open_packets(rig, agent, rig.dialer, FLOW._replace(network="udp"))
    assert (asked.network, asked.client) == ("udp", CLIENT) and not rig.dialer.symmetric
    for target in (TARGET, Address("192.0.2.1", 53)):
        arena = Arena()
        run = arena.put(b"ask")
        conn.send(arena, run, conn.prepare(FLOW._replace(target=target)))
        framing = tunnel.AddressedDatagrams()
        wanted = framing.prefix(framing.encode(target), 3) + b"ask"
        assert read_exactly(waiting.socket, len(wanted)) == wanted
        waiting.send(framing.prefix(framing.encode(target), 6) + b"answer")
        assert conn.wait()
        batch = conn.receive(arena)
        offsets, length, last, peer = batch.spans[0]
        assert (
            bytes(arena.view[offsets[0] : offsets[0] + last]) == b"answer"
            and conn.source(peer) == target
        )
    conn.close()


def test_agents_end_cuts_datagrams_and_leaves_streams(rig: BridgeRig, agent: Played) -> None:
    """Hazard 125: UDP sessions are reset, so that the next datagram finds the new connection."""
    conn, _, _ = open_packets(rig, agent, rig.dialer, FLOW._replace(network="udp"))
    waiting = work(rig, agent)
    dial = Task(rig.dialer.dial, FLOW)
    opening(waiting)
    waiting.send(tunnel.encode_accept())
    stream = dial.result()
    agent.close()
    arena = Arena()
    while not conn.ended:
        assert conn.wait()
        conn.receive(arena)
    conn.close()
    stream.write(b"still here")
    assert read_exactly(waiting.socket, 10) == b"still here"
    stream.close()


def test_what_it_says_of_itself(rig: BridgeRig) -> None:
    service = TunnelDialer("home", rig.sessions, 1.0, rig.counts, SSH)
    for dialer in (rig.dialer, service):
        assert (dialer.name, dialer.carries, dialer.resolves_names) == (
            "tunnel://home",
            {"tcp", "udp"},
            True,
        )
        assert dialer.fixed_for(FLOW) is dialer
