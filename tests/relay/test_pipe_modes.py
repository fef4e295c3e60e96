"""How a relay moves its bytes: by copying, through a kernel pipe, on a thread of its own or by steps; the bytes are the same."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import select
import socket
from typing import Any, Iterator

import pytest

from netproxy.interfaces.connections import Wait
from netproxy.net.stream import Stream
from netproxy.relay import direction as direction_module
from netproxy.relay.direction import TINY_READS, Direction
from netproxy.relay.pipe import Outcome, PipeLimits, pipe
from tests.support.waits import run_to_end
from tests.support.sockets import (
    Task,
    is_reset,
    read_exactly,
    read_to_end,
    reset,
    tcp_pair,
    wait_until,
)

LIMITS = PipeLimits(idle=30.0, half_close=30.0)
MEGABYTE = 1 << 20


class Opaque(Stream):
    plain = False  # as if its bytes were not what the socket holds


class Ends:
    """A client and a target, and the streams between which a relay runs."""

    def __init__(
        self, client: socket.socket, near: socket.socket, far: socket.socket, target: socket.socket
    ) -> None:
        self.client, self.target = client, target
        self.near, self.far = Stream(near), Stream(far)
        self.outcomes: list[Outcome] = []
        self.task: Task | None = None

    def begin(self, limits: PipeLimits = LIMITS) -> Wait:
        pause = pipe(self.near, self.far, limits, self.outcomes.append)
        assert pause is not None
        return pause

    def run(self, limits: PipeLimits = LIMITS) -> None:
        """On a thread of its own, and never by steps."""
        self.task = Task(
            lambda: run_to_end(pipe(self.near, self.far, limits, self.outcomes.append))
        )

    def outcome(self) -> Outcome:
        wait_until(lambda: self.outcomes)
        (outcome,) = self.outcomes
        assert not self.near.open and not self.far.open
        return outcome


@pytest.fixture
def ends() -> Iterator[Ends]:
    with contextlib.ExitStack() as stack:
        near, client = stack.enter_context(tcp_pair())
        far, target = stack.enter_context(tcp_pair())
        ends = Ends(client, near, far, target)
        yield ends
        for sock in (client, target):
            sock.close()
        if ends.task is not None:
            ends.task.result()


class Pipes:
    """Stands in for os.pipe2: counts the pipes, and fails where it is told to."""

    def __init__(self) -> None:
        self.opened: list[tuple[int, int]] = []
        self.asked = self.error = 0
        self._pipe2 = os.pipe2

    def __call__(self, flags: int) -> tuple[int, int]:
        self.asked += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.opened.append(self._pipe2(flags))
        return self.opened[-1]


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> Pipes:
    monkeypatch.setattr(os, "pipe2", pipes := Pipes())
    return pipes


def open_pipes() -> int:
    """Ends of kernel pipes that this process has."""
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(name).startswith("pipe:") for name in names if os.path.lexists(name))


def data_of(size: int, seed: int) -> bytes:
    return hashlib.shake_128(bytes((seed,))).digest(size)


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def exchange(ends: Ends, size: int = 8 * MEGABYTE) -> None:
    """So much each way at once; what arrives has the same hash."""
    up, down = data_of(size, 1), data_of(size, 2)
    senders = [Task(send_all, ends.client, up), Task(send_all, ends.target, down)]
    readers = [Task(read_to_end, ends.target), Task(read_to_end, ends.client)]
    found = [hashlib.sha256(reader.result(20)).hexdigest() for reader in readers]
    assert found == [hashlib.sha256(data).hexdigest() for data in (up, down)]
    for sender in senders:
        sender.result()
    assert ends.outcome() == Outcome(size, size, "closed")


class Busy:
    """One direction alone, driven by hand from a source that has as much as it takes."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        for stream in (ends.near, ends.far):
            stream.detach()
        self.direction = Direction(ends.near.socket, ends.far.socket, b"", True)
        self.sent, self.received = b"", b""
        ends.target.settimeout(0)

    def carry(self, data: bytes) -> None:
        """All of `data` from the client to the target."""
        self.ends.client.settimeout(0)
        rest = memoryview(data)
        self.sent += data
        while rest or len(self.received) < len(self.sent):
            with contextlib.suppress(BlockingIOError):
                rest = rest[self.ends.client.send(rest) :] if rest else rest
            self.direction.flush()
            if not self.direction.pending:
                self.direction.move()
            with contextlib.suppress(BlockingIOError):
                self.received += self.ends.target.recv(MEGABYTE)
        assert self.received == self.sent


