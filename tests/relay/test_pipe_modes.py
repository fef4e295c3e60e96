"""How a relay moves bytes: by copying or through a kernel pipe, on a thread or by steps.

The bytes that arrive are the same in every mode.
"""

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

from netproxy.interfaces.sockets import LayeredSocket
from netproxy.interfaces.connections import Wait
from netproxy.net.stream import Stream
from netproxy.relay import direction as direction_module
from netproxy.relay.direction import TINY_READS, Direction
from netproxy.relay.pipe import Outcome, PipeLimits, Relay
from tests.support.accounts import free_account
from tests.support.outcomes import Outcomes
from tests.support.sockets import (
    SECONDS,
    Task,
    is_reset,
    read_exactly,
    read_to_end,
    reset,
    tcp_pair,
    wait_until,
)
from tests.support.waits import run_to_end

LIMITS = PipeLimits(idle=10 * SECONDS, half_close=10 * SECONDS)
MEGABYTE = 1 << 20


class EncryptedSocket(socket.socket, LayeredSocket):
    """A plain socket that has what relay.direction asks of an encrypted one."""

    peer_ended = False


class EncryptedStream(Stream):
    """A stream that claims to be encrypted."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(EncryptedSocket(fileno=sock.detach()))
        self.plain = False


class Ends:
    """A client and a target, and the streams between which a relay runs."""

    def __init__(
        self, client: socket.socket, near: socket.socket, far: socket.socket, target: socket.socket
    ) -> None:
        self.client, self.target = client, target
        self.near, self.far = Stream(near), Stream(far)
        self.owner = Outcomes()
        self.task: Task | None = None

    def begin(self, limits: PipeLimits = LIMITS) -> Wait:
        wait = Relay(self.near, self.far, limits, self.owner, free_account()).begin()
        assert wait is not None
        return wait

    def run(self, limits: PipeLimits = LIMITS) -> None:
        """Relay on a thread of its own, and never by steps."""
        self.task = Task(
            lambda: run_to_end(
                Relay(self.near, self.far, limits, self.owner, free_account()).begin()
            )
        )

    def outcome(self) -> Outcome:
        wait_until(lambda: self.owner.outcomes)
        (outcome,) = self.owner.outcomes
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
    """Stands in for os.pipe2: counts the pipes, and fails with `error` if that is set."""

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
    """Return how many ends of kernel pipes this process has open."""
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(name).startswith("pipe:") for name in names if os.path.lexists(name))


def data_of(size: int, seed: int) -> bytes:
    return hashlib.shake_128(bytes((seed,))).digest(size)


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def exchange(ends: Ends, size: int = 8 * MEGABYTE) -> None:
    """Send `size` bytes in each direction at once; what arrives must have the same hash."""
    up, down = data_of(size, 1), data_of(size, 2)
    senders = [Task(send_all, ends.client, up), Task(send_all, ends.target, down)]
    readers = [Task(read_to_end, ends.target), Task(read_to_end, ends.client)]
    received = [hashlib.sha256(reader.result()).hexdigest() for reader in readers]
    assert received == [hashlib.sha256(data).hexdigest() for data in (up, down)]
    for sender in senders:
        sender.result()
    assert ends.outcome() == Outcome(size, size, "closed")


class Busy:
    """One direction alone, driven by hand from a source that never runs dry."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        for stream in (ends.near, ends.far):
            stream.detach()
        self.direction = Direction(ends.near.socket, ends.far.socket, free_account().up, True)
        self.sent, self.received = b"", b""
        ends.target.settimeout(0)

    def carry(self, data: bytes) -> None:
        """Move all of `data` from the client to the target."""
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


class TestDirection:
    def test_direction_changes_to_a_pipe_and_back(self, ends: Ends) -> None:
        before = open_pipes()
        busy = Busy(ends)
        assert not busy.direction.busy
        # Several times, because the last reads may have been small ones.
        while busy.direction._pipe is None:
            busy.carry(data_of(4 * MEGABYTE, 1))
        assert busy.direction.busy and open_pipes() == before + 2
        for number in range(TINY_READS):
            assert busy.direction._pipe is not None
            busy.carry(b"tiny %d" % number)
        assert busy.direction._pipe is None and not busy.direction.busy and open_pipes() == before
        busy.carry(b"copied")
        assert busy.direction._pipe is None and busy.direction.bytes_moved == len(busy.sent)

    @pytest.mark.parametrize("small", [False, True])
    def test_direction_without_a_good_pipe_asks_once_and_copies(
        self, ends: Ends, pipes: Pipes, monkeypatch: pytest.MonkeyPatch, small: bool
    ) -> None:
        before = open_pipes()
        if small:
            monkeypatch.setattr(fcntl, "fcntl", small_pipe)
        else:
            pipes.error = errno.EMFILE
        busy = Busy(ends)
        while not pipes.asked:
            busy.carry(data_of(4 * MEGABYTE, 1))
        busy.carry(data_of(4 * MEGABYTE, 2))
        assert pipes.asked == 1 and open_pipes() == before
        assert busy.direction.bytes_moved == len(busy.sent)


