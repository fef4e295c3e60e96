"""Outbound: a dial that is pending, needs a thread, fails, or is given up."""

from __future__ import annotations

import select
import socket
from typing import Any, Iterator

import pytest

from netproxy.access.accounts.subject import USER
from netproxy.errors import DialError, Reason, StreamError
from netproxy.handler.outbound import ClientLeft, Outbound, OutboundConnection
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Progress
from netproxy.interfaces.listeners import EVICTED
from netproxy.interfaces.routing import NonBlockingDialer, Route
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream
from netproxy.observe.metrics import Counters
from tests.support.accounts import account_book, free_account
from tests.support.flows import OneUpstream, tcp_to
from tests.support.handlers import PIPE_LIMITS, RecordingDialer, RecordingLog
from tests.support.sockets import SECONDS, reset, tcp_pair

TARGET = Address("192.0.2.7", 80)


class RecordingDial:
    """A PendingDial that is settled when the test says so."""

    left = 5.0
    local = None

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.ready = False
        self.failure: Reason | None = None
        self.said = ""
        self.closed = 0

    def settled(self) -> bool:
        return self.ready

    def finish(self) -> socket.socket:
        if self.failure is not None:
            raise DialError(self.failure, said=self.said)
        return self.socket

    def close(self) -> None:
        self.closed += 1


class PendingDialer(RecordingDialer, NonBlockingDialer):
    """A dialer whose begin() returns `pending`."""

    def __init__(self, pending: RecordingDial | None) -> None:
        super().__init__()
        self.pending = pending

    def begin(self, flow: Flow) -> RecordingDial | None:
        return self.pending


class Rig:
    """An Outbound, a client, and a dial that is pending."""

    def __init__(self, client: socket.socket, upstream: socket.socket) -> None:
        self.client = Stream(client)
        self.pending = RecordingDial(upstream)
        self.dialer: RecordingDialer = PendingDialer(self.pending)
        self.router = OneUpstream(self.dialer)
        self.log, self.counters = RecordingLog(), Counters()
        self.accounts = account_book()
        self.outbound = Outbound(self.router, PIPE_LIMITS, self.counters, self.log, self.accounts)
        self.steps = self.outbound.connect(tcp_to(TARGET), self.client)

    def proceed(self, descriptor: socket.socket) -> Any:
        """Return what the need returns after an event on a descriptor."""
        return self.need.proceed({descriptor.fileno(): select.POLLOUT})

    def begin(self) -> Any:
        """Begin the dial.  Return what the need returns."""
        self.need = next(self.steps)
        return self.need.begin()

    def ended(self) -> list[str]:
        return [record.ended for record in self.log.records]


Pairs = tuple[socket.socket, socket.socket, socket.socket]
"""Our end of the client's connection, the client's end, our end of that to the target."""


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    with tcp_pair() as (client, peer), tcp_pair() as (upstream, _):
        client.setblocking(False)
        upstream.setblocking(False)
        yield client, peer, upstream


@pytest.fixture
def rig(pairs: Pairs) -> Rig:
    return Rig(pairs[0], pairs[2])


def test_settled_dial_is_a_connection_at_once(rig: Rig) -> None:
    rig.pending.ready = True
    connection = rig.begin()
    assert isinstance(connection, OutboundConnection)
    assert connection.upstream.socket is rig.pending.socket and not rig.ended()


def test_pending_dial_watches_the_dial_and_the_hang_up_of_the_client(rig: Rig) -> None:
    assert rig.begin() is Progress.PENDING
    assert rig.need.watched() == (
        ((rig.pending.socket, select.POLLOUT), (rig.client.socket, 0)),
        5.0,
    )
    assert rig.need.light


def test_event_about_another_owner_of_a_descriptor_leaves_the_dial_pending(rig: Rig) -> None:
    rig.begin()
    assert rig.proceed(rig.pending.socket) is Progress.PENDING
    assert rig.proceed(rig.client.socket) is Progress.PENDING
    rig.pending.ready = True
    assert isinstance(rig.proceed(rig.pending.socket), OutboundConnection)


def test_failed_dial_is_counted_and_recorded_once(rig: Rig) -> None:
    rig.begin()
    rig.pending.ready, rig.pending.failure = True, Reason.REFUSED
    with pytest.raises(DialError) as raised:
        rig.proceed(rig.pending.socket)
    with pytest.raises(DialError):
        rig.steps.throw(raised.value)
    assert rig.ended() == ["connection refused"] and not rig.pending.closed
    assert rig.counters.value("dial_failures", "connection refused") == 1


def test_record_of_a_failure_without_a_reason_tells_what_the_kernel_said(rig: Rig) -> None:
    rig.begin()
    rig.pending.ready, rig.pending.failure = True, Reason.GENERAL
    rig.pending.said = "Too many open files"
    with pytest.raises(DialError):
        rig.proceed(rig.pending.socket)
    [record] = rig.log.records
    assert (record.ended, record.decided) == ("Too many open files", "")


