"""Worker processes: forked, told, heard, reaped, forked again later and later, and killed."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import ExitStack
from typing import Callable, Iterable, Iterator

import pytest

from netproxy.daemon.workers import processes
from netproxy.daemon.workers.messages import Message, receive, send
from netproxy.daemon.workers.processes import (
    BACK_OFF,
    BACK_OFF_LONGEST,
    INTERNAL,
    YOUNG,
    WorkerEnds,
    WorkerProcess,
    Workers,
)
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, Task, wait_until

Serve = Callable[[WorkerEnds], int]
KILLED = 9
"""The status of wait(2) of a process that SIGKILL has ended."""


class ForkingLog(Lines):
    """A Log that a child closes."""

    descriptors = ()

    def close(self) -> None:
        pass


class Fleet:
    """Workers that do `serve`, and whatever there is to end of them."""

    def __init__(self, serve: Serve, count: int = 2) -> None:
        self.log = ForkingLog()
        self.guard = threading.Lock()
        self.workers = Workers(count, serve, self.guard, self.log)  # type: ignore[arg-type]
        self.workers.open()

    def fork_all(self) -> list[WorkerProcess]:
        for worker in self.workers.all:
            self.workers.fork(worker)
        return self.workers.all

    def heard(self, worker: WorkerProcess) -> Message:
        message = self.workers.hear(worker, SECONDS)
        assert message is not None
        return message

    def reaped(self, now: float = 1000.0) -> list[WorkerProcess]:
        """Wait until a worker is reaped."""
        dead: list[WorkerProcess] = []
        wait_until(lambda: dead.extend(self.workers.reap(now)) or dead)  # type: ignore[func-returns-value]
        return dead

    def close(self) -> None:
        for worker in self.workers.running:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
            worker.end(KILLED, 0.0)
        for worker in self.workers.all:
            if not worker.is_new:
                worker.questions.close()
        self.workers.close()


@pytest.fixture
def fleet() -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def make(serve: Serve, count: int = 2) -> Fleet:
        fleets.append(Fleet(serve, count))
        return fleets[-1]

    yield make
    for each in fleets:
        each.close()


def obedient(ends: WorkerEnds) -> int:
    """Answer each order with the worker's number; "stop" ends it."""
    while True:
        order = receive(ends.orders)
        assert order is not None
        if order.kind == "stop":
            return 0
        send(ends.orders, Message({"kind": order.kind, "number": ends.number, "pid": os.getpid()}))


def endless(ends: WorkerEnds) -> int:
    """Ignore all orders."""
    threading.Event().wait()
    return 0


def test_worker_is_another_process_that_knows_its_number(fleet: Callable[..., Fleet]) -> None:
    ours = fleet(obedient, 3)
    assert ours.workers.running == []
    assert all(worker.is_new for worker in ours.workers.all)
    running = ours.fork_all()
    assert ours.workers.running == running
    assert ours.workers.tell(Message({"kind": "who"})) == running
    answers = [ours.heard(worker).fields for worker in running]
    assert [answer["number"] for answer in answers] == [0, 1, 2]
    assert [answer["pid"] for answer in answers] == [worker.pid for worker in running]
    assert os.getpid() not in [worker.pid for worker in running]


