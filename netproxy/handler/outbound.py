"""The step that every TCP handler shares: route a flow, dial it, relay it, record it."""

from __future__ import annotations

import time
from select import POLLOUT
from typing import Callable

from netproxy.errors import DialError, NeedsThread, StreamError
from netproxy.handler.stream_udp import NO_UPSTREAM, StreamUdpRelay, UotStream
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.flows import Flow, Observer, Record, Traffic
from netproxy.interfaces.routing import Dialer, Route, Router
from netproxy.interfaces.services import Counter
from netproxy.net.address import is_unspecified
from netproxy.handler.bind import Binder
from netproxy.net.connect import PendingDial
from netproxy.net.stream import Stream
from netproxy.protocol import uot
from netproxy.relay.pipe import Outcome, PipeLimits, Relay, pipe

UOT_NAMES = (uot.MAGIC, uot.MAGIC_V1)
CLIENT_LEFT = (
    "client left"  # how a flow ended whose client did not get to hear that it is connected
)


class Connector:
    """Immutable; one for each listener and configuration, used by all its connections."""

    def __init__(
        self,
        router: Router,
        limits: PipeLimits,
        counter: Counter,
        observer: Observer,
        datagrams: StreamUdpRelay | None = None,
    ) -> None:
        """`datagrams` serves connections to UoT's names, which are no targets then."""
        self._datagrams = datagrams
        self._router = router
        self._limits = limits
        self._counter = counter
        self._observer = observer

    def route(self, flow: Flow) -> Dialer:
        """DialError."""
        return self._router.route(flow).dialer

    def tunnel(self, flow: Flow) -> Passage | UotStream:
        """What a client gets that asks for a connection of its own: one to its target, or a stream of datagrams.  DialError."""
        if self._datagrams is not None and flow.target.host in UOT_NAMES:
            self._datagrams.permit(flow)
            return UotStream(self._datagrams, flow)
        return self.open(flow)

    def open(self, flow: Flow) -> Passage:
        """A connection to the flow's target; DialError, which has been counted and recorded."""
        started, way = time.monotonic(), NO_UPSTREAM
        try:
            dialer, flow = self._router.route(flow)
            way = dialer.name
            passage = Passage(self, flow, dialer, dialer.dial(flow), started)
        except DialError as error:
            self._failed(flow, way, started, error)
            raise
        return self.begin(passage, time.monotonic() - started)

    def attempt(
        self,
        client: Stream,
        flow: Flow,
        connected: Callable[[Passage], Wait | None],
        refused: Callable[[DialError], None],
    ) -> Wait | None:
        """What tunnel() gives goes to `connected`, its DialError, on a thread, to `refused`.  Never waits; NeedsThread, DialError."""
        if self._datagrams is not None and flow.target.host in UOT_NAMES:
            raise NeedsThread
        started = time.monotonic()
        dialer, flow = self._router.route_without_blocking(flow) or (None, flow)
        begin = getattr(dialer, "begin", None)
        dialling = begin(flow) if begin is not None else None
        if dialling is None:
            raise NeedsThread

        def finish() -> Wait | None:
            try:
                upstream = Stream(dialling.finish())
            except DialError as error:
                self._failed(flow, dialer.name, started, error)
                why = error  # the name ends with this block
                return Wait((), None, lambda ready: refused(why))
            return connected(
                self.begin(
                    Passage(self, flow, dialer, upstream, started), time.monotonic() - started
                )
            )

        def left() -> None:
            dialling.close()
            self._observer.finished(
                Record(flow, dialer.name, 0, 0, time.monotonic() - started, CLIENT_LEFT)
            )

        return finish() if dialling.settled() else _until_settled(dialling, client, finish, left)

    def bind(
        self, flow: Flow, client: Stream, binder: Binder, announce: Callable[[Address], None]
    ) -> Passage:
        """The connection of the peer that a BIND waits for; its flow's target is the peer.  DialError."""
        started, way = time.monotonic(), NO_UPSTREAM
        try:
            dialer, flow = self._way_to_peer(flow)
            way = dialer.name
            if "bind" not in dialer.carries:
                raise DialError(dialer.refusal, f"BIND by {way}")
            upstream, peer = binder.accept(client, flow, announce)
        except DialError as error:
            self._failed(flow, way, started, error)
            raise
        return self.begin(Passage(self, flow._replace(target=peer), dialer, upstream, started))

    def _way_to_peer(self, flow: Flow) -> Route:
        """A peer that may be anybody (0.0.0.0) is no target, and goes where most does."""
        return (
            Route(list(self._router.candidates(flow))[-1], flow)
            if is_unspecified(flow.target.host)
            else self._router.route(flow)
        )

    def _failed(self, flow: Flow, way: str, started: float, error: DialError) -> None:
        self._counter.count("dial_failures", error.reason.value)
        ended = str(error) if error.hop else error.reason.value
        self._observer.finished(Record(flow, way, 0, 0, time.monotonic() - started, ended))

    def relay(self, passage: Passage, client: Stream) -> Wait | None:
        return pipe(client, passage.upstream, self._limits, passage)

    def begin(self, passage: Passage, dialled: float | None = None) -> Passage:
        """The same, known as a flow under way until its record."""
        self._observer.began(passage, dialled)
        return passage

    def record(self, record: Record) -> None:
        self._counter.count("bytes", "up", record.sent)
        self._counter.count("bytes", "down", record.received)
        self._observer.finished(record)


