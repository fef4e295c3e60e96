"""The UDP listener: batches reach the handler, a fault costs one batch, a stop wakes the reader."""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterator

import pytest

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, Run
from netproxy.listener.udp import UdpListener
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.support.doubles import Counts, Lines
from tests.support.sockets import SECONDS, udp

LOCALHOST = Address("127.0.0.1", 0)


class Echo:
    """A PacketHandler that sends everything back, or raises `raises` for the next batch."""

    def __init__(self) -> None:
        self.raises: BaseException | None = None
        self.threads: set[threading.Thread] = set()

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        self.threads.add(threading.current_thread())
        if self.raises and batch.spans:
            error, self.raises = self.raises, None
            raise error
        for offsets, length, last, key in batch.spans:
            local.send(batch.arena, Run(offsets, length, last), local.reply_destination(key))


class Rig:
    def __init__(self, level: str) -> None:
        self.counts, self.log, self.handler = Counts(), Lines(), Echo()
        self.datagrams = UdpSocketFactory(self.counts, self.log, level)
        self.listener = self.listen(LOCALHOST)

    def listen(self, address: Address) -> UdpListener:
        listener = UdpListener(address, self.datagrams, self.counts, self.log)
        listener.handler = self.handler
        return listener


@pytest.fixture(params=["mmsg", "trains"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.listener.stop()


def ask(listener: UdpListener, data: bytes) -> bytes:
    with udp() as client:
        client.sendto(data, (*listener.address,))
        return client.recv(100)


def test_datagrams_reach_the_handler_on_its_own_thread(rig: Rig) -> None:
    rig.listener.start()
    assert [ask(rig.listener, data) for data in (b"one", b"two", b"")] == [b"one", b"two", b""]
    assert rig.handler.threads == {rig.listener.thread}
    assert rig.listener.thread.name == f"udp-listener {rig.listener.address}"


def test_datagrams_that_came_before_the_start_are_handled(rig: Rig) -> None:
    with udp() as client:
        client.sendto(b"early", (*rig.listener.address,))
        rig.listener.start()
        assert client.recv(100) == b"early"


def test_fault_of_the_handler_costs_one_batch_and_is_logged(rig: Rig) -> None:
    """Hazard 97."""
    rig.handler.raises = ValueError("broken")
    rig.listener.start()
    with udp() as client:
        client.sendto(b"x", (*rig.listener.address,))
        rig.log.wait_for("broken")
    assert ask(rig.listener, b"next") == b"next"
    assert rig.log.of("exception") == [f"handling datagrams on {rig.listener.address}: broken"]
    assert rig.counts.of("drops", "internal error") == 1


def test_stop_wakes_the_reader_and_frees_the_port(rig: Rig) -> None:
    rig.listener.start()
    assert ask(rig.listener, b"x") == b"x"
    rig.listener.stop()
    assert not rig.listener.thread.is_alive()
    assert not rig.log.lines
    again = rig.listen(rig.listener.address)
    again.stop()


def test_listener_can_be_stopped_right_after_its_start(rig: Rig) -> None:
    for _ in range(50):
        listener = rig.listen(LOCALHOST)
        listener.start()
        listener.stop()
        assert not listener.thread.is_alive()


def test_listener_that_never_started_can_be_stopped(rig: Rig) -> None:
    rig.listener.stop()
    rig.listener.stop()


def test_address_in_use_is_named(rig: Rig) -> None:
    with pytest.raises(ListenError, match=f"^cannot listen on udp {rig.listener.address}: "):
        rig.listen(rig.listener.address)


def test_new_handler_gets_the_next_datagrams(rig: Rig) -> None:
    rig.listener.start()
    ask(rig.listener, b"x")
    old: Any = rig.listener.handler
    seen = threading.Event()

    class New:
        handle_packets: Callable[..., None] = staticmethod(lambda batch, local: seen.set())

    rig.listener.handler = New()
    with udp() as client:
        client.sendto(b"y", (*rig.listener.address,))
        assert seen.wait(SECONDS)
    assert old.threads
