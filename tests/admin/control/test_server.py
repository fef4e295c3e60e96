"""The control socket: one JSON object a line in each direction, for its owner only."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import pytest

from netproxy.admin.control import client as control_client
from netproxy.admin.control import server as control_server
from netproxy.admin.control.ask import NotRunning, ask, ask_with_warnings
from netproxy.admin.control.client import LINE_LIMIT, ActAfterAnswer, CommandError, PartialAnswer
from netproxy.admin.control.server import ControlServer, ReloadRequests
from netproxy.errors import ListenError
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, Task, wait_until


def refuse(request: Mapping[str, Any]) -> Any:
    raise CommandError(f"no {request['what']} here")


def fail(request: Mapping[str, Any]) -> Any:
    raise RuntimeError("a fault")


COMMANDS = {"answer": lambda request: {"is": 42}, "refuse": refuse, "fail": fail}


@pytest.fixture
def log() -> Lines:
    return Lines()


@pytest.fixture
def serve(tmp_path: Path, log: Lines) -> Iterator[Callable[[], ControlServer]]:
    """Start a server."""
    servers: list[ControlServer] = []

    def start() -> ControlServer:
        servers.append(ControlServer(str(tmp_path / "socket"), COMMANDS, log))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
        assert not server.thread.is_alive()


def test_prepared_server_answers_nobody_before_its_start(tmp_path: Path, log: Lines) -> None:
    """Its thread is started before its configuration applies."""
    server = ControlServer(str(tmp_path / "socket"), COMMANDS, log)
    server.prepare()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(server.path)
            client.sendall(b'{"command": "answer"}\n')
            assert server.thread.is_alive() and not server._clients
            server.start()
            assert client.recv(100) == b'{"result": {"is": 42}}\n'
    finally:
        server.stop()


def test_prepared_server_can_be_stopped(tmp_path: Path, log: Lines) -> None:
    server = ControlServer(str(tmp_path / "socket"), COMMANDS, log)
    server.prepare()
    server.stop()
    assert not server.thread.is_alive() and not os.path.exists(server.path)


def exchange(path: str, data: bytes) -> list[Any]:
    """Send `data` and the end of the stream; return the answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(path)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as lines:
            return [json.loads(line) for line in lines]


def test_command_is_answered(serve: Callable[[], ControlServer]) -> None:
    assert ask(serve().path, "answer") == {"is": 42}


def test_refusal_tells_why(serve: Callable[[], ControlServer]) -> None:
    with pytest.raises(CommandError, match="no bread here"):
        ask(serve().path, "refuse", what="bread")


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"[]", b'"answer"', b"{}", b'{"command": "unknown"}', b'{"command": []}', b"\xff"),
        *(b"", b"[" * 60000, b"9" * 60000, b"\0"),
    ],
    ids=lambda line: repr(line[:30]),
)
def test_unknown_command_is_answered_with_the_known_ones(
    serve: Callable[[], ControlServer], line: bytes
) -> None:
    error = {"error": "unknown command (known: answer, refuse, fail)"}
    assert exchange(serve().path, line + b'\n{"command": "answer"}\n') == [
        error,
        {"result": {"is": 42}},
    ]


def test_fault_is_answered_with_an_error(serve: Callable[[], ControlServer], log: Lines) -> None:
    """Hazard 139."""
    lines = b'{"command": "fail"}\n{"command": "answer"}\n'
    assert exchange(serve().path, lines) == [
        {"error": "internal error, see the log"},
        {"result": {"is": 42}},
    ]
    assert log.of("exception") == ["answering on the control socket: a fault"]


