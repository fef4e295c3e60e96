"""The relay between two real TCP connections: every byte, each half-close, each end."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import socket
import struct
import termios
import time
from typing import Iterator

import pytest

from netproxy.net.stream import Stream
from netproxy.relay.direction import BUFFER
from netproxy.relay.pipe import Outcome, PipeLimits, Relay
from tests.support.accounts import free_account
from tests.support.outcomes import Outcomes
from tests.support.sockets import (
    SECONDS,
    Task,
    is_reset,
    nothing_comes,
    read_exactly,
    read_to_end,
    reset,
    tcp_pair,
    wait_until,
)
from tests.support.waits import run_to_end

LIMITS = PipeLimits(idle=10 * SECONDS, half_close=10 * SECONDS)
MEGABYTE = 1 << 20
SPARE_TURNS = 3
"""Wake-ups that may follow the last byte.  A relay that spins has thousands."""
SIOCOUTQ = termios.TIOCOUTQ
"""Asks for the bytes of a TCP socket that its peer has not acknowledged."""


class Relayed:
    """A client and a target with a relay between them, on a thread of its own."""

    def __init__(
        self, client: socket.socket, near: Stream, far: Stream, target: socket.socket
    ) -> None:
        self.client, self.target = client, target
        self.near, self.far = near, far
        self.task: Task | None = None

    def start(self, limits: PipeLimits = LIMITS) -> None:
        self.task = Task(relay, self.near, self.far, limits)

    def outcome(self) -> Outcome:
        assert self.task is not None
        return self.task.result()


def relay(near: Stream, far: Stream, limits: PipeLimits) -> Outcome:
    """Relay until both sides have ended, waits included; return the outcome."""
    owner = Outcomes()
    run_to_end(Relay(near, far, limits, owner, free_account()).begin())
    (outcome,) = owner.outcomes
    return outcome


@pytest.fixture
def relayed() -> Iterator[Relayed]:
    with contextlib.ExitStack() as stack:
        near, client = stack.enter_context(tcp_pair())
        far, target = stack.enter_context(tcp_pair())
        relayed = Relayed(client, Stream(near), Stream(far), target)
        yield relayed
        for sock in (client, target):
            sock.close()
        if relayed.task is not None:
            wait_until(lambda: relayed.task.done)


class Turns:
    """Counts how often the threads of relays were woken by an event."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._move = Relay._move
        monkeypatch.setattr(Relay, "_move", lambda relay, ready: self._counted(relay, ready))

    def _counted(self, relay: Relay, ready: dict[int, int]) -> str:
        self.count += 1
        return self._move(relay, ready)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    return Turns(monkeypatch)


def data_of(size: int, seed: int) -> bytes:
    return hashlib.shake_128(bytes((seed,))).digest(size)


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def queued(sock: socket.socket, request: int) -> int:
    return struct.unpack("i", fcntl.ioctl(sock, request, bytes(4)))[0]


class TestHalfClose:
    @pytest.mark.parametrize("first", ["client", "target"])
    def test_half_close_reaches_the_other_side_and_the_reply_direction_stays_open(
        self, relayed: Relayed, first: str
    ) -> None:
        """Hazards 82 and 83.  8 MB in one direction, its end, then 1 MB in the other."""
        relayed.start()
        ends = (
            (relayed.client, relayed.target)
            if first == "client"
            else (relayed.target, relayed.client)
        )
        request, reply = data_of(8 * MEGABYTE, 1), data_of(MEGABYTE, 2)
        sender = Task(send_all, ends[0], request)
        assert hashlib.sha256(read_to_end(ends[1])).digest() == hashlib.sha256(request).digest()
        sender.result()
        sender = Task(send_all, ends[1], reply)
        assert hashlib.sha256(read_to_end(ends[0])).digest() == hashlib.sha256(reply).digest()
        sender.result()
        sent, received = (request, reply) if first == "client" else (reply, request)
        assert relayed.outcome() == Outcome(len(sent), len(received), "closed")
        assert not relayed.near.open and not relayed.far.open

    def test_both_directions_at_once_lose_no_byte(self, relayed: Relayed) -> None:
        relayed.start()
        up, down = data_of(4 * MEGABYTE, 3), data_of(4 * MEGABYTE, 4)
        senders = [Task(send_all, relayed.client, up), Task(send_all, relayed.target, down)]
        readers = [Task(read_to_end, relayed.client), Task(read_to_end, relayed.target)]
        assert (readers[0].result(), readers[1].result()) == (down, up)
        for sender in senders:
            sender.result()
        assert relayed.outcome() == Outcome(len(up), len(down), "closed")

    def test_half_close_without_a_byte_is_relayed(self, relayed: Relayed) -> None:
        relayed.start()
        relayed.client.shutdown(socket.SHUT_WR)
        assert read_to_end(relayed.target) == b""
        relayed.target.shutdown(socket.SHUT_WR)
        assert relayed.outcome() == Outcome(0, 0, "closed")

    def test_half_close_before_the_relay_began_is_relayed(self, relayed: Relayed) -> None:
        send_all(relayed.client, b"request")
        send_all(relayed.target, b"answer")
        relayed.start()
        assert read_to_end(relayed.target) == b"request"
        assert read_to_end(relayed.client) == b"answer"
        assert relayed.outcome() == Outcome(7, 6, "closed")

    def test_half_closed_relay_costs_no_processor_time(
        self, relayed: Relayed, turns: Turns
    ) -> None:
        relayed.start()
        relayed.client.shutdown(socket.SHUT_WR)
        assert read_to_end(relayed.target) == b""
        before = turns.count
        time.sleep(0.2)
        assert turns.count <= before + SPARE_TURNS

    def test_bytes_that_come_one_at_a_time_are_all_relayed(self, relayed: Relayed) -> None:
        """Hazard 89."""
        relayed.start()
        data = data_of(2000, 5)

        def drip() -> None:
            for byte in data:
                relayed.client.send(bytes((byte,)))
            relayed.client.shutdown(socket.SHUT_WR)

        sender = Task(drip)
        assert read_to_end(relayed.target) == data
        sender.result()