class TestADirection:
    def test_goes_over_to_a_pipe_and_comes_back(self, ends: Ends) -> None:
        before = open_pipes()
        busy = Busy(ends)
        assert not busy.direction.busy
        while busy.direction._pipe is None:  # the last reads may have been small ones
            busy.carry(data_of(4 * MEGABYTE, 1))
        assert busy.direction.busy and open_pipes() == before + 2
        for number in range(TINY_READS):
            assert busy.direction._pipe is not None
            busy.carry(b"tiny %d" % number)
        assert busy.direction._pipe is None and not busy.direction.busy and open_pipes() == before
        busy.carry(b"copied")
        assert busy.direction._pipe is None and busy.direction.traffic == len(busy.sent)


def small_pipe(descriptor: int, command: int, value: Any = 0) -> int:
    """What a user meets whose pipes are too many."""
    if command == fcntl.F_SETPIPE_SZ:
        raise PermissionError(errno.EPERM, "no")
    assert command == fcntl.F_GETPIPE_SZ
    return direction_module.PIPE_LEAST // 16


class TestEightMegabytesEachWay:
    def test_through_pipes(self, ends: Ends, pipes: Pipes) -> None:
        before = open_pipes()
        ends.run()
        exchange(ends)
        assert pipes.opened and open_pipes() == before

    @pytest.mark.parametrize("small", [False, True])
    def test_without_good_pipes(
        self, ends: Ends, pipes: Pipes, monkeypatch: pytest.MonkeyPatch, small: bool
    ) -> None:
        """Each direction asks once, and copies."""
        before = open_pipes()
        if small:
            monkeypatch.setattr(fcntl, "fcntl", small_pipe)
        else:
            pipes.error = errno.EMFILE
        ends.run()
        exchange(ends)
        assert pipes.asked in (1, 2) and open_pipes() == before

    def test_without_leave_to_splice(self, ends: Ends, pipes: Pipes) -> None:
        ends.run(LIMITS._replace(splice=False))
        exchange(ends)
        assert not pipes.asked

    @pytest.mark.parametrize("side", ["near", "far"])
    def test_of_a_stream_that_is_not_plain(self, ends: Ends, pipes: Pipes, side: str) -> None:
        setattr(ends, side, Opaque(getattr(ends, side).socket))
        ends.run()
        exchange(ends)
        assert not pipes.asked


