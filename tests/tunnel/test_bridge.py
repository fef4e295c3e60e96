"""The bridge with agents played by hand: logins, names, registered ports, work connections."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from netproxy.errors import DialError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.listeners import ALL_CLIENTS, AllowedClients
from netproxy.interfaces.networks import IpNetwork
from netproxy.net.stream import complete
from netproxy.protocol import tunnel
from netproxy.protocol.http.capsule import encode_varint
from netproxy.protocol.tunnel import BridgePort, Hello
from netproxy.access import backoff
from netproxy.tunnel.control import claims, connection
from netproxy.tunnel.control import session as session_module
from netproxy.access.backoff import BackOff
from netproxy.tunnel.ports import AgentRights, PortRange
from netproxy.tunnel.control.session import AgentSession
from tests.support.agents import NONCE, OTHER_TOKEN, TOKEN, BridgeRig, PlayedAgent
from tests.support.sockets import Task, nothing_comes, read_to_end, wait_until

SSH, DNS = BridgePort("tcp", 8022), BridgePort("udp", 53)
NOT_PROVEN_TEXT = "unknown name or wrong token"


def log_in(rig: BridgeRig, name: str = "home", token: bytes = TOKEN) -> PlayedAgent:
    """Return a control connection whose proof was sent and whose answer was not read."""
    return PlayedAgent(rig, Hello(tunnel.CONTROL, name, NONCE), token)


def agents(*ports: PortRange) -> dict[str, AgentRights]:
    """Return a configuration with the agent "home" alone."""
    return {"home": AgentRights(TOKEN, ports)}


def registered(agent: PlayedAgent) -> dict[BridgePort, int]:
    """Read a REGISTERED that the bridge sends unasked."""
    return dict(tunnel.parse_registered(agent.read(tunnel.REGISTERED)))


@pytest.fixture
def short_delay(rig: BridgeRig) -> None:
    """Refuse failed logins almost at once."""
    rig.bridge._refusals._back_off = BackOff(0.05, 0.05)


# -- logins


def test_agent_with_its_token_is_welcomed(rig: BridgeRig) -> None:
    agent = rig.agent()
    assert [session["name"] for session in rig.bridge.describe()] == ["home"]
    rig.log.wait_for("agent 'home' connected from 127.0.0.1")
    agent.close()
    wait_until(lambda: not rig.sessions.all())
    rig.log.wait_for("agent 'home' disconnected: closed by the peer")


def test_two_agents_are_connected_at_once(rig: BridgeRig) -> None:
    rig.agent()
    rig.agent("away", OTHER_TOKEN)
    assert [session.name for session in rig.sessions.all()] == ["home", "away"]


@pytest.mark.usefixtures("short_delay")
@pytest.mark.parametrize(
    ("name", "token"),
    [("home", b"wrong"), ("nobody", TOKEN), ("home", OTHER_TOKEN), ("away", TOKEN)],
)
def test_wrong_name_and_wrong_token_get_the_same_refusal(
    rig: BridgeRig, name: str, token: bytes
) -> None:
    """Hazard 127."""
    agent = log_in(rig, name, token)
    assert read_to_end(agent.socket) == b"\3\1"
    assert rig.counts.of("tunnel_handshakes", NOT_PROVEN_TEXT) == 1
    assert not rig.sessions.all()


def test_refusal_of_a_wrong_token_is_delayed_without_a_thread(rig: BridgeRig) -> None:
    """Hazard 127: 100 failed logins wait in the poller, and an agent logs in meanwhile."""
    began = time.monotonic()
    guesses = [
        log_in(rig, "home" if number % 2 else "nobody", b"guess %d" % number)
        for number in range(100)
    ]
    wait_until(lambda: len(rig.poller) == 100)
    assert not rig.pool.busy
    rig.agent()
    assert guesses[0].answer() == tunnel.NOT_PROVEN
    assert time.monotonic() - began >= backoff.AGENT_SECONDS
    assert rig.counts.of("tunnel_handshakes", NOT_PROVEN_TEXT) == 100
    for guess in guesses:
        guess.close()
    wait_until(lambda: len(rig.poller) == 1)


def test_unknown_name_costs_the_same_work_as_a_known_one(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 127: one proof is computed and compared, whether there is a token or not."""
    calls: list[str] = []
    agent_proof, secrets_equal = tunnel.agent_proof, tunnel.secrets_equal

    def count_proof(token: bytes, hello: Hello, nonce: bytes) -> bytes:
        calls.append("proof")
        return agent_proof(token, hello, nonce)

    def count_comparison(given: bytes, expected: bytes) -> bool:
        calls.append("comparison")
        return secrets_equal(given, expected)

    monkeypatch.setattr(tunnel, "agent_proof", count_proof)
    monkeypatch.setattr(tunnel, "secrets_equal", count_comparison)
    rig.bridge._refusals._back_off = BackOff(0.01)
    calls_by_name = {}
    for name in ("home", "nobody"):
        agent = log_in(rig, name, b"wrong")
        # The agent computes its proof in this process, too.
        calls.remove("proof")
        assert agent.answer() == tunnel.NOT_PROVEN
        calls_by_name[name] = calls[:]
        calls.clear()
    assert calls_by_name["home"] == calls_by_name["nobody"] == ["proof", "comparison"]