class TestUnread:
    def test_unread_bytes_go_first(self, relayed: Relayed) -> None:
        """Hazard 16.  What was read ahead of the relay comes before what follows."""
        near, far = Stream(relayed.near.socket, b"early "), Stream(relayed.far.socket, b"banner ")
        relayed.near, relayed.far = near, far
        send_all(relayed.client, b"late")
        send_all(relayed.target, b"answer")
        relayed.start()
        assert read_to_end(relayed.target) == b"early late"
        assert read_to_end(relayed.client) == b"banner answer"
        assert relayed.outcome() == Outcome(10, 13, "closed")

    def test_unread_bytes_go_though_nothing_follows(self, relayed: Relayed) -> None:
        relayed.near = Stream(relayed.near.socket, b"early")
        relayed.start()
        assert read_exactly(relayed.target, 5) == b"early"

    def test_many_unread_bytes_reach_a_target_that_reads_late(self, relayed: Relayed) -> None:
        relayed.far.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        early = data_of(MEGABYTE, 6)
        relayed.near = Stream(relayed.near.socket, early)
        send_all(relayed.client, b"late")
        relayed.start()
        wait_until(lambda: not nothing_comes(relayed.target, 0))
        assert read_to_end(relayed.target) == early + b"late"

    def test_unread_bytes_to_a_target_that_has_gone_end_in_a_reset(self, relayed: Relayed) -> None:
        relayed.near = Stream(relayed.near.socket, b"early")
        reset(relayed.target)
        relayed.start()
        assert is_reset(relayed.client)
        assert relayed.outcome().ended == "reset"


class TestReset:
    @pytest.mark.parametrize("side", ["client", "target"])
    def test_reset_of_one_side_becomes_a_reset_of_the_other(
        self, relayed: Relayed, side: str
    ) -> None:
        """Hazard 84.  Nobody takes a cut stream for a complete one."""
        relayed.start()
        ends = (
            (relayed.client, relayed.target)
            if side == "client"
            else (relayed.target, relayed.client)
        )
        ends[0].sendall(b"half of it")
        assert read_exactly(ends[1], 10) == b"half of it"
        reset(ends[0])
        assert is_reset(ends[1])
        assert relayed.outcome().ended == ("client reset" if side == "client" else "reset")
        assert not relayed.near.open and not relayed.far.open

    @pytest.mark.parametrize("side", ["client", "target"])
    def test_reset_after_the_other_side_has_ended_becomes_a_reset(
        self, relayed: Relayed, side: str
    ) -> None:
        relayed.start()
        ends = (
            (relayed.client, relayed.target)
            if side == "client"
            else (relayed.target, relayed.client)
        )
        ends[1].shutdown(socket.SHUT_WR)
        assert read_to_end(ends[0]) == b""
        reset(ends[0])
        assert is_reset(ends[1])
        assert relayed.outcome().ended == ("client reset" if side == "client" else "reset")

    def test_reset_while_the_other_side_does_not_read_becomes_a_reset(
        self, relayed: Relayed
    ) -> None:
        relayed.start()
        stalled = fill(relayed)
        assert stalled > 0
        reset(relayed.target)
        assert is_reset(relayed.client)
        assert relayed.outcome().ended == "reset"


