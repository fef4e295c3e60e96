"""Connections of a listener: the threads that drive a handshake, and its one end."""

from __future__ import annotations

import errno
import os
import socket
import threading
from functools import partial
from typing import Any, Callable

import pytest

from netproxy.errors import CannotLoad, ProtocolError, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Handshake, Stream, Wait
from netproxy.listener import poller as poller_module
from tests.support.sockets import (
    SECONDS,
    nothing_comes,
    read_exactly,
    read_to_end,
    reset,
    wait_until,
)
from tests.support.tcp import TcpRig

POLLER, POOL = "poller", "connection-"


class Lines:
    """A handler that returns each line, and remembers which threads have driven it.

    "again" goes on with the next line, every other line ends the connection.  "thread" and
    "wait" need a blocking call before the answer; that of "wait" returns once `may_go_on` is
    set.  A line of `fails` raises its error, on the poller's thread, or on a pool thread if it
    is in `fails_on_thread`.
    """

    def __init__(self) -> None:
        # Names of threads: where a handshake began, read a line, made a blocking call.
        self.began: list[str] = []
        self.read: list[str] = []
        self.blocked: list[str] = []
        self.fails: dict[bytes, BaseException] = {}
        self.fails_on_thread: set[bytes] = set()
        self.may_go_on = threading.Event()

    def handle(self, stream: Stream, client: Address) -> Handshake:
        self.began.append(threading.current_thread().name)
        while True:
            line = yield from stream.read_until(b"\n", 100)
            self.read.append(threading.current_thread().name)
            if line in (b"thread\n", b"wait\n") or line in self.fails_on_thread:
                yield Blocking(partial(self._block, line))
            if line in self.fails:
                raise self.fails[line]
            stream.reply(line)
            if line != b"again\n":
                return None

    def _block(self, line: bytes) -> None:
        self.blocked.append(threading.current_thread().name)
        if line == b"wait\n":
            assert self.may_go_on.wait(SECONDS)


Start = Callable[..., tuple[TcpRig, Lines]]


@pytest.fixture
def start(make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch) -> Start:
    """Return a function that starts a listener with such a handler."""
    monkeypatch.setattr(poller_module, "TICK", 0.02)

    def start(threads: int = 8, handshake: float = 10 * SECONDS) -> tuple[TcpRig, Lines]:
        rig, lines = make(threads), Lines()
        rig.configure(lines, handshake)
        rig.listener.start()
        return rig, lines

    return start


def test_handshake_that_only_waits_for_its_client_takes_no_pool_thread(start: Start) -> None:
    rig, lines = start()
    socks = [rig.connect() for _ in range(20)]
    wait_until(lambda: len(rig.poller) == 20)
    for sock in socks:
        for byte in (b"h", b"i", b"\n"):
            sock.sendall(byte)
        assert read_to_end(sock) == b"hi\n"
    wait_until(rig.all_ended)
    assert rig.pool.threads == 0
    assert set(lines.began) == {rig.listener.thread.name} and lines.read == [POLLER] * 20
    assert rig.outcomes() == {"accepted": 20}


def test_blocking_call_takes_a_pool_thread(start: Start) -> None:
    rig, lines = start()
    sock = rig.connect()
    sock.sendall(b"thread\n")
    assert read_to_end(sock) == b"thread\n"
    wait_until(rig.all_ended)
    assert rig.pool.threads == 1 and [name.startswith(POOL) for name in lines.blocked] == [True]
    assert rig.outcomes() == {"accepted": 1}


@pytest.mark.parametrize("command", [b"thread\n", b"again\n"])
def test_wait_for_a_thread_goes_on_on_the_pool_thread_that_it_has(
    start: Start, monkeypatch: pytest.MonkeyPatch, command: bytes
) -> None:
    """A wait that watches nothing asks for a pool thread."""
    rig, lines = start()
    threads: list[int] = []

    def go_on(stream: Stream, left: int, ready: bool) -> Wait | None:
        assert ready
        threads.append(threading.get_ident())
        if left:
            return Wait((), None, partial(go_on, stream, left - 1))
        stream.reply(b"done\n")
        return None

    def handle(stream: Stream, client: Address) -> Handshake:
        if (yield from stream.read_until(b"\n", 100)) == b"thread\n":
            yield Blocking(lambda: threads.append(threading.get_ident()))
        return Wait((), None, partial(go_on, stream, 2))

    monkeypatch.setattr(lines, "handle", handle)
    sock = rig.connect()
    sock.sendall(command)
    assert read_to_end(sock) == b"done\n"
    wait_until(rig.all_ended)
    assert len(threads) == 3 + (command == b"thread\n") and len(set(threads)) == 1
    assert rig.pool.threads == 1