@pytest.mark.usefixtures("short_delay")
def test_replayed_hello_and_proof_are_refused(rig: BridgeRig) -> None:
    """Hazard 123."""
    agent = rig.agent()
    agent.close()
    wait_until(lambda: not rig.sessions.all())
    sock = rig.connect()
    sock.sendall(tunnel.encode_hello(agent.hello) + agent.proof)
    assert read_to_end(sock)[33:] == b"\3\1"


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x9eNPT\2\0" + NONCE + b"\4home", b"\x9eNPT\1\7" + NONCE],
    ids=["HTTP", "version 2", "kind 7"],
)
def test_invalid_hello_is_closed_without_an_answer(rig: BridgeRig, data: bytes) -> None:
    sock = rig.connect()
    sock.sendall(data)
    try:
        assert read_to_end(sock) == b""
    except ConnectionResetError:
        pass
    rig.counts.wait_for("connections", "bad protocol")


def test_silent_agent_is_closed_at_the_handshake_deadline(rig: BridgeRig) -> None:
    """Hazard 119."""
    rig.listener.configure(rig.bridge, rig.admission, 0.1, 256)
    for data in (b"", tunnel.encode_hello(Hello(tunnel.CONTROL, "home", NONCE))):
        sock = rig.connect()
        sock.sendall(data)
        assert len(read_to_end(sock)) in (0, 33)


# -- registered ports


def test_ports_are_opened_on_the_configured_addresses(rig: BridgeRig) -> None:
    agent = rig.agent()
    assert agent.register(SSH, DNS) == {SSH: tunnel.SERVED, DNS: tunnel.SERVED}
    assert rig.ports.opened == [("home", SSH, "127.0.0.1"), ("home", DNS, "0.0.0.0")]
    assert rig.bridge.describe()[0]["ports"] == ["127.0.0.1:8022/tcp", "0.0.0.0:53/udp"]
    agent.close()
    wait_until(lambda: len(rig.ports.closed) == 2)


@pytest.mark.parametrize(
    "port",
    [
        BridgePort("tcp", 8031),
        BridgePort("udp", 8022),
        BridgePort("tcp", 53),
        BridgePort("tcp", 22),
        BridgePort("tcp", 0),
    ],
    ids=str,
)
def test_port_that_is_not_configured_is_refused(rig: BridgeRig, port: BridgePort) -> None:
    """Hazard 122."""
    agent = rig.agent()
    assert agent.register(port, SSH) == {port: tunnel.NOT_ALLOWED, SSH: tunnel.SERVED}
    assert [opened for _, opened, _ in rig.ports.opened] == [SSH]
    rig.log.wait_for(f"agent 'home' is not allowed to have port {port}")
    assert rig.bridge.describe()[0]["refused"] == {str(port): "not allowed by the bridge"}


def test_busy_port_is_reported_to_the_agent_and_in_the_log(rig: BridgeRig) -> None:
    rig.ports.busy = {8023}
    assert rig.agent().register(SSH, BridgePort("tcp", 8023)) == {
        SSH: tunnel.SERVED,
        BridgePort("tcp", 8023): tunnel.CANNOT_LISTEN,
    }
    rig.log.wait_for("cannot open port 8023/tcp of agent 'home': tcp 127.0.0.1:8023: Address")


def test_second_registration_keeps_the_ports_named_again(rig: BridgeRig) -> None:
    agent = rig.agent()
    added = BridgePort("tcp", 8023)
    agent.register(SSH, DNS)
    assert agent.register(SSH, added) == {SSH: tunnel.SERVED, added: tunnel.SERVED}
    assert rig.ports.closed == [DNS]
    assert [opened for _, opened, _ in rig.ports.opened] == [SSH, DNS, added]
    assert agent.register() == {}
    assert rig.ports.closed == [DNS, SSH, added]


