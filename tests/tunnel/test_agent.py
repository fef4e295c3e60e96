"""The agent with a bridge played by hand: handshake, messages, reconnects, work connections."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from typing import Callable, Iterator

import pytest

from netproxy.errors import DialError, ProtocolError, Reason, StreamError
from netproxy.listener.pool import ThreadPool
from netproxy.net.stream import Stream, complete
from netproxy.protocol import tunnel
from netproxy.protocol.http.capsule import encode_varint
from netproxy.protocol.tunnel import BridgePort, Hello, Registration, Welcome
from netproxy.tunnel import agent as agent_module
from netproxy.tunnel import pool
from netproxy.tunnel.control import connection
from netproxy.tunnel.agent import Agent, reconnect_delay
from netproxy.tunnel.control.handshake import AgentIdentity
from netproxy.tunnel.pool import WorkPool
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, wait_until

TOKEN = b"the token of home"
SSH = BridgePort("tcp", 8022)
SESSION = bytes(range(16))
SETTLE_SECONDS = 0.15
"""In which the agent would dial more work connections, if it wanted more."""


class RecordingHandler:
    """A WorkHandler that only notes the connections."""

    def __init__(self) -> None:
        self.served: queue.SimpleQueue[tuple[Stream, WorkPool]] = queue.SimpleQueue()

    def serve(self, stream: Stream, pool: WorkPool) -> None:
        self.served.put((stream, pool))


class PlayedBridge:
    """An agent and the other ends of what it dials; implements BridgeDialer by socket pairs."""

    def __init__(self) -> None:
        self.log = Lines()
        self.dialled: queue.SimpleQueue[Stream] = queue.SimpleQueue()
        self.handler = RecordingHandler()
        self.failure: Exception | None = None
        """What each dial raises."""
        self.failed = 0
        self.registered: tuple[list[BridgePort], bool] | None = None
        self._sockets: list[socket.socket] = []
        self._dial_pool = ThreadPool("dial", 8, 8, self.log)
        identity = AgentIdentity("home", TOKEN)
        self.agent = Agent(identity, self._dial_pool.submit, self.handler, self.log)
        self.agent.configure(self, [SSH], False)

    def dial(self, greet: Callable[[Stream], None]) -> Stream:
        if self.failure is not None:
            self.failed += 1
            raise self.failure
        ours, theirs = socket.socketpair()
        self._sockets += [ours, theirs]
        self.dialled.put(Stream(theirs, limited=SECONDS))
        stream = Stream(ours, limited=SECONDS)
        try:
            greet(stream)
        except BaseException:
            stream.close()
            raise
        return stream

    def next_dialled(self) -> Stream:
        """Return the next connection of the agent."""
        return self.dialled.get(timeout=SECONDS)

    def accept(self, token: bytes = TOKEN) -> tuple[Stream, Hello]:
        """Welcome the next connection of the agent; `token` signs the bridge's proof."""
        stream = self.next_dialled()
        hello, nonce = complete(tunnel.read_hello(stream)), os.urandom(32)
        stream.write(tunnel.encode_challenge(nonce))
        assert complete(stream.read_exactly(32)) == tunnel.agent_proof(TOKEN, hello, nonce)
        proof = tunnel.bridge_proof(token, hello, nonce, SESSION)
        stream.write(tunnel.encode_welcome(Welcome(proof, SESSION)))
        return stream, hello

    def accept_control(self) -> Stream:
        """Welcome a control connection and read its REGISTER."""
        stream, hello = self.accept()
        assert (hello.kind, hello.name) == (tunnel.CONTROL, "home")
        message = complete(tunnel.read_message(stream))
        assert message.kind == tunnel.REGISTER
        self.registered = tunnel.parse_register(message.value)
        return stream

    def accept_work(self, count: int) -> list[Stream]:
        """Welcome so many work connections."""
        streams = []
        for _ in range(count):
            stream, hello = self.accept()
            assert (hello.kind, hello.session) == (tunnel.WORK, SESSION)
            streams.append(stream)
        return streams

    def assert_no_more_dials(self) -> None:
        time.sleep(SETTLE_SECONDS)
        assert self.dialled.empty()

    def close(self) -> None:
        self.agent.stop(SECONDS)
        self._dial_pool.stop(SECONDS)
        assert not self.agent.thread.is_alive()
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedBridge]:
    monkeypatch.setattr(agent_module, "RECONNECT_FIRST", 0.02)
    monkeypatch.setattr(agent_module, "RECONNECT_LIMIT", 0.04)
    monkeypatch.setattr(agent_module, "LOOK_SECONDS", 0.05)
    bridge = PlayedBridge()
    bridge.agent.start()
    yield bridge
    bridge.close()