def small_pipe(descriptor: int, command: int, value: Any = 0) -> int:
    """Answer as the kernel does if the user has too many pipes."""
    if command == fcntl.F_SETPIPE_SZ:
        raise PermissionError(errno.EPERM, "no")
    assert command == fcntl.F_GETPIPE_SZ
    return direction_module.PIPE_LEAST // 16


class TestEightMegabytesEachWay:
    def test_busy_relay_moves_all_bytes_and_closes_its_pipes(
        self, ends: Ends, pipes: Pipes
    ) -> None:
        """Whether a pipe is worth it depends on the speed of the machine; see TestDirection."""
        before = open_pipes()
        ends.run()
        exchange(ends)
        assert open_pipes() == before

    def test_busy_relay_that_may_not_splice_copies(self, ends: Ends, pipes: Pipes) -> None:
        ends.run(LIMITS._replace(splice=False))
        exchange(ends)
        assert not pipes.asked

    @pytest.mark.parametrize("side", ["near", "far"])
    def test_busy_relay_of_an_encrypted_stream_copies(
        self, ends: Ends, pipes: Pipes, side: str
    ) -> None:
        setattr(ends, side, EncryptedStream(getattr(ends, side).socket))
        ends.run()
        exchange(ends)
        assert not pipes.asked


