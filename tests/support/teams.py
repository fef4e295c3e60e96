"""A Parent whose workers are threads of this process, so that tests see into them.

Each worker has a runtime of its own: what processes share (the ledger, the registry of agents)
these workers do not.  Clients choose their addresses by the worker that owns them.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
from typing import Any, Iterator

import pytest

from netproxy.daemon.build import build
from netproxy.daemon.daemon import Daemon
from netproxy.daemon.plan import Plan
from netproxy.daemon.runtime import Runtime
from netproxy.daemon.workers import parent as parent_module
from netproxy.daemon.workers.hand_over import HandOvers
from netproxy.daemon.workers.messages import message_pair
from netproxy.daemon.workers.parent import Parent
from netproxy.daemon.workers.processes import WorkerEnds, WorkerProcess, Workers
from netproxy.daemon.workers.sockets import WorkerSockets
from netproxy.daemon.workers.worker import Worker
from netproxy.listener.steering import owner
from tests.support.handlers import RecordingLog
from tests.support.relays import configuration
from tests.support.sockets import SECONDS, Task, wait_until

FIRST_PID = 1 << 30
"""No process has such a number."""
SIGKILL_STATUS = 9


class WorkerLog(RecordingLog):
    """A log that can be configured; `configured` are the arguments in order."""

    def __init__(self) -> None:
        super().__init__()
        self.configured: list[tuple[object, ...]] = []

    def configure(self, *arguments: object) -> None:
        self.configured.append(arguments)

    def close(self) -> None:
        pass


class ThreadWorkers(Workers):
    """Workers that are threads.  die() ends one as SIGKILL would: without a word."""

    _pids = itertools.count(FIRST_PID)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._tasks: dict[int, Task] = {}
        self._ends: dict[int, WorkerEnds] = {}
        self.forks_fail = False

    def fork(self, worker: WorkerProcess) -> None:
        if self.forks_fail:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        orders, far_orders = message_pair()
        questions, far_questions = socket.socketpair()
        index = worker.index
        # Each reads the inbox with an object of its own, as a process does.
        inbox = self.inboxes[index].dup()
        ends = WorkerEnds(index, far_orders, far_questions, inbox, len(self.all))
        self._ends[index] = ends
        self._tasks[index] = Task(self._run, ends)
        worker.begin(next(self._pids), orders, questions)
        self.on_fork(worker)

    def _run(self, ends: WorkerEnds) -> int:
        try:
            return self._serve(ends)
        finally:
            with contextlib.suppress(OSError):
                ends.questions.shutdown(socket.SHUT_RDWR)
            for sock in (ends.orders, ends.inbox, ends.questions):
                sock.close()

    def reap(self, now: float) -> list[WorkerProcess]:
        dead = []
        for worker in self.running:
            task = self._tasks[worker.index]
            if task.done:
                worker.end(task.result() << 8, now)
                dead.append(worker)
        return dead


class ThreadWorker(Worker):
    """A worker with a runtime of its own."""

    running: list[ThreadWorker] = []
    """Those of the test, the newest of each number last; replaced by each team."""

    def __init__(self, runtime: Runtime, sockets: WorkerSockets, ends: WorkerEnds) -> None:
        assert runtime.hand_overs is not None
        count = len(runtime.hand_overs.others) + 1
        own = Runtime(runtime.log, workers=count)
        own.hand_overs = HandOvers(runtime.hand_overs._outboxes)
        super().__init__(own, _duplicates(sockets), ends)
        self.running.append(self)

    def run(self, plan: Plan, own: Any) -> int:
        self._runtime.choose_batching(plan.config.batching)
        status = super().run(build(plan.config, self._runtime, None), own)
        end(self)
        return status

    @property
    def daemon(self) -> Daemon:
        return self._daemon

    @property
    def sockets(self) -> WorkerSockets:
        return self._sockets


def end(worker: Worker) -> None:
    """Stop what a worker has left for the end of its process."""
    if worker._inbox.thread.is_alive():
        worker._daemon.stop()
    worker._inbox.stop()


def _duplicates(sockets: WorkerSockets) -> WorkerSockets:
    """Return what a process inherits: descriptors of its own for the same sockets."""
    copies = WorkerSockets()
    for key in sockets.keys:
        sock = sockets._sockets.get(key)
        copies.add(key, None if sock is None else sock.dup())
    return copies


class Team:
    """A parent with its workers."""

    def __init__(self, text: str, count: int) -> None:
        self.count = count
        self.log = WorkerLog()
        ThreadWorker.running = self.started = []
        self.parent = Parent(self.log, count)  # type: ignore[arg-type]
        try:
            self.parent.start(configuration(text))
        except BaseException:
            self.parent.stop()
            raise

    @property
    def processes(self) -> ThreadWorkers:
        workers = self.parent._workers
        assert isinstance(workers, ThreadWorkers)
        return workers

    def worker(self, index: int) -> ThreadWorker:
        """Return the worker that has a number now."""
        return next(worker for worker in reversed(self.started) if worker._ends.number == index)

    @property
    def workers(self) -> list[ThreadWorker]:
        return [self.worker(index) for index in range(self.count)]

    def ports(self, network: str = "tcp") -> list[int]:
        """Return the ports of the listeners of a network, in their order."""
        return [int(port) for port in re.findall(rf"{network} \S+:(\d+)", self.parent.summary())]

    @property
    def port(self) -> int:
        return self.ports()[0]

    def reload(self, text: str) -> None:
        self.parent.reload(configuration(text))

    def client_of(self, index: int, place: int = 0) -> str:
        """Return a client's address that a worker owns; `place` tells several apart."""
        clients = (f"127.0.0.{number}" for number in range(2, 250))
        owned = (client for client in clients if owner(client, self.count) == index)
        return next(itertools.islice(owned, place, None))

    def count_of(self, name: str, reason: str) -> list[int]:
        """Return a counter of each worker."""
        return [worker.daemon.counters.value(name, reason) for worker in self.workers]

    def live(self) -> list[int]:
        """Return the connections of each worker."""
        return [worker.daemon.live for worker in self.workers]

    def counted(self) -> list[int]:
        """Return the connections that each worker counts."""
        return [worker.daemon.connections for worker in self.workers]

    def associations(self) -> list[int]:
        """Return the associations of each worker."""
        return [
            sum(
                int(found[1])
                for line in worker.daemon.status()
                if (found := re.search(r"^udp .*associations=(\d+)", line))
            )
            for worker in self.workers
        ]

    def connect(self, index: int, port: int = 0, source: str = "127.0.0.1") -> socket.socket:
        """Return a connection that this worker has accepted."""
        address = ("127.0.0.1", port or self.port)
        for _ in range(500):
            before = self._accepted()
            sock = socket.create_connection(address, SECONDS, (source, 0))
            wait_until(lambda before=before: self._accepted() != before)
            if self._accepted()[index] > before[index]:
                return sock
            sock.close()
        raise AssertionError(f"no connection comes to worker {index}")

    def _accepted(self) -> list[int]:
        return self.count_of("connections", "accepted")


@contextlib.contextmanager
def team(
    monkeypatch: pytest.MonkeyPatch, text: str, count: int = 2, has_faults: bool = False
) -> Iterator[Team]:
    """Run a parent with workers; stop them, and check that nothing has raised an exception."""
    monkeypatch.setattr(parent_module, "Workers", ThreadWorkers)
    monkeypatch.setattr(parent_module, "Worker", ThreadWorker)
    ours = Team(text, count)
    try:
        yield ours
    finally:
        ours.parent.stop()
    if not has_faults:
        assert not ours.log.faults
        assert not any(ours.count_of("connections", "internal error"))