class TestAPipeThatIsFull:
    """The target does not read, and the kernel pipe holds what it was given."""

    PATTERN = bytes(range(256)) * 256

    def go_over(self, ends: Ends, pipes: Pipes) -> int:
        """Bytes that went from the client to the target until the relay had a pipe; some may be on their way."""
        poll, sent = select.poll(), 0
        for sock, events in ((ends.client, select.POLLOUT), (ends.target, select.POLLIN)):
            poll.register(sock, events)
            sock.settimeout(0)
        while not pipes.opened:
            for descriptor, _ in poll.poll(5000):
                if descriptor == ends.client.fileno():
                    sent += ends.client.send(self.PATTERN[sent % 256 :])
                else:
                    self.found += ends.target.recv(MEGABYTE)
        ends.target.settimeout(5)
        return sent

    def fill(self, ends: Ends, sent: int = 0) -> int:
        """Bytes that the client got rid of, with those that it had sent."""
        poll = select.poll()
        poll.register(ends.client, select.POLLOUT)
        ends.client.settimeout(0)
        while poll.poll(200):
            sent += ends.client.send(self.PATTERN[sent % 256 :])
        ends.client.settimeout(5)
        return sent

    def test_loses_nothing_when_the_source_ends(self, ends: Ends, pipes: Pipes) -> None:
        before = open_pipes()
        ends.run()
        self.found = b""
        sent = self.fill(ends, self.go_over(ends, pipes))
        assert open_pipes() == before + 2 and select.select([pipes.opened[-1][0]], [], [], 0)[0]
        ends.client.shutdown(socket.SHUT_WR)
        found = self.found + read_to_end(ends.target)
        assert (
            hashlib.sha256(found).digest()
            == hashlib.sha256((bytes(range(256)) * (sent // 256 + 1))[:sent]).digest()
        )
        send_all(ends.target, b"answer")
        assert read_to_end(ends.client) == b"answer"
        assert ends.outcome() == Outcome(sent, 6, "closed") and open_pipes() == before

    def test_is_given_up_after_the_idle_time(self, ends: Ends) -> None:
        before = len(os.listdir("/proc/self/fd"))
        ends.run(LIMITS._replace(idle=1.0))
        self.fill(ends)
        assert ends.outcome().ended == "idle"
        wait_until(
            lambda: len(os.listdir("/proc/self/fd")) == before - 2
        )  # and both the relay's sockets
        assert is_reset(ends.client)

    def test_is_given_up_though_the_source_is_reset_after_the_other_way_has_ended(
        self, ends: Ends
    ) -> None:
        ends.run(LIMITS._replace(half_close=0.5, splice=False))
        ends.target.shutdown(socket.SHUT_WR)
        assert read_to_end(ends.client) == b""
        self.fill(ends)
        reset(ends.client)
        assert ends.outcome().ended in ("idle", "reset")


class TestSteps:
    def step(self, pause: Wait, sock: socket.socket) -> Wait | None:
        """As the parker does once `sock` has something."""
        poll = select.poll()
        poll.register(sock, dict(pause.watched)[sock])
        ((descriptor, events),) = poll.poll(5000)
        assert pause.step is not None
        return pause.step(descriptor, events)

    def test_an_idle_relay_goes_on_by_the_same_pause(self, ends: Ends) -> None:
        pause = ends.begin()
        for number in range(5):
            ends.client.sendall(b"ask %d" % number)
            assert self.step(pause, ends.near.socket) is pause
            assert read_exactly(ends.target, 5) == b"ask %d" % number
            ends.target.sendall(b"get %d" % number)
            assert self.step(pause, ends.far.socket) is pause
            assert read_exactly(ends.client, 5) == b"get %d" % number
        ends.client.shutdown(socket.SHUT_WR)
        half = self.step(pause, ends.near.socket)
        assert half is not None and half is not pause and read_to_end(ends.target) == b""
        ends.target.shutdown(socket.SHUT_WR)
        assert self.step(half, ends.far.socket) is None
        assert ends.outcome() == Outcome(25, 25, "closed")

    def test_a_busy_one_asks_for_a_thread(self, ends: Ends) -> None:
        pause: Wait | None = ends.begin()
        sender, reader = (
            Task(send_all, ends.client, data_of(8 * MEGABYTE, 1)),
            Task(read_to_end, ends.target),
        )
        while pause is not None and pause.step is not None:
            pause = self.step(
                pause,
                dict((sock.fileno(), sock) for sock, _ in pause.watched)[ends.near.socket.fileno()],
            )
        assert pause is not None and not ends.outcomes
        ends.task = Task(run_to_end, pause)
        ends.target.shutdown(socket.SHUT_WR)
        assert reader.result() == data_of(8 * MEGABYTE, 1)
        sender.result()
        assert ends.outcome() == Outcome(8 * MEGABYTE, 0, "closed")

    @pytest.mark.parametrize("side", ["near", "far"])
    def test_one_that_is_not_plain_has_none(self, ends: Ends, side: str) -> None:
        setattr(ends, side, Opaque(getattr(ends, side).socket))
        pause = ends.begin()
        assert pause.step is None
        assert pause.resume(False) is None and ends.outcome() == Outcome(0, 0, "idle")

    @pytest.mark.parametrize("stepped", [True, False])
    @pytest.mark.parametrize("first", ["client", "target"])
    def test_a_reset_while_parked_becomes_a_reset(
        self, ends: Ends, first: str, stepped: bool
    ) -> None:
        pause = ends.begin()
        gone, other, sock = (
            (ends.client, ends.target, ends.near.socket)
            if first == "client"
            else (ends.target, ends.client, ends.far.socket)
        )
        reset(gone)
        assert (self.step(pause, sock) if stepped else pause.resume(True)) is None
        assert is_reset(other) and ends.outcome() == Outcome(
            0, 0, "client reset" if first == "client" else "reset"
        )