def read(stream: Stream, kind: int) -> bytes:
    """Return the value of the next message of a kind; others are skipped."""
    while (message := complete(tunnel.read_message(stream))).kind != kind:
        pass
    return message.value


def test_agent_registers_and_dials_a_few_work_connections_ahead(bridge: PlayedBridge) -> None:
    bridge.accept_control()
    assert bridge.registered == Registration([SSH], False)
    bridge.accept_work(pool.IDLE_FEWEST)
    wait_until(lambda: bridge.agent.describe().get("idle") == pool.IDLE_FEWEST)
    bridge.assert_no_more_dials()
    state = bridge.agent.describe()
    assert (state["name"], state["connected"]) == ("home", True)


def test_agent_learns_and_logs_which_ports_are_not_served(bridge: PlayedBridge) -> None:
    stream = bridge.accept_control()
    stream.write(tunnel.encode_registered([(SSH, tunnel.CANNOT_LISTEN)]))
    bridge.log.wait_for("port 8022/tcp is not served: the bridge cannot listen there")
    assert bridge.agent.describe()["ports"] == {"8022/tcp": "the bridge cannot listen there"}


def test_opened_work_connection_is_replaced_by_another(bridge: PlayedBridge) -> None:
    bridge.accept_control()
    bridge.accept_work(pool.IDLE_FEWEST)
    stream, work_pool = bridge.handler.served.get(timeout=SECONDS)
    work_pool.opened(stream)
    bridge.accept_work(1)


def test_agent_dials_as_many_more_as_the_bridge_wants(bridge: PlayedBridge) -> None:
    stream = bridge.accept_control()
    bridge.accept_work(pool.IDLE_FEWEST)
    stream.write(tunnel.encode_number(tunnel.WANT, 2) + tunnel.encode_number(tunnel.WANT, 1))
    bridge.accept_work(3)
    bridge.assert_no_more_dials()


def test_wanted_connections_are_limited(
    bridge: PlayedBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "WANTED_LIMIT", 3)
    stream = bridge.accept_control()
    stream.write(tunnel.encode_number(tunnel.WANT, 1 << 60))
    bridge.accept_work(pool.IDLE_FEWEST + 3)
    bridge.assert_no_more_dials()


def test_reload_registers_the_new_offer(bridge: PlayedBridge) -> None:
    stream = bridge.accept_control()
    services = [SSH, BridgePort("udp", 53)]
    bridge.agent.configure(bridge, services, True)
    registered = tunnel.parse_register(read(stream, tunnel.REGISTER))
    assert registered == Registration(services, True)


def test_agent_answers_pings(bridge: PlayedBridge) -> None:
    stream = bridge.accept_control()
    stream.write(tunnel.encode_message(tunnel.PING, b"01234567"))
    assert read(stream, tunnel.PONG) == b"01234567"


# -- reconnects


def test_reconnect_delay_doubles_up_to_a_limit_with_jitter() -> None:
    """Hazard 125: 1 to 60 s."""
    for failures, longest in ((1, 2), (2, 4), (3, 8), (6, 60), (1000, 60)):
        delays = [reconnect_delay(failures) for _ in range(200)]
        assert longest / 2 <= min(delays) < max(delays) < longest
        assert len(set(delays)) > 100


