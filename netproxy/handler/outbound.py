"""Opens outbound connections: routes a flow and dials its target.

A flow that is refused, and a dial that fails, is counted and recorded here; relay.connection
records a dial that succeeds.
"""

from __future__ import annotations

import time
from functools import partial
from select import POLLOUT

from netproxy.errors import ClientLeft, DialError, FlowRefused
from netproxy.handler.datagrams.stream_udp import NO_UPSTREAM, StreamUdpRelay, UotStream
from netproxy.interfaces.connections import Blocking, Progress, Ready, Steps, Watched
from netproxy.interfaces.flows import Failure, Flow, Record
from netproxy.interfaces.routing import NonBlockingDialer, Route
from netproxy.net import stream as net_stream
from netproxy.net.address import is_unspecified
from netproxy.protocol import uot
from netproxy.relay.connection import CLIENT_LEFT, OutboundConnection, take_eviction, tell_route
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.handler.bind import Binder, EncodeReply
    from netproxy.interfaces.accounts import Account, Accounts
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Observer
    from netproxy.interfaces.routing import PendingDial, Router
    from netproxy.interfaces.services import Counter
    from netproxy.relay.pipe import PipeLimits

UOT_NAMES = (uot.MAGIC, uot.MAGIC_V1)


class Outbound:
    """Opens the outbound connections of a listener.  A reload replaces `router`, nothing else."""

    def __init__(
        self,
        router: Router,
        limits: PipeLimits,
        counter: Counter,
        observer: Observer,
        accounts: Accounts,
        datagrams: StreamUdpRelay | None = None,
    ) -> None:
        """Open connections.  `datagrams` serves UoT; without it the names of UoT are dialled."""
        self.router = router
        self.limits = limits
        self.counter = counter
        self.observer = observer
        self.accounts = accounts
        self._datagrams = datagrams

    def through(self, router: Router) -> Outbound:
        """Return what opens connections in the same way, but by another router."""
        return Outbound(router, self.limits, self.counter, self.observer, self.accounts)

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
        except BaseException:
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
        except BaseException:
            dial.abandon("failed")
            raise
        return connection

    def open(self, flow: Flow) -> OutboundConnection:
        """Connect to the flow's target; blocks.  Raises DialError, as connect()."""
        dial = _Connect(self, flow, None)
        try:
            return dial.block()
        except BaseException:
            dial.abandon("failed")
            raise

    def bind(
        self, flow: Flow, client: Stream, binder: Binder, encode: EncodeReply
    ) -> Steps[OutboundConnection]:
        """Wait for the peer of a BIND; the target of the connection's flow is the peer.

        `encode` makes the first reply, which names the address that listens.
        Raises DialError, as connect().
        """
        started, route, account = time.monotonic(), None, None
        try:
            flow = self.router.named(flow)
            account = self.accounts.open(flow)
            route = yield from self._route_to_peer(flow)
            dialer, flow, _ = route
            if "bind" not in dialer.carries:
                raise DialError(dialer.refusal, f"BIND through {dialer.name}")
            stream, peer = yield from binder.accept(client, flow, encode)
        except BaseException as error:
            if account is not None:
                account.close()
            if isinstance(error, DialError):
                raise self.note_failure(flow, route, started, error) from error
            raise
        route = route._replace(flow=flow._replace(target=peer))
        connection = OutboundConnection(self, route, stream, account, started)
        connection.trace = client.trace
        self.observer.began(connection, None)
        return connection

    def _route_to_peer(self, flow: Flow) -> Steps[Route]:
        """Return the route of a BIND; that of an unspecified peer is the default upstream."""
        if is_unspecified(flow.target.host):
            return Route(list(self.router.candidates(flow))[-1], flow, "default")
        route = self.router.route_without_blocking(flow)
        if route is None:
            route = yield Blocking(partial(self.router.route, flow))
        return route

    def note_failure(
        self, flow: Flow, route: Route | None, started: float, error: DialError
    ) -> DialError:
        """Count and record a failed dial, or a flow that a limit refuses.

        `route` is None if there was no upstream to dial.  Return the error with its record's id.
        """
        if isinstance(error, FlowRefused):
            refusal = flow.refusal("requests_refused", error.said, error.decided)
            return error.recorded_as(self.counter.refuse(refusal))
        self.counter.count("dial_failures", error.why)
        upstream, rule = (NO_UPSTREAM, "") if route is None else (route.dialer.name, route.rule)
        seconds, decided = time.monotonic() - started, error.decided_by(rule)
        record = Record(flow, upstream, 0, 0, seconds, error.ended, rule=rule, decided=decided)
        record = record._replace(failure=Failure.of(error))
        return error.recorded_as(self.observer.finished(record))