class TestSlowReader:
    def test_slow_reader_holds_at_most_one_buffer(self, relayed: Relayed) -> None:
        """Hazard 85.  The rest stays with the sender and the kernel."""
        near, far = relayed.near.socket.dup(), relayed.far.socket.dup()
        with near, far:
            relayed.start()
            sent = fill(relayed)
            in_kernel = (
                queued(relayed.client, SIOCOUTQ)
                + queued(near, termios.FIONREAD)
                + queued(far, SIOCOUTQ)
                + queued(relayed.target, termios.FIONREAD)
            )
            assert 0 <= sent - in_kernel <= BUFFER

    def test_slow_reader_does_not_delay_the_other_direction(self, relayed: Relayed) -> None:
        relayed.start()
        fill(relayed)
        relayed.target.sendall(b"x" * 100000)
        assert read_exactly(relayed.client, 100000) == b"x" * 100000

    def test_slow_reader_gets_every_byte_when_it_reads_again(self, relayed: Relayed) -> None:
        relayed.start()
        sent = fill(relayed)
        relayed.client.shutdown(socket.SHUT_WR)
        assert len(read_to_end(relayed.target)) == sent

    def test_slow_reader_costs_no_processor_time(self, relayed: Relayed, turns: Turns) -> None:
        relayed.start()
        fill(relayed)
        before = turns.count
        time.sleep(0.2)
        assert turns.count <= before + SPARE_TURNS

    def test_slow_reader_is_reset_after_the_idle_time(self, relayed: Relayed) -> None:
        relayed.start(PipeLimits(0.3, 10 * SECONDS))
        fill(relayed)
        assert relayed.outcome().ended == "idle"


class TestTimeouts:
    def test_idle_relay_is_reset_after_the_idle_time(self, relayed: Relayed) -> None:
        owner = Outcomes()
        wait = Relay(
            relayed.near, relayed.far, PipeLimits(0.2, 10 * SECONDS), owner, free_account()
        ).begin()
        assert wait is not None and wait.seconds == 0.2
        run_to_end(wait)
        assert owner.outcomes == [Outcome(0, 0, "idle")]
        # A half-close would look like a complete stream.
        assert is_reset(relayed.client) and is_reset(relayed.target)

    def test_every_byte_restarts_the_idle_time(self, relayed: Relayed) -> None:
        relayed.start(PipeLimits(0.3, 10 * SECONDS))
        for _ in range(6):
            time.sleep(0.1)
            relayed.client.send(b"x")
            relayed.target.send(b"y")
        relayed.client.shutdown(socket.SHUT_WR)
        relayed.target.shutdown(socket.SHUT_WR)
        assert read_to_end(relayed.target) == b"xxxxxx"
        assert relayed.outcome().ended == "closed"

    def test_half_closed_relay_has_its_own_idle_time(self, relayed: Relayed) -> None:
        relayed.start(PipeLimits(10 * SECONDS, 0.2))
        time.sleep(0.3)
        relayed.client.shutdown(socket.SHUT_WR)
        assert read_to_end(relayed.target) == b""
        assert relayed.outcome().ended == "idle"

    def test_idle_time_does_not_apply_once_one_side_has_ended(self, relayed: Relayed) -> None:
        relayed.start(PipeLimits(0.2, 10 * SECONDS))
        relayed.client.shutdown(socket.SHUT_WR)
        assert read_to_end(relayed.target) == b""
        time.sleep(0.4)
        relayed.target.sendall(b"late answer")
        relayed.target.shutdown(socket.SHUT_WR)
        assert read_to_end(relayed.client) == b"late answer"
        assert relayed.outcome().ended == "closed"

    def test_idle_time_of_many_days_is_accepted(self, relayed: Relayed) -> None:
        """A configuration may say tcp_idle: 30d, which is more than poll(2) takes."""
        relayed.start(PipeLimits(30 * 86400.0, 30 * 86400.0))
        relayed.client.shutdown(socket.SHUT_WR)
        relayed.target.shutdown(socket.SHUT_WR)
        assert relayed.outcome().ended == "closed"


@pytest.mark.parametrize("closed", ["near", "far"])
def test_stream_that_is_closed_already_ends_in_a_reset(relayed: Relayed, closed: str) -> None:
    getattr(relayed, closed).close()
    relayed.start()
    assert relayed.outcome().ended == "reset"
    assert not relayed.near.open and not relayed.far.open


def fill(relayed: Relayed) -> int:
    """Send from the client until nothing moves any more, because the target does not read.

    Returns how many bytes were taken.
    """
    for sock in (relayed.client, relayed.near.socket, relayed.far.socket, relayed.target):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 65536)
    sent, piece, full_since = 0, bytes(32768), 0.0
    relayed.client.setblocking(False)
    while True:
        try:
            sent += relayed.client.send(piece)
            full_since = 0.0
        except BlockingIOError:
            now = time.monotonic()
            full_since = full_since or now
            if now - full_since > 0.1:
                break
            time.sleep(0.005)
    relayed.client.settimeout(SECONDS)
    return sent


def test_thread_relays_one_connection_after_the_other() -> None:
    """The buffer of the thread is used again, and holds nothing of the last relay."""

    def relay_twice() -> list[Outcome]:
        outcomes = []
        for data in (b"a" * 50000, b"b"):
            with tcp_pair() as (near, client), tcp_pair() as (far, target):
                send_all(client, data)
                send_all(target, b"")
                outcomes.append(relay(Stream(near), Stream(far), LIMITS))
                assert read_to_end(target) == data
        return outcomes

    assert Task(relay_twice).result() == [Outcome(50000, 0, "closed"), Outcome(1, 0, "closed")]