@pytest.mark.parametrize(
    "failure",
    [
        DialError(Reason.REFUSED),
        DialError(Reason.NAME, "bridge.example"),
        StreamError("reset"),
        ProtocolError("no"),
        RuntimeError("an internal error"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_agent_dials_again_after_every_failure(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 125: from the first failure on, and without another thread for each."""
    monkeypatch.setattr(agent_module, "RECONNECT_FIRST", 0.01)
    monkeypatch.setattr(agent_module, "RECONNECT_LIMIT", 0.01)
    bridge = PlayedBridge()
    bridge.failure = failure
    before = threading.active_count()
    bridge.agent.start()
    wait_until(lambda: bridge.failed >= 10)
    assert threading.active_count() <= before + 1
    bridge.failure = None
    bridge.accept_control()
    bridge.close()


def test_dials_that_fail_late_count_as_failures_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 125: an absent bridge answers nothing, and each dial takes as long as it may."""
    failures_in_a_row: list[int] = []

    def no_delay(failures: int) -> float:
        failures_in_a_row.append(failures)
        return 0.0

    monkeypatch.setattr(agent_module, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(agent_module, "reconnect_delay", no_delay)
    bridge = PlayedBridge()
    bridge.failure = DialError(Reason.TIMEOUT)
    bridge.agent.start()
    wait_until(lambda: len(failures_in_a_row) >= 3)
    assert failures_in_a_row[:3] == [1, 2, 3]
    bridge.failure = None
    bridge.accept_control().close()
    # A connection that lasted long enough starts the count again.
    wait_until(lambda: failures_in_a_row[-1] == 1)
    bridge.close()


@pytest.mark.parametrize("quick", [0.0, 1000.0])
def test_delay_does_not_grow_soon_after_a_connection_that_lasted(
    monkeypatch: pytest.MonkeyPatch, quick: float
) -> None:
    """Hazard 125: a bridge that is started again is found soon."""
    failures_in_a_row: list[int] = []

    def no_delay(failures: int) -> float:
        failures_in_a_row.append(failures)
        return 0.0

    monkeypatch.setattr(agent_module, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(agent_module, "QUICK_SECONDS", quick)
    monkeypatch.setattr(agent_module, "reconnect_delay", no_delay)
    bridge = PlayedBridge()
    bridge.agent.start()
    control = bridge.accept_control()
    bridge.failure = DialError(Reason.REFUSED)
    control.close()
    wait_until(lambda: len(failures_in_a_row) >= 3)
    assert failures_in_a_row[:3] == ([1, 1, 1] if quick else [1, 2, 3])
    bridge.close()


@pytest.mark.parametrize("end", ["end", "close", "silence", "long capsule", "bad message"])
def test_agent_reconnects_whatever_ends_the_control_connection(
    bridge: PlayedBridge, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazards 123, 125, 126."""
    if end == "silence":
        monkeypatch.setattr(connection, "HEARTBEAT_SECONDS", 0.1)
        monkeypatch.setattr(connection, "DEAD_SECONDS", 0.3)
    stream = bridge.accept_control()
    works = bridge.accept_work(pool.IDLE_FEWEST)
    if end == "end":
        stream.close()
    elif end == "close":
        stream.write(tunnel.encode_number(tunnel.CLOSE, tunnel.STOPPING))
        bridge.log.wait_for("the bridge has closed the connection: it is stopping")
    elif end == "long capsule":
        stream.write(encode_varint(tunnel.PING) + encode_varint(1 << 32))
    elif end == "bad message":
        stream.write(tunnel.encode_message(tunnel.REGISTERED, b"\1"))
    bridge.accept_control()
    # The idle work connections ended with their session.
    for work in works:
        work.limit(SECONDS)
        assert complete(work.read_some(1)) == b""
    monkeypatch.undo()


def test_bridge_that_does_not_know_the_token_is_rejected(bridge: PlayedBridge) -> None:
    stream, _ = bridge.accept(b"another")
    bridge.log.wait_for("the bridge does not know the token")
    assert complete(stream.read_some(1)) == b""
    bridge.accept_control()


@pytest.mark.parametrize("reason", [*tunnel.REFUSALS, 99])
def test_refused_agent_logs_the_reason_and_dials_again(bridge: PlayedBridge, reason: int) -> None:
    stream = bridge.next_dialled()
    hello = complete(tunnel.read_hello(stream))
    stream.write(tunnel.encode_challenge(os.urandom(32)))
    complete(stream.read_exactly(32))
    stream.write(tunnel.encode_refusal(reason))
    text = tunnel.REFUSALS.get(reason, "unknown reason 99")
    bridge.log.wait_for(f"the bridge has refused the agent: {text}")
    stream = bridge.next_dialled()
    assert complete(tunnel.read_hello(stream)).nonce != hello.nonce
    # A refusal in place of the challenge.
    stream.write(tunnel.encode_refusal(reason))
    bridge.accept_control()


def test_failed_work_connection_is_dialled_again(bridge: PlayedBridge) -> None:
    bridge.accept_control()
    for _ in range(pool.IDLE_FEWEST):
        bridge.next_dialled().close()
    bridge.log.wait_for("cannot dial a work connection")
    bridge.accept_work(pool.IDLE_FEWEST)


def test_stopping_agent_tells_the_bridge(bridge: PlayedBridge) -> None:
    stream = bridge.accept_control()
    works = bridge.accept_work(pool.IDLE_FEWEST)
    bridge.agent.stop(SECONDS)
    assert tunnel.parse_number(read(stream, tunnel.CLOSE)) == tunnel.STOPPING
    for work in works:
        assert complete(work.read_some(1)) == b""


def test_identity_does_not_show_its_token() -> None:
    assert "token" not in repr(AgentIdentity("home", TOKEN))


# -- the pool alone


class PoolRig:
    """A WorkPool that dials at once, on socket pairs; `added` are its connections in order."""

    def __init__(self) -> None:
        self.added: list[Stream] = []
        self._sockets: list[socket.socket] = []
        self.pool = WorkPool(self._dial, self._submit, self, Lines())

    def _dial(self) -> Stream:
        pair = socket.socketpair()
        self._sockets += pair
        return Stream(pair[0])

    @staticmethod
    def _submit(call: Callable[[], None]) -> bool:
        call()
        return True

    def serve(self, stream: Stream, pool: WorkPool) -> None:
        self.added.append(stream)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def pool_rig() -> Iterator[PoolRig]:
    rig = PoolRig()
    yield rig
    rig.close()


def test_pool_releases_connections_beyond_those_it_keeps(pool_rig: PoolRig) -> None:
    work_pool, added = pool_rig.pool, pool_rig.added
    work_pool.want(2)
    assert len(added) == pool.IDLE_FEWEST + 2
    released = [work_pool.release(stream) for stream in added]
    assert released == [True, True] + [False] * pool.IDLE_FEWEST
    assert work_pool.describe()["idle"] == pool.IDLE_FEWEST


def test_pool_keeps_more_for_a_while_after_it_had_too_few(
    pool_rig: PoolRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "IDLE_MOST", pool.IDLE_FEWEST + 2)
    work_pool, added = pool_rig.pool, pool_rig.added
    work_pool.want(3)
    assert len(added) == pool.IDLE_FEWEST + 3
    for stream in added[:3]:
        work_pool.opened(stream)
    assert work_pool.describe() == {"idle": pool.IDLE_FEWEST + 2, "opened": 3}
    assert [work_pool.release(stream) for stream in added[3:6]] == [True, True, False]
    work_pool.opened(added[6])
    assert work_pool.describe() == {"idle": pool.IDLE_FEWEST, "opened": 4}


def no_connection() -> Stream:
    pytest.fail("dialled")


def test_connection_dialled_before_the_end_of_the_pool_is_closed() -> None:
    ours, theirs = socket.socketpair()
    tasks: list[Callable[[], None]] = []

    def submit(call: Callable[[], None]) -> bool:
        tasks.append(call)
        return True

    with ours, theirs:
        work_pool = WorkPool(lambda: Stream(ours), submit, RecordingHandler(), Lines())
        work_pool.fill()
        work_pool.end()
        tasks[0]()
        theirs.settimeout(SECONDS)
        assert theirs.recv(1) == b""


def test_connection_for_which_there_is_no_room_any_more_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its place was taken by one whose stream has ended while it was dialled."""
    monkeypatch.setattr(pool, "IDLE_MOST", pool.IDLE_FEWEST)
    tasks: list[Callable[[], None]] = []
    made: list[tuple[socket.socket, socket.socket]] = []
    handler = RecordingHandler()

    def dial() -> Stream:
        made.append(socket.socketpair())
        return Stream(made[-1][0])

    def submit(call: Callable[[], None]) -> bool:
        tasks.append(call)
        return True

    work_pool = WorkPool(dial, submit, handler, Lines())
    work_pool.fill()
    while tasks:
        tasks.pop()()
    stream, _ = handler.served.get(timeout=SECONDS)
    work_pool.opened(stream)
    assert work_pool.take_back(stream)
    tasks.pop()()
    assert not tasks and len(made) == pool.IDLE_FEWEST + 1
    made[-1][1].settimeout(SECONDS)
    assert made[-1][1].recv(1) == b"" and handler.served.qsize() == pool.IDLE_FEWEST - 1
    assert work_pool.describe() == {"idle": pool.IDLE_FEWEST, "opened": 1}
    for pair in made:
        for sock in pair:
            sock.close()


def test_internal_error_in_a_dial_does_not_keep_its_place() -> None:
    """Threads and memory may run out in a dial: that is no NetProxyError."""
    errors: list[Exception] = []

    def dial() -> Stream:
        raise RuntimeError("can't start new thread")

    def submit(job: Callable[[], None]) -> bool:
        try:
            job()
        except RuntimeError as error:
            # A thread of the dial pool logs it.
            errors.append(error)
        return len(errors) % 2 == 0

    work_pool = WorkPool(dial, submit, RecordingHandler(), Lines())
    for _ in range(2 * pool.DIALLING_LIMIT):
        work_pool.fill()
    assert len(errors) >= 2 * pool.DIALLING_LIMIT


def test_full_dial_pool_is_asked_again_later() -> None:
    work_pool = WorkPool(no_connection, lambda call: False, RecordingHandler(), Lines())
    work_pool.fill()
    work_pool.fill()
    assert work_pool.describe() == {"idle": 0, "opened": 0}
