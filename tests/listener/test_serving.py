"""Connections that begin without a thread: who takes one, how each ends, and that it ends once."""

from __future__ import annotations

import errno
import os
import socket
import threading
from typing import Any, Callable

import pytest

from netproxy.errors import NeedsThread, ProtocolError, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Wait
from netproxy.listener import poller as parker_module
from netproxy.net.stream import Stream
from tests.support.sockets import nothing_comes, read_exactly, read_to_end, reset, wait_until
from tests.support.tcp import TcpRig

POLLER, POOL, ACCEPTING = "poller", "connection-", "tcp-listener "


class Lines:
    """A handler that gives each line back, without a thread where it can; remembers which threads did what.

    "thread" is served by a thread, "wait" by one that `goes_on`; "again" by another attempt; all others end it, the rest of
    `fails` by what is raised.
    """

    def __init__(self) -> None:
        self.attempts: list[str] = []
        self.handled: list[str] = []
        self.welcomed: list[bytes] = []
        self.fails: dict[bytes, BaseException] = {}
        self.goes_on = threading.Event()

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        self.handled.append(threading.current_thread().name)
        line = stream.read_until(b"\n", 100)
        if line == b"wait\n":
            assert self.goes_on.wait(5)
        if line in self.fails:
            raise self.fails[line]
        stream.write(line)
        return None

    def attempt(self, stream: Stream, client: Address) -> Wait | None:
        self.attempts.append(threading.current_thread().name)
        return stream.attempt(
            lambda: self._attempt(stream, client), lambda: self.handle(stream, client)
        )

    def _attempt(self, stream: Stream, client: Address) -> Wait | None:
        self.attempts.append(threading.current_thread().name)
        line = stream.read_until(b"\n", 100)
        if line in (b"thread\n", b"wait\n"):
            raise NeedsThread
        if line in self.fails:
            raise self.fails[line]
        stream.write(line)
        return self.attempt(stream, client) if line == b"again\n" else None


@pytest.fixture
def rig(make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch) -> TcpRig:
    monkeypatch.setattr(parker_module, "TICK", 0.02)
    return started(make())


def started(rig: TcpRig, handshake: float = 5.0) -> TcpRig:
    rig.handler = Lines()  # type: ignore[assignment]
    rig.listener.configure(rig.handler, rig.door, handshake)
    rig.listener.start()
    return rig


def ended(rig: TcpRig) -> bool:
    """Each once: a door that somebody leaves twice raises."""
    return not rig.listener.live and not rig.door.inside and not len(rig.poller)


def outcomes(rig: TcpRig) -> dict[str, int]:
    return {
        reason: value
        for (name, reason), value in rig.counts.counts.items()
        if name == "connections"
    }


def test_what_only_waits_for_its_client_takes_no_thread(rig: TcpRig) -> None:
    socks = [rig.connect() for _ in range(20)]
    wait_until(lambda: len(rig.poller) == 20)
    for sock in socks:
        for byte in (b"h", b"i", b"\n"):
            sock.sendall(byte)
        assert read_to_end(sock) == b"hi\n"
    wait_until(lambda: ended(rig))
    handler: Any = rig.handler
    assert rig.pool.threads == 0 and not handler.handled
    assert {name for name in handler.attempts if name != POLLER} == {rig.listener.thread.name}
    assert outcomes(rig) == {"accepted": 20}


def test_what_must_wait_takes_one(rig: TcpRig) -> None:
    sock = rig.connect()
    sock.sendall(b"thread\n")
    assert read_to_end(sock) == b"thread\n"
    wait_until(lambda: ended(rig))
    handler: Any = rig.handler
    assert rig.pool.threads == 1 and [name.startswith(POOL) for name in handler.handled] == [True]
    assert outcomes(rig) == {"accepted": 1}


def test_one_attempt_leads_to_another(rig: TcpRig) -> None:
    sock = rig.connect()
    sock.sendall(b"again\nagain\n")
    assert read_exactly(sock, 12) == b"again\nagain\n"
    sock.sendall(b"end\n")
    assert read_to_end(sock) == b"end\n"
    assert rig.pool.threads == 0


@pytest.mark.parametrize(
    "error, counted",
    [
        (StreamError("gone"), "broken off"),
        (ProtocolError("bad"), "bad protocol"),
        (ValueError("broken"), "internal error"),
    ],
    ids=["stream", "protocol", "fault"],
)
@pytest.mark.parametrize("way", ["attempt", "handle"])
def test_failures_are_told_apart_and_counted_once(
    make: Callable[..., TcpRig], way: str, error: BaseException, counted: str
) -> None:
    rig = make()
    handler = rig.handler = Lines()  # type: ignore[assignment]
    handler.fails[b"fail\n"] = error
    rig.listener.configure(handler, rig.door, 5.0)
    if way == "handle":
        rig.listener._attempt = None
    rig.listener.start()
    sock = rig.connect()
    sock.sendall(b"fail\n")
    assert read_to_end(sock) == b""
    wait_until(lambda: ended(rig))
    assert outcomes(rig) == {"accepted": 1, counted: 1}
    assert len(rig.log.of("exception")) == (counted == "internal error")


@pytest.mark.parametrize("said", [b"", b"half a line"])
@pytest.mark.parametrize(
    "leaves, counted",
    [(lambda sock: sock.shutdown(socket.SHUT_WR), "bad protocol"), (reset, "broken off")],
    ids=["end", "reset"],
)
def test_a_client_that_leaves(
    rig: TcpRig, said: bytes, leaves: Callable[[socket.socket], None], counted: str
) -> None:
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    sock.sendall(said)
    handler: Any = rig.handler
    wait_until(lambda: len(handler.attempts) == (2 if said else 1))
    leaves(sock)
    wait_until(lambda: ended(rig))
    assert outcomes(rig) == {"accepted": 1, counted: 1}


