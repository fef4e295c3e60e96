"""Outbound connections: routes a flow, dials its target, relays it, and records it.

An OutboundConnection is one dialled flow, from its dial to its record; Outbound opens them.
"""

from __future__ import annotations

import time
from functools import partial
from select import POLLOUT
from typing import TYPE_CHECKING

from netproxy.errors import ClientLeft, DialError, StreamError
from netproxy.handler.stream_udp import NO_UPSTREAM, StreamUdpRelay, UotStream
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.connections import Blocking, Progress, Ready, Steps, Wait, Watched
from netproxy.interfaces.flows import Flow, Record, Traffic
from netproxy.interfaces.routing import NonBlockingDialer, Route
from netproxy.net import stream as net_stream
from netproxy.net.address import is_unspecified
from netproxy.protocol import uot
from netproxy.relay.pipe import Outcome, PipeLimits, Relay

if TYPE_CHECKING:
    from netproxy.handler.bind import Binder, EncodeReply
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Observer
    from netproxy.interfaces.routing import Dialer, PendingDial, Router
    from netproxy.interfaces.services import Counter

UOT_NAMES = (uot.MAGIC, uot.MAGIC_V1)
CLIENT_LEFT = "client left"  # before its target had answered


class Outbound:
    """Opens the outbound connections of a listener.  A reload replaces `router`, nothing else."""

    def __init__(
        self,
        router: Router,
        limits: PipeLimits,
        counter: Counter,
        observer: Observer,
        datagrams: StreamUdpRelay | None = None,
    ) -> None:
        """Open connections.  `datagrams` serves UoT; without it the names of UoT are dialled."""
        self.router = router
        self.limits = limits
        self.counter = counter
        self.observer = observer
        self._datagrams = datagrams

    def tunnel(self, flow: Flow, client: Stream) -> Steps[OutboundConnection | UotStream]:
        """Return a connection to the flow's target, or a stream of datagrams for UoT.

        Raises as connect().
        """
        if self._datagrams is not None and flow.target.host in UOT_NAMES:
            self._datagrams.permit(flow)
            return UotStream(self._datagrams, flow)
        dial = _Connect(self, flow, client)
        try:
            connection: OutboundConnection = yield dial
        except (StreamError, GeneratorExit):
            dial.abandon("failed")
            raise
        return connection

    def connect(self, flow: Flow, client: Stream) -> Steps[OutboundConnection]:
        """Connect to the flow's target.

        Raises DialError, which has been counted and recorded, and ClientLeft.
        """
        dial = _Connect(self, flow, client)
        try:
            connection: OutboundConnection = yield dial
        except (StreamError, GeneratorExit):
            dial.abandon("failed")
            raise
        return connection

    def open(self, flow: Flow) -> OutboundConnection:
        """Connect to the flow's target; blocks.  Raises DialError, as connect()."""
        return _Connect(self, flow, None).block()

    def bind(
        self, flow: Flow, client: Stream, binder: Binder, encode: EncodeReply
    ) -> Steps[OutboundConnection]:
        """Wait for the peer of a BIND; the target of the connection's flow is the peer.

        `encode` makes the first reply, which names the address that listens.
        Raises DialError, as connect().
        """
        started, upstream = time.monotonic(), NO_UPSTREAM
        try:
            dialer, flow = yield from self._route_to_peer(flow)
            upstream = dialer.name
            if "bind" not in dialer.carries:
                raise DialError(dialer.refusal, f"BIND through {upstream}")
            stream, peer = yield from binder.accept(client, flow, encode)
        except DialError as error:
            self.note_failure(flow, upstream, started, error)
            raise
        connection = OutboundConnection(self, flow._replace(target=peer), dialer, stream, started)
        self.observer.began(connection, None)
        return connection

    def _route_to_peer(self, flow: Flow) -> Steps[Route]:
        """Return the route of a BIND; that of an unspecified peer is the default upstream."""
        if is_unspecified(flow.target.host):
            return Route(list(self.router.candidates(flow))[-1], flow)
        route = self.router.route_without_blocking(flow)
        if route is None:
            route = yield Blocking(partial(self.router.route, flow))
        return route

    def note_failure(self, flow: Flow, upstream: str, started: float, error: DialError) -> None:
        """Count and record a failed dial."""
        self.counter.count("dial_failures", error.reason.value)
        ended = str(error) if error.hop else error.reason.value
        self.observer.finished(Record(flow, upstream, 0, 0, time.monotonic() - started, ended))