def test_guard_is_held_during_a_fork_and_free_after_it(
    fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = fleet(obedient)
    fork, held = os.fork, []

    def forking() -> int:
        held.append(ours.guard.locked())
        return fork()

    monkeypatch.setattr(os, "fork", forking)
    ours.fork_all()
    assert held == [True, True]
    assert not ours.guard.locked()


def test_fork_that_fails_leaves_nothing(
    fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = fleet(obedient)
    before = os.listdir("/proc/self/fd")

    def fail() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fail)
    with pytest.raises(OSError):
        ours.workers.fork(ours.workers.all[0])
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert not ours.guard.locked()
    assert ours.workers.running == []


def test_who_wants_to_know_is_told_of_each_fork(fleet: Callable[..., Fleet]) -> None:
    ours = fleet(obedient)
    forked: list[tuple[int, bool]] = []
    ours.workers.on_fork = lambda worker: forked.append((worker.index, worker.pid > 0))
    ours.fork_all()
    assert forked == [(0, True), (1, True)]


def test_child_closes_what_it_does_not_keep(fleet: Callable[..., Fleet]) -> None:
    """A worker with the parent's end of another worker's channel would hide the parent's death."""

    def report(ends: WorkerEnds) -> int:
        descriptors = []
        for name in os.listdir("/proc/self/fd"):
            try:
                descriptors.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
            except OSError:
                continue
        send(ends.orders, Message({"kind": "open", "descriptors": descriptors}))
        return 0

    ours = fleet(report)
    with ExitStack() as stack:
        kept = [stack.enter_context(socket.socket()) for _ in range(2)]
        lost = stack.enter_context(socket.socket())
        ours.workers.kept = lambda index: [kept[index].fileno()]
        inode = {sock: os.readlink(f"/proc/self/fd/{sock.fileno()}") for sock in [*kept, lost]}
        shared = [os.readlink(f"/proc/self/fd/{sock.fileno()}") for sock in ours.workers.outboxes]
        inboxes = [os.readlink(f"/proc/self/fd/{sock.fileno()}") for sock in ours.workers.inboxes]
        for worker in ours.fork_all():
            descriptors = ours.heard(worker).fields["descriptors"]
            assert isinstance(descriptors, list)
            targets = [target for number, target in descriptors if number > 2]
            # Its own, orders and questions, its inbox, and all outboxes; nothing else.
            expected = {inode[kept[worker.index]], inboxes[worker.index], *shared}
            assert expected <= set(targets)
            others = [target for target in targets if target not in expected]
            assert len(others) == 2, others
            assert all(target.startswith("socket:") for target in others)
            assert inode[lost] not in targets


def test_end_of_the_parent_is_an_end_of_orders_in_every_worker(fleet: Callable[..., Fleet]) -> None:
    """No worker has a parent's end: not even one that was forked after the others."""
    ours = fleet(obedient, 3)
    running = ours.fork_all()
    for worker in running:
        worker.orders.close()
    # Each ends with an EOFError.
    for worker in running:
        _, status = os.waitpid(worker.pid, 0)
        assert os.waitstatus_to_exitcode(status) == INTERNAL
        worker.end(status, 0.0)


def test_exit_status_is_that_of_the_worker(fleet: Callable[..., Fleet]) -> None:
    ours = fleet(lambda ends: 40 + ends.number)
    running = ours.fork_all()
    for _ in running:
        wait_until(lambda: ours.workers.reap(0.0) or not ours.workers.running)
    assert [worker.ended for worker in running] == ["exit status 40", "exit status 41"]


def test_worker_that_raises_ends_with_an_internal_error(fleet: Callable[..., Fleet]) -> None:
    def fail(ends: WorkerEnds) -> int:
        raise ValueError("broken")

    ours = fleet(fail, 1)
    (worker,) = ours.fork_all()
    assert ours.reaped() == [worker]
    assert worker.ended == f"exit status {INTERNAL}"


def test_signal_that_ended_a_worker_is_named(fleet: Callable[..., Fleet]) -> None:
    ours = fleet(endless)
    first, second = ours.fork_all()
    os.kill(first.pid, signal.SIGKILL)
    assert ours.reaped() == [first]
    assert (first.ended, first.pid, first.serving, first.live) == ("SIGKILL", 0, False, 0)
    assert ours.workers.running == [second]
    assert ours.workers.reap(0.0) == []


def test_worker_that_another_has_waited_for_is_reaped(fleet: Callable[..., Fleet]) -> None:
    ours = fleet(lambda ends: 0, 1)
    (worker,) = ours.fork_all()
    os.waitpid(worker.pid, 0)
    assert ours.workers.reap(0.0) == [worker]


def test_successor_has_channels_of_its_own_and_the_same_inbox(fleet: Callable[..., Fleet]) -> None:
    def read_inbox(ends: WorkerEnds) -> int:
        message = receive(ends.inbox)
        assert message is not None
        send(ends.orders, message)
        return 0

    ours = fleet(read_inbox, 1)
    (worker,) = ours.workers.all
    for number in range(3):
        # It was sent while there was no worker.
        send(ours.workers.outboxes[0], Message({"kind": f"message {number}"}))
        ours.workers.fork(worker)
        assert ours.heard(worker).kind == f"message {number}"
        assert worker.restarts == number
        assert ours.reaped() == [worker]
        worker.questions.close()


def test_nobody_is_told_or_heard_who_has_died(fleet: Callable[..., Fleet]) -> None:
    ours = fleet(endless)
    first, second = ours.fork_all()
    os.kill(first.pid, signal.SIGKILL)
    assert Task(ours.workers.hear, first, 10 * SECONDS).result() is None
    assert not ours.workers.tell_one(first, Message({"kind": "order"}))
    assert ours.workers.tell(Message({"kind": "order"})) == [second]


def test_worker_that_does_not_read_does_not_stop_its_parent(fleet: Callable[..., Fleet]) -> None:
    ours = fleet(endless, 1)
    (worker,) = ours.fork_all()
    order = Message({"kind": "order"}, b"x" * 10_000)
    told = 0
    while ours.workers.tell_one(worker, order):
        told += 1
        assert told < 1000
    assert worker.pid
    assert ours.workers.hear(worker, 0) is None


def test_worker_serves_once_it_has_said_so(fleet: Callable[..., Fleet]) -> None:
    def say(ends: WorkerEnds) -> int:
        send(ends.orders, Message({"kind": "serving"}))
        send(ends.orders, Message({"kind": "draining", "live": 7}))
        return endless(ends)

    ours = fleet(say, 1)
    (worker,) = ours.fork_all()
    assert (worker.serving, worker.live) == (False, 1)
    ours.heard(worker)
    assert (worker.serving, worker.live) == (True, 1)
    ours.heard(worker)
    assert (worker.serving, worker.live) == (True, 7)


# -- the back-off


def deaths(ages: Iterable[float]) -> list[float]:
    """Return how long each successor of a worker waits; `ages`: how long each one had lived."""
    worker, waits = WorkerProcess(0), []
    for age in ages:
        orders, far_orders = socket.socketpair()
        questions, far_questions = socket.socketpair()
        with far_orders, far_questions, questions:
            worker.begin(4242, orders, questions)
            now = worker.started + age
            worker.end(KILLED, now)
        waits.append(round(worker.due - now, 6))
    return waits


def test_back_off_doubles_up_to_its_longest() -> None:
    waits = deaths([0.0] * 10)
    assert waits[:7] == [BACK_OFF * 2**number for number in range(7)]
    assert waits[7:] == [BACK_OFF_LONGEST] * 3


def test_back_off_never_overflows() -> None:
    assert deaths([1.0] * 1200)[-1] == BACK_OFF_LONGEST


def test_back_off_begins_anew_after_a_worker_that_lived_long() -> None:
    old, young = YOUNG + 1, YOUNG - 1
    assert deaths([young, young, young, old, young, old]) == [
        BACK_OFF * factor for factor in (1, 2, 4, 1, 2, 1)
    ]


def test_channels_of_a_dead_worker_are_closed() -> None:
    worker = WorkerProcess(0)
    orders, far_orders = socket.socketpair()
    questions, far_questions = socket.socketpair()
    with far_orders, far_questions, questions:
        worker.begin(4242, orders, questions)
        assert not worker.is_new
        worker.end(KILLED, 0.0)
        assert orders.fileno() < 0


# -- the end


def test_stop_waits_for_workers_that_were_told_to(fleet: Callable[..., Fleet]) -> None:
    ours = fleet(obedient)
    running = ours.fork_all()
    ours.workers.tell(Message({"kind": "stop"}))
    ours.workers.stop()
    assert ours.workers.running == []
    assert [worker.ended for worker in running] == ["exit status 0"] * 2
    assert ours.log.of("error") == []


def test_worker_that_does_not_stop_is_killed(
    fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)

    def serve(ends: WorkerEnds) -> int:
        return endless(ends) if ends.number else obedient(ends)

    ours = fleet(serve)
    first, second = ours.fork_all()
    pid = second.pid
    ours.workers.tell(Message({"kind": "stop"}))
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    ours.workers.stop()
    assert (first.ended, second.ended) == ("exit status 0", "SIGKILL")
    assert ours.log.of("error") == [f"worker 1 (pid {pid}) does not stop: killed"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
