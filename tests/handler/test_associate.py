"""UDP ASSOCIATE in the process that has the client's associations, and in another one."""

from __future__ import annotations

import socket
from typing import Any, Iterator

import pytest

from netproxy.errors import DialError, Reason, StreamError
from netproxy.handler.socks.associate import Associating
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream, complete
from netproxy.protocol import socks5
from tests.support.doubles import Counts
from tests.support.sockets import SECONDS, Task, nothing_comes, read_to_end, tcp_pair
from tests.support.waits import run_to_end

BOUND, REACHED = Address("192.0.2.1", 5353), Address("192.0.2.9", 1080)
FLOW = Flow("tcp", Address("127.0.0.7", 4000), Address("0.0.0.0", 7), "main", "alice")
SUCCESS = socks5.encode_reply(socks5.SUCCEEDED, BOUND)

Pair = tuple[socket.socket, socket.socket]


class Relay:
    """A Socks5UdpRelay: opens associations, or raises `refusal`."""

    def __init__(self) -> None:
        self.refusal: DialError | None = None
        self.opened: list[tuple[Flow, Address]] = []
        self.closed: list[object] = []

    def open(self, flow: Flow, local: Address) -> tuple[object, Address]:
        self.opened.append((flow, local))
        if self.refusal is not None:
            raise self.refusal
        return "association", BOUND

    def close(self, association: object) -> None:
        self.closed.append(association)


class Owners:
    """AssociationOwners: clients of `elsewhere` are another worker's."""

    def __init__(self, *elsewhere: str) -> None:
        self._elsewhere = elsewhere
        self.refusal: DialError | None = None
        self.given: list[tuple[object, Flow, Address]] = []
        self.wait: Wait | None = None

    def is_elsewhere(self, client: str) -> bool:
        return client in self._elsewhere

    def hand_over(self, control: object, flow: Flow, reached: Address) -> Wait | None:
        if self.refusal is not None:
            raise self.refusal
        self.given.append((control, flow, reached))
        return self.wait


class Rig:
    """Associating between its doubles, on a connection."""

    def __init__(self, pair: Pair) -> None:
        sock, self.client = pair
        sock.setblocking(False)
        self.stream = Stream(sock)
        self.relay, self.counts = Relay(), Counts()
        self.associating = Associating(self.relay, self.counts)  # type: ignore[arg-type]

    def serve(self) -> Wait | None:
        wait: Wait | None = complete(self.associating.serve(self.stream, FLOW))
        return wait

    def refusals(self) -> list[tuple[str, str, str, str]]:
        return [
            (refusal.reason, refusal.user, refusal.asked, refusal.network)
            for refusal in self.counts.refusals
        ]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tcp_pair() as pair:
        yield Rig(pair)


@pytest.mark.parametrize("owners", [None, Owners(), Owners("127.0.0.8")])
def test_association_of_this_process_lives_with_its_connection(
    rig: Rig, owners: Owners | None
) -> None:
    rig.associating.owners = owners
    wait = rig.serve()
    assert rig.relay.opened == [(FLOW, rig.stream.local_address())]
    assert rig.client.recv(64) == SUCCESS
    running = Task(run_to_end, wait)
    rig.client.sendall(b"dropped")
    assert nothing_comes(rig.client)
    assert not rig.relay.closed
    rig.client.close()
    running.result()
    assert rig.relay.closed == ["association"]
    assert not rig.counts.refusals
    if owners is not None:
        assert not owners.given


def test_association_elsewhere_is_handed_over_and_nothing_is_opened(rig: Rig) -> None:
    owners = rig.associating.owners = Owners(FLOW.client.host)
    assert rig.serve() is None
    assert owners.given == [(rig.stream, FLOW, rig.stream.local_address())]
    assert not rig.relay.opened
    # The owner answers.
    assert nothing_comes(rig.client)
    assert not rig.counts.refusals


def test_wait_of_a_relayed_connection_is_that_of_the_handler(rig: Rig) -> None:
    owners = rig.associating.owners = Owners(FLOW.client.host)
    owners.wait = Wait((), None, lambda ready: None)
    assert rig.serve() is owners.wait


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_refusal_is_counted_recorded_and_raised(rig: Rig, is_elsewhere: bool) -> None:
    refusal = DialError(Reason.GENERAL, said="nothing to be had")
    owners = rig.associating.owners = Owners(*[FLOW.client.host][: int(is_elsewhere)])
    rig.relay.refusal = owners.refusal = refusal
    with pytest.raises(DialError) as raised:
        rig.serve()
    assert raised.value is refusal
    assert rig.refusals() == [(Reason.GENERAL.value, "alice", "UDP ASSOCIATE", "udp")]
    assert rig.counts.of("requests_refused", Reason.GENERAL.value) == 1
    assert nothing_comes(rig.client)


def test_association_is_closed_if_its_client_cannot_be_told(rig: Rig) -> None:
    def fail(data: bytes) -> Any:
        raise StreamError("gone")

    stream: Any = _Failing(rig.stream, fail)
    with pytest.raises(StreamError):
        complete(rig.associating.serve(stream, FLOW))
    assert rig.relay.closed == ["association"]


class _Failing:
    """A stream whose reply() fails."""

    def __init__(self, stream: Stream, reply: Any) -> None:
        self._stream = stream
        self.reply = reply

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# -- in the owner


def test_connection_of_another_worker_is_answered_and_lives(rig: Rig) -> None:
    wait = complete(rig.associating.take_over(rig.stream, FLOW, REACHED))
    # The address that the client connected to: this socket's own may be that of a pair.
    assert rig.relay.opened == [(FLOW, REACHED)]
    assert rig.client.recv(64) == SUCCESS
    running = Task(run_to_end, wait)
    rig.client.shutdown(socket.SHUT_WR)
    running.result()
    assert rig.relay.closed == ["association"]


def test_owner_takes_over_without_asking_who_owns(rig: Rig) -> None:
    """No connection is handed over twice."""
    owners = rig.associating.owners = Owners(FLOW.client.host)
    complete(rig.associating.take_over(rig.stream, FLOW, REACHED))
    assert not owners.given
    assert rig.client.recv(64) == SUCCESS


def test_refusal_of_the_owner_is_answered_and_the_connection_closed(rig: Rig) -> None:
    rig.relay.refusal = DialError(Reason.LIMIT, said="no more")
    ending = Task(complete, rig.associating.take_over(rig.stream, FLOW, REACHED))
    rig.client.settimeout(SECONDS)
    reply = socks5.REPLIES[Reason.LIMIT]
    expected = socks5.encode_reply(reply, Address("0.0.0.0", 0))
    assert read_to_end(rig.client) == expected
    rig.client.close()
    assert ending.result() is None
    assert not rig.stream.open
    assert rig.refusals() == [(Reason.LIMIT.value, "alice", "UDP ASSOCIATE", "udp")]


def test_pair_without_an_address_is_taken_over() -> None:
    """Within TLS the owner has one end of a socket pair, which has no IP address."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        rig = Rig((ours, theirs))
        wait = complete(rig.associating.take_over(rig.stream, FLOW, REACHED))
        assert theirs.recv(64) == SUCCESS
        running = Task(run_to_end, wait)
        theirs.close()
        running.result()
    assert rig.relay.closed == ["association"]
