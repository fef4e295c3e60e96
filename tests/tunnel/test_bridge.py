"""The bridge towards agents that are played by hand: who is let in, who keeps a name, what is registered, what is not taken."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from netproxy.errors import DialError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.protocol import tunnel
from netproxy.protocol.capsule import encode_varint
from netproxy.protocol.tunnel import Hello, Service
from netproxy.tunnel import bridge as bridge_module
from netproxy.tunnel import control
from netproxy.tunnel import backoff
from netproxy.tunnel.bridge import PortRange, Rights
from netproxy.tunnel.backoff import BackOff
from netproxy.tunnel.sessions import AgentSession
from tests.support.agents import NONCE, OTHER_TOKEN, TOKEN, BridgeRig, Played
from tests.support.sockets import Task, nothing_comes, read_to_end, wait_until

SSH, DNS = Service("tcp", 8022), Service("udp", 53)


def shake(rig: BridgeRig, name: str = "home", token: bytes = TOKEN) -> Played:
    return Played(rig, Hello(tunnel.CONTROL, name, NONCE), token)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come at once, or nearly so."""
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(backoff, "LONGEST_SECONDS", 0.05)


# -- who is let in


def test_agent_with_its_token_is_welcome(rig: BridgeRig) -> None:
    agent = rig.agent()
    assert [one["name"] for one in rig.bridge.describe()] == ["home"]
    rig.log.wait_for("agent 'home' connected from 127.0.0.1")
    agent.close()
    wait_until(lambda: not rig.sessions.all())
    rig.log.wait_for("agent 'home' is gone")


def test_two_agents_side_by_side(rig: BridgeRig) -> None:
    rig.agent()
    rig.agent("away", OTHER_TOKEN)
    assert [link.name for link in rig.sessions.all()] == ["home", "away"]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("name", "token"),
    [("home", b"wrong"), ("nobody", TOKEN), ("home", OTHER_TOKEN), ("away", TOKEN)],
)
def test_wrong_name_or_token_is_refused_in_the_same_words(
    rig: BridgeRig, name: str, token: bytes
) -> None:
    """Hazard 127."""
    played = shake(rig, name, token)
    assert read_to_end(played.socket) == b"\3\1"
    assert rig.counts.of("tunnel_handshakes", "not proven") == 1
    assert not rig.sessions.all()


def test_wrong_token_is_answered_late_and_holds_no_thread(rig: BridgeRig) -> None:
    """Hazard 127: a hundred of them at once wait for a second and more, parked, and an agent comes in meanwhile."""
    began = time.monotonic()
    guesses = [
        shake(rig, "home" if number % 2 else "nobody", b"guess %d" % number)
        for number in range(100)
    ]
    wait_until(lambda: len(rig.poller) == 100)
    assert not rig.pool.busy
    rig.agent()
    assert guesses[0].answer() == tunnel.NOT_PROVEN
    assert time.monotonic() - began >= backoff.FIRST_SECONDS
    assert rig.counts.of("tunnel_handshakes", "not proven") == 100
    for guess in guesses:
        guess.close()
    wait_until(lambda: len(rig.poller) == 1)