def test_dial_of_a_client_that_resets_is_closed_and_recorded(rig: Rig, pairs: Pairs) -> None:
    rig.begin()
    reset(pairs[1])
    poll = select.poll()
    poll.register(rig.client.socket, 0)
    assert poll.poll(SECONDS * 1000)
    with pytest.raises(ClientLeft) as raised:
        rig.proceed(rig.client.socket)
    with pytest.raises(ClientLeft):
        rig.steps.throw(raised.value)
    assert rig.ended() == ["client left"] and rig.pending.closed == 1


def test_dial_is_closed_and_recorded_when_the_handshake_is_closed(rig: Rig) -> None:
    rig.begin()
    rig.steps.close()
    assert rig.ended() == ["failed"] and rig.pending.closed == 1


def test_dial_is_closed_and_recorded_when_no_thread_can_be_had(rig: Rig) -> None:
    rig.begin()
    with pytest.raises(StreamError):
        rig.steps.throw(StreamError("no thread can be had to go on"))
    assert rig.ended() == ["failed"] and rig.pending.closed == 1


def test_dialer_that_must_block_needs_a_thread(rig: Rig) -> None:
    dialer = rig.router.dialer = PendingDialer(None)
    assert rig.begin() is Progress.NEEDS_THREAD
    connection = rig.need.block()
    assert isinstance(connection, OutboundConnection) and len(rig.router.flows) == 1
    connection.finish("done")
    dialer.target().close()
    assert rig.ended() == ["done"]


def test_dialer_without_begin_needs_a_thread(rig: Rig) -> None:
    rig.router.dialer = RecordingDialer(Reason.TIMEOUT)
    assert rig.begin() is Progress.NEEDS_THREAD
    with pytest.raises(DialError):
        rig.need.block()
    assert rig.ended() == ["timed out"]
    assert rig.counters.value("dial_failures", "timed out") == 1


def test_router_that_must_block_needs_a_thread(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.router, "route_without_blocking", lambda flow: None)
    dialer = rig.router.dialer = RecordingDialer()
    assert rig.begin() is Progress.NEEDS_THREAD and not rig.router.flows
    rig.need.block().finish("done")
    dialer.target().close()
    assert len(rig.router.flows) == 1 and rig.ended() == ["done"]


def test_kept_connection_has_one_record_for_each_request(rig: Rig) -> None:
    rig.pending.ready = True
    first = rig.begin()
    first.sent, first.received = 3, 5
    first.finish("done", keep=True)
    second = first.again(Route(first.dialer, first.flow), free_account())
    assert second.upstream.open
    second.sent = 7
    second.finish("closed")
    assert [(record.sent, record.received, record.ended) for record in rig.log.records] == [
        (3, 5, "done"),
        (7, 0, "closed"),
    ]
    assert not second.upstream.open and rig.counters.value("bytes", "up") == 10


def test_killed_connection_is_recorded_as_killed(rig: Rig) -> None:
    rig.pending.ready = True
    connection = rig.begin()
    connection.kill()
    connection.finish("closed")
    assert rig.ended() == ["killed"]


def count_of_alice(rig: Rig) -> list[int]:
    """Return how many connections count for the user alice."""
    return [subject.connections for subject in rig.accounts.stats(USER)]


@pytest.fixture
def of_alice(rig: Rig) -> Rig:
    rig.steps = rig.outbound.connect(tcp_to(TARGET)._replace(user="alice"), rig.client)
    return rig


def test_connection_that_no_thread_could_go_on_with_is_finished(of_alice: Rig) -> None:
    dialer = of_alice.router.dialer = PendingDialer(None)
    assert of_alice.begin() is Progress.NEEDS_THREAD
    connection = of_alice.need.block()
    assert count_of_alice(of_alice) == [1]
    with pytest.raises(StreamError):
        of_alice.steps.throw(StreamError("no thread can be had to go on"))
    dialer.target().close()
    assert count_of_alice(of_alice) == [] and of_alice.ended() == ["failed"]
    assert not connection.upstream.open


def test_connection_of_a_handshake_that_is_closed_is_finished(of_alice: Rig) -> None:
    of_alice.begin()
    of_alice.pending.ready = True
    connection = of_alice.proceed(of_alice.pending.socket)
    of_alice.client.evicted = EVICTED
    of_alice.steps.close()
    assert count_of_alice(of_alice) == [] and of_alice.ended() == [EVICTED]
    assert not connection.upstream.open and not of_alice.pending.closed


def test_connection_that_was_handed_over_runs_on(of_alice: Rig) -> None:
    of_alice.pending.ready = True
    connection = of_alice.begin()
    with pytest.raises(StopIteration) as stopped:
        of_alice.steps.send(connection)
    of_alice.steps.close()
    assert stopped.value.value is connection and connection.upstream.open
    assert count_of_alice(of_alice) == [1] and not of_alice.ended()
    connection.finish("done")


@pytest.mark.parametrize("error", [StreamError("a fault"), RuntimeError("a fault")])
def test_blocking_dial_that_breaks_counts_for_nobody(
    rig: Rig, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dial(flow: Flow) -> Stream:
        raise error

    monkeypatch.setattr(rig.dialer, "dial", dial)
    with pytest.raises(type(error)):
        rig.outbound.open(tcp_to(TARGET)._replace(user="alice"))
    assert count_of_alice(rig) == []