class _Connect:
    """The need for a connection to a flow's target."""

    __slots__ = (
        *("_outbound", "_flow", "_client", "_started", "_route", "_pending", "_account"),
        *("_connection", "light"),
    )

    def __init__(self, outbound: Outbound, flow: Flow, client: Stream | None) -> None:
        """`client` is watched while the target is dialled; None if block() is called alone."""
        self._outbound = outbound
        self._flow = flow
        self._client = client
        self._started = time.monotonic()
        # The route, once begin() or block() has it.
        self._route: Route | None = None
        # Opened by begin() or block(); the connection closes it, or a failure.
        self._account: Account | None = None
        # The dial that is in progress.
        self._pending: PendingDial | None = None
        # The result, which nobody may get: there may be no thread to go on with it.
        self._connection: OutboundConnection | None = None
        self.light = client is None or client.light

    def begin(self) -> OutboundConnection | Progress:
        """Connect without blocking if the router and the dialer can."""
        try:
            self._open_account()
            route = self._outbound.router.route_without_blocking(self._flow)
            if route is None:
                return Progress.NEEDS_THREAD
            self._route = route
            if self._client is not None and self._client.trace is not None:
                tell_route(self._client.trace, route)
            dialer = route.dialer
            if not isinstance(dialer, NonBlockingDialer):
                return Progress.NEEDS_THREAD
            pending = dialer.begin(route.flow)
        except DialError as error:
            raise self._note_failure(error) from error
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
        """Close the dial, or the connection, and record how it ended, unless it has failed.

        Not for a need whose result has been handed over.
        """
        if self._account is not None:
            self._account.close()
        pending, self._pending, route = self._pending, None, self._route
        connection, self._connection = self._connection, None
        if pending is None and connection is None:
            return
        decided = ""
        if self._client is not None and self._client.evicted:
            ended, decided = take_eviction(self._client)
        if connection is not None:
            connection.finish(ended, fault=decided)
        if pending is not None and route is not None:
            pending.close()
            seconds = time.monotonic() - self._started
            dialer, flow, rule = route
            record = Record(flow, dialer.name, 0, 0, seconds, ended, rule=rule, decided=decided)
            self._outbound.observer.finished(record)

    def block(self) -> OutboundConnection:
        """Route, unless begin() has done so, and dial; blocks."""
        try:
            if self._account is None:
                self._open_account()
            if self._route is None:
                self._route = self._outbound.router.route(self._flow)
                if self._client is not None and self._client.trace is not None:
                    tell_route(self._client.trace, self._route)
            dialer, flow, _ = self._route
            stream = dialer.dial(flow)
        except DialError as error:
            raise self._note_failure(error) from error
        return self._connected(stream)

    def _open_account(self) -> None:
        """Find the name of the flow, and count it in.  Raises FlowRefused."""
        asked, self._flow = self._flow.target, self._outbound.router.named(self._flow)
        trace = None if self._client is None else self._client.trace
        if trace is not None and self._flow.target is not asked:
            trace.step("name", host=self._flow.target.host, seen_in="fake address")
        self._account = self._outbound.accounts.open(self._flow)

    def _finish(self) -> OutboundConnection:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        try:
            stream = net_stream.Stream(pending.finish(), local=pending.local)
        except DialError as error:
            raise self._note_failure(error) from error
        return self._connected(stream)

    def _connected(self, stream: Stream) -> OutboundConnection:
        route, account, self._account = self._route, self._account, None
        assert route is not None and account is not None
        connection = OutboundConnection(self._outbound, route, stream, account, self._started)
        self._connection = connection
        if self._client is not None and self._client.trace is not None:
            connection.tell_steps(self._client.trace)
        self._outbound.observer.began(connection, time.monotonic() - self._started)
        return connection

    def _note_failure(self, error: DialError) -> DialError:
        if self._account is not None:
            self._account.close()
        flow = self._flow if self._route is None else self._route.flow
        if self._client is not None and self._client.trace is not None:
            self._client.trace.step("failed", target=flow.target, error=error)
        return self._outbound.note_failure(flow, self._route, self._started, error)