def test_name_that_nobody_has_costs_the_same_work(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 127, no oracle: one proof is made and compared, whether there is a token or not."""
    work: list[str] = []
    proof, same = tunnel.agent_proof, tunnel.same
    monkeypatch.setattr(tunnel, "agent_proof", lambda *about: work.append("proof") or proof(*about))
    monkeypatch.setattr(tunnel, "same", lambda *both: work.append("same") or same(*both))
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)
    done = []
    for name in ("home", "nobody"):
        played = shake(rig, name, b"wrong")
        work.remove("proof")  # the test's own
        assert played.answer() == tunnel.NOT_PROVEN
        done.append(work[:])
        work.clear()
    assert done[0] == done[1] == ["proof", "same"]


def test_refusals_come_later_each_time_up_to_a_limit() -> None:
    known = BackOff()
    assert [known.seconds("192.0.2.1", float(at)) for at in range(6)] == [1, 2, 4, 8, 8, 8]
    assert known.seconds("192.0.2.2", 6.0) == 1
    assert known.seconds("192.0.2.1", 5.0 + backoff.FORGET_SECONDS) == 1
    for number in range(2 * backoff.ADDRESSES_LIMIT):
        known.seconds(f"2001:db8::{number:x}", 100.0)
    assert len(known) == backoff.ADDRESSES_LIMIT


@pytest.mark.usefixtures("hasty")
def test_recorded_hello_and_proof_are_of_no_use_again(rig: BridgeRig) -> None:
    """Hazard 123."""
    first = rig.agent()
    first.close()
    wait_until(lambda: not rig.sessions.all())
    sock = rig.connect()
    sock.sendall(tunnel.encode_hello(first.hello) + first.proof)
    assert read_to_end(sock)[33:] == b"\3\1"


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x9eNPT\2\0" + NONCE + b"\4home", b"\x9eNPT\1\7" + NONCE]
)
def test_what_is_no_hello_is_closed_without_an_answer(rig: BridgeRig, data: bytes) -> None:
    sock = rig.connect()
    sock.sendall(data)
    try:
        assert read_to_end(sock) == b""
    except ConnectionResetError:
        pass
    rig.counts.wait_for("connections", "bad protocol")


def test_silent_agent_meets_the_listeners_deadline(rig: BridgeRig) -> None:
    """Hazard 119."""
    rig.listener.configure(rig.bridge, rig.door, 0.1)
    for data in (b"", tunnel.encode_hello(Hello(tunnel.CONTROL, "home", NONCE))):
        sock = rig.connect()
        sock.sendall(data)
        assert len(read_to_end(sock)) in (0, 33)


# -- what an agent registers


def test_ports_are_opened_as_the_bridge_says(rig: BridgeRig) -> None:
    agent = rig.agent()
    assert agent.register(SSH, DNS) == {SSH: tunnel.SERVED, DNS: tunnel.SERVED}
    assert rig.opened == [("home", SSH, "127.0.0.1"), ("home", DNS, "0.0.0.0")]
    assert rig.bridge.describe()[0]["ports"] == ["127.0.0.1:8022/tcp", "0.0.0.0:53/udp"]
    agent.close()
    wait_until(lambda: len(rig.shut) == 2)


@pytest.mark.parametrize(
    "service",
    [
        Service("tcp", 8031),
        Service("udp", 8022),
        Service("tcp", 53),
        Service("tcp", 22),
        Service("tcp", 0),
    ],
)
def test_port_that_is_not_on_the_list_is_refused(rig: BridgeRig, service: Service) -> None:
    """Hazard 122."""
    agent = rig.agent()
    assert agent.register(service, SSH) == {service: tunnel.NOT_ALLOWED, SSH: tunnel.SERVED}
    assert [one[1] for one in rig.opened] == [SSH]
    rig.log.wait_for(f"agent 'home' may not have port {service}")
    assert rig.bridge.describe()[0]["refused"] == {str(service): "not allowed by the bridge"}


def test_port_that_is_busy_is_told_to_both_sides(rig: BridgeRig) -> None:
    rig.busy = {8023}
    assert rig.agent().register(SSH, Service("tcp", 8023)) == {
        SSH: tunnel.SERVED,
        Service("tcp", 8023): tunnel.CANNOT_LISTEN,
    }
    rig.log.wait_for("Address already in use")


def test_registering_again_leaves_what_stays_as_it_is(rig: BridgeRig) -> None:
    agent = rig.agent()
    more = Service("tcp", 8023)
    agent.register(SSH, DNS)
    assert agent.register(SSH, more) == {SSH: tunnel.SERVED, more: tunnel.SERVED}
    assert rig.shut == [DNS]
    assert [one[1] for one in rig.opened] == [SSH, DNS, more]
    assert agent.register() == {}
    assert rig.shut == [DNS, SSH, more]


def test_reload_changes_ports_and_leaves_the_others(rig: BridgeRig) -> None:
    agent = rig.agent()
    more = Service("tcp", 9000)
    assert agent.register(SSH, DNS, more)[more] == tunnel.NOT_ALLOWED
    rig.bridge.configure(
        {
            "home": Rights(
                TOKEN,
                (
                    PortRange("tcp", "127.0.0.1", 8022, 8022),
                    PortRange("tcp", "127.0.0.1", 9000, 9000),
                ),
            )
        }
    )
    outcomes = dict(tunnel.parse_registered(agent.read(tunnel.REGISTERED)))
    assert outcomes == {SSH: tunnel.SERVED, DNS: tunnel.NOT_ALLOWED, more: tunnel.SERVED}
    assert rig.shut == [DNS] and [one[1] for one in rig.opened] == [SSH, DNS, more]
    rig.bridge.configure({"home": Rights(TOKEN, (PortRange("tcp", "0.0.0.0", 8022, 9000),))})
    assert set(tunnel.parse_registered(agent.read(tunnel.REGISTERED))) == {
        (SSH, 0),
        (DNS, 1),
        (more, 0),
    }
    assert (
        rig.opened[-2:] == [("home", SSH, "0.0.0.0"), ("home", more, "0.0.0.0")]
        and len(rig.shut) == 3
    )


@pytest.mark.parametrize("agents", [{}, {"home": Rights(OTHER_TOKEN)}])
def test_reload_without_an_agent_or_with_another_token_closes_it(
    rig: BridgeRig, agents: Any
) -> None:
    agent = rig.agent()
    agent.register(SSH)
    rig.bridge.configure(agents)
    assert tunnel.parse_number(agent.read(tunnel.CLOSE)) == tunnel.WITHDRAWN
    assert agent.ended()
    assert rig.shut == [SSH] and not rig.sessions.all()


# -- what is not taken


@pytest.mark.parametrize(
    "data",
    [
        encode_varint(tunnel.PING) + encode_varint(1 << 32),
        encode_varint(tunnel.REGISTER) + encode_varint(4097),
        tunnel.encode(tunnel.REGISTER, b"\0\7\0\1"),
        tunnel.encode(tunnel.REGISTER),
        tunnel.encode(tunnel.PING, b"short"),
        tunnel.encode(tunnel.CLOSE),
    ],
)
def test_message_that_cannot_be_closes_this_agent_alone(rig: BridgeRig, data: bytes) -> None:
    """Hazard 123."""
    agent, other = rig.agent(), rig.agent("away", OTHER_TOKEN)
    agent.register(SSH)
    agent.send(data)
    assert agent.ended()
    assert rig.shut == [SSH]
    wait_until(lambda: [link.name for link in rig.sessions.all()] == ["away"])
    assert other.register(SSH) == {SSH: tunnel.NOT_ALLOWED}


def test_unknown_message_is_skipped(rig: BridgeRig) -> None:
    agent = rig.agent()
    agent.send(
        tunnel.encode(0x29 * 5 + 0x17, b"grease")
        + tunnel.encode(0)
        + tunnel.encode(tunnel.PING, b"01234567")
    )
    assert agent.read(tunnel.PONG) == b"01234567"


def test_message_in_pieces(rig: BridgeRig) -> None:
    agent = rig.agent()
    for byte in tunnel.encode(tunnel.PING, b"01234567"):
        agent.send(bytes((byte,)))
        time.sleep(0.001)
    assert agent.read(tunnel.PONG) == b"01234567"


# -- the heartbeat


def test_silent_agent_is_pinged_and_then_given_up(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 126."""
    monkeypatch.setattr(control, "HEARTBEAT", 0.2)
    monkeypatch.setattr(control, "DEAD", 2.5)
    agent = rig.agent()
    agent.register(SSH)
    assert len(agent.read_ping()) == 8
    assert agent.ended()
    wait_until(lambda: rig.shut == [SSH])
    rig.log.wait_for("agent 'home' is gone: silent for 2.5 s")


def test_agent_that_answers_stays_and_its_time_is_known(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "HEARTBEAT", 0.2)
    agent = rig.agent()
    for _ in range(2):
        agent.send(tunnel.encode(tunnel.PONG, agent.read_ping()))
    wait_until(lambda: rig.bridge.describe()[0]["rtt"] > 0)


# -- whose a name is


def test_second_agent_is_refused_while_the_first_answers(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 121."""
    monkeypatch.setattr(bridge_module, "CHALLENGE_SECONDS", 0.5)
    first = rig.agent()
    first.register(SSH)
    second = shake(rig)
    first.send(tunnel.encode(tunnel.PONG, first.read_ping()))
    assert second.answer() == tunnel.NAME_IN_USE
    rig.log.wait_for("is refused: the one at 127.0.0.1 answers")
    assert first.register(SSH) == {SSH: tunnel.SERVED} and not rig.shut
    third = shake(rig)  # and asked again
    first.send(tunnel.encode(tunnel.PONG, first.read_ping()))
    assert third.answer() == tunnel.NAME_IN_USE


def test_only_one_at_a_time_asks_for_a_name(rig: BridgeRig) -> None:
    rig.agent()
    shake(rig)
    wait_until(lambda: rig.sessions.get("home").challenged)
    assert shake(rig).answer() == tunnel.NAME_IN_USE


def test_second_agent_takes_over_when_the_first_does_not_answer(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 121: it is welcome only when the ports are free, so that it gets them at once."""
    monkeypatch.setattr(bridge_module, "CHALLENGE_SECONDS", 0.2)
    first = rig.agent()
    first.register(SSH)
    work = rig.work(first)
    second = rig.agent()
    assert rig.shut == [SSH]
    assert second.register(SSH) == {SSH: tunnel.SERVED}
    assert tunnel.parse_number(first.read(tunnel.CLOSE)) == tunnel.REPLACED
    assert first.ended() and work.ended()
    rig.log.wait_for("agent 'home' is gone: the agent at 127.0.0.1 took over")
    assert [link.session for link in rig.sessions.all()] == [second.session]


def test_second_agent_comes_in_where_the_first_leaves_meanwhile(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "CHALLENGE_SECONDS", 0.5)
    first = rig.agent()
    second = shake(rig)
    first.send(tunnel.encode(tunnel.PONG, first.read_ping()))
    first.close()
    second.welcome()


def test_welcome_is_the_first_that_an_agent_hears(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Openings, challenges and reloads find it as soon as it has its name."""
    add, opening = rig.sessions.add, []

    def add_and_use(link: AgentSession) -> bool:
        added = add(link)
        link.leads_out = True
        opening.append(
            Task(
                rig.dialer.dial,
                Flow("tcp", Address("203.0.113.9", 50000), Address("a.test", 80), "main", ""),
            )
        )
        wait_until(lambda: link._waiting)
        link.control.ping()
        rig.bridge.configure({"home": Rights(TOKEN, (PortRange("tcp", "127.0.0.1", 8022, 8022),))})
        return added

    monkeypatch.setattr(rig.sessions, "add", add_and_use)
    agent = rig.agent()  # which asserts that it is welcome
    kinds = [tunnel.read_message(agent.stream).kind for _ in range(3)]
    assert kinds == [tunnel.WANT, tunnel.PING, tunnel.REGISTERED]
    agent.close()
    with pytest.raises(DialError):
        opening[0].result()


def test_agent_that_is_gone_before_its_welcome_is_no_agent(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = rig.sessions.add

    def add_and_leave(link: AgentSession) -> bool:
        link.control.close(tunnel.STOPPING)  # as somebody may who finds it among the links
        return add(link)

    monkeypatch.setattr(rig.sessions, "add", add_and_leave)
    assert read_to_end(shake(rig).socket) == b""
    wait_until(lambda: not rig.sessions.all())
    assert not rig.counts.of("tunnel_handshakes", "agent")


@pytest.mark.parametrize("agents", [{}, {"home": Rights(OTHER_TOKEN)}])
def test_second_agent_does_not_come_in_by_a_token_that_was_withdrawn_meanwhile(
    rig: BridgeRig, agents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "CHALLENGE_SECONDS", 0.3)
    rig.agent()
    second = shake(rig)
    wait_until(lambda: rig.sessions.get("home").challenged)
    rig.bridge.configure(agents)
    assert second.answer() == tunnel.NOT_PROVEN
    assert not rig.sessions.all()


def test_agent_for_whom_no_thread_can_be_had_is_gone(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = rig.agent()
    agent.register(SSH)
    wait_until(lambda: len(rig.poller) == 1)
    with monkeypatch.context() as without:
        without.setattr(rig.pool, "submit", lambda task, urgent=False: False)
        agent.send(tunnel.encode(tunnel.PING, b"01234567"))
        assert agent.ended()
        wait_until(lambda: rig.shut == [SSH] and not rig.sessions.all())
        wait_until(lambda: not rig.listener.live)
    rig.log.wait_for("agent 'home' is gone: the connection broke off")


def test_wrong_token_does_not_disturb_who_has_the_name(rig: BridgeRig) -> None:
    """Hazard 121: no ping, no challenge for a stranger."""
    first = rig.agent()
    shake(rig, token=b"wrong")
    wait_until(lambda: rig.counts.of("tunnel_handshakes", "not proven"))
    assert not rig.sessions.get("home").challenged and nothing_comes(first.socket)


# -- work connections


def test_work_connection_of_another_session_is_refused_at_once(rig: BridgeRig) -> None:
    """Hazard 123: ids are not to be guessed; but who has the token is only told, not made to wait."""
    agent = rig.agent()
    for session in (os.urandom(16), bytes(16)):
        assert (
            Played(rig, Hello(tunnel.WORK, "home", NONCE, session), TOKEN).answer()
            == tunnel.NO_SESSION
        )
    assert (
        Played(rig, Hello(tunnel.WORK, "away", NONCE, agent.session), OTHER_TOKEN).answer()
        == tunnel.NO_SESSION
    )
    rig.work(agent)


def test_waiting_work_connections_are_bounded(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netproxy.tunnel.sessions.IDLE_LIMIT", 2)
    agent = rig.agent()
    for number in (1, 2):
        rig.work(agent)
        wait_until(lambda: rig.bridge.describe()[0]["idle"] == number)
    assert (
        Played(rig, Hello(tunnel.WORK, "home", NONCE, agent.session), TOKEN).answer()
        == tunnel.TOO_MANY
    )


def test_waiting_work_connection_has_no_thread_and_no_place_at_the_door(rig: BridgeRig) -> None:
    agent = rig.agent()
    rig.work(agent)
    wait_until(lambda: rig.door.inside == ["127.0.0.1"])  # the control connection
    wait_until(lambda: not rig.pool.busy)


def test_work_connection_that_was_closed_is_let_go(rig: BridgeRig) -> None:
    agent = rig.agent()
    works = [rig.work(agent) for _ in range(3)]
    wait_until(lambda: rig.bridge.describe()[0]["idle"] == 3)
    works[1].close()
    works[2].send(b"!")  # nothing may come before it was opened
    wait_until(lambda: sum(not stream.quiet() for stream in rig.sessions.get("home")._idle) == 2)
    for close in rig.sessions.expire(0.0):
        close()
    assert rig.bridge.describe()[0]["idle"] == 1


def test_agents_end_closes_what_waits(rig: BridgeRig) -> None:
    agent = rig.agent()
    work = rig.work(agent)
    wait_until(lambda: rig.bridge.describe()[0]["idle"])
    agent.close()
    assert work.ended()


def test_stopping_bridge_tells_its_agents(rig: BridgeRig) -> None:
    agent = rig.agent()
    agent.register(SSH)
    rig.bridge.stop()
    assert tunnel.parse_number(agent.read(tunnel.CLOSE)) == tunnel.STOPPING
    assert agent.ended() and rig.shut == [SSH]
