"""TunnelDialer with an agent played by hand: its requests, and what answers lead to."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Arena
from netproxy.net.frames.framed import FramedConn
from netproxy.net.stream import complete
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import BridgePort, OpenRequest
from netproxy.protocol.tunnels.datagrams import AddressedDatagrams
from netproxy.tunnel.control import session as session_module
from netproxy.tunnel.dialer import TRIES, TunnelDialer
from tests.support.agents import BridgeRig, PlayedAgent
from tests.support.sockets import Task, read_exactly, read_to_end, wait_until

CLIENT, TARGET = Address("203.0.113.9", 50000), Address("printer.lan", 9100)
FLOW = Flow("tcp", CLIENT, TARGET, "main", "alice")
SSH = BridgePort("tcp", 8022)


@pytest.fixture
def agent(rig: BridgeRig) -> PlayedAgent:
    """Return an agent that is an exit."""
    agent = rig.agent()
    agent.register(is_exit=True)
    return agent


def idle_work(rig: BridgeRig, agent: PlayedAgent) -> PlayedAgent:
    """Return an idle work connection that the bridge knows."""
    before = rig.bridge.describe()[0]["idle"]
    work = rig.work(agent)
    wait_until(lambda: rig.bridge.describe()[0]["idle"] > before)
    return work


def read_request(work: PlayedAgent) -> OpenRequest:
    """Read the bridge's OPEN."""
    return tunnel.parse_open(work.read(tunnel.OPEN))


def accept(work: PlayedAgent) -> None:
    """Read the bridge's OPEN and accept it."""
    read_request(work)
    work.send(tunnel.encode_accept())


def failure_of(dial: Callable[[], Any]) -> DialError:
    """Return the DialError that `dial` raises."""
    with pytest.raises(DialError) as caught:
        dial()
    return caught.value


def impatient_dialer(rig: BridgeRig, seconds: float) -> TunnelDialer:
    return TunnelDialer("home", rig.sessions, seconds, rig.counts)


def test_dial_to_an_address_carries_bytes_both_ways(rig: BridgeRig, agent: PlayedAgent) -> None:
    work = idle_work(rig, agent)
    dial = Task(rig.dialer.dial, FLOW)
    assert read_request(work) == OpenRequest("tcp", CLIENT, TARGET)
    unknown = tunnel.encode_message(0x17)
    work.send(unknown + tunnel.encode_accept() + b"first")
    stream = dial.result()
    assert complete(stream.read_exactly(5)) == b"first"
    stream.write(b"hello")
    assert read_exactly(work.socket, 5) == b"hello"
    assert rig.bridge.describe()[0]["streams"] == 1
    stream.close()
    assert read_to_end(work.socket) == b""
    state = rig.bridge.describe()[0]
    assert (state["streams"], state["opened"]) == (0, 1)
    assert state["sent"] > 5 and state["received"] > 5


def test_dial_to_a_service_names_its_port(rig: BridgeRig, agent: PlayedAgent) -> None:
    work = idle_work(rig, agent)
    dial = Task(TunnelDialer("home", rig.sessions, 3.0, rig.counts, SSH).dial, FLOW)
    assert read_request(work) == OpenRequest("tcp", CLIENT, SSH)
    work.send(tunnel.encode_accept())
    dial.result().close()


@pytest.mark.parametrize("reason", list(Reason))
def test_refusal_by_the_agent_is_an_error_of_the_target(
    rig: BridgeRig, agent: PlayedAgent, reason: Reason
) -> None:
    work = idle_work(rig, agent)
    dial = Task(failure_of, lambda: rig.dialer.dial(FLOW))
    read_request(work)
    work.send(tunnel.encode_refuse(reason))
    error = dial.result()
    assert (error.reason, error.upstream, error.hop) == (reason, False, "tunnel://home")
    assert work.is_closed()


def test_dial_without_a_connected_agent_fails_at_once(rig: BridgeRig) -> None:
    error = failure_of(lambda: rig.dialer.dial(FLOW))
    assert (error.reason, error.upstream) == (Reason.HOST_UNREACHABLE, True)
    assert str(error) == "tunnel://home: agent 'home' is not connected"
    assert failure_of(lambda: rig.dialer.dial_packet(FLOW)).reason is Reason.HOST_UNREACHABLE


def test_agent_that_is_not_an_exit_is_not_asked(rig: BridgeRig) -> None:
    rig.agent().register(is_exit=False)
    wait_until(lambda: not rig.bridge.describe()[0]["exit"])
    error = failure_of(lambda: rig.dialer.dial(FLOW))
    assert error.reason is Reason.DENIED
    assert str(error) == "tunnel://home: agent 'home' is not an exit"


def test_agent_that_has_not_registered_yet_decides_itself(rig: BridgeRig) -> None:
    work = idle_work(rig, rig.agent())
    dial = Task(failure_of, lambda: rig.dialer.dial(FLOW))
    assert read_request(work).target == TARGET
    work.send(tunnel.encode_refuse(Reason.DENIED))
    assert dial.result().reason is Reason.DENIED


def test_agent_is_asked_for_work_connections_if_none_is_idle(
    rig: BridgeRig, agent: PlayedAgent
) -> None:
    dials = [Task(rig.dialer.dial, FLOW) for _ in range(3)]
    assert [tunnel.parse_number(agent.read(tunnel.WANT)) for _ in dials] == [1, 1, 1]
    works = [rig.work(agent) for _ in dials]
    for work in works:
        accept(work)
    for dial in dials:
        dial.result().close()


def test_agent_that_dials_no_work_connection_times_out(rig: BridgeRig, agent: PlayedAgent) -> None:
    error = failure_of(lambda: impatient_dialer(rig, 0.1).dial(FLOW))
    assert (error.reason, error.upstream) == (Reason.TIMEOUT, True)