class _Connect:
    """The need for a connection to a flow's target."""

    __slots__ = ("_outbound", "_flow", "_client", "_started", "_dialer", "_pending", "light")

    def __init__(self, outbound: Outbound, flow: Flow, client: Stream | None) -> None:
        """`client` is watched while the target is dialled; None if block() is called alone."""
        self._outbound = outbound
        self._flow = flow
        self._client = client
        self._started = time.monotonic()
        # The upstream of the route, once begin() has chosen it.
        self._dialer: Dialer | None = None
        # The dial that is in progress.
        self._pending: PendingDial | None = None
        self.light = client is None or client.light

    def begin(self) -> OutboundConnection | Progress:
        """Connect without blocking if the router and the dialer can."""
        upstream = NO_UPSTREAM
        try:
            flow = self._flow
            route = self._outbound.router.route_without_blocking(flow)
            if route is None:
                return Progress.NEEDS_THREAD
            dialer, self._flow = route
            self._dialer, upstream = dialer, dialer.name
            if not isinstance(dialer, NonBlockingDialer):
                return Progress.NEEDS_THREAD
            pending = dialer.begin(self._flow)
        except DialError as error:
            self._outbound.note_failure(self._flow, upstream, self._started, error)
            raise
        if pending is None:
            return Progress.NEEDS_THREAD
        self._pending = pending
        return self._finish() if pending.settled() else Progress.PENDING

    def watched(self) -> tuple[Watched, float | None]:
        """Watch the pending dial, and the client for its reset."""
        assert self._client is not None and self._pending is not None
        return ((self._pending.socket, POLLOUT), (self._client.socket, 0)), self._pending.left

    def proceed(self, ready: Ready) -> OutboundConnection | Progress:
        """Finish the dial.  Raises DialError, ClientLeft."""
        assert self._client is not None and self._pending is not None
        client = self._client.socket
        # An event may have been about the last owner of the descriptor.
        if client.fileno() in ready and net_stream.poll_watched(((client, 0),), 0):
            self.abandon(CLIENT_LEFT)
            raise ClientLeft("the client left during the dial")
        if ready and not self._pending.settled():
            return Progress.PENDING
        return self._finish()

    def abandon(self, ended: str) -> None:
        """Close the dial and record how it ended, unless it is finished."""
        pending, self._pending = self._pending, None
        if pending is not None and self._dialer is not None:
            pending.close()
            seconds = time.monotonic() - self._started
            record = Record(self._flow, self._dialer.name, 0, 0, seconds, ended)
            self._outbound.observer.finished(record)

    def block(self) -> OutboundConnection:
        """Route, unless begin() has done so, and dial; blocks."""
        flow, dialer, upstream = self._flow, self._dialer, NO_UPSTREAM
        try:
            if dialer is None:
                dialer, flow = self._outbound.router.route(flow)
            upstream = dialer.name
            stream = dialer.dial(flow)
        except DialError as error:
            self._outbound.note_failure(flow, upstream, self._started, error)
            raise
        return self._connected(flow, dialer, stream)

    def _finish(self) -> OutboundConnection:
        assert self._dialer is not None and self._pending is not None
        pending, self._pending = self._pending, None
        try:
            stream = net_stream.Stream(pending.finish(), local=pending.local)
        except DialError as error:
            self._outbound.note_failure(self._flow, self._dialer.name, self._started, error)
            raise
        return self._connected(self._flow, self._dialer, stream)

    def _connected(self, flow: Flow, dialer: Dialer, stream: Stream) -> OutboundConnection:
        connection = OutboundConnection(self._outbound, flow, dialer, stream, self._started)
        self._outbound.observer.began(connection, time.monotonic() - self._started)
        return connection


class OutboundConnection:
    """One dialled flow: a LiveFlow from its dial to its record."""

    __slots__ = (
        *("flow", "number", "dialer", "upstream", "sent", "received", "started"),
        *("_relay", "_client", "_killed", "_outbound"),
    )

    def __init__(
        self, outbound: Outbound, flow: Flow, dialer: Dialer, upstream: Stream, started: float
    ) -> None:
        self.flow = flow
        self.dialer = dialer
        self.upstream = upstream
        self.sent = self.received = 0  # bytes, without those of a relay
        self.number = 0  # assigned by the observer
        self.started = started
        self._relay: Relay | None = None
        self._client: Stream | None = None  # of a tunnel
        self._killed = False
        self._outbound = outbound

    def bound(self) -> Address:
        """Return the address that the target sees, for the reply; 0.0.0.0 if it is not known."""
        try:
            return self.upstream.local_address()
        except StreamError:
            return UNSPECIFIED_ADDRESS  # the relay will find out what is wrong

    def accept(self, client: Stream, reply: bytes) -> Wait | None:
        """Send the reply to the client, then relay.  The relay closes both streams.

        Returns what the relay waits for while neither side sends anything.
        """
        self._client = client
        try:
            client.reply(reply)
        except StreamError:
            self.finish(CLIENT_LEFT)
            return None
        self._relay = Relay(client, self.upstream, self._outbound.limits, self)
        return self._relay.begin()

    def relay_ended(self, outcome: Outcome) -> None:
        """Write the record: the relay has ended."""
        self.finish(outcome.ended)

    def again(self, flow: Flow) -> OutboundConnection:
        """Return the flow of the next request on the same connection; it has its own record."""
        connection = OutboundConnection(
            self._outbound, flow, self.dialer, self.upstream, time.monotonic()
        )
        self._outbound.observer.began(connection, None)
        return connection

    def traffic(self) -> Traffic:
        """Return what the flow has carried so far."""
        sent, received = self._relay.bytes_moved() if self._relay is not None else (0, 0)
        return Traffic(self.sent + sent, self.received + received)

    def idle(self) -> float:
        """Return the seconds since a byte came or went."""
        return (self._client or self.upstream).idle()

    def kill(self) -> None:
        """End the flow; its record says "killed"."""
        self._killed = True
        self.upstream.shutdown()
        if self._client is not None:
            self._client.shutdown()

    def finish(self, ended: str, keep: bool = False) -> None:
        """Write the record, once; close the upstream unless it is kept for again()."""
        if not keep:
            self.upstream.close()
        sent, received, *_ = self.traffic()
        outbound = self._outbound
        outbound.counter.count("bytes", "up", sent)
        outbound.counter.count("bytes", "down", received)
        seconds = time.monotonic() - self.started
        ended = "killed" if self._killed else ended
        record = Record(self.flow, self.dialer.name, sent, received, seconds, ended)
        outbound.observer.finished(record._replace(number=self.number))