class TestManyClients:
    """Hazard 139: no client waits for another one."""

    def test_silent_chatty_and_deaf_clients_delay_nobody(
        self, tmp_path: Path, log: Lines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control_client, "SECONDS", 10 * SECONDS)
        gate = threading.Event()
        commands = {
            **COMMANDS,
            "big": lambda request: "x" * 4_000_000,
            "wait": lambda request: gate.wait(10 * SECONDS),
        }
        server = ControlServer(str(tmp_path / "socket"), commands, log)
        server.start()
        said = [b"", b"", b'{"comm', b'{"command": "big"}\n', b'{"command": "wait"}\n', b"junk\n"]
        clients = [socket.socket(socket.AF_UNIX) for _ in said]
        try:
            for client, data in zip(clients, said, strict=True):
                client.connect(server.path)
                client.sendall(data)
            for _ in range(3):
                assert ask(server.path, "answer") == {"is": 42}
                clients[2].sendall(b"x")
        finally:
            gate.set()
            server.stop()
            for client in clients:
                client.close()

    def test_client_that_sends_byte_by_byte_has_a_deadline_for_the_line(
        self, serve: Callable[[], ControlServer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control_client, "SECONDS", 0.2)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(serve().path)
            client.settimeout(0.01)
            for _ in range(3000):
                try:
                    client.sendall(b" ")
                    if client.recv(1) == b"":
                        return
                except TimeoutError:
                    continue
                except ConnectionError:
                    return
        pytest.fail("it may go on for ever")

    def test_client_that_does_not_read_has_a_deadline_for_the_answer(
        self, tmp_path: Path, log: Lines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control_client, "SECONDS", 0.2)
        big = {"big": lambda request: "x" * 4_000_000}
        server = ControlServer(str(tmp_path / "socket"), big, log)
        server.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(server.path)
            client.sendall(b'{"command": "big"}\n')
            wait_until(lambda: server._clients)
            wait_until(lambda: not server._clients)
        server.stop()
        assert not log.lines

    def test_client_that_is_silent_for_longest_makes_room(
        self, serve: Callable[[], ControlServer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control_server, "CLIENTS_LIMIT", 2)
        monkeypatch.setattr(control_client, "SECONDS", 10 * SECONDS)
        server = serve()
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for client in (first, second):
                client.settimeout(SECONDS)
                client.connect(server.path)
            assert ask(server.path, "answer") == {"is": 42}
            assert first.recv(1) == b""
            second.sendall(b'{"command": "answer"}\n')
            assert second.recv(100) == b'{"result": {"is": 42}}\n'

    def test_client_is_refused_if_all_others_wait_for_answers(
        self, tmp_path: Path, log: Lines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control_server, "CLIENTS_LIMIT", 1)
        entered, gate = threading.Event(), threading.Event()

        def wait(request: Mapping[str, Any]) -> bool:
            entered.set()
            return gate.wait(SECONDS)

        server = ControlServer(str(tmp_path / "socket"), {"wait": wait}, log)
        server.start()
        waiting = Task(ask, server.path, "wait")
        assert entered.wait(SECONDS)
        with pytest.raises(CommandError, match="too many clients"):
            ask(server.path, "wait")
        gate.set()
        assert waiting.result() is True
        server.stop()

    def test_client_without_a_thread_is_told_so(
        self, serve: Callable[[], ControlServer], monkeypatch: pytest.MonkeyPatch, log: Lines
    ) -> None:
        """Hazard 94."""
        server, begin = serve(), threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if thread.name.startswith("control-client"):
                raise RuntimeError("can't start new thread")
            begin(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(CommandError, match="can't start new thread"):
                ask(server.path, "answer")
        assert ask(server.path, "answer") == {"is": 42}
        assert log.of("limited") == ["control socket: can't start new thread"]


def test_request_that_is_too_long_is_an_error(serve: Callable[[], ControlServer]) -> None:
    path = serve().path
    fitting = b'{"command": "answer"}'.ljust(LINE_LIMIT)
    assert exchange(path, fitting + b"\n") == [{"result": {"is": 42}}]
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(path)
        client.sendall(fitting + b" ")
        with client.makefile("rb") as lines:
            assert json.loads(lines.readline()) == {
                "error": "the request has more than 65536 bytes"
            }


def test_answer_that_is_too_long_is_an_error(
    serve: Callable[[], ControlServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_client, "ANSWER_LIMIT", 10)
    with pytest.raises(CommandError, match="the answer has more than 0 MiB: use a filter"):
        ask(serve().path, "answer")


def test_request_without_a_newline_at_the_end_is_answered(
    serve: Callable[[], ControlServer],
) -> None:
    assert exchange(serve().path, b'{"command": "answer"}') == [{"result": {"is": 42}}]


def test_silent_client_is_disconnected(
    serve: Callable[[], ControlServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_client, "SECONDS", 0.05)
    server = serve()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(SECONDS)
        silent.connect(server.path)
        assert silent.recv(1) == b""
    monkeypatch.undo()
    assert ask(server.path, "answer") == {"is": 42}


def test_only_the_owner_may_open_the_socket(serve: Callable[[], ControlServer]) -> None:
    assert stat.S_IMODE(os.stat(serve().path).st_mode) == 0o600


def test_stopped_server_does_not_answer(serve: Callable[[], ControlServer], tmp_path: Path) -> None:
    server = serve()
    server.stop()
    assert not os.path.exists(server.path)
    with pytest.raises(NotRunning, match="No such file"):
        ask(server.path, "answer")


def test_socket_of_a_killed_server_is_replaced(
    serve: Callable[[], ControlServer], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "socket"))
    assert ask(serve().path, "answer") == {"is": 42}


def test_socket_of_a_running_server_is_not_replaced(
    serve: Callable[[], ControlServer], log: Lines
) -> None:
    server = serve()
    with pytest.raises(
        ListenError, match=f"control unix:{server.path}: Address already in use by another daemon"
    ):
        ControlServer(server.path, {}, log)
    assert ask(server.path, "answer") == {"is": 42}


@pytest.mark.parametrize("content", [b"precious", b""])
def test_file_at_the_path_is_not_replaced(tmp_path: Path, log: Lines, content: bytes) -> None:
    """A wrong path in the configuration must not cost a file."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ListenError, match=f"control unix:{path}: Address already in use$"):
        ControlServer(str(path), {}, log)
    assert path.read_bytes() == content


def test_link_at_the_path_is_not_replaced(tmp_path: Path, log: Lines) -> None:
    path, file = tmp_path / "link", tmp_path / "file"
    file.write_bytes(b"precious")
    path.symlink_to(file)
    with pytest.raises(ListenError):
        ControlServer(str(path), {}, log)
    assert path.is_symlink() and file.read_bytes() == b"precious"


class Exhausted:
    """A listening socket that is out of descriptors a few times.  `pauses` are the waits then."""

    def __init__(self, server: ControlServer, times: int) -> None:
        self._listening = server._socket
        self._left = times
        self._wait, server._stopped.wait = server._stopped.wait, self._pause  # type: ignore[method-assign]
        self.pauses: list[float] = []
        self.accepts = 0
        server._socket = self  # type: ignore[assignment]

    def accept(self) -> tuple[socket.socket, Any]:
        self.accepts += 1
        if self._left:
            self._left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listening.accept()

    def _pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        return self._wait(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listening, name)


def test_accept_without_descriptors_pauses_and_goes_on(tmp_path: Path, log: Lines) -> None:
    """It does not spin; a limited warning is logged each time."""
    server = ControlServer(str(tmp_path / "socket"), COMMANDS, log)
    exhausted = Exhausted(server, 3)
    server.start()
    try:
        assert ask(server.path, "answer") == {"is": 42}
        assert (
            exhausted.pauses == [control_server.ACCEPT_PAUSE] * 3
            and control_server.ACCEPT_PAUSE >= 0.05
        )
        assert log.of("limited") == ["control socket: Too many open files"] * 3
        assert log.keys == ["control"] * 3
    finally:
        server.stop()
    assert not server.thread.is_alive()


def test_pause_does_not_delay_the_stop(
    tmp_path: Path, log: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "ACCEPT_PAUSE", 10 * SECONDS)
    server = ControlServer(str(tmp_path / "socket"), COMMANDS, log)
    paused, wait = threading.Event(), server._stopped.wait
    exhausted = Exhausted(server, 1)

    def pause(seconds: float) -> bool:
        paused.set()
        return wait(seconds)

    server._stopped.wait = pause  # type: ignore[method-assign]
    server.start()
    assert paused.wait(SECONDS) and exhausted.accepts == 1
    server.stop()
    assert not server.thread.is_alive()
    assert log.lines == []


@pytest.mark.parametrize(
    "said",
    [b"", b'{"command": "answer"}\n', b'{"comm'],
    ids=["nothing", "a command", "half of one"],
)
def test_silent_client_does_not_delay_the_stop(
    serve: Callable[[], ControlServer], said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_client, "SECONDS", 10 * SECONDS)
    monkeypatch.setattr(control_server, "STOP_SECONDS", 10 * SECONDS)
    server = serve()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(SECONDS)
        silent.connect(server.path)
        silent.sendall(said)
        # The client is being served.
        wait_until(lambda: server._clients)
        Task(server.stop).result()
        assert not server.thread.is_alive()


class TestPartialAnswer:
    @pytest.mark.parametrize("warnings", [[], ["worker 2 does not answer"]])
    def test_warnings_come_with_the_answer(
        self, tmp_path: Path, log: Lines, warnings: list[str]
    ) -> None:
        commands = {"list": lambda request: PartialAnswer([1], warnings)}
        server = ControlServer(str(tmp_path / "socket"), commands, log)
        server.start()
        try:
            assert ask_with_warnings(server.path, "list") == ([1], warnings)
            assert ask(server.path, "list") == [1]
        finally:
            server.stop()


class TestAfterTheAnswer:
    def test_action_follows_the_answer(self, tmp_path: Path, log: Lines) -> None:
        """A daemon with nothing to wait for ends at once: its last answer must have been sent."""
        done = threading.Event()
        server = ControlServer(
            str(tmp_path / "socket"),
            {"end": lambda request: ActAfterAnswer("ending", done.set)},
            log,
        )
        server.start()
        try:
            assert ask(server.path, "end") == "ending"
            assert done.wait(SECONDS)
        finally:
            server.stop()

    def test_running_command_is_answered_after_stop_accepting(
        self, tmp_path: Path, log: Lines
    ) -> None:
        """The client that asks for a reload gets its answer even if that moves the socket."""

        def move(request: Mapping[str, Any]) -> str:
            server.stop_accepting()
            return "moved"

        server = ControlServer(str(tmp_path / "socket"), {"move": move}, log)
        server.start()
        assert ask(server.path, "move") == "moved"
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
        assert not os.path.exists(server.path)


class TestReloadRequests:
    def test_outcome_is_told_to_those_who_asked_before_the_reload(self) -> None:
        woken = threading.Semaphore(0)
        reloads = ReloadRequests(woken.release)
        early = Task(reloads.request)
        assert woken.acquire(timeout=SECONDS)
        finish = reloads.begin()
        late = Task(reloads.request)
        assert woken.acquire(timeout=SECONDS)
        finish([])
        early.result()
        reloads.begin()(["a: wrong", "b: wrong"])
        with pytest.raises(CommandError, match="a: wrong\nb: wrong"):
            late.result()

    def test_request_does_not_wait_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(control_server, "RELOAD_SECONDS", 0.01)
        with pytest.raises(CommandError, match="the reload is still running"):
            ReloadRequests(lambda: None).request()