def test_the_handshakes_time_is_up_for_the_silent_and_for_those_that_drip(
    make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parker_module, "TICK", 0.02)
    rig = started(make(), 0.3)
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
        raise AssertionError("it went on for ever")
    assert read_to_end(silent) == b""
    wait_until(lambda: ended(rig))
    assert outcomes(rig) == {"accepted": 2, "broken off": 2}


def test_a_full_pool_keeps_nobody_out_who_needs_no_thread(make: Callable[..., TcpRig]) -> None:
    rig = started(make(1))
    handler: Any = rig.handler
    first, second = rig.connect(), rig.connect()
    first.sendall(b"wait\n")
    wait_until(lambda: handler.handled)
    second.sendall(b"thread\n")
    for _ in range(3):  # one is accepted by whoever has asked for room a while ago
        sock = rig.connect()
        sock.sendall(b"hello\n")
        assert read_to_end(sock) == b"hello\n"
    assert nothing_comes(first) and nothing_comes(second)
    rig.log.wait_for("all threads are busy")
    handler.goes_on.set()
    assert (read_to_end(first), read_to_end(second)) == (b"wait\n", b"thread\n")
    wait_until(lambda: ended(rig))
    assert rig.pool.threads == 1 and outcomes(rig) == {"accepted": 5}


def test_without_attempts_a_full_pool_keeps_all_waiting(make: Callable[..., TcpRig]) -> None:
    rig = started(make(1))
    handler: Any = rig.handler
    rig.listener._attempt = None
    first = rig.connect()
    first.sendall(b"wait\n")
    wait_until(lambda: handler.handled)
    socks = [rig.connect() for _ in range(3)]
    for sock in socks:
        sock.sendall(b"hello\n")
    rig.log.wait_for("all threads are busy")
    assert all(nothing_comes(sock) for sock in socks) and len(rig.door.entered) <= 2
    handler.goes_on.set()
    assert [read_to_end(sock) for sock in socks] == [b"hello\n"] * 3


@pytest.mark.parametrize("when", ["silent", "after a byte"])
def test_an_abort_ends_it(rig: TcpRig, when: str) -> None:
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    if when != "silent":
        sock.sendall(b"x")
        handler: Any = rig.handler
        wait_until(lambda: len(handler.attempts) == 2)
    rig.listener.stop()
    rig.listener.abort()
    assert read_to_end(sock) == b""
    wait_until(lambda: ended(rig))
    assert outcomes(rig) == {"accepted": 1, "bad protocol": 1}


def test_it_goes_on_after_its_listener_has_stopped(rig: TcpRig) -> None:
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    rig.listener.stop()
    sock.sendall(b"hello\n")
    assert read_to_end(sock) == b"hello\n"


def test_another_handler_is_for_those_that_come_later(rig: TcpRig) -> None:
    first = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    before: Any = rig.handler
    later = Lines()
    rig.listener.configure(later, rig.door, 5.0)
    second = rig.connect()
    for sock in (first, second):
        sock.sendall(b"hello\n")
        assert read_to_end(sock) == b"hello\n"
    assert len(before.attempts) == len(later.attempts) == 2


class Full:
    """An epoll that takes nobody in."""

    def __init__(self, inner: Any) -> None:
        self.poll, self.unregister, self.close = inner.poll, inner.unregister, inner.close

    def register(self, descriptor: int, events: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_where_it_cannot_be_watched_a_thread_serves_it_and_accepting_goes_on(
    make: Callable[..., TcpRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has no room for more in the epoll; whoever accepts must not wait for the client in the parker's place."""
    rig = make()
    monkeypatch.setattr(rig.poller, "_epoll", Full(rig.poller._epoll))
    started(rig)
    silent, sock = rig.connect(), rig.connect()
    sock.sendall(b"hello\n")
    assert read_to_end(sock) == b"hello\n"
    silent.sendall(b"here\n")
    assert read_to_end(silent) == b"here\n"
    wait_until(lambda: ended(rig))
    handler: Any = rig.handler
    assert len(handler.handled) == 2 and all(name.startswith(POOL) for name in handler.handled)
    assert outcomes(rig) == {"accepted": 2}


@pytest.mark.parametrize("line", [b"thread\n", b"fail\n"])
def test_once_the_pool_has_stopped_it_ends_at_once_and_once(
    make: Callable[..., TcpRig], line: bytes
) -> None:
    rig = started(make())
    handler: Any = rig.handler
    handler.fails[b"fail\n"] = ProtocolError("bad")
    sock = rig.connect()
    wait_until(lambda: len(rig.poller) == 1)
    rig.pool.stop(1.0)
    sock.sendall(line)
    assert read_to_end(sock) == b""
    wait_until(lambda: ended(rig))
    assert outcomes(rig) == {"accepted": 1, "broken off": 1}


def test_a_descriptor_that_is_reused_at_once_is_its_new_owners(rig: TcpRig) -> None:
    """Many at a time, each ended on the parker's thread while others are accepted: nobody gets another's line, or none."""
    for number in range(300):
        sock = rig.connect()
        sock.sendall(b"%d\n" % number)
        if number % 3:
            assert read_to_end(sock) == b"%d\n" % number
            sock.close()
    for number, sock in enumerate(rig.clients):
        if not number % 3:
            assert read_to_end(sock) == b"%d\n" % number
    wait_until(lambda: ended(rig))
    assert outcomes(rig) == {"accepted": 300} and rig.pool.threads == 0
