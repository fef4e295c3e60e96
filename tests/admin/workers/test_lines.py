"""Questions to workers: in threads, in forked children, and to what does not answer."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any, Callable, Iterator, Mapping

import pytest

from netproxy.admin.control.client import CommandError
from netproxy.admin.workers import lines as lines_module
from netproxy.admin.workers.lines import Answer, WorkerLine, WorkerLines
from netproxy.admin.workers.questions import serve_questions
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, Task, wait_until
from tests.support.workers import PATIENCE, FakeWorker, Gate, forked


def echo(request: Mapping[str, object]) -> object:
    return request["text"]


def refuse(request: Mapping[str, object]) -> object:
    raise CommandError("no such flow")


def fail(request: Mapping[str, object]) -> object:
    raise RuntimeError("a fault")


COMMANDS = {"echo": echo, "refuse": refuse, "fail": fail}


@pytest.fixture
def line() -> Iterator[WorkerLine]:
    worker = FakeWorker(2, **COMMANDS)
    yield worker.line
    worker.close()


@pytest.fixture
def end() -> Iterator[tuple[WorkerLine, socket.socket]]:
    """A line whose other end the test has."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(SECONDS)
    line = WorkerLine(2, ours)
    with theirs:
        yield line, theirs
        line.close()


SILENT = "worker 2 does not answer"


class TestAnswers:
    def test_answer_comes_back(self, line: WorkerLine) -> None:
        request = {"command": "echo", "text": "\u2028 and\n"}
        assert line.ask(request, PATIENCE) == Answer(line, "\u2028 and\n")

    def test_refusal_names_its_reason(self, line: WorkerLine) -> None:
        assert line.ask({"command": "refuse"}, PATIENCE) == Answer(line, refusal="no such flow")

    def test_fault_of_a_command_is_a_refusal_and_the_line_goes_on(self, line: WorkerLine) -> None:
        answer = line.ask({"command": "fail"}, PATIENCE)
        assert answer.refusal == "internal error, see the log"
        assert line.ask({"command": "echo", "text": 1}, PATIENCE).result == 1

    def test_answers_to_many_threads_are_not_mixed_up(self, line: WorkerLine) -> None:
        def ask(first: int) -> list[object]:
            numbers = range(first, first + 50)
            return [
                line.ask({"command": "echo", "text": number}, PATIENCE).result for number in numbers
            ]

        tasks = [(first, Task(ask, first)) for first in range(0, 1000, 100)]
        for first, task in tasks:
            assert task.result(PATIENCE) == list(range(first, first + 50))

    def test_answer_of_several_megabytes_arrives(self, line: WorkerLine) -> None:
        text = "x" * (9 << 20)
        worker = FakeWorker(0, big=lambda request: text)
        try:
            assert worker.line.ask({"command": "big"}, PATIENCE).result == text
        finally:
            worker.close()

    def test_request_as_long_as_a_client_may_send_arrives(self, line: WorkerLine) -> None:
        # JSON that was read and written again: three times as long.
        text = "\xe9" * 32000
        assert line.ask({"command": "echo", "text": text}, PATIENCE).result == text

    def test_slow_explanation_delays_no_other_answer(self) -> None:
        gate = Gate()
        worker = FakeWorker(0, explain=gate, **COMMANDS)
        try:
            slow = Task(worker.line.ask, {"command": "explain"}, PATIENCE)
            assert gate.entered.wait(PATIENCE)
            assert worker.line.ask({"command": "echo", "text": 5}, PATIENCE).result == 5
            assert not slow.done
            gate.open()
            assert slow.result(PATIENCE).result == "late"
        finally:
            gate.open()
            worker.close()


