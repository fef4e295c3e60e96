"""The agent towards a bridge that is played by hand: its handshake, its patience, and what it makes of what the bridge says."""

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
from netproxy.net.stream import Stream
from netproxy.protocol import tunnel
from netproxy.protocol.capsule import encode_varint
from netproxy.protocol.tunnel import Hello, Service, Welcome
from netproxy.tunnel import agent as agent_module
from netproxy.tunnel import control, pool
from netproxy.tunnel.agent import Agent, Identity, backoff
from netproxy.tunnel.pool import WorkPool
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, wait_until

TOKEN = b"the token of home"
SSH = Service("tcp", 8022)
SESSION = bytes(range(16))


class PlayedBridge:
    """An agent that dials socket pairs; the test has their other ends."""

    def __init__(self) -> None:
        self.log = Lines()
        self.dialled: queue.SimpleQueue[Stream] = queue.SimpleQueue()
        self.served: queue.SimpleQueue[tuple[Stream, WorkPool]] = queue.SimpleQueue()
        self.failure: Exception | None = None
        self.failed = 0
        self.sockets: list[socket.socket] = []
        self.dials = ThreadPool("dial", 8, 8, self.log)
        self.agent = Agent(
            Identity("home", TOKEN),
            self._dial,
            self.dials.submit,
            lambda *both: self.served.put(both),
            self.log,
        )
        self.agent.configure([SSH], False)

    def _dial(self, greet: Callable[[Stream], None]) -> Stream:
        if self.failure is not None:
            self.failed += 1
            raise self.failure
        ours, theirs = socket.socketpair()
        self.sockets += [ours, theirs]
        self.dialled.put(Stream(theirs, limited=SECONDS))
        stream = Stream(ours, limited=SECONDS)
        try:
            greet(stream)
        except BaseException:
            stream.close()
            raise
        return stream

    def accept(self, token: bytes = TOKEN) -> tuple[Stream, Hello]:
        """The next connection, let in."""
        stream = self.dialled.get(timeout=SECONDS)
        hello, nonce = tunnel.read_hello(stream), os.urandom(32)
        stream.write(tunnel.encode_challenge(nonce))
        assert stream.read_exactly(32) == tunnel.agent_proof(TOKEN, hello, nonce)
        stream.write(
            tunnel.encode_welcome(
                Welcome(tunnel.bridge_proof(token, hello, nonce, SESSION), SESSION)
            )
        )
        return stream, hello

    def link(self) -> Stream:
        """A control connection whose agent has registered."""
        stream, hello = self.accept()
        assert (hello.kind, hello.name) == (tunnel.CONTROL, "home")
        message = tunnel.read_message(stream)
        assert message.kind == tunnel.REGISTER
        self.registered = tunnel.parse_register(message.value)
        return stream

    def work(self, count: int) -> list[Stream]:
        found = []
        for _ in range(count):
            stream, hello = self.accept()
            assert (hello.kind, hello.session) == (tunnel.WORK, SESSION)
            found.append(stream)
        return found

    def close(self) -> None:
        self.agent.stop(SECONDS)
        self.dials.stop(SECONDS)
        assert not self.agent.thread.is_alive()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedBridge]:
    monkeypatch.setattr(agent_module, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(agent_module, "BACKOFF_LIMIT", 0.04)
    monkeypatch.setattr(agent_module, "LOOK_SECONDS", 0.05)
    made = PlayedBridge()
    made.agent.start()
    yield made
    made.close()


def read(stream: Stream, kind: int) -> bytes:
    while (message := tunnel.read_message(stream)).kind != kind:
        pass
    return message.value


def test_it_registers_and_dials_a_few_connections_ahead(bridge: PlayedBridge) -> None:
    bridge.link()
    assert bridge.registered == ([SSH], False)
    bridge.work(pool.WAITING)
    wait_until(lambda: bridge.agent.describe().get("idle") == pool.WAITING)
    time.sleep(0.15)
    assert bridge.dialled.empty()  # and no more than these
    describe_flows = bridge.agent.describe()
    assert (describe_flows["name"], describe_flows["connected"]) == ("home", True)


def test_it_learns_what_is_served(bridge: PlayedBridge) -> None:
    stream = bridge.link()
    stream.write(tunnel.encode_registered([(SSH, tunnel.CANNOT_LISTEN)]))
    bridge.log.wait_for("port 8022/tcp is not served: the bridge cannot listen there")
    assert bridge.agent.describe()["ports"] == {"8022/tcp": "the bridge cannot listen there"}


def test_another_connection_takes_the_place_of_one_that_was_opened(bridge: PlayedBridge) -> None:
    bridge.link()
    bridge.work(pool.WAITING)
    stream, waiting = bridge.served.get(timeout=SECONDS)
    waiting.opened(stream)
    bridge.work(1)


def test_it_dials_as_many_more_as_the_bridge_wants(bridge: PlayedBridge) -> None:
    stream = bridge.link()
    bridge.work(pool.WAITING)
    stream.write(tunnel.encode_number(tunnel.WANT, 2) + tunnel.encode_number(tunnel.WANT, 1))
    bridge.work(3)
    time.sleep(0.15)
    assert bridge.dialled.empty()


def test_wants_are_bounded(bridge: PlayedBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "EXTRA_LIMIT", 3)
    stream = bridge.link()
    stream.write(tunnel.encode_number(tunnel.WANT, 1 << 60))
    bridge.work(pool.WAITING + 3)
    time.sleep(0.15)
    assert bridge.dialled.empty()


def test_reload_registers_again(bridge: PlayedBridge) -> None:
    stream = bridge.link()
    bridge.agent.configure([SSH, Service("udp", 53)], True)
    assert tunnel.parse_register(read(stream, tunnel.REGISTER)) == ([SSH, Service("udp", 53)], True)


def test_pings_are_answered(bridge: PlayedBridge) -> None:
    stream = bridge.link()
    stream.write(tunnel.encode(tunnel.PING, b"01234567"))
    assert read(stream, tunnel.PONG) == b"01234567"


# -- patience


def test_backoff_doubles_up_to_a_limit_with_jitter() -> None:
    """Hazard 125: 1 to 60 s."""
    for tries, longest in ((1, 2), (2, 4), (3, 8), (6, 60), (1000, 60)):
        times = [backoff(tries) for _ in range(200)]
        assert longest / 2 <= min(times) < max(times) < longest
        assert len(set(times)) > 100


@pytest.mark.parametrize(
    "failure",
    [
        DialError(Reason.REFUSED),
        DialError(Reason.NAME, "bridge.example"),
        StreamError("reset"),
        ProtocolError("no"),
        RuntimeError("a fault of ours"),
    ],
)
def test_it_tries_for_ever_from_the_first_failure_on(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 125: without a thread more for each."""
    monkeypatch.setattr(agent_module, "BACKOFF_FIRST", 0.01)
    monkeypatch.setattr(agent_module, "BACKOFF_LIMIT", 0.01)
    bridge = PlayedBridge()
    bridge.failure = failure
    before = threading.active_count()
    bridge.agent.start()
    wait_until(lambda: bridge.failed >= 10)
    assert threading.active_count() <= before + 1
    bridge.failure = None
    bridge.link()
    bridge.close()


def test_dials_that_fail_late_are_failures_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 125: a bridge that is not there answers nothing, and each dial takes as long as it may."""
    monkeypatch.setattr(agent_module, "STEADY_SECONDS", 0.0)
    tries: list[int] = []
    monkeypatch.setattr(agent_module, "backoff", lambda number: tries.append(number) or 0.0)
    bridge = PlayedBridge()
    bridge.failure = DialError(Reason.TIMEOUT)
    bridge.agent.start()
    wait_until(lambda: len(tries) >= 3)
    assert tries[:3] == [1, 2, 3]
    bridge.failure = None
    bridge.link().close()
    wait_until(lambda: tries[-1] == 1)  # it had lived long enough
    bridge.close()


@pytest.mark.parametrize("way", ["end", "close", "silence", "long capsule", "bad message"])
def test_it_comes_back_whatever_ends_the_connection(
    bridge: PlayedBridge, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazards 123, 125, 126."""
    if way == "silence":
        monkeypatch.setattr(control, "HEARTBEAT", 0.1)
        monkeypatch.setattr(control, "DEAD", 0.3)
    stream = bridge.link()
    waiting = bridge.work(pool.WAITING)
    if way == "end":
        stream.close()
    elif way == "close":
        stream.write(tunnel.encode_number(tunnel.CLOSE, tunnel.STOPPING))
        bridge.log.wait_for("the bridge closes: it stops")
    elif way == "long capsule":
        stream.write(encode_varint(tunnel.PING) + encode_varint(1 << 32))
    elif way == "bad message":
        stream.write(tunnel.encode(tunnel.REGISTERED, b"\1"))
    bridge.link()
    for one in waiting:
        one.limit(SECONDS)
        assert one.read_some(1) == b""  # they were of the session that ended
    monkeypatch.undo()


def test_bridge_that_does_not_know_the_token_is_found_out(bridge: PlayedBridge) -> None:
    stream, _ = bridge.accept(b"another")
    bridge.log.wait_for("the bridge does not know our token")
    assert stream.read_some(1) == b""
    bridge.link()


@pytest.mark.parametrize("reason", [*tunnel.REFUSALS, 99])
def test_refusal_is_said_and_tried_again(bridge: PlayedBridge, reason: int) -> None:
    stream = bridge.dialled.get(timeout=SECONDS)
    hello = tunnel.read_hello(stream)
    stream.write(tunnel.encode_challenge(os.urandom(32)))
    stream.read_exactly(32)
    stream.write(tunnel.encode_refusal(reason))
    bridge.log.wait_for(
        f"the bridge refuses: {tunnel.REFUSALS.get(reason, 'no reason that we know')}"
    )
    stream = bridge.dialled.get(timeout=SECONDS)
    assert tunnel.read_hello(stream).nonce != hello.nonce
    stream.write(tunnel.encode_refusal(reason))  # in the place of the challenge
    bridge.link()


def test_work_connection_that_fails_is_dialled_again(bridge: PlayedBridge) -> None:
    bridge.link()
    for _ in range(pool.WAITING):
        stream = bridge.dialled.get(timeout=SECONDS)
        stream.close()
    bridge.log.wait_for("no work connection")
    bridge.work(pool.WAITING)


def test_stop_tells_the_bridge(bridge: PlayedBridge) -> None:
    stream = bridge.link()
    waiting = bridge.work(pool.WAITING)
    bridge.agent.stop(SECONDS)
    assert tunnel.parse_number(read(stream, tunnel.CLOSE)) == tunnel.STOPPING
    for one in waiting:
        assert one.read_some(1) == b""


def test_secrets_are_in_no_repr() -> None:
    assert "token" not in repr(Identity("home", TOKEN))


# -- the pool by itself


def test_spare_connections_go() -> None:
    """As many as were wanted for a burst, and are not any more."""
    added: list[Stream] = []
    pairs = [socket.socketpair() for _ in range(pool.WAITING + 2)]
    streams = iter([Stream(one) for one, _ in pairs])

    def at_once(call: Callable[[], None]) -> bool:
        call()
        return True

    waiting = WorkPool(
        lambda: next(streams), at_once, lambda stream, _: added.append(stream), Lines()
    )
    waiting.want(2)
    assert len(added) == pool.WAITING + 2
    assert [waiting.spare(stream) for stream in added] == [True, True] + [False] * pool.WAITING
    assert waiting.describe()["idle"] == pool.WAITING
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_what_was_not_enough_is_more_from_then_on_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "KEPT_LIMIT", pool.WAITING + 2)
    added: list[Stream] = []
    pairs = [socket.socketpair() for _ in range(4 * pool.WAITING)]
    streams = iter([Stream(one) for one, _ in pairs])
    waiting = WorkPool(
        lambda: next(streams),
        lambda call: call() is None,
        lambda stream, _: added.append(stream),
        Lines(),
    )
    waiting.want(3)
    assert len(added) == pool.WAITING + 3
    for stream in added[:3]:
        waiting.opened(stream)
    assert waiting.describe() == {"idle": pool.WAITING + 2, "opened": 3}
    assert [waiting.spare(stream) for stream in added[3:6]] == [True, True, False]
    waiting.opened(added[6])
    assert waiting.describe() == {"idle": pool.WAITING, "opened": 4}
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_connection_that_comes_after_the_end_is_closed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        tasks: list[Callable[[], None]] = []
        waiting = WorkPool(
            lambda: Stream(ours), lambda call: not tasks.append(call), lambda *both: None, Lines()
        )
        waiting.fill()
        waiting.end()
        tasks[0]()
        theirs.settimeout(SECONDS)
        assert theirs.recv(1) == b""


def test_fault_of_ours_takes_no_dials_place_for_ever() -> None:
    """Threads and memory may run out in a dial, too: that is no NetProxyError."""
    faults: list[Exception] = []

    def dial() -> Stream:
        raise RuntimeError("can't start new thread")

    def submit(job: Callable[[], None]) -> bool:
        try:
            job()
        except RuntimeError as error:
            faults.append(error)  # a pool's thread logs it
        return len(faults) % 2 == 0

    work = WorkPool(dial, submit, lambda *both: None, Lines())
    for _ in range(2 * pool.DIALLING_LIMIT):
        work.fill()
    assert len(faults) >= 2 * pool.DIALLING_LIMIT


def test_full_dial_pool_is_asked_again_later() -> None:
    waiting = WorkPool(
        lambda: pytest.fail("dialled"), lambda call: False, lambda *both: None, Lines()
    )
    waiting.fill()
    waiting.fill()
    assert waiting.describe() == {"idle": 0, "opened": 0}
