"""The worker processes, as their parent sees them: forked, told, reaped, and forked again.

Thread: main, except what a lock guards.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time

from netproxy.daemon.process.forked import leave_parent
from netproxy.daemon.workers.messages import (
    PAUSE,
    Message,
    MessageError,
    message_pair,
    receive,
    send,
)
from netproxy.typed import TYPE_CHECKING, Callable, Iterable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.observe.log import Log

BACK_OFF, BACK_OFF_LONGEST = 0.1, 10.0
"""Seconds before a worker that died is replaced: doubled each time that one dies young."""
DOUBLINGS = 7
"""After so many the back-off is the longest."""
YOUNG = 10.0
"""Seconds: a worker that lived longer begins with BACK_OFF again."""
STOP_SECONDS = 8.0
"""How long workers may take to stop before they are killed."""
STOP_STEP = 0.02
INTERNAL = 70
"""The exit status of a worker that has failed (sysexits(3): EX_SOFTWARE)."""


class WorkerEnds(NamedTuple):
    """A worker's ends of its channels."""

    number: int
    """Of the worker, from 0."""
    orders: socket.socket
    """Messages from and to the parent (workers.messages)."""
    questions: socket.socket
    """A stream: the parent asks, the worker answers (admin.workers)."""
    inbox: socket.socket
    """Messages from other workers."""
    workers: int
    """How many there are."""
    restarts: int = 0
    """How many processes there were before in its place."""