class TestNoAnswer:
    def test_silent_worker_is_named_at_the_deadline(
        self, end: tuple[WorkerLine, socket.socket]
    ) -> None:
        line, _ = end
        assert line.ask({"command": "echo"}, 0.01) == Answer(line, fault=SILENT)
        assert not line.ended

    def test_late_answer_is_skipped(self, end: tuple[WorkerLine, socket.socket]) -> None:
        line, theirs = end
        assert line.ask({"command": "a"}, 0.01).fault
        first = json.loads(theirs.recv(1000))
        second = Task(line.ask, {"command": "b"}, PATIENCE)
        number = json.loads(theirs.recv(1000))["number"]
        for asked, result in ((first["number"], "late"), (number, "in time")):
            theirs.sendall(json.dumps({"number": asked, "result": result}).encode() + b"\n")
        assert second.result(PATIENCE) == Answer(line, "in time")

    def test_worker_that_has_ended_is_named_at_once(
        self, end: tuple[WorkerLine, socket.socket]
    ) -> None:
        line, theirs = end
        waiting = Task(line.ask, {"command": "echo"}, 1000.0)
        theirs.recv(1000)
        theirs.close()
        assert waiting.result(PATIENCE) == Answer(line, fault=SILENT)
        assert line.ask({"command": "echo"}, 1000.0) == Answer(line, fault=SILENT)
        assert line.ended

    @pytest.mark.parametrize(
        "garbage",
        [
            b"\n",
            b"[]\n",
            b"7\n",
            b"nonsense\n",
            b"\xff\xfe\n",
            b"{}\n",
            b'{"number": 1}\n',
            b'{"number": 99, "result": 1}\n',
            b'{"number": [], "result": 1}\n',
            b"[" * 100000 + b"\n",
        ],
        ids=range(10),
    )
    def test_garbage_ends_the_line(
        self, end: tuple[WorkerLine, socket.socket], garbage: bytes
    ) -> None:
        line, theirs = end
        waiting = Task(line.ask, {"command": "echo"}, 1000.0)
        theirs.recv(1000)
        theirs.sendall(garbage)
        assert waiting.result(PATIENCE) == Answer(line, fault=SILENT)
        assert line.ended

    def test_answer_without_end_ends_the_line(
        self, end: tuple[WorkerLine, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lines_module, "ANSWER_LIMIT", 1000)
        line, theirs = end
        waiting = Task(line.ask, {"command": "echo"}, 1000.0)
        theirs.recv(1000)
        theirs.sendall(b"x" * 1001)
        assert waiting.result(PATIENCE).fault == SILENT

    def test_worker_that_owes_many_answers_is_asked_nothing(
        self, end: tuple[WorkerLine, socket.socket]
    ) -> None:
        line, theirs = end
        for _ in range(lines_module.UNANSWERED_LIMIT):
            line.ask({"command": "echo"}, 0.0)
        assert line.ask({"command": "more"}, 1000.0).fault == SILENT
        with theirs.makefile("rb") as requests:
            numbers = [
                json.loads(requests.readline())["number"]
                for _ in range(lines_module.UNANSWERED_LIMIT)
            ]
        for number in numbers:
            theirs.sendall(b'{"number": %d, "result": 1}\n' % number)
        wait_until(lambda: not line._unanswered)
        again = Task(line.ask, {"command": "again"}, PATIENCE)
        assert json.loads(theirs.recv(1000))["command"] == "again"
        line.close()
        assert again.result(PATIENCE).fault

    def test_worker_that_receives_nothing_delays_nobody_beyond_the_deadline(
        self, end: tuple[WorkerLine, socket.socket]
    ) -> None:
        line, theirs = end
        texts = [str(number) * 60000 for number in range(8)]
        for text in texts:
            assert line.ask({"command": "echo", "text": text}, 0.01).fault == SILENT
        asked = Task(line.ask, {"command": "last"}, PATIENCE)
        with theirs.makefile("rb") as requests:
            # No request was cut.
            assert [json.loads(requests.readline())["text"] for _ in texts] == texts
            assert json.loads(requests.readline())["command"] == "last"
        line.close()
        assert asked.result(PATIENCE).fault


class TestLines:
    def test_all_are_asked_at_once_and_the_silent_one_is_named(
        self, end: tuple[WorkerLine, socket.socket]
    ) -> None:
        silent, _ = end
        workers = [FakeWorker(index, **COMMANDS) for index in (3, 0)]
        lines = WorkerLines([worker.line for worker in workers] + [silent])
        try:
            asked = Task(lines.ask_all, {"command": "echo", "text": "x"}, 1.0)
            # The other ones do not wait for the silent one.
            wait_until(lambda: all(worker.asked for worker in workers))
            answers = asked.result(PATIENCE)
            assert [answer.line.index for answer in answers] == [0, 2, 3]
            assert [answer.fault for answer in answers] == ["", SILENT, ""]
        finally:
            for worker in workers:
                worker.close()

    def test_line_to_a_successor_replaces_the_one_before(self) -> None:
        before, successor = FakeWorker(0, **COMMANDS), FakeWorker(0, **COMMANDS)
        lines = WorkerLines([before.line])
        try:
            lines.replace(successor.line)
            assert before.line.ended and lines.current() == [successor.line]
            (answer,) = lines.ask_all({"command": "echo", "text": 1}, PATIENCE)
            assert answer == Answer(successor.line, 1)
            lines.close()
            assert successor.line.ended
        finally:
            before.close()
            successor.close()

    def test_line_that_nobody_has_used_closes(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            WorkerLine(0, ours).close()
            assert theirs.recv(1) == b""


class TestForked:
    def test_children_answer_and_a_killed_one_is_named(self) -> None:
        commands: dict[str, Callable[..., Any]] = {"pid": lambda request: os.getpid()}
        with forked(0, commands) as (line, child), forked(1, commands) as (other, sister):
            lines = WorkerLines([line, other])
            answers = lines.ask_all({"command": "pid"}, PATIENCE)
            assert [answer.result for answer in answers] == [child, sister]
            os.kill(child, signal.SIGKILL)
            wait_until(lambda: line.ended)
            answers = lines.ask_all({"command": "pid"}, PATIENCE)
            assert [(answer.result, answer.fault) for answer in answers] == [
                (None, "worker 0 does not answer"),
                (sister, ""),
            ]

    def test_stopped_child_answers_when_it_goes_on(self) -> None:
        with forked(0, COMMANDS) as (line, child):
            assert line.ask({"command": "echo", "text": 1}, PATIENCE).result == 1
            os.kill(child, signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
            assert line.ask({"command": "echo", "text": 2}, 0.01).fault
            os.kill(child, signal.SIGCONT)
            assert line.ask({"command": "echo", "text": 3}, PATIENCE).result == 3


class TestWorkerEnd:
    def test_end_of_the_line_ends_the_thread(self) -> None:
        ours, theirs = socket.socketpair()
        thread = serve_questions(theirs, COMMANDS, Lines())
        ours.close()
        thread.join(SECONDS)
        assert not thread.is_alive()

    @pytest.mark.parametrize("line", [b"nonsense\n", b'{"command": "unknown"}\n', b"\n"])
    def test_stranger_on_the_line_ends_the_thread(self, line: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            thread = serve_questions(theirs, COMMANDS, Lines())
            ours.sendall(line)
            thread.join(SECONDS)
            assert not thread.is_alive()