def test_handshake_goes_on_from_line_to_line_on_the_pollers_thread(start: Start) -> None:
    rig, lines = start()
    sock = rig.connect()
    sock.sendall(b"again\nagain\n")
    assert read_exactly(sock, 12) == b"again\nagain\n"
    sock.sendall(b"end\n")
    assert read_to_end(sock) == b"end\n"
    assert rig.pool.threads == 0 and lines.read == [POLLER] * 3


def test_handshake_returns_to_the_poller_after_a_blocking_call(start: Start) -> None:
    rig, lines = start()
    sock = rig.connect()
    lines.fails_on_thread.add(b"again\n")
    sock.sendall(b"again\n")
    assert read_exactly(sock, 6) == b"again\n"
    wait_until(lambda: len(rig.poller) == 1 and not rig.pool.busy)
    sock.sendall(b"end\n")
    assert read_to_end(sock) == b"end\n"
    assert lines.read == [POLLER] * 2 and len(lines.blocked) == 1


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (StreamError("gone"), "broken off"),
        (ProtocolError("bad"), "bad protocol"),
        (CannotLoad("json", OSError(24, "Too many open files")), "cannot be served"),
        (ValueError("broken"), "internal error"),
    ],
    ids=["stream", "protocol", "module", "fault"],
)
@pytest.mark.parametrize("thread", ["poller", "pool"])
def test_failed_handshake_is_counted_once_by_its_kind(
    start: Start, thread: str, error: BaseException, counted: str
) -> None:
    rig, lines = start()
    lines.fails[b"fail\n"] = error
    if thread == "pool":
        lines.fails_on_thread.add(b"fail\n")
    sock = rig.connect()
    sock.sendall(b"fail\n")
    assert read_to_end(sock) == b""
    wait_until(rig.all_ended)
    assert rig.outcomes() == {"accepted": 1, counted: 1}
    assert len(rig.log.of("exception")) == (counted == "internal error")


@pytest.mark.parametrize("sent", [b"", b"half a line"], ids=["silent", "half a line"])
@pytest.mark.parametrize(
    ("leave", "counted"),
    [(lambda sock: sock.shutdown(socket.SHUT_WR), "closed early"), (reset, "broken off")],
    ids=["end", "reset"],
)
def test_client_that_leaves_ends_its_handshake(
    start: Start, sent: bytes, leave: Callable[[socket.socket], None], counted: str
) -> None:
    rig, _ = start()
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    sock.sendall(sent)
    (connection,) = rig.listener._live
    wait_until(lambda: connection.stream.unread() == sent)
    leave(sock)
    wait_until(rig.all_ended)
    assert rig.outcomes() == {"accepted": 1, counted: 1}


def test_deadline_ends_silent_and_dripping_handshakes(start: Start) -> None:
    rig, _ = start(handshake=0.3)
    silent, dripping = rig.connect(), rig.connect()
    wait_until(lambda: len(rig.poller) == 2)
    dripping.settimeout(0.02)
    for _ in range(250):  # 5 seconds
        try:
            dripping.sendall(b"x")
            assert dripping.recv(1) == b""
            break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        raise AssertionError("a client that sends byte by byte has no deadline")
    assert read_to_end(silent) == b""
    wait_until(rig.all_ended)
    assert rig.outcomes() == {"accepted": 2, "timed out": 2}


def test_full_pool_does_not_delay_handshakes_that_need_no_thread(start: Start) -> None:
    rig, lines = start(1)
    first, second = rig.connect(), rig.connect()
    first.sendall(b"wait\n")
    wait_until(lambda: lines.blocked)
    second.sendall(b"thread\n")
    for _ in range(3):
        sock = rig.connect()
        sock.sendall(b"hello\n")
        assert read_to_end(sock) == b"hello\n"
    assert nothing_comes(first) and nothing_comes(second)
    rig.log.wait_for("all threads are busy")
    lines.may_go_on.set()
    assert (read_to_end(first), read_to_end(second)) == (b"wait\n", b"thread\n")
    wait_until(rig.all_ended)
    assert rig.pool.threads == 1 and rig.outcomes() == {"accepted": 5}