def test_agent_that_does_not_answer_times_out(rig: BridgeRig, agent: PlayedAgent) -> None:
    work = idle_work(rig, agent)
    error = failure_of(lambda: impatient_dialer(rig, 0.1).dial(FLOW))
    assert (error.reason, error.upstream) == (Reason.TIMEOUT, True)
    assert work.is_closed()


def test_waiting_dials_are_limited(
    rig: BridgeRig, agent: PlayedAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "WAITING_LIMIT", 1)
    waiting = Task(failure_of, lambda: rig.dialer.dial(FLOW))
    agent.read(tunnel.WANT)
    assert failure_of(lambda: rig.dialer.dial(FLOW)).reason is Reason.GENERAL
    agent.close()
    assert waiting.result().reason is Reason.HOST_UNREACHABLE


def test_end_of_the_agent_fails_waiting_dials(rig: BridgeRig, agent: PlayedAgent) -> None:
    dial = Task(failure_of, lambda: rig.dialer.dial(FLOW))
    agent.read(tunnel.WANT)
    agent.close()
    assert str(dial.result()) == "tunnel://home: the agent has disconnected"


def test_work_connection_that_closes_before_its_answer_is_replaced(
    rig: BridgeRig, agent: PlayedAgent
) -> None:
    older, newer = (idle_work(rig, agent) for _ in range(2))
    dial = Task(rig.dialer.dial, FLOW)
    # The newest connection is taken first.
    read_request(newer)
    newer.close()
    accept(older)
    dial.result().close()


def test_dial_gives_up_after_a_few_work_connections(rig: BridgeRig, agent: PlayedAgent) -> None:
    works = [idle_work(rig, agent) for _ in range(TRIES + 1)]
    dial = Task(failure_of, lambda: rig.dialer.dial(FLOW))
    for work in reversed(works[1:]):
        read_request(work)
        work.close()
    error = dial.result()
    assert error.upstream and rig.bridge.describe()[0]["idle"] == 1


def test_closed_work_connection_is_not_used(rig: BridgeRig, agent: PlayedAgent) -> None:
    older, newer = (idle_work(rig, agent) for _ in range(2))
    newer.close()
    wait_until(lambda: not rig.session()._idle[1].is_usable())
    dial = Task(rig.dialer.dial, FLOW)
    accept(older)
    dial.result().close()


@pytest.mark.parametrize(
    "answer",
    [b"\xff" * 16, tunnel.encode_message(tunnel.REFUSE), b"HTTP/1.1 200 OK\r\n\r\n"],
    ids=["long message", "REFUSE without reason", "HTTP"],
)
def test_malformed_answer_ends_the_work_connection(
    rig: BridgeRig, agent: PlayedAgent, answer: bytes
) -> None:
    work = idle_work(rig, agent)
    dial = Task(failure_of, lambda: impatient_dialer(rig, 0.5).dial(FLOW))
    read_request(work)
    work.send(answer)
    assert work.is_closed()
    assert dial.result().upstream


# -- datagrams


def open_packets(rig: BridgeRig, agent: PlayedAgent) -> tuple[FramedConn, PlayedAgent, OpenRequest]:
    """Return a packet connection, its work connection and what the agent was asked for."""
    work = idle_work(rig, agent)
    dial = Task(rig.dialer.dial_packet, FLOW._replace(network="udp"))
    request = read_request(work)
    work.send(tunnel.encode_accept())
    return dial.result(), work, request


def test_one_work_connection_carries_datagrams_to_all_targets(
    rig: BridgeRig, agent: PlayedAgent
) -> None:
    conn, work, request = open_packets(rig, agent)
    assert (request.network, request.client) == ("udp", CLIENT) and not rig.dialer.symmetric
    framing = AddressedDatagrams()
    for target in (TARGET, Address("192.0.2.1", 53)):
        arena = Arena()
        run = arena.put(b"ask")
        conn.send(arena, run, conn.prepare(FLOW._replace(target=target)))
        expected = framing.prefix(framing.encode(target), 3) + b"ask"
        assert read_exactly(work.socket, len(expected)) == expected
        work.send(framing.prefix(framing.encode(target), 6) + b"answer")
        assert conn.wait()
        offsets, _, last, peer = conn.receive(arena).spans[0]
        assert bytes(arena.view[offsets[0] : offsets[0] + last]) == b"answer"
        assert conn.source(peer) == target
    conn.close()


def test_end_of_the_agent_ends_datagrams_but_not_streams(
    rig: BridgeRig, agent: PlayedAgent
) -> None:
    """Hazard 125: UDP sessions are reset, so that the next datagram takes the new connection."""
    conn, _, _ = open_packets(rig, agent)
    work = idle_work(rig, agent)
    dial = Task(rig.dialer.dial, FLOW)
    accept(work)
    stream = dial.result()
    agent.close()
    arena = Arena()
    while not conn.ended:
        assert conn.wait()
        conn.receive(arena)
    conn.close()
    stream.write(b"still here")
    assert read_exactly(work.socket, 10) == b"still here"
    stream.close()


def test_tunnel_dialer_carries_tcp_and_udp_and_resolves_names(rig: BridgeRig) -> None:
    service = TunnelDialer("home", rig.sessions, 1.0, rig.counts, SSH)
    assert (rig.dialer.carries, service.carries) == ({"tcp", "udp"}, {"tcp"})
    for dialer in (rig.dialer, service):
        assert dialer.name == "tunnel://home"
        assert dialer.resolves_names
        assert dialer.fixed_for(FLOW) is dialer