class TestFullPipe:
    """The target does not read, and the kernel pipe holds bytes."""

    PATTERN = bytes(range(256)) * 256

    def go_over(self, ends: Ends, pipes: Pipes) -> int:
        """Send to a target that reads until the relay has a pipe; return the bytes sent."""
        poll, sent = select.poll(), 0
        for sock, events in ((ends.client, select.POLLOUT), (ends.target, select.POLLIN)):
            poll.register(sock, events)
            sock.settimeout(0)
        while not pipes.opened:
            for descriptor, _ in poll.poll(SECONDS * 1000):
                if descriptor == ends.client.fileno():
                    sent += ends.client.send(self.PATTERN[sent % 256 :])
                else:
                    self.received += ends.target.recv(MEGABYTE)
        ends.target.settimeout(SECONDS)
        return sent

    def fill(self, ends: Ends, sent: int = 0) -> int:
        """Send until the relay takes no more; return the bytes sent, with those sent before."""
        poll = select.poll()
        poll.register(ends.client, select.POLLOUT)
        ends.client.settimeout(0)
        while poll.poll(200):
            sent += ends.client.send(self.PATTERN[sent % 256 :])
        ends.client.settimeout(SECONDS)
        return sent

    def test_full_pipe_loses_nothing_when_the_source_ends(self, ends: Ends, pipes: Pipes) -> None:
        before = open_pipes()
        ends.run()
        self.received = b""
        sent = self.fill(ends, self.go_over(ends, pipes))
        assert open_pipes() == before + 2 and select.select([pipes.opened[-1][0]], [], [], 0)[0]
        ends.client.shutdown(socket.SHUT_WR)
        received = self.received + read_to_end(ends.target)
        assert (
            hashlib.sha256(received).digest()
            == hashlib.sha256((bytes(range(256)) * (sent // 256 + 1))[:sent]).digest()
        )
        send_all(ends.target, b"answer")
        assert read_to_end(ends.client) == b"answer"
        assert ends.outcome() == Outcome(sent, 6, "closed") and open_pipes() == before

    def test_full_pipe_is_closed_after_the_idle_time(self, ends: Ends) -> None:
        before = len(os.listdir("/proc/self/fd"))
        ends.run(LIMITS._replace(idle=1.0))
        self.fill(ends)
        assert ends.outcome().ended == "idle"
        # The two sockets of the relay are closed as well.
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == before - 2)
        assert is_reset(ends.client)

    def test_full_pipe_is_closed_if_the_source_resets_after_the_other_direction_ended(
        self, ends: Ends
    ) -> None:
        ends.run(LIMITS._replace(half_close=0.5, splice=False))
        ends.target.shutdown(socket.SHUT_WR)
        assert read_to_end(ends.client) == b""
        self.fill(ends)
        reset(ends.client)
        assert ends.outcome().ended in ("idle", "reset")


class TestSteps:
    def step(self, wait: Wait, sock: socket.socket) -> Wait | None:
        """Step as the poller does once `sock` has something."""
        poll = select.poll()
        poll.register(sock, dict(wait.watched)[sock])
        ((descriptor, events),) = poll.poll(SECONDS * 1000)
        assert wait.step is not None
        return wait.step(descriptor, events)

    def test_relay_with_little_to_do_uses_the_same_wait_again(self, ends: Ends) -> None:
        wait = ends.begin()
        for number in range(5):
            ends.client.sendall(b"ask %d" % number)
            assert self.step(wait, ends.near.socket) is wait
            assert read_exactly(ends.target, 5) == b"ask %d" % number
            ends.target.sendall(b"get %d" % number)
            assert self.step(wait, ends.far.socket) is wait
            assert read_exactly(ends.client, 5) == b"get %d" % number
        ends.client.shutdown(socket.SHUT_WR)
        half = self.step(wait, ends.near.socket)
        assert half is not None and half is not wait and read_to_end(ends.target) == b""
        ends.target.shutdown(socket.SHUT_WR)
        assert self.step(half, ends.far.socket) is None
        assert ends.outcome() == Outcome(25, 25, "closed")

    def test_busy_relay_asks_for_a_thread(self, ends: Ends) -> None:
        wait: Wait | None = ends.begin()
        sender, reader = (
            Task(send_all, ends.client, data_of(8 * MEGABYTE, 1)),
            Task(read_to_end, ends.target),
        )
        while wait is not None and wait.step is not None:
            wait = self.step(
                wait,
                dict((sock.fileno(), sock) for sock, _ in wait.watched)[ends.near.socket.fileno()],
            )
        assert wait is not None and not ends.owner.outcomes
        ends.task = Task(run_to_end, wait)
        ends.target.shutdown(socket.SHUT_WR)
        assert reader.result() == data_of(8 * MEGABYTE, 1)
        sender.result()
        assert ends.outcome() == Outcome(8 * MEGABYTE, 0, "closed")

    @pytest.mark.parametrize("side", ["near", "far"])
    def test_relay_of_an_encrypted_stream_has_no_step(self, ends: Ends, side: str) -> None:
        setattr(ends, side, EncryptedStream(getattr(ends, side).socket))
        wait = ends.begin()
        assert wait.step is None
        assert wait.resume(False) is None and ends.outcome() == Outcome(0, 0, "idle")

    @pytest.mark.parametrize("side", ["near", "far"])
    def test_relay_of_an_encrypted_stream_begins_on_a_thread(self, ends: Ends, side: str) -> None:
        """It asks for a thread at once, and returns it if nothing comes for a moment."""
        setattr(ends, side, EncryptedStream(getattr(ends, side).socket))
        first = ends.begin()
        assert not first.watched and first.seconds is None
        wait = first.resume(True)
        assert wait is not None and wait.step is None
        assert {sock.fileno() for sock, _ in wait.watched} == {
            ends.near.socket.fileno(),
            ends.far.socket.fileno(),
        }
        ends.task = Task(run_to_end, wait)
        for sock in (ends.client, ends.target):
            sock.sendall(b"late")
            sock.shutdown(socket.SHUT_WR)
        assert read_to_end(ends.client) == read_to_end(ends.target) == b"late"
        assert ends.outcome() == Outcome(4, 4, "closed")

    @pytest.mark.parametrize("stepped", [True, False])
    @pytest.mark.parametrize("first", ["client", "target"])
    def test_reset_during_a_wait_becomes_a_reset(
        self, ends: Ends, first: str, stepped: bool
    ) -> None:
        wait = ends.begin()
        gone, other, sock = (
            (ends.client, ends.target, ends.near.socket)
            if first == "client"
            else (ends.target, ends.client, ends.far.socket)
        )
        reset(gone)
        assert (self.step(wait, sock) if stepped else wait.resume(True)) is None
        assert is_reset(other) and ends.outcome() == Outcome(
            0, 0, "client reset" if first == "client" else "reset"
        )