def test_reload_changes_ports_and_keeps_those_still_allowed(rig: BridgeRig) -> None:
    agent = rig.agent()
    web = BridgePort("tcp", 9000)
    assert agent.register(SSH, DNS, web)[web] == tunnel.NOT_ALLOWED
    ssh_range, web_range = (
        PortRange("tcp", "127.0.0.1", port, port) for port in (SSH.port, web.port)
    )
    rig.bridge.configure(agents(ssh_range, web_range))
    assert registered(agent) == {SSH: tunnel.SERVED, DNS: tunnel.NOT_ALLOWED, web: tunnel.SERVED}
    assert rig.ports.closed == [DNS]
    assert [opened for _, opened, _ in rig.ports.opened] == [SSH, DNS, web]
    rig.bridge.configure(agents(PortRange("tcp", "0.0.0.0", SSH.port, web.port)))
    assert registered(agent) == {SSH: tunnel.SERVED, DNS: tunnel.NOT_ALLOWED, web: tunnel.SERVED}
    assert rig.ports.opened[-2:] == [("home", SSH, "0.0.0.0"), ("home", web, "0.0.0.0")]
    assert len(rig.ports.closed) == 3


def test_reload_sets_the_clients_of_ports_that_stay(rig: BridgeRig) -> None:
    agent = rig.agent()
    agent.register(SSH, DNS)
    office = AllowedClients(([IpNetwork.parse("192.0.2.0/24")], ()))
    ssh_range = PortRange("tcp", "127.0.0.1", SSH.port, SSH.port, clients=office)
    dns_range = PortRange("udp", "0.0.0.0", DNS.port, DNS.port)
    rig.bridge.configure(agents(ssh_range, dns_range))
    assert registered(agent) == {SSH: tunnel.SERVED, DNS: tunnel.SERVED}
    assert rig.ports.clients == [(SSH, office), (DNS, ALL_CLIENTS)] and not rig.ports.closed
    # Another registration changes nothing.
    agent.register(SSH, DNS)
    assert len(rig.ports.clients) == 2


@pytest.mark.parametrize(
    "rights", [{}, {"home": AgentRights(OTHER_TOKEN)}], ids=["removed", "other token"]
)
def test_reload_ends_an_agent_that_may_no_longer_log_in(rig: BridgeRig, rights: Any) -> None:
    agent = rig.agent()
    agent.register(SSH)
    rig.bridge.configure(rights)
    assert tunnel.parse_number(agent.read(tunnel.CLOSE)) == tunnel.WITHDRAWN
    assert agent.is_closed()
    assert rig.ports.closed == [SSH] and not rig.sessions.all()


# -- messages


@pytest.mark.parametrize(
    "data",
    [
        encode_varint(tunnel.PING) + encode_varint(1 << 32),
        encode_varint(tunnel.REGISTER) + encode_varint(4097),
        tunnel.encode_message(tunnel.REGISTER, b"\0\7\0\1"),
        tunnel.encode_message(tunnel.REGISTER),
        tunnel.encode_message(tunnel.PING, b"short"),
        tunnel.encode_message(tunnel.CLOSE),
    ],
    ids=["long PING", "long REGISTER", "network 7", "empty REGISTER", "short PING", "empty CLOSE"],
)
def test_malformed_message_ends_its_own_agent_alone(rig: BridgeRig, data: bytes) -> None:
    """Hazard 123."""
    agent, other = rig.agent(), rig.agent("away", OTHER_TOKEN)
    agent.register(SSH)
    agent.send(data)
    assert agent.is_closed()
    assert rig.ports.closed == [SSH]
    wait_until(lambda: [session.name for session in rig.sessions.all()] == ["away"])
    assert other.register(SSH) == {SSH: tunnel.NOT_ALLOWED}


def test_message_of_unknown_type_is_skipped(rig: BridgeRig) -> None:
    agent = rig.agent()
    unknown = tunnel.encode_message(0x29 * 5 + 0x17, b"grease") + tunnel.encode_message(0)
    agent.send(unknown + tunnel.encode_message(tunnel.PING, b"01234567"))
    assert agent.read(tunnel.PONG) == b"01234567"


def test_message_that_arrives_byte_by_byte_is_read(rig: BridgeRig) -> None:
    agent = rig.agent()
    for byte in tunnel.encode_message(tunnel.PING, b"01234567"):
        agent.send(bytes((byte,)))
        time.sleep(0.001)
    assert agent.read(tunnel.PONG) == b"01234567"


