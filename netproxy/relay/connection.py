"""Outbound connections: one dialled flow, from its dial to its record."""

from __future__ import annotations

import time
from select import POLLIN

from netproxy.errors import StreamError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.connections import Events
from netproxy.interfaces.flows import Record, Traffic
from netproxy.interfaces.listeners import DECIDED_BY, decided_by
from netproxy.interfaces.routing import Route
from netproxy.net.stream import poll_watched
from netproxy.relay.pipe import Outcome, PipeLimits, Relay
from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Account, Pace
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Steps, Stream, Wait
    from netproxy.interfaces.flows import Observer
    from netproxy.interfaces.services import Counter, Trace
    from netproxy.relay.pipe import RelayOwner

CLIENT_LEFT = "client left"  # before its target had answered


def take_eviction(client: Stream) -> tuple[str, str]:
    """Return why the daemon has ended a client's connection, and what decided it.

    The record of a flow that says so is the only one.
    """
    reason, client.evicted = client.evicted, ""
    return reason, DECIDED_BY[reason]


def tell_route(trace: Trace, route: Route, **values: object) -> None:
    """Write the step "routed": `values`, the rule, the upstream, and the addresses to try."""
    dialer, flow, rule = route
    addresses = " ".join(address.host for address in flow.addresses)
    upstream = dialer.name
    trace.step(
        "routed", **values, target=flow.target, rule=rule, upstream=upstream, addresses=addresses
    )


def wait_for_room(pace: Pace, moved: int) -> Steps[int]:
    """Return how many bytes a direction may carry that has moved so many; wait while it is 0."""
    room = pace.mark - moved
    while room <= 0 and not (room := pace.renew(moved)):
        yield Events((), pace.delay())
    return room


class ConnectionDependencies(Protocol):
    """What a connection needs of the listener that it belongs to."""

    limits: PipeLimits
    counter: Counter
    observer: Observer


class TracedRelay(Relay):
    """A Relay that tells when the first byte came from the upstream."""

    __slots__ = ("_trace",)

    def __init__(
        self,
        client: Stream,
        upstream: Stream,
        limits: PipeLimits,
        owner: RelayOwner,
        account: Account,
        trace: Trace,
    ) -> None:
        super().__init__(client, upstream, limits, owner, account)
        # None once the first byte has come.
        self._trace: Trace | None = trace

    def _tell(self) -> None:
        if self._trace is not None and self._down.bytes_moved:
            self._trace.step("first byte")
            self._trace = None

    def _move(self, ready: dict[int, int]) -> str:
        ended = super()._move(ready)
        self._tell()
        return ended

    def _step(self, descriptor: int, events: int) -> Wait | None:
        following = super()._step(descriptor, events)
        self._tell()
        return following

    def _next_wait(self) -> Wait:
        self._tell()
        return super()._next_wait()

    def _end(self, ended: str) -> Wait | None:
        self._tell()
        return super()._end(ended)


class OutboundConnection:
    """One dialled flow: a LiveFlow from its dial to its record."""

    __slots__ = (
        *("flow", "number", "dialer", "upstream", "sent", "received", "started", "trace"),
        *("account", "_relay", "_client", "_killed", "_rule", "_dependencies"),
    )

    def __init__(
        self,
        dependencies: ConnectionDependencies,
        route: Route,
        upstream: Stream,
        account: Account,
        started: float,
    ) -> None:
        """`upstream` is connected; its dial began at `started` (monotonic seconds).

        `account` is closed at the end.
        """
        self.dialer, self.flow, self._rule = route
        self.upstream = upstream
        self.sent = self.received = 0  # bytes, without those of a relay
        self.number = 0  # assigned by the observer
        self.started = started
        self.account = account
        account.attach(self)
        self.trace: Trace | None = None  # of the client's connection
        self._relay: Relay | None = None
        self._client: Stream | None = None  # of a tunnel
        self._killed = ""  # why the daemon has ended it, if it has
        self._dependencies = dependencies

    def tell_steps(self, trace: Trace) -> None:
        """Write the step "connected", and from now on those that follow."""
        self.trace = trace
        try:
            peer: Address | str = self.upstream.peer_address()
        except StreamError as error:
            peer = str(error)
        trace.step("connected", target=self.flow.target, peer=peer, member=self.upstream.member)

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
        limits, trace, account = self._dependencies.limits, self.trace, self.account
        if trace is None:
            self._relay = Relay(client, self.upstream, limits, self, account)
        else:
            self._relay = TracedRelay(client, self.upstream, limits, self, account, trace)
        return self._relay.begin()

    def relay_ended(self, outcome: Outcome) -> None:
        """Write the record: the relay has ended, and has closed both streams."""
        self.finish(outcome.ended, keep=True)

    def may_serve(self, route: Route) -> bool:
        """Return whether the next request may use the connection, which has been kept."""
        upstream, flow = self.upstream, self.flow
        # The local address may be the user's own, also by the bind of the upstream.
        if flow.user != route.flow.user or flow.source != route.flow.source:
            return False
        if route.dialer is not self.dialer or upstream.unread():
            return False
        return not poll_watched(((upstream.socket, POLLIN),), 0)

    def again(self, route: Route, account: Account) -> OutboundConnection:
        """Return the flow of the next request on the same connection; it has its own record."""
        started = time.monotonic()
        connection = OutboundConnection(self._dependencies, route, self.upstream, account, started)
        connection.trace = self.trace
        self._dependencies.observer.began(connection, None)
        return connection

    def traffic(self) -> Traffic:
        """Return what the flow has carried so far."""
        sent, received = self._relay.bytes_moved() if self._relay is not None else (0, 0)
        return Traffic(self.sent + sent, self.received + received)

    def idle(self) -> float:
        """Return the seconds since a byte came or went."""
        return (self._client or self.upstream).idle()

    def kill(self, ended: str = "killed") -> None:
        """End the flow; `ended` is what its record says."""
        self._killed = ended
        self.upstream.shutdown()
        if self._client is not None:
            self._client.shutdown()

    def finish(self, ended: str, keep: bool = False, fault: str = "") -> str:
        """Write the record, once; close the upstream unless it is kept for again().

        `fault`: the error that ended it, "" for none.  Return the id of the record, if it has one.
        """
        if not keep:
            self.upstream.close()
        sent, received, *_ = self.traffic()
        counter, observer = self._dependencies.counter, self._dependencies.observer
        counter.count("bytes", "up", sent)
        counter.count("bytes", "down", received)
        seconds = time.monotonic() - self.started
        client = self._client
        self.account.close()
        if self._killed:
            ended = self._killed
            fault = decided_by(ended, self.flow.user)
        elif client is not None and client.evicted:
            ended, fault = take_eviction(client)
        name = observer.finished(
            Record(
                self.flow,
                self.dialer.name,
                sent,
                received,
                seconds,
                ended,
                number=self.number,
                rule=self._rule,
                member=self.upstream.member,
                decided=fault,
            )
        )
        if self.trace is not None:
            self.trace.step("ended", target=self.flow.target, ended=ended, received=received)
        return name