class WorkerProcess:
    """One worker, which may have died."""

    __slots__ = (
        *("index", "pid", "orders", "questions", "serving", "live", "gone"),
        *("started", "restarts", "ended", "due", "_deaths"),
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.pid = 0
        """0 while there is none."""
        self.orders: socket.socket
        """The parent's ends of its channels."""
        self.questions: socket.socket
        self.serving = False
        """True once it has said that it serves."""
        self.gone = False
        """True once it has closed its end of the orders: it is about to end."""
        self.live = 0
        """Connections that a worker that drains has told of; 1 before, 0 without a process."""
        self.started = 0.0
        """Monotonic seconds, as `due`."""
        self.restarts = -1
        """How often a process was forked after the first."""
        self.ended = ""
        """How the last process has ended."""
        self.due = 0.0
        """When a successor is forked."""
        self._deaths = 0

    @property
    def is_new(self) -> bool:
        """True if no process was ever forked."""
        return self.restarts < 0

    def begin(self, pid: int, orders: socket.socket, questions: socket.socket) -> None:
        """Note that a process was forked."""
        self.pid, self.orders, self.questions = pid, orders, questions
        self.serving, self.gone, self.live = False, False, 1
        self.started = time.monotonic()
        self.restarts += 1

    def end(self, status: int, now: float) -> None:
        """Note that the process has ended, with a status of wait(2)."""
        self.orders.close()
        self._deaths = 0 if now - self.started > YOUNG else self._deaths
        self.due = now + min(BACK_OFF * 2 ** min(self._deaths, DOUBLINGS), BACK_OFF_LONGEST)
        self._deaths += 1
        self.pid, self.live, self.serving = 0, 0, False
        code = os.waitstatus_to_exitcode(status)
        self.ended = f"exit status {code}" if code >= 0 else signal.Signals(-code).name


class Workers:
    """All workers of a daemon."""

    def __init__(
        self, count: int, serve: Callable[[WorkerEnds], int], guard: threading.Lock, log: Log
    ) -> None:
        """`serve(ends)` is what a worker does; it returns the exit status.

        `guard` is held while a worker is forked: see daemon.workers.parent.
        """
        self._serve = serve
        self._guard = guard
        self._log = log
        self.all = [WorkerProcess(index) for index in range(count)]
        self.inboxes: list[socket.socket] = []
        self.outboxes: list[socket.socket] = []
        self.on_fork: Callable[[WorkerProcess], None] = _ignore
        """Called in the parent with each worker that was forked."""
        self.kept: Callable[[int], Iterable[int]] = _nothing
        """Returns the further descriptors that a worker keeps, by its number."""

    def open(self) -> None:
        """Open the inboxes, before the first fork.  Raises OSError."""
        for _ in self.all:
            reading, writing = message_pair()
            self.inboxes.append(reading)
            self.outboxes.append(writing)

    @property
    def running(self) -> list[WorkerProcess]:
        """The workers that have not died."""
        return [worker for worker in self.all if worker.pid]

    def fork(self, worker: WorkerProcess) -> None:
        """Fork a worker.  Raises OSError."""
        orders, far_orders = message_pair()
        questions, far_questions = socket.socketpair()
        inbox, count = self.inboxes[worker.index], len(self.all)
        restarts = worker.restarts + 1
        ends = WorkerEnds(worker.index, far_orders, far_questions, inbox, count, restarts)
        with self._guard:
            pid = os.fork()
            if not pid:
                self._become(ends)
            # Within the guard: what is changed in all workers misses none.
            worker.begin(pid, orders, questions)
            self.on_fork(worker)
        far_orders.close()
        far_questions.close()

    def _become(self, ends: WorkerEnds) -> None:
        """Be a worker; never returns."""
        status = INTERNAL
        try:
            # The guard is held: no other thread is left that could let it go.
            kept = {*self._log.descriptors, *self.kept(ends.number)}
            kept |= {sock.fileno() for sock in (ends.orders, ends.questions, ends.inbox)}
            kept |= {sock.fileno() for sock in self.outboxes}
            leave_parent(kept)
            status = self._serve(ends)
        except BaseException:
            self._log.exception(f"serving as worker {ends.number}")
        finally:
            self._log.close()
            # No finalizer may run: the parent's objects are not the worker's to close.
            os._exit(status)

    def tell(self, message: Message) -> list[WorkerProcess]:
        """Send a message to all running workers; return those that got it."""
        return [worker for worker in self.running if self.tell_one(worker, message)]

    @staticmethod
    def tell_one(worker: WorkerProcess, message: Message) -> bool:
        """Send a message to a worker; return False if it is gone, or reads nothing."""
        try:
            send(worker.orders, message)
        except MessageError as error:
            cause = error.__cause__
            is_full = isinstance(cause, BlockingIOError)
            worker.gone |= isinstance(cause, OSError) and not is_full
            return False
        return True

    def hear(self, worker: WorkerProcess, seconds: float) -> Message | None:
        """Return the next message of a worker, None if it has died or says nothing in time."""
        try:
            message = receive(worker.orders, seconds)
        except (EOFError, OSError):
            worker.gone = True
            return None
        if message is not None and message.kind == "failed" and worker.restarts > 0:
            self._log.error("worker %d: %s", worker.index, message.fields["error"])
        if message is not None and message.kind == "serving":
            worker.serving = True
        if message is not None and message.kind == "draining":
            worker.live = int(str(message.fields["live"]))
        return message

    @staticmethod
    def wait_for_any(workers: Sequence[WorkerProcess], seconds: float) -> None:
        """Wait until one of some workers says something or is gone, for so long at most."""
        poll = select.poll()
        for worker in workers:
            if not worker.gone:
                poll.register(worker.orders, select.POLLIN)
        try:
            poll.poll(seconds * 1000)
        except OSError:
            time.sleep(PAUSE)  # the kernel has no memory for it

    def reap(self, now: float) -> list[WorkerProcess]:
        """Return the workers that have died since the last call; successors become due."""
        dead = []
        for worker in self.running:
            try:
                pid, status = os.waitpid(worker.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = worker.pid, 0
            if pid:
                worker.end(status, now)
                dead.append(worker)
        return dead

    def stop(self) -> None:
        """Wait until all workers have ended, which were told to; kill those that do not."""
        deadline = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < deadline:
            self.reap(time.monotonic())
            time.sleep(STOP_STEP)
        for worker in self.running:
            self._log.error("worker %d (pid %d) does not stop: killed", worker.index, worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
            _, status = os.waitpid(worker.pid, 0)
            worker.end(status, time.monotonic())

    def close(self) -> None:
        """Close the inboxes."""
        for sock in (*self.inboxes, *self.outboxes):
            sock.close()


def _ignore(worker: WorkerProcess) -> None:
    """Do nothing with a worker."""


def _nothing(index: int) -> Iterable[int]:
    """Return no descriptors."""
    return ()
