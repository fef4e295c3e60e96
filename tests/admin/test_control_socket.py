"""The control socket: one JSON object a line each way, for its owner alone."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import pytest

from netproxy.errors import ListenError
from netproxy.admin import control_socket
from netproxy.admin.control_socket import (
    CommandError,
    ControlServer,
    NotRunning,
    Reloads,
    Then,
    ask,
)
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
    made: list[ControlServer] = []

    def start() -> ControlServer:
        made.append(ControlServer(str(tmp_path / "socket"), COMMANDS, log))
        made[-1].start()
        return made[-1]

    yield start
    for server in made:
        server.stop()
        assert not server.thread.is_alive()


def test_nobody_is_answered_before_its_start(tmp_path: Path, log: Lines) -> None:
    """Its thread is there before the configuration counts that wants it."""
    server = ControlServer(str(tmp_path / "socket"), COMMANDS, log)
    server.prepare()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(server.path)
            client.sendall(b'{"command": "answer"}\n')
            assert server.thread.is_alive() and server._client is None
            server.start()
            assert client.recv(100) == b'{"result": {"is": 42}}\n'
    finally:
        server.stop()


def test_one_that_never_starts_ends(tmp_path: Path, log: Lines) -> None:
    server = ControlServer(str(tmp_path / "socket"), COMMANDS, log)
    server.prepare()
    server.stop()
    assert not server.thread.is_alive() and not os.path.exists(server.path)


def say(path: str, data: bytes) -> list[Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as lines:
            return [json.loads(line) for line in lines]


def test_asks_and_gets_an_answer(serve: Callable[[], ControlServer]) -> None:
    assert ask(serve().path, "answer") == {"is": 42}


def test_a_refusal_says_why(serve: Callable[[], ControlServer]) -> None:
    with pytest.raises(CommandError, match="no bread here"):
        ask(serve().path, "refuse", what="bread")


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'"answer"', b"{}", b'{"command": "unknown"}', b'{"command": []}', b"\xff", b""],
)
def test_what_is_no_command_is_answered_with_those_there_are(
    serve: Callable[[], ControlServer], line: bytes
) -> None:
    error = {"error": "no such command; known are answer, refuse, fail"}
    assert say(serve().path, line + b'\n{"command": "answer"}\n') == [error, {"result": {"is": 42}}]


def test_a_fault_ends_one_conversation_only(serve: Callable[[], ControlServer], log: Lines) -> None:
    server = serve()
    with pytest.raises(NotRunning):
        ask(server.path, "fail")
    assert ask(server.path, "answer") == {"is": 42}
    assert log.of("exception") == ["answering on the control socket: a fault"]


def test_a_silent_client_is_hung_up_on(
    serve: Callable[[], ControlServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_socket, "SECONDS", 0.05)
    server = serve()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(5)
        silent.connect(server.path)
        assert silent.recv(1) == b""
    monkeypatch.undo()
    assert ask(server.path, "answer") == {"is": 42}


def test_only_its_owner_may_open_it(serve: Callable[[], ControlServer]) -> None:
    assert stat.S_IMODE(os.stat(serve().path).st_mode) == 0o600


def test_nobody_answers_where_none_runs(serve: Callable[[], ControlServer], tmp_path: Path) -> None:
    server = serve()
    server.stop()
    assert not os.path.exists(server.path)
    with pytest.raises(NotRunning, match="No such file"):
        ask(server.path, "answer")


def test_takes_over_from_one_that_was_killed(
    serve: Callable[[], ControlServer], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "socket"))
    assert ask(serve().path, "answer") == {"is": 42}


def test_does_not_take_over_from_one_that_lives(
    serve: Callable[[], ControlServer], log: Lines
) -> None:
    server = serve()
    with pytest.raises(ListenError, match=f"control unix:{server.path}: Address already in use"):
        ControlServer(server.path, {}, log)
    assert ask(server.path, "answer") == {"is": 42}


@pytest.mark.parametrize("content", [b"precious", b""])
def test_a_file_in_its_place_is_left_as_it_is(tmp_path: Path, log: Lines, content: bytes) -> None:
    """A wrong path must cost nobody a file."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ListenError, match=f"control unix:{path}: Address already in use"):
        ControlServer(str(path), {}, log)
    assert path.read_bytes() == content


