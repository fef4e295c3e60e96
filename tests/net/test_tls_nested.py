"""TLS within TLS: all bytes arrive before the end, however small the reads are."""

from __future__ import annotations

import random
import select
import socket
from contextlib import contextmanager
from typing import Iterator

import pytest

from netproxy.net import syscalls, tls
from netproxy.net.syscalls import ROOM
from netproxy.net.tls_socket import LayeredCalls, TlsSocket
from netproxy.relay.direction import Direction
from tests.support.certificates import Certificates, certificates
from tests.support.sockets import SECONDS, read_to_end, tcp_pair

DATA = random.Random(9).randbytes(50_000)


class SmallPace:
    """A Pace that always allows so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = self.mark = size
        self.lease = 0

    def renew(self, moved: int) -> int:
        self.mark = moved + self.size
        return self.size

    def delay(self) -> float:
        return 0.0

    def decided(self) -> str:
        return ""


def meet(client: TlsSocket, server: TlsSocket) -> None:
    """Do a handshake between both ends, on this thread."""
    ends, left = (client, server), {client, server}
    while left:
        for end in ends:
            if not end.handshake():
                left.discard(end)


@pytest.fixture(scope="module")
def pem() -> Certificates:
    return certificates()


class Nested:
    """Both ends of TLS within TLS, of which neither waits."""

    def __init__(self, near: socket.socket, far: socket.socket, pem: Certificates) -> None:
        here = tls.server_context(pem.path("server.pem"), pem.path("server.key"), "")
        there = pem.client_context()
        # Tickets would be deciphered before the data.
        here.num_tickets = 0
        self.outer = TlsSocket(near, syscalls, there, "localhost")
        outer = TlsSocket(far, syscalls, here)
        meet(self.outer, outer)
        self.sender = TlsSocket(self.outer, LayeredCalls, there, "localhost")
        self.receiver = TlsSocket(outer, LayeredCalls, here)
        self.wire = far
        meet(self.sender, self.receiver)

    def send(self, data: bytes) -> None:
        while data:
            data = data[self.sender.send(data) :]

    def receive(self, size: int) -> bytes:
        """Return what is read, so many bytes at a time, until the peer has ended."""
        received, buffer = bytearray(), memoryview(bytearray(size))
        while not self.receiver.peer_ended:
            try:
                count = self.receiver.recv_into(buffer)
            except BlockingIOError:
                select.select([self.wire], [], [])
                continue
            received += buffer[:count]
            if not count:
                break
        return bytes(received)


@contextmanager
def nested(pem: Certificates) -> Iterator[Nested]:
    with tcp_pair() as (near, far):
        near.setblocking(False)
        far.setblocking(False)
        for sock in (near, far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        yield Nested(near, far, pem)


SIZES = (1, 2048, 16_384, 25_000, ROOM)


@pytest.mark.parametrize("size", SIZES)
def test_small_reads_give_all_before_the_end(pem: Certificates, size: int) -> None:
    with nested(pem) as both:
        both.send(DATA)
        both.sender.shutdown(socket.SHUT_WR)
        assert both.receive(size) == DATA and both.receiver.peer_ended


@pytest.mark.parametrize("size", SIZES)
def test_small_reads_give_all_before_an_end_of_the_outer_layer_alone(
    pem: Certificates, size: int
) -> None:
    with nested(pem) as both:
        both.send(DATA)
        both.outer.shutdown(socket.SHUT_WR)
        assert both.receive(size) == DATA and both.receiver.peer_ended


def test_end_within_a_record_of_the_inner_layer_is_an_end(pem: Certificates) -> None:
    with nested(pem) as both:
        both.send(DATA[:1000])
        both.outer.send(b"\x17\x03\x03\x40\x00" + bytes(100))
        both.outer.shutdown(socket.SHUT_WR)
        assert both.receive(ROOM) == DATA[:1000] and both.receiver.peer_ended


@pytest.mark.parametrize("size", (2048, 25_000))
def test_direction_with_a_small_room_moves_all(pem: Certificates, size: int) -> None:
    with nested(pem) as both, tcp_pair() as (near, far):
        near.setblocking(False)
        both.send(DATA)
        both.sender.shutdown(socket.SHUT_WR)
        select.select([both.wire], [], [])
        source = both.receiver
        direction = Direction(source, near, SmallPace(size), False, source)  # type: ignore[arg-type]
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        while not direction.done:
            direction.move()
            assert not direction.pending
        assert read_to_end(far) == DATA and direction.bytes_moved == len(DATA)


@pytest.mark.parametrize("lease", [2048, 25000])
def test_direction_whose_reads_are_small_moves_again_without_an_event(lease: int) -> None:
    """What was deciphered wakes no poll: the direction must not wait for the peer's next bytes."""
    with nested(certificates()) as both, tcp_pair() as (near, far):
        near.setblocking(False)
        both.send(DATA)
        select.select([both.wire], [], [], SECONDS)
        direction = Direction(both.receiver, near, SmallPace(lease), False, both.receiver)
        received = b""
        direction.move()
        while direction.paused or direction.pending:
            received += far.recv(1 << 20)
            direction.flush()
            if not direction.pending:
                direction.move()
        while len(received) < len(DATA):
            received += far.recv(1 << 20)
        assert received == DATA
