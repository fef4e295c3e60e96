"""One worker on a thread, whose parent is the test: what it obeys, answers and ends with."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from typing import Any, Iterator

import pytest

from netproxy.config.schema import Config
from netproxy.daemon.build import build
from netproxy.daemon.runtime import Runtime
from netproxy.daemon.workers import worker as worker_module
from netproxy.daemon.workers.hand_over import HandOvers
from netproxy.daemon.workers.messages import Message, file_in_memory, message_pair, receive, send
from netproxy.daemon.workers.processes import INTERNAL, WorkerEnds
from netproxy.daemon.workers.sockets import WorkerSockets
from netproxy.daemon.workers.worker import CANNOT_LISTEN, CONFIGURATION, FINE, Worker
from netproxy.errors import ConfigError, ListenError
from tests.support.relays import configuration
from tests.support.sockets import SECONDS, Task, listen, read_exactly
from tests.support.teams import WorkerLog, end

SPS = "listeners: [{listen: '127.0.0.1:%d', network: tcp, name: main}]"
TWO = (
    "listeners: [{listen: '127.0.0.1:%d', network: tcp, name: main}, "
    "{listen: '127.0.0.1:%d', network: tcp, name: second}]"
)


class Boss:
    """The parent of a worker with one listener."""

    def __init__(self) -> None:
        self.log = WorkerLog()
        self.listening = listen()
        self.port = int(self.listening.getsockname()[1])
        self.boxes = [message_pair() for _ in range(2)]
        runtime = Runtime(self.log, workers=2)  # type: ignore[arg-type]
        runtime.hand_overs = HandOvers([writing for _, writing in self.boxes])
        self.sockets = WorkerSockets()
        self.sockets.add(("tcp", f"127.0.0.1:{self.port}"), self.listening.dup())
        self.orders, far_orders = message_pair()
        self.questions, far_questions = socket.socketpair()
        self._ends = WorkerEnds(1, far_orders, far_questions, self.boxes[1][0], 2)
        self.worker = Worker(runtime, self.sockets, self._ends)
        # No handshake is over before a test has waited in vain.
        config = configuration(SPS % self.port + "\ntimeouts: {handshake: 600s}")
        runtime.choose_batching(config.batching)
        self._plan = build(config, runtime, None)
        self._task: Task

    def start(self) -> None:
        self._task = Task(self._run)

    def _run(self) -> int:
        try:
            status = self.worker.run(self._plan, ())
            end(self.worker)
            return status
        finally:
            self._ends.orders.close()

    def serve(self) -> None:
        self.start()
        assert self.heard().kind == "serving"

    def heard(self) -> Message:
        message = receive(self.orders, SECONDS)
        assert message is not None
        return message

    def tell(self, kind: str, **fields: object) -> None:
        send(self.orders, Message({"kind": kind, **fields}))

    def give(self, *socks: socket.socket) -> None:
        """Give listening sockets."""
        keys = [("tcp", f"127.0.0.1:{sock.getsockname()[1]}", True) for sock in socks]
        message = Message({"kind": "sockets", "keys": keys})
        send(self.orders, message._replace(descriptors=[sock.fileno() for sock in socks]))

    def prepare(self, config: Config, number: int = 1) -> Message:
        """Have it prepare a reload; return its answer."""
        with file_in_memory(pickle.dumps((config, ()))) as file:
            fields = {"kind": "prepare", "number": number}
            send(self.orders, Message(fields, descriptors=[file.fileno()]))
        return self.heard()

    def settle(self, kind: str, *gone: int) -> Message:
        """Have it commit or discard, and close the ports in `gone`; return its answer."""
        if gone:
            self.tell("gone", keys=[("tcp", f"127.0.0.1:{port}") for port in gone])
        self.tell(kind, number=2)
        return self.heard()

    def greet(self, port: int = 0) -> socket.socket:
        """Return a connection that the worker has answered."""
        sock = socket.create_connection(("127.0.0.1", port or self.port), SECONDS)
        sock.sendall(b"\5\1\0")
        assert read_exactly(sock, 2) == b"\5\0"
        return sock

    def status(self) -> int:
        """Wait for the end of the worker; return its exit status."""
        status = self._task.result(4 * SECONDS)
        assert isinstance(status, int)
        return status

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.orders.shutdown(socket.SHUT_RDWR)
        self._task.result(4 * SECONDS)
        with contextlib.suppress(OSError):
            self._ends.questions.shutdown(socket.SHUT_RDWR)
        self._ends.questions.close()
        socks = [sock for pair in self.boxes for sock in pair]
        for sock in (*socks, self.orders, self.questions, self.listening):
            sock.close()


@pytest.fixture
def boss() -> Iterator[Boss]:
    ours = Boss()
    yield ours
    ours.close()


def test_worker_serves_its_socket_and_stops_when_told_to(boss: Boss) -> None:
    boss.serve()
    with boss.greet():
        boss.tell("stop")
        assert boss.status() == FINE
    # The socket is another's, too: it listens on.
    with socket.create_connection(("127.0.0.1", boss.port), SECONDS):
        boss.listening.accept()[0].close()


def test_end_of_the_orders_is_the_death_of_the_parent(boss: Boss) -> None:
    boss.serve()
    boss.orders.shutdown(socket.SHUT_RDWR)
    assert boss.status() == INTERNAL
    assert "worker 1: the parent has died" in boss.log.lines


@pytest.mark.parametrize(
    ("error", "listen_error", "status"),
    [
        (ListenError("no thread"), True, CANNOT_LISTEN),
        (RuntimeError("can't start new thread"), True, CANNOT_LISTEN),
        (ConfigError("no such file"), False, CONFIGURATION),
    ],
)
def test_start_that_fails_is_told_and_is_the_exit_status(
    boss: Boss, monkeypatch: pytest.MonkeyPatch, error: Exception, listen_error: bool, status: int
) -> None:
    def fail(plan: object) -> None:
        raise error

    monkeypatch.setattr(boss.worker._daemon, "start_plan", fail)
    boss.start()
    message = boss.heard()
    assert (message.kind, message.fields["error"]) == ("failed", str(error))
    assert message.fields["listen"] is listen_error
    assert boss.status() == status


def test_dead_thread_ends_the_worker(boss: Boss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "LOOK_SECONDS", 0.02)
    boss.serve()
    monkeypatch.setattr(boss.worker._daemon, "dead_thread", lambda: "janitor")
    assert boss.status() == INTERNAL
    assert "worker 1: the thread 'janitor' has died" in boss.log.lines


def test_dead_inbox_ends_the_worker(boss: Boss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "LOOK_SECONDS", 0.02)
    boss.serve()
    boss.worker._inbox.stop()
    assert boss.status() == INTERNAL
    assert "worker 1: the thread 'inbox' has died" in boss.log.lines


def test_unknown_order_is_no_harm(boss: Boss) -> None:
    boss.serve()
    boss.tell("an order of another version")
    boss.greet().close()
    boss.tell("stop")
    assert boss.status() == FINE


# -- reloads


def test_commit_serves_what_was_given(boss: Boss) -> None:
    boss.serve()
    with listen() as second:
        port = second.getsockname()[1]
        boss.give(second)
        answer = boss.prepare(configuration(TWO % (boss.port, port)), number=7)
        assert (answer.kind, answer.fields["number"]) == ("ready", 7)
        answer = boss.settle("commit")
        assert (answer.kind, answer.fields["number"]) == ("committed", 2)
        boss.greet(port).close()
        boss.greet().close()
        assert boss.prepare(configuration(SPS % boss.port)).kind == "ready"
        assert boss.settle("commit", port).kind == "committed"
        assert boss.sockets.keys == {("tcp", f"127.0.0.1:{boss.port}")}
        # Its own descriptors are closed: what comes waits for the others.
        with socket.create_connection(("127.0.0.1", port), SECONDS):
            second.accept()[0].close()


def test_commit_configures_the_log_and_discard_does_not(boss: Boss) -> None:
    boss.serve()
    config = configuration(SPS % boss.port + "\nlog: {level: debug}")
    for kind in ("discard", "commit"):
        assert boss.prepare(config).kind == "ready"
        assert not boss.log.configured
        boss.settle(kind)
    assert boss.log.configured == [tuple(config.log)]


def test_discard_leaves_everything_as_it_was(boss: Boss) -> None:
    boss.serve()
    before = boss.sockets.keys
    with boss.greet() as running, listen() as second:
        port = second.getsockname()[1]
        for _ in range(2):
            boss.give(second)
            assert boss.prepare(configuration(TWO % (boss.port, port))).kind == "ready"
            assert boss.settle("discard", port).kind == "discarded"
            assert boss.sockets.keys == before
        boss.greet().close()
        with socket.create_connection(("127.0.0.1", port), SECONDS):
            second.accept()[0].close()
        running.sendall(b"\5\1\0\1\x7f\0\0\1\0\0")
        assert read_exactly(running, 2)[0] == 5


@pytest.mark.parametrize(
    ("error", "is_listen"), [(ListenError("no thread"), True), (ConfigError("no file"), False)]
)
def test_refusal_tells_the_error_and_its_kind(
    boss: Boss, monkeypatch: pytest.MonkeyPatch, error: Exception, is_listen: bool
) -> None:
    boss.serve()

    def fail(config: object) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(boss.worker._daemon, "prepare", fail)
        answer = boss.prepare(configuration(SPS % boss.port))
    assert (answer.kind, answer.fields["error"]) == ("refused", str(error))
    assert answer.fields["listen"] is is_listen
    assert boss.settle("discard").kind == "discarded"
    boss.greet().close()
    assert boss.prepare(configuration(SPS % boss.port)).kind == "ready"
    assert boss.settle("commit").kind == "committed"


def test_sockets_that_were_lost_refuse_this_reload_and_not_the_next(boss: Boss) -> None:
    boss.serve()
    with listen() as second:
        port = second.getsockname()[1]
        keys = [("tcp", f"127.0.0.1:{port}", True)]
        boss.worker._take_sockets(Message({"kind": "sockets", "keys": keys}, is_whole=False))
        config = configuration(TWO % (boss.port, port))
        answer = boss.prepare(config)
        assert (answer.kind, answer.fields["listen"]) == ("refused", True)
        assert answer.fields["error"] == "worker 1 has no descriptor left for the sockets"
        assert boss.settle("discard", port).kind == "discarded"
        boss.give(second)
        assert boss.prepare(config).kind == "ready"
        assert boss.settle("commit").kind == "committed"
        boss.greet(port).close()


def test_refused_reload_closes_the_file_of_its_configuration(boss: Boss) -> None:
    boss.serve()
    before = len(os.listdir("/proc/self/fd"))
    keys = [("tcp", "127.0.0.1:1", True)]
    for _ in range(3):
        boss.worker._take_sockets(Message({"kind": "sockets", "keys": keys}, is_whole=False))
        assert boss.prepare(configuration(SPS % boss.port)).kind == "refused"
        boss.settle("discard")
    assert len(os.listdir("/proc/self/fd")) == before


def test_commit_of_nothing_is_no_harm(boss: Boss) -> None:
    boss.serve()
    for kind in ("commit", "discard"):
        boss.settle(kind)
    boss.greet().close()


# -- the drain


def test_drain_tells_what_lives_and_ends_with_it(boss: Boss) -> None:
    boss.serve()
    with boss.greet():
        boss.tell("drain")
        answer = boss.heard()
        assert (answer.kind, answer.fields["live"]) == ("draining", 1)
        # The whole daemon drains: a connection that the parent's copy took would wait in vain.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", boss.port), SECONDS)
    assert boss.status() == FINE


def test_drain_without_connections_ends_at_once(boss: Boss) -> None:
    boss.serve()
    boss.tell("drain")
    assert boss.heard().fields["live"] == 0
    assert boss.status() == FINE


def test_stop_ends_a_drain(boss: Boss) -> None:
    boss.serve()
    with boss.greet() as running:
        boss.tell("drain")
        assert boss.heard().kind == "draining"
        boss.tell("stop")
        assert boss.status() == FINE
        with contextlib.suppress(ConnectionResetError):
            assert running.recv(1) == b""