class Passage:
    """One dialled flow, from its dial to its record."""

    __slots__ = (
        "flow",
        "number",
        "dialer",
        "upstream",
        "sent",
        "received",
        "started",
        "relay",
        "_client",
        "_killed",
        "_connector",
    )

    def __init__(
        self, connector: Connector, flow: Flow, dialer: Dialer, upstream: Stream, started: float
    ) -> None:
        self.flow = flow
        self.dialer = dialer
        self.upstream = upstream
        self.sent = 0  # bytes, client to target, but for what a relay moves
        self.received = 0  # bytes, target to client, likewise
        self.number = 0  # the observer's
        self.started = started
        self.relay: Relay | None = None
        self._client: Stream | None = None  # where it is a tunnel
        self._killed = False
        self._connector = connector

    def bound(self) -> Address:
        """The address that the target sees, for the reply."""
        return self.upstream.local_address()

    def accept(self, client: Stream, reply: bytes) -> Wait | None:
        """Tells the client that it is connected, then relays until both sides have ended; closes both.

        A Pause while neither side has anything to say.
        """
        self._client = client
        try:
            client.write(reply)
        except StreamError:
            self.finish(CLIENT_LEFT)
            return None
        return self._connector.relay(self, client)

    def again(self, flow: Flow) -> Passage:
        """The next request on the same upstream, with a record of its own."""
        return self._connector.begin(
            Passage(self._connector, flow, self.dialer, self.upstream, time.monotonic())
        )

    def traffic(self) -> Traffic:
        relay = self.relay
        sent, received = relay.bytes_moved() if relay is not None else (0, 0)
        return Traffic(self.sent + sent, self.received + received)

    def relay_began(self, relay: Relay) -> None:
        self.relay = relay

    def relay_ended(self, outcome: Outcome) -> None:
        self.finish(outcome.ended)

    def idle(self) -> float:
        return (self._client or self.upstream).idle()

    def kill(self) -> None:
        self._killed = True
        for stream in (self.upstream, self._client):
            if stream is not None:
                stream.shutdown()

    def finish(self, ended: str, keep: bool = False) -> None:
        """The record, once; closes the upstream unless it is kept for again()."""
        if not keep:
            self.upstream.close()
        sent, received, *_ = self.traffic()
        self._connector.record(
            Record(
                self.flow,
                self.dialer.name,
                sent,
                received,
                time.monotonic() - self.started,
                "killed" if self._killed else ended,
                number=self.number,
            )
        )


def _until_settled(
    dialling: PendingDial,
    client: Stream,
    finish: Callable[[], Wait | None],
    left: Callable[[], None],
) -> Wait:
    """`finish` comes when it is, or its time is up; `left` where the client has gone meanwhile: reset, or shut down to end it."""

    def step(descriptor: int, events: int) -> Wait | None:
        if descriptor == client.socket.fileno():
            return left()
        return (
            client.hastily(finish)
            if dialling.settled()
            else _until_settled(dialling, client, finish, left)
        )

    def resume(ready: bool) -> Wait | None:
        if not client.open:  # no thread could be had for it
            return left()
        dialling.wait()  # nothing is left to wait for, but where it could not be watched
        return finish()

    # of the client nothing is asked, so that only its being gone is told
    return Wait(((dialling.socket, POLLOUT), (client.socket, 0)), dialling.left, resume, step=step)