def test_a_link_to_a_file_is_left_as_it_is(tmp_path: Path, log: Lines) -> None:
    path, file = tmp_path / "link", tmp_path / "file"
    file.write_bytes(b"precious")
    path.symlink_to(file)
    with pytest.raises(ListenError):
        ControlServer(str(path), {}, log)
    assert path.is_symlink() and file.read_bytes() == b"precious"


class Exhausted:
    """A listening socket for which there is no descriptor a few times; `pauses` is how often it was waited then."""

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


def test_without_a_descriptor_it_pauses_and_goes_on(tmp_path: Path, log: Lines) -> None:
    """And does not spin; one line of a kind that is limited says so each time."""
    server = ControlServer(str(tmp_path / "socket"), COMMANDS, log)
    exhausted = Exhausted(server, 3)
    server.start()
    try:
        assert ask(server.path, "answer") == {"is": 42}
        assert exhausted.pauses == [control_socket.PAUSE] * 3 and control_socket.PAUSE >= 0.05
        assert log.of("limited") == ["control socket: Too many open files"] * 3
        assert log.keys == ["control"] * 3
    finally:
        server.stop()
    assert not server.thread.is_alive()


def test_a_pause_does_not_delay_its_stop(
    tmp_path: Path, log: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_socket, "PAUSE", 60.0)
    server = ControlServer(str(tmp_path / "socket"), COMMANDS, log)
    paused, wait = threading.Event(), server._stopped.wait
    exhausted = Exhausted(server, 1)
    server._stopped.wait = lambda seconds: paused.set() or wait(seconds)  # type: ignore[method-assign, func-returns-value]
    server.start()
    assert paused.wait(5) and exhausted.accepts == 1
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 2 and not server.thread.is_alive()
    assert log.lines == []


@pytest.mark.parametrize(
    "said",
    [b"", b'{"command": "answer"}\n', b'{"comm'],
    ids=["nothing", "a command", "half of one"],
)
def test_a_client_that_is_silent_does_not_delay_its_stop(
    serve: Callable[[], ControlServer], said: bytes
) -> None:
    server = serve()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(5)
        silent.connect(server.path)
        silent.sendall(said)
        wait_until(lambda: server._client)  # it is being served
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < control_socket.SECONDS / 2
        assert not server.thread.is_alive()


class TestAfterTheAnswer:
    def test_something_is_done(self, tmp_path: Path, log: Lines) -> None:
        """With nothing to wait for the daemon ends at once, and its last answer must have gone."""
        done = threading.Event()
        server = ControlServer(
            str(tmp_path / "socket"), {"end": lambda request: Then("ending", done.set)}, log
        )
        server.start()
        try:
            assert ask(server.path, "end") == "ending"
            assert done.wait(SECONDS)
        finally:
            server.stop()

    def test_a_server_that_retires_still_answers(self, tmp_path: Path, log: Lines) -> None:
        """A reload that moves the control socket is answered over the one it was asked by."""
        made: list[ControlServer] = []

        def move(request: Mapping[str, Any]) -> str:
            made[0].retire()
            return "moved"

        made.append(ControlServer(str(tmp_path / "socket"), {"move": move}, log))
        made[0].start()
        assert ask(made[0].path, "move") == "moved"
        made[0].thread.join(SECONDS)
        assert not made[0].thread.is_alive()
        assert not os.path.exists(made[0].path)


class TestReloads:
    @staticmethod
    def asked(reloads: Reloads) -> Task:
        return Task(reloads.ask)

    def test_whoever_asked_before_it_began_hears_how_it_went(self) -> None:
        woken = threading.Semaphore(0)
        reloads = Reloads(woken.release)
        fine = self.asked(reloads)
        assert woken.acquire(timeout=SECONDS)
        tell = reloads.begin()
        late = self.asked(reloads)
        assert woken.acquire(timeout=SECONDS)
        tell([])
        fine.result()
        reloads.begin()(["a: wrong", "b: wrong"])
        with pytest.raises(CommandError, match="a: wrong\nb: wrong"):
            late.result()

    def test_one_that_takes_long_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(control_socket, "RELOAD_SECONDS", 0.01)
        with pytest.raises(CommandError, match="the reload goes on"):
            Reloads(lambda: None).ask()
