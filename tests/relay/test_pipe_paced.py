"""Relays whose directions may carry only so much: they pause, and lose no byte."""

from __future__ import annotations

import contextlib
import select
import socket
from types import SimpleNamespace
from typing import Any, Iterator

import pytest

from netproxy.interfaces.accounts import UNLIMITED
from netproxy.interfaces.connections import Wait
from netproxy.net.stream import Stream
from netproxy.relay.pipe import Outcome, PipeLimits, Relay
from tests.relay.test_pipe_modes import EncryptedStream, data_of
from tests.support.outcomes import Outcomes
from tests.support.sockets import SECONDS, Task, read_exactly, read_to_end, tcp_pair
from tests.support.waits import run_to_end

LIMITS = PipeLimits(idle=10 * SECONDS, half_close=10 * SECONDS)


class Leases:
    """A Pace that gives the leases which a test has put there."""

    def __init__(self, *leases: int, unlimited: bool = False) -> None:
        self.mark = UNLIMITED if unlimited else 0
        self.lease = 0
        self.leases = list(leases)
        self.asked = 0

    def renew(self, moved: int) -> int:
        self.asked += 1
        if self.leases and moved >= self.mark:
            self.mark += self.leases.pop(0)
        return max(0, self.mark - moved)

    def delay(self) -> float:
        return 0.005

    def decided(self) -> str:
        return "a limit"


class Ends:
    """A client and a target with a relay between them, and its paces."""

    def __init__(self, stack: contextlib.ExitStack, kind: type[Stream] = Stream) -> None:
        near, self.client = stack.enter_context(tcp_pair())
        far, self.target = stack.enter_context(tcp_pair())
        self.up, self.down = Leases(unlimited=True), Leases(unlimited=True)
        self.owner = Outcomes()
        self._near, self._far = kind(near), kind(far)

    def relay(self) -> Relay:
        account: Any = SimpleNamespace(up=self.up, down=self.down)
        return Relay(self._near, self._far, LIMITS, self.owner, account)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def step_on(wait: Wait | None) -> Wait | None:
    """Let the time of a pause be over, on the thread of the poller or of a pool."""
    assert wait is not None and wait.timed
    return wait.step(-1, 0) if wait.step is not None else wait.resume(False)


def watches(wait: Wait, sock: socket.socket) -> bool:
    """Return whether a wait is for bytes of a socket."""
    return any(
        watched.fileno() == sock.fileno() and events & select.POLLIN
        for watched, events in wait.watched
    )


def test_paused_direction_is_not_read_until_its_time_is_over(stack: contextlib.ExitStack) -> None:
    ends = Ends(stack)
    ends.down = Leases(10)
    ends.target.sendall(b"0123456789abcdef")
    far = ends._far.socket
    wait = ends.relay().begin()
    assert wait is not None and wait.step is not None and watches(wait, far)
    paused = wait.step(far.fileno(), select.POLLIN)
    assert read_exactly(ends.client, 10) == b"0123456789"
    assert paused is not None and paused.timed and not watches(paused, far)
    ends.down.leases = [100]
    going_on = step_on(paused)
    assert read_exactly(ends.client, 6) == b"abcdef"
    assert going_on is not None and not going_on.timed and watches(going_on, far)
    ends.client.close()
    ends.target.close()
    run_to_end(going_on)


def test_piece_that_the_mark_would_cut_is_read_whole(stack: contextlib.ExitStack) -> None:
    """A read that begins before the mark goes on into the next lease, and no further."""
    ends = Ends(stack)
    ends.down = Leases(10)
    ends.down.lease = 14
    ends.target.sendall(b"0123456789abcdef")
    far = ends._far.socket
    wait = ends.relay().begin()
    assert wait is not None and wait.step is not None
    paused = wait.step(far.fileno(), select.POLLIN)
    assert read_exactly(ends.client, 14) == b"0123456789abcd"
    assert paused is not None and paused.timed
    # The next lease pays for what was carried already.
    ends.down.leases = [5]
    ends.down.lease = 0
    again = step_on(paused)
    assert read_exactly(ends.client, 1) == b"e"
    assert again is not None and again.timed
    ends.down.leases = [100]
    going_on = step_on(again)
    assert read_exactly(ends.client, 1) == b"f"
    ends.client.close()
    ends.target.close()
    run_to_end(going_on)


@pytest.mark.parametrize("kind", [Stream, EncryptedStream])
def test_other_direction_goes_on_during_a_pause(
    stack: contextlib.ExitStack, kind: type[Stream]
) -> None:
    ends = Ends(stack, kind)
    ends.down = Leases(10)
    ends.target.sendall(bytes(100))
    near = ends._near.socket
    relay = Task(run_to_end, ends.relay().begin())
    assert read_exactly(ends.client, 10) == bytes(10)
    for _ in range(3):
        ends.client.sendall(b"upload")
        assert read_exactly(ends.target, 6) == b"upload"
    assert near.fileno() >= 0
    ends.down.leases = [1000]
    assert read_exactly(ends.client, 90) == bytes(90)
    ends.client.close()
    ends.target.close()
    relay.result()


def test_event_during_a_pause_of_a_busy_relay_is_served_once(stack: contextlib.ExitStack) -> None:
    """Otherwise each event wakes a pool thread at once that does nothing."""
    ends = Ends(stack, EncryptedStream)
    ends.down = Leases(10)
    ends.target.sendall(bytes(100))
    wait = ends.relay().begin()
    while wait is not None and not wait.timed:
        wait = wait.resume(True)
    assert wait is not None
    ends.client.sendall(b"upload")
    wait = wait.resume(True)
    assert read_exactly(ends.target, 6) == b"upload"
    assert wait is not None and wait.timed and watches(wait, ends._near.socket)
    ends.client.close()
    ends.target.close()
    ends.down.leases = [1000]
    run_to_end(wait)


@pytest.mark.parametrize("kind", [Stream, EncryptedStream])
@pytest.mark.parametrize("lease", [1, 1000, 65536, 300_000])
def test_all_bytes_and_both_ends_pass_in_leases_of_any_size(
    stack: contextlib.ExitStack, kind: type[Stream], lease: int
) -> None:
    ends, size = Ends(stack, kind), min(lease * 50, 2_000_000)
    ends.up, ends.down = (Leases(*[lease] * (size // lease + 2)) for _ in range(2))
    up, down = data_of(size, 1), data_of(size, 2)

    def send(sock: socket.socket, data: bytes) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    tasks = [
        Task(send, ends.client, up),
        Task(send, ends.target, down),
        Task(run_to_end, ends.relay().begin()),
    ]
    received = [Task(read_to_end, sock) for sock in (ends.target, ends.client)]
    assert [task.result() for task in received] == [up, down]
    for task in tasks:
        task.result()
    assert ends.owner.outcomes == [Outcome(size, size, "closed")]


def test_reset_of_the_client_ends_a_paused_relay(stack: contextlib.ExitStack) -> None:
    ends = Ends(stack)
    ends.down = Leases(10)
    ends.target.sendall(bytes(100))
    relay = Task(run_to_end, ends.relay().begin())
    assert read_exactly(ends.client, 10) == bytes(10)
    ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    ends.client.close()
    relay.result()
    assert [outcome.ended for outcome in ends.owner.outcomes] == ["client reset"]