# -- the heartbeat


def test_silent_agent_is_pinged_and_then_given_up(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 126."""
    monkeypatch.setattr(connection, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(connection, "DEAD_SECONDS", 2.5)
    agent = rig.agent()
    agent.register(SSH)
    assert len(agent.read_ping()) == 8
    assert agent.is_closed()
    wait_until(lambda: rig.ports.closed == [SSH])
    rig.log.wait_for("agent 'home' disconnected: silent for 2.5 s")


def test_agent_that_answers_pings_stays_and_has_a_round_trip_time(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEARTBEAT_SECONDS", 0.2)
    agent = rig.agent()
    for _ in range(2):
        agent.send(tunnel.encode_message(tunnel.PONG, agent.read_ping()))
    wait_until(lambda: rig.bridge.describe()[0]["rtt"])


# -- who owns a name


def test_second_agent_is_refused_while_the_first_answers(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 121."""
    monkeypatch.setattr(claims, "CHALLENGE_SECONDS", 0.5)
    first = rig.agent()
    first.register(SSH)
    second = log_in(rig)
    first.send(tunnel.encode_message(tunnel.PONG, first.read_ping()))
    assert second.answer() == tunnel.NAME_IN_USE
    (refusal,) = rig.counts.refusals
    assert str(refusal.decided).startswith("the agent that answers from 127.0.0.1")
    assert first.register(SSH) == {SSH: tunnel.SERVED} and not rig.ports.closed
    # The first is asked again for each newcomer.
    third = log_in(rig)
    first.send(tunnel.encode_message(tunnel.PONG, first.read_ping()))
    assert third.answer() == tunnel.NAME_IN_USE


def test_third_agent_is_refused_while_the_first_is_asked(rig: BridgeRig) -> None:
    rig.agent()
    log_in(rig)
    wait_until(lambda: rig.session().challenged)
    assert log_in(rig).answer() == tunnel.NAME_IN_USE


def test_second_agent_takes_over_if_the_first_does_not_answer(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 121: it is welcomed only when the ports are free, so that it gets them at once."""
    monkeypatch.setattr(claims, "CHALLENGE_SECONDS", 0.2)
    first = rig.agent()
    first.register(SSH)
    work = rig.work(first)
    second = rig.agent()
    assert rig.ports.closed == [SSH]
    assert second.register(SSH) == {SSH: tunnel.SERVED}
    assert tunnel.parse_number(first.read(tunnel.CLOSE)) == tunnel.REPLACED
    assert first.is_closed() and work.is_closed()
    rig.log.wait_for("agent 'home' disconnected: replaced by the agent from 127.0.0.1")
    assert [session.identifier for session in rig.sessions.all()] == [second.session]


def test_second_agent_is_welcomed_if_the_first_leaves_meanwhile(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "CHALLENGE_SECONDS", 0.5)
    first = rig.agent()
    second = log_in(rig)
    first.send(tunnel.encode_message(tunnel.PONG, first.read_ping()))
    first.close()
    second.welcomed()


def test_welcome_precedes_all_messages_of_other_threads(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dials, challenges and reloads find the session as soon as it has its name."""
    add = rig.sessions.add
    dials: list[Task] = []
    flow = Flow("tcp", Address("203.0.113.9", 50000), Address("a.test", 80), "main", "")

    def add_and_use(session: AgentSession) -> bool:
        added = add(session)
        session.is_exit = True
        dials.append(Task(rig.dialer.dial, flow))
        wait_until(lambda: session._waiting)
        session.control.ping()
        rig.bridge.configure(agents(PortRange("tcp", "127.0.0.1", 8022, 8022)))
        return added

    monkeypatch.setattr(rig.sessions, "add", add_and_use)
    # Asserts that the welcome comes first.
    agent = rig.agent()
    kinds = [complete(tunnel.read_message(agent.stream)).kind for _ in range(3)]
    assert kinds == [tunnel.WANT, tunnel.PING, tunnel.REGISTERED]
    agent.close()
    with pytest.raises(DialError):
        dials[0].result()


def test_agent_that_ends_before_its_welcome_has_no_session(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = rig.sessions.add

    def close_and_add(session: AgentSession) -> bool:
        # As any thread may that finds the session.
        session.control.close(tunnel.STOPPING)
        return add(session)

    monkeypatch.setattr(rig.sessions, "add", close_and_add)
    assert read_to_end(log_in(rig).socket) == b""
    wait_until(lambda: not rig.sessions.all())
    assert not rig.counts.of("tunnel_handshakes", "agent")


@pytest.mark.parametrize(
    "rights", [{}, {"home": AgentRights(OTHER_TOKEN)}], ids=["removed", "other token"]
)
def test_reload_during_a_challenge_refuses_the_old_token(
    rig: BridgeRig, rights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "CHALLENGE_SECONDS", 0.3)
    rig.agent()
    second = log_in(rig)
    wait_until(lambda: rig.session().challenged)
    rig.bridge.configure(rights)
    assert second.answer() == tunnel.NOT_PROVEN
    assert not rig.sessions.all()


def test_agent_ends_if_no_thread_can_serve_its_message(
    rig: BridgeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = rig.agent()
    agent.register(SSH)
    wait_until(lambda: len(rig.poller) == 1)
    with monkeypatch.context() as without_threads:
        without_threads.setattr(rig.pool, "submit", lambda *_, **__: False)
        agent.send(tunnel.encode_message(tunnel.PING, b"01234567"))
        assert agent.is_closed()
        wait_until(lambda: rig.ports.closed == [SSH] and not rig.sessions.all())
        wait_until(lambda: not rig.listener.live)
    rig.log.wait_for("agent 'home' disconnected: the connection was lost")


def test_wrong_token_does_not_challenge_the_holder_of_the_name(rig: BridgeRig) -> None:
    """Hazard 121: the holder is not pinged for a stranger."""
    first = rig.agent()
    log_in(rig, token=b"wrong")
    wait_until(lambda: rig.counts.of("tunnel_handshakes", NOT_PROVEN_TEXT))
    assert not rig.session().challenged and nothing_comes(first.socket)


# -- work connections


def test_work_connection_of_another_session_is_refused_at_once(rig: BridgeRig) -> None:
    """Hazard 123: sessions cannot be guessed; the token is right, so the refusal is not delayed."""
    agent = rig.agent()
    for session in (os.urandom(16), bytes(16)):
        hello = Hello(tunnel.WORK, "home", NONCE, session)
        assert PlayedAgent(rig, hello, TOKEN).answer() == tunnel.NO_SESSION
    hello = Hello(tunnel.WORK, "away", NONCE, agent.session)
    assert PlayedAgent(rig, hello, OTHER_TOKEN).answer() == tunnel.NO_SESSION
    rig.work(agent)


def test_idle_work_connections_are_limited(rig: BridgeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "IDLE_LIMIT", 2)
    agent = rig.agent()
    for _ in range(2):
        rig.work(agent)
    wait_until(lambda: rig.bridge.describe()[0]["idle"] == 2)
    hello = Hello(tunnel.WORK, "home", NONCE, agent.session)
    assert PlayedAgent(rig, hello, TOKEN).answer() == tunnel.TOO_MANY


def test_idle_work_connection_holds_no_thread_and_no_admission(rig: BridgeRig) -> None:
    agent = rig.agent()
    rig.work(agent)
    # The control connection alone.
    wait_until(lambda: rig.admission.inside == ["127.0.0.1"])
    wait_until(lambda: not rig.pool.busy)


def test_sweep_closes_unusable_work_connections(rig: BridgeRig) -> None:
    agent = rig.agent()
    works = [rig.work(agent) for _ in range(3)]
    wait_until(lambda: rig.bridge.describe()[0]["idle"] == 3)
    works[1].close()
    # An agent may send nothing before the bridge opens the connection.
    works[2].send(b"!")
    wait_until(lambda: sum(not stream.is_usable() for stream in rig.session()._idle) == 2)
    for close in rig.sessions.expire(0.0):
        close()
    assert rig.bridge.describe()[0]["idle"] == 1


def test_end_of_the_agent_closes_its_idle_work_connections(rig: BridgeRig) -> None:
    agent = rig.agent()
    work = rig.work(agent)
    wait_until(lambda: rig.bridge.describe()[0]["idle"])
    agent.close()
    assert work.is_closed()


def test_stopping_bridge_tells_its_agents_and_closes_their_ports(rig: BridgeRig) -> None:
    agent = rig.agent()
    agent.register(SSH)
    rig.bridge.stop()
    assert tunnel.parse_number(agent.read(tunnel.CLOSE)) == tunnel.STOPPING
    assert agent.is_closed() and rig.ports.closed == [SSH]