def test_connections_that_need_a_thread_wait_while_the_pool_is_full(start: Start) -> None:
    rig, lines = start(1)
    first = rig.connect()
    first.sendall(b"wait\n")
    wait_until(lambda: lines.blocked)
    socks = [rig.connect() for _ in range(3)]
    for sock in socks:
        sock.sendall(b"thread\n")
    rig.log.wait_for("all threads are busy")
    assert all(nothing_comes(sock) for sock in socks)
    lines.may_go_on.set()
    assert [read_to_end(sock) for sock in socks] == [b"thread\n"] * 3
    assert rig.pool.threads == 1


@pytest.mark.parametrize("sent", [b"", b"x"], ids=["silent", "after a byte"])
def test_abort_ends_a_handshake(start: Start, sent: bytes) -> None:
    rig, _ = start()
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    sock.sendall(sent)
    (connection,) = rig.listener._live
    wait_until(lambda: connection.stream.unread() == sent)
    rig.listener.stop()
    rig.listener.abort()
    assert read_to_end(sock) == b""
    wait_until(rig.all_ended)
    assert rig.outcomes() == {"accepted": 1, "closed early": 1}


def test_handshake_goes_on_after_its_listener_has_stopped(start: Start) -> None:
    rig, _ = start()
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    rig.listener.stop()
    sock.sendall(b"hello\n")
    assert read_to_end(sock) == b"hello\n"


def test_new_handler_is_for_later_connections_only(start: Start) -> None:
    rig, before = start()
    first = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    later = Lines()
    rig.configure(later)
    second = rig.connect()
    for sock in (first, second):
        sock.sendall(b"hello\n")
        assert read_to_end(sock) == b"hello\n"
    assert (len(before.read), len(later.read)) == (1, 1)


class FullEpoll:
    """An epoll that registers nothing more."""

    def __init__(self, inner: Any) -> None:
        self.poll, self.unregister, self.close = inner.poll, inner.unregister, inner.close

    def register(self, descriptor: int, events: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_connection_that_cannot_be_watched_is_served_by_a_pool_thread(
    make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has no memory for the epoll; the accepting thread must not wait for a client."""
    rig, lines = make(), Lines()
    monkeypatch.setattr(rig.poller, "_epoll", FullEpoll(rig.poller._epoll))
    rig.configure(lines)
    rig.listener.start()
    silent, sock = rig.connect(), rig.connect()
    sock.sendall(b"again\nhello\n")
    assert read_to_end(sock) == b"again\nhello\n"
    silent.sendall(b"here\n")
    assert read_to_end(silent) == b"here\n"
    wait_until(rig.all_ended)
    assert len(lines.read) == 3 and all(name.startswith(POOL) for name in lines.read)
    assert rig.outcomes() == {"accepted": 2, "not watched": 2}


def test_connection_that_needs_a_thread_ends_once_the_pool_has_stopped(start: Start) -> None:
    rig, lines = start()
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    rig.pool.stop(1.0)
    sock.sendall(b"thread\n")
    assert read_to_end(sock) == b""
    wait_until(rig.all_ended)
    assert not lines.blocked
    assert rig.outcomes() == {"accepted": 1}
    assert rig.counts.of("connections_refused", "no thread") == 1


def test_reused_descriptor_belongs_to_its_new_connection(start: Start) -> None:
    """Many connections end on the poller's thread while others are accepted."""
    rig, _ = start()
    for number in range(300):
        sock = rig.connect()
        sock.sendall(b"%d\n" % number)
        if number % 3:
            assert read_to_end(sock) == b"%d\n" % number
            sock.close()
    for number, sock in enumerate(rig.clients):
        if not number % 3:
            assert read_to_end(sock) == b"%d\n" % number
    wait_until(rig.all_ended)
    assert rig.outcomes() == {"accepted": 300} and rig.pool.threads == 0
