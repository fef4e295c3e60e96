"""Connections that another worker has accepted: it counts them, and this one serves them."""

from __future__ import annotations

import socket
from typing import Callable, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Handshake
from netproxy.listener.poller import Poller
from netproxy.net.stream import Stream
from tests.support.sockets import SECONDS, nothing_comes, read_exactly, wait_until
from tests.support.tcp import RecordingAdmission, TcpRig

CLIENT = Address("192.0.2.1", 4000)


class CountingAdmission(RecordingAdmission):
    """A RecordingAdmission that can take over."""

    counts_here = True

    def take_over(self, client: str) -> None:
        self.inside.append(client)


class Given:
    """A connection that a listener has adopted; `other` is the other worker's end."""

    def __init__(self, rig: TcpRig, is_relayed: bool = False) -> None:
        self.rig = rig
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.client = socket.create_connection(server.getsockname(), SECONDS)
            served, _ = server.accept()
        served.setblocking(False)
        self.other, lifetime = socket.socketpair()
        self.other.settimeout(SECONDS)
        if is_relayed:
            lifetime.close()
        rig.listener.adopt(
            Stream(served, b"he"), CLIENT, self._handle, None if is_relayed else lifetime
        )

    def _handle(self, stream: Stream) -> Handshake:
        return self.rig.handler.handle(stream, CLIENT)

    def ask(self) -> None:
        self.client.sendall(b"llo\n")
        assert read_exactly(self.client, 6) == b"hello\n"

    def has_ended(self) -> bool:
        """Return whether the worker that has accepted it knows of its end."""
        return not nothing_comes(self.other, 0) and self.other.recv(1) == b""

    def close(self) -> None:
        self.other.close()
        self.client.close()


@pytest.fixture
def rig(make: Callable[..., TcpRig]) -> TcpRig:
    rig = make()
    rig.admission = CountingAdmission()
    rig.configure(rig.handler)
    return rig


@pytest.fixture
def given(rig: TcpRig) -> Iterator[Given]:
    given = Given(rig)
    yield given
    given.close()


def test_given_connection_is_counted_by_the_worker_that_accepted_it(
    rig: TcpRig, given: Given
) -> None:
    given.ask()
    assert (rig.listener.live, rig.listener.counted, rig.admission.inside) == (1, 0, [])
    assert not given.has_ended()
    given.client.close()
    wait_until(given.has_ended)
    wait_until(rig.all_ended)


def test_worker_that_accepted_a_connection_can_end_it(rig: TcpRig, given: Given) -> None:
    given.ask()
    given.other.send(b"\0")
    assert given.client.recv(1) == b""
    wait_until(given.has_ended)
    wait_until(rig.all_ended)


def test_connection_of_a_worker_that_has_died_is_counted_here(rig: TcpRig, given: Given) -> None:
    given.other.close()
    wait_until(lambda: rig.admission.inside == [CLIENT.host])
    assert (rig.listener.live, rig.listener.counted) == (1, 1)
    assert len(rig.admission.residents) == 1
    given.ask()
    given.client.close()
    wait_until(rig.all_ended)
    assert not rig.admission.residents


def test_connection_that_has_ended_is_not_counted_when_its_worker_dies(
    rig: TcpRig, given: Given
) -> None:
    given.client.close()
    wait_until(given.has_ended)
    given.other.close()
    wait_until(rig.all_ended)
    assert not rig.admission.inside


def test_relayed_connection_is_not_counted(rig: TcpRig) -> None:
    """If the worker that relays it dies, its end comes with the relay's."""
    given = Given(rig, is_relayed=True)
    given.ask()
    assert (rig.listener.live, rig.listener.counted, rig.admission.inside) == (1, 0, [])
    given.close()
    wait_until(rig.all_ended)


def test_connection_whose_worker_cannot_be_watched_is_counted_here(
    rig: TcpRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(Poller, "watch", refuse)
        patch.setattr(type(rig.serving), "begin", lambda *_: None)
        given = Given(rig)
    assert given.has_ended() and rig.admission.inside == [CLIENT.host]
    (connection,) = rig.listener.connections()
    connection.ended()
    given.close()
    wait_until(rig.all_ended)
