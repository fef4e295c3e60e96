"""Workers for tests of the parent's side: lines to threads or to forked children that answer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from typing import Any, Iterator, Mapping

from netproxy.access.accounts.book import AccountBook
from netproxy.access.accounts.standing import Standing
from netproxy.access.accounts.usage import UsageBook
from netproxy.admin.stats.snapshot import Snapshot
from netproxy.admin.workers.lines import WorkerLine
from netproxy.admin.workers.questions import serve_questions
from netproxy.admin.workers.report import encode
from netproxy.admin.workers.view import WorkerInfo
from netproxy.config.access_schema import UserConfig
from netproxy.config.schema import Config
from netproxy.interfaces.services import DaemonState
from netproxy.observe.metrics import Counters
from netproxy.observe.incidents import Incidents
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS

PATIENCE = SECONDS
"""Seconds for an answer that comes at once, on a slow machine."""


class Parent:
    """A ParentView without processes."""

    def __init__(self, count: int = 2, users: tuple[str, ...] = ("alice", "bob")) -> None:
        self.state = DaemonState.SERVING
        self.log = Lines()
        self.counters = Counters()
        self.incidents = Incidents()
        self.usage = UsageBook(None)
        self.standing = Standing(self.usage)
        self.accounts = AccountBook(self.usage, self.standing)
        self.config = Config((), users={name: UserConfig("x") for name in users})
        self.infos = [WorkerInfo(number, 1000 + number, 0, True) for number in range(count)]

    def state_folder(self) -> str:
        return ""

    def workers(self) -> list[WorkerInfo]:
        return self.infos


class FakeWorker:
    """Answers with a snapshot that a test sets, and with what it is told to, on a thread."""

    def __init__(self, index: int, **commands: Any) -> None:
        self.snapshot = Snapshot()
        self.asked: list[Mapping[str, object]] = []
        self.log = Lines()
        ours, theirs = socket.socketpair()
        self.line = WorkerLine(index, ours)
        self._socket = theirs
        table = {"report": lambda request: encode(self.snapshot), **commands}
        noting = {name: self._noting(command) for name, command in table.items()}
        self._thread = serve_questions(theirs, noting, self.log)

    def _noting(self, command: Any) -> Any:
        def answer(request: Mapping[str, object]) -> object:
            self.asked.append(request)
            return command(request)

        return answer

    def die(self) -> None:
        """Close this end, as the kernel does for a process that ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)

    def close(self) -> None:
        self.die()
        self.line.close()


@contextlib.contextmanager
def forked(index: int, commands: Mapping[str, Any]) -> Iterator[tuple[WorkerLine, int]]:
    """Yield the line to a child that answers, and its process id; end it afterwards."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            ours.close()
            serve_questions(theirs, commands, Lines()).join()
        os._exit(0)
    theirs.close()
    line = WorkerLine(index, ours)
    try:
        yield line, child
    finally:
        line.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Gate:
    """A command that waits until the test opens it."""

    def __init__(self) -> None:
        self.entered, self._open = threading.Event(), threading.Event()

    def __call__(self, request: Mapping[str, object]) -> object:
        self.entered.set()
        self._open.wait(PATIENCE)
        return "late"

    def open(self) -> None:
        self._open.set()
