"""Questions from a listener's socket, and their answers among datagrams of others."""

from __future__ import annotations

import select
import socket
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.net.address import from_sockaddr
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.protocol import stun
from netproxy.public_address.stun_port import ASKED_LIMIT, StunPort
from tests.support.doubles import Counts
from tests.support.handlers import LOCALHOST, SECONDS, RecordingLog
from tests.support.stun_server import StunServer, stun_server

ID = bytes(range(12))
MAPPED = Address("203.0.113.5", 40000)


class Rig:
    """A StunPort on a socket of its own."""

    def __init__(self, level: str) -> None:
        self.counts = Counts()
        sockets = UdpSocketFactory(self.counts, RecordingLog(), level)
        self.local = sockets.listen(Address(LOCALHOST, 0))
        self.arena = sockets.arena()
        self.port = StunPort(self.counts)
        self.port.local = self.local
        self.answers: list[tuple[bytes, Address | None]] = []
        self.port.answered = lambda *answer: self.answers.append(answer)

    def take(self) -> tuple[int, int]:
        """Return how many datagrams came with the next batch, and how many were taken."""
        poll = select.poll()
        poll.register(self.local.socket, select.POLLIN)
        assert poll.poll(SECONDS * 1000)
        batch = self.local.receive(self.arena)
        came = sum(len(span[0]) for span in batch.spans)
        return came, sum(self.port.take(batch.arena, span, self.local) for span in batch.spans)

    def take_all(self, count: int) -> int:
        """Receive `count` datagrams; return how many were taken."""
        total = taken = 0
        while total < count:
            came, of_batch = self.take()
            total, taken = total + came, taken + of_batch
        return taken


@pytest.fixture(params=["mmsg", "trains", "single"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.local.close()


@pytest.fixture
def server() -> Iterator[StunServer]:
    with stun_server() as server:
        server.mapped = MAPPED
        yield server


def send(sock: socket.socket, rig: Rig, data: bytes) -> None:
    sock.sendto(data, (LOCALHOST, rig.local.address.port))


def test_answer_is_taken_and_told(rig: Rig, server: StunServer) -> None:
    assert rig.port.ask(server.address, ID)
    assert rig.take_all(1) == 1
    assert rig.answers == [(ID, MAPPED)]
    assert server.requests == [rig.local.address]


def test_error_is_told_without_address(rig: Rig, server: StunServer) -> None:
    server.error = 400
    rig.port.ask(server.address, ID)
    assert rig.take_all(1) == 1
    assert rig.answers == [(ID, None)]


def test_repeated_answer_is_taken_and_counted(rig: Rig, server: StunServer) -> None:
    """They may come as a train, which the kernel has joined."""
    server.copies = 3
    rig.port.ask(server.address, ID)
    assert rig.take_all(3) == 3
    assert rig.answers == [(ID, MAPPED)]
    assert rig.counts.counts == {("public_address", "answer repeated"): 2}


def test_forged_answers_are_not_taken(rig: Rig, server: StunServer) -> None:
    """Without the transaction or the address of the server nobody can answer."""
    server.silent = True
    rig.port.ask(server.address, ID)
    answer = stun.encode_response(stun.BindingSuccess(ID, MAPPED))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((LOCALHOST, 0))
        send(other, rig, answer)
        assert rig.take_all(1) == 0
    guessed = stun.encode_response(stun.BindingSuccess(bytes(12), MAPPED))
    for data in (guessed, answer[:-1], answer + b"\0", b"", stun.encode_request(_request())):
        server.socket.sendto(data, (LOCALHOST, rig.local.address.port))
        assert rig.take_all(1) == 0
    assert rig.answers == []
    server.socket.sendto(answer, (LOCALHOST, rig.local.address.port))
    assert rig.take_all(1) == 1


def _request() -> stun.BindingRequest:
    return stun.BindingRequest(ID)


def test_nothing_is_taken_before_a_question(rig: Rig) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        send(other, rig, stun.encode_response(stun.BindingSuccess(ID, MAPPED)))
        assert rig.take_all(1) == 0


def test_old_questions_are_forgotten(rig: Rig, server: StunServer) -> None:
    server.silent = True
    for number in range(ASKED_LIMIT + 10):
        assert rig.port.ask(server.address, number.to_bytes(12, "big"))
    assert len(rig.port._asked) == ASKED_LIMIT


def test_question_that_cannot_be_sent_is_told(rig: Rig) -> None:
    assert not rig.port.ask(Address("2001:db8::1", 3478), ID)
    assert not rig.port.ask(Address("255.255.255.255", 3478), ID)
    rig.port.local = None
    assert not rig.port.ask(Address(LOCALHOST, 3478), ID)


def test_dual_stack_socket_asks_both_families() -> None:
    counts = Counts()
    sockets = UdpSocketFactory(counts, RecordingLog())
    local = sockets.listen(Address("::", 0))
    port = StunPort(counts)
    port.local = local
    with local.socket:
        for host in ("127.0.0.1", "::1"):
            with stun_server(host) as server:
                assert port.ask(server.address, ID)
                local.socket.settimeout(SECONDS)
                assert from_sockaddr(local.socket.recvfrom(100)[1]) == server.address
