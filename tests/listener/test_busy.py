"""A busy listener lends its socket to the poller, and gets it back."""

from __future__ import annotations

import errno
import os
import socket
import threading
from typing import Any, Callable

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Handshake, Stream
from netproxy.listener import busy, poller
from netproxy.listener import tcp as tcp_module
from netproxy.listener.tcp import TcpListener
from tests.support.sockets import (
    SECONDS,
    Task,
    nothing_comes,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.tcp import TcpRig

POLLER = "poller"


class Names:
    """A handler that notes on which threads handshakes begin, and answers."""

    def __init__(self) -> None:
        self.began: list[str] = []

    def handle(self, stream: Stream, client: Address) -> Handshake:
        self.began.append(threading.current_thread().name)
        stream.reply(b"served")
        yield from stream.read_some(1)
        return None


@pytest.fixture
def names() -> Names:
    return Names()


@pytest.fixture
def lent(make: Callable[..., TcpRig], names: Names, monkeypatch: pytest.MonkeyPatch) -> TcpRig:
    """A listener whose socket the poller has: it is busy with its first connection."""
    monkeypatch.setattr(busy, "BUSY_ACCEPTS", 1)
    monkeypatch.setattr(busy, "BUSY_SECONDS", float("inf"))
    monkeypatch.setattr(busy, "QUIET_SECONDS", 10 * SECONDS)
    rig = make()
    rig.configure(names)
    rig.listener.start()
    served(rig)
    wait_until(lambda: is_lent(rig))
    return rig


def served(rig: TcpRig) -> socket.socket:
    """Return a connection that was served."""
    sock = rig.connect()
    assert read_exactly(sock, 6) == b"served"
    return sock


def is_lent(rig: TcpRig) -> bool:
    """Return whether the poller watches the listening socket."""
    return rig.listener.socket.fileno() in rig.poller._watches


def fail_accept(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Make the next accept() fail."""
    accept, left = tcp_module.TcpListener._accept, [code]

    def failing_accept(sock: socket.socket) -> Any:  # Any: as accept()
        if left:
            raise OSError(left[0], os.strerror(left.pop()))
        return accept(sock)

    monkeypatch.setattr(tcp_module.TcpListener, "_accept", staticmethod(failing_accept))


def test_connections_of_a_busy_listener_begin_on_the_pollers_thread(
    lent: TcpRig, names: Names
) -> None:
    for _ in range(2 * busy.BATCH):
        served(lent)
    assert names.began == [lent.listener.thread.name] + [POLLER] * 2 * busy.BATCH
    assert lent.listener.live == 1 + 2 * busy.BATCH and lent.pool.threads == 0
    wait_until(lambda: len(lent.poller) == lent.listener.live)  # the listening socket is left out


def test_backlog_longer_than_a_batch_is_accepted(lent: TcpRig, names: Names) -> None:
    socks = [lent.connect() for _ in range(3 * busy.BATCH)]
    assert all(read_exactly(sock, 6) == b"served" for sock in socks)
    assert names.began[1:] == [POLLER] * 3 * busy.BATCH


def test_listener_that_is_not_busy_accepts_on_its_own_thread(
    make: Callable[..., TcpRig], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busy, "BUSY_ACCEPTS", 2)
    monkeypatch.setattr(busy, "BUSY_SECONDS", 0.0)
    rig = make()
    rig.configure(names)
    rig.listener.start()
    for _ in range(4):
        served(rig)
    assert names.began == [rig.listener.thread.name] * 4 and not is_lent(rig)


def test_socket_goes_back_when_no_connection_has_come_for_a_moment(
    make: Callable[..., TcpRig], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "TICK", 0.02)
    monkeypatch.setattr(busy, "BUSY_ACCEPTS", 1)
    monkeypatch.setattr(busy, "BUSY_SECONDS", float("inf"))
    monkeypatch.setattr(busy, "QUIET_SECONDS", 0.0)
    rig = make()
    rig.configure(names)
    rig.listener.start()
    served(rig)
    wait_until(rig.listener._busy._is_back.is_set)
    monkeypatch.setattr(busy, "BUSY_ACCEPTS", 1000)
    served(rig)
    assert names.began == [rig.listener.thread.name] * 2 and not is_lent(rig)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ECONNABORTED])
def test_failed_accept_is_counted_and_gives_the_socket_back(
    lent: TcpRig, names: Names, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Hazard 92: the listener's thread may pause, the poller's may not."""
    monkeypatch.setattr(busy, "BUSY_ACCEPTS", 1000)
    fail_accept(monkeypatch, code)
    served(lent)
    assert names.began == [lent.listener.thread.name] * 2 and not is_lent(lent)
    assert lent.counts.of("accept_errors", errno.errorcode[code]) == 1
    assert len(lent.log.of("limited")) == (code == errno.EMFILE)


def test_fault_before_the_handshake_costs_its_connection_only(
    lent: TcpRig, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(client: str) -> str:
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(lent.admission, "enter", enter)
        assert read_to_end(lent.connect()) == b""
    assert len(lent.log.of("exception")) == 1
    served(lent)
    assert names.began[-1] == POLLER


def test_stop_while_the_poller_accepts(lent: TcpRig) -> None:
    sock = served(lent)
    descriptor = lent.listener.socket.fileno()
    lent.listener.stop()
    assert not lent.listener.thread.is_alive() and descriptor not in lent.poller._watches
    with pytest.raises(ConnectionRefusedError):
        lent.connect()
    assert nothing_comes(sock) and not lent.log.lines


def test_stop_after_the_poller_has_ended(lent: TcpRig) -> None:
    lent.clients[0].close()
    wait_until(lambda: not lent.listener.live)
    lent.poller.stop()
    lent.closed = True
    Task(lent.listener.stop).result()
    assert not lent.listener.thread.is_alive()


def test_stop_of_an_activation_socket_that_the_poller_has(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never shut down, as the service manager has it too."""
    monkeypatch.setattr(busy, "BUSY_ACCEPTS", 1)
    monkeypatch.setattr(busy, "BUSY_SECONDS", float("inf"))
    with socket.create_server(("127.0.0.1", 0)) as activated:
        rig = TcpRig()
        rig.listener.stop()
        copy = socket.socket(fileno=os.dup(activated.fileno()))
        rig.listener = TcpListener(Address("127.0.0.1", 0), rig.serving, copy)
        rig.configure(names)
        rig.listener.start()
        served(rig).close()
        descriptor = rig.listener.socket.fileno()
        wait_until(lambda: is_lent(rig))
        Task(rig.listener.stop).result()
        assert descriptor not in rig.poller._watches and not rig.listener.thread.is_alive()
        rig.close()
        with socket.create_connection(activated.getsockname(), SECONDS):
            activated.accept()[0].close()


def test_connections_that_the_kernel_has_accepted_are_served_when_it_stops(
    lent: TcpRig, names: Names
) -> None:
    held, may_go_on = threading.Event(), threading.Event()

    def verify_request(request: Any, client: Any) -> bool:  # Any: as in TcpListener
        held.set()
        return may_go_on.wait(SECONDS)

    lent.listener.verify_request = verify_request  # type: ignore[method-assign]
    socks = [lent.connect() for _ in range(4)]
    assert held.wait(SECONDS)
    del lent.listener.verify_request
    lent.admission.inside.append("127.0.0.1")  # for the first, which was not counted in
    stopping = threading.Thread(target=lent.listener.stop)
    stopping.start()
    wait_until(lambda: len(names.began) == 4)
    may_go_on.set()
    stopping.join(SECONDS)
    assert not stopping.is_alive()
    assert all(read_exactly(sock, 6) == b"served" for sock in socks)


def test_listener_without_a_watch_goes_on_accepting(
    make: Callable[..., TcpRig], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may have no memory for another watch."""
    monkeypatch.setattr(busy, "BUSY_ACCEPTS", 1)
    monkeypatch.setattr(busy, "BUSY_SECONDS", float("inf"))
    rig = make()
    rig.configure(names)
    watch = rig.poller.watch

    def fail(wait: Any, owner: Any) -> None:  # Any: as in Poller
        if owner is rig.listener._busy:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        watch(wait, owner)

    monkeypatch.setattr(rig.poller, "watch", fail)
    rig.listener.start()
    for _ in range(3):
        served(rig)
    assert names.began == [rig.listener.thread.name] * 3


def test_bytes_that_came_before_the_accept_are_read_at_once(lent: TcpRig, names: Names) -> None:
    """The poller watches no connection that can go on, and any other after that."""
    held, may_go_on = threading.Event(), threading.Event()
    lent.configure(lent.handler)  # returns the first line

    def verify_request(request: Any, client: Any) -> bool:  # Any: as in TcpListener
        held.set()
        lent.admission.enter("127.0.0.1")
        return may_go_on.wait(SECONDS)

    lent.listener.verify_request = verify_request  # type: ignore[method-assign]
    socks = [lent.connect() for _ in range(3)]
    assert held.wait(SECONDS)
    socks[0].sendall(b"whole\n")
    socks[1].sendall(b"ha")
    may_go_on.set()
    assert read_exactly(socks[0], 6) == b"whole\n"
    socks[1].sendall(b"lf\n")
    assert read_exactly(socks[1], 5) == b"half\n"
    assert nothing_comes(socks[2])
    socks[2].sendall(b"late\n")
    assert read_exactly(socks[2], 5) == b"late\n"
    for sock in lent.clients:
        sock.close()
    wait_until(lambda: not lent.listener.live)


def test_fault_in_the_first_bytes_ends_the_connection_once(lent: TcpRig) -> None:
    lent.configure(lent.handler)
    lent.handler.raises = ValueError("broken")
    sock = lent.connect()
    sock.sendall(b"x\n")
    assert read_to_end(sock) == b""
    lent.log.wait_for("broken")
    assert len(lent.log.of("exception")) == 1
    wait_until(lambda: lent.listener.live == 1)
