"""Datagrams that clients send within a stream: connect-udp (RFC 9298), UDP over TCP (UoT), a tunnel's.

A stream, stop by stop: it is opened by a request, or by a connection to UoT's name;
its frames are received where they lie and go through the listener's NAT table as
datagrams do; answers come back on their sessions' own threads.  A stream that is
quiet for a moment gives its thread back.
"""

from __future__ import annotations

import select
from typing import Any, Callable

from netproxy.errors import DialError, NetProxyError, ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.datagrams import Batch
from netproxy.interfaces.flows import Flow, Observer, Record
from netproxy.interfaces.routing import Route, Router
from netproxy.interfaces.services import Counter
from netproxy.net.datagram import ArenaPool
from netproxy.net.framed import FramedSocket, Framing
from netproxy.net.stream import Stream, complete, poll_streams
from netproxy.protocol import connect_udp, http1, uot
from netproxy.protocol.capsule import Capsules
from netproxy.relay.nat import Entry, NatTable
from netproxy.relay.coalesce import Runs
from netproxy.relay.session import ADDRESS_AND_PORT, Client

STAY_SECONDS = 0.2  # without a frame before a stream gives its thread back: a game's pace is faster
UNSPECIFIED_ADDRESS = Address("0.0.0.0", 0)
NO_UPSTREAM = "-"  # in the record of what was not routed


class StreamUdpRelay:
    """Of one listener; `idle` is the seconds that a stream may be silent."""

    def __init__(
        self,
        router: Router,
        table: NatTable,
        arenas: ArenaPool,
        counter: Counter,
        observer: Observer,
        idle: float,
    ) -> None:
        self.router = router
        self.table = table
        self.arenas = arenas
        self.counter = counter
        self.observer = observer
        self.idle = idle

    def connect_udp(self, stream: Stream, request: http1.HttpRequest, flow: Flow) -> Wait | None:
        """Answers a request for connect-udp and serves its datagrams.  HttpError, or DialError: then nothing is answered."""
        target = connect_udp.parse_target(request)
        return self.serve_one(
            stream,
            flow._replace(network="udp", target=target),
            Capsules(target),
            connect_udp.encode_accept(),
        )

    def uot(self, stream: Stream, flow: Flow, reply: bytes) -> Wait | None:
        """Accepts a connection to UoT's name and serves its datagrams."""
        try:
            stream.write(reply)
            request = (
                uot.UotRequest(False, UNSPECIFIED_ADDRESS)
                if flow.target.host == uot.MAGIC_V1
                else complete(uot.read_request(stream))
            )
            if not request.connected:
                return self.serve_all(stream, flow, uot.Frames(), uot.encode_address)
            return self.serve_one(
                stream,
                flow._replace(network="udp", target=request.target),
                uot.Frames(request.target),
                b"",
            )
        except NetProxyError as error:
            # the tunnel is open: what its protocol has no word for is said by a reset
            self.counter.count(
                "connections_refused",
                error.reason.value if isinstance(error, DialError) else "no UoT request",
            )
            stream.reset()
            return None

    def serve_one(
        self, stream: Stream, flow: Flow, framing: Framing, accepted: bytes
    ) -> Wait | None:
        """A stream for one target, which alone may answer.  Its name is resolved before it is accepted (RFC 9298 section 3.1)."""
        route = self._route(flow)
        service = _Service(self, stream, flow, framing, lambda source: b"")
        try:
            service.client.filtering = ADDRESS_AND_PORT
            service.entry = self.table.open_now((service.socket, b""), service.client, route)
            stream.write(accepted)
        except DialError as error:
            service.abandon(error.reason.value)
            self.counter.count("dial_failures", error.reason.value)
            raise
        except BaseException:
            service.abandon("failed")
            raise
        return service.run()

    def permit(self, flow: Flow) -> None:
        """DialError where no datagram of a stream for all targets could leave."""
        try:
            refuse_without_udp(self.router, flow._replace(network="udp"))
        except DialError as error:
            self._refused(flow, NO_UPSTREAM, error)
            raise

    def _route(self, flow: Flow) -> Route:
        """The way out of a flow's datagrams; DialError, which has been counted and recorded, where they have none."""
        way = "-"
        try:
            route = self.router.route(flow._replace(network="udp"))
            way = route.dialer.name
            if not flow.target.port:
                raise DialError(Reason.REFUSED, f"{flow.target}: port 0")
            if "udp" not in route.dialer.carries:
                raise DialError(route.dialer.refusal, said=f"{way} carries no UDP")
            return route
        except DialError as error:
            self._refused(flow, way, error)
            raise

    def _refused(self, flow: Flow, way: str, error: DialError) -> None:
        self.counter.count("dial_failures", error.reason.value)
        self.observer.finished(Record(flow, way, 0, 0, 0.0, str(error)))

    def serve_all(
        self, stream: Stream, flow: Flow, framing: Framing, wrap: Callable[[Address], bytes]
    ) -> Wait | None:
        """A stream whose frames name their targets: endpoint-independent, as a SOCKS5 association is.  `wrap` names a source."""
        return _Service(self, stream, flow._replace(network="udp"), framing, wrap).run()


def refuse_without_udp(router: Router, flow: Flow) -> None:
    """DialError where no datagram of a client could leave, wherever it goes: better said now than lost one by one."""
    ways = list(router.candidates(flow))
    if not any("udp" in dialer.carries for dialer in ways):
        raise DialError(ways[-1].refusal, said=f"{ways[-1].name} carries no UDP")


class UotStream:
    """What a connection to UoT's name gets in place of a connector's Passage."""

    def __init__(self, relay: StreamUdpRelay, flow: Flow) -> None:
        self._relay = relay
        self._flow = flow

    def bound(self) -> Address:
        return UNSPECIFIED_ADDRESS

    def accept(self, client: Stream, reply: bytes) -> Wait:
        """Accept the stream on a pool thread: reading its request, and dialling, may block."""
        return Wait((), None, lambda ready: self._relay.uot(client, self._flow, reply))


class _Service:
    """One stream under way."""

    __slots__ = ("_relay", "_flow", "_framing", "socket", "client", "entry", "_poll", "_watched")

    def __init__(
        self,
        relay: StreamUdpRelay,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        wrap: Callable[[Address], bytes],
    ) -> None:
        """StreamError."""
        self._relay = relay
        self._flow = flow
        self._framing = framing
        self._watched = stream.socket
        self.socket = FramedSocket(stream, framing, relay.counter)
        self.client = Client(self.socket, flow.client, self.socket, wrap, self.socket)
        self.client.drain = self.socket.drain
        self.entry: Entry | None = None  # of a stream with one target
        self._poll = select.poll()
        self._poll.register(stream.socket.fileno(), select.POLLIN)
        relay.table.add_client(self.client)

    def run(self) -> Wait | None:
        """On a thread of the connection's own: until it ends, or a Pause where nothing comes for a moment."""
        arena = self._relay.arenas.take()
        try:
            while self.socket.fresh or poll_streams(self._poll, STAY_SECONDS):
                self._forward(self.socket.receive(arena))
                if self.socket.ended:
                    return self._end()
        except BaseException:
            self._end()
            raise
        finally:
            self._relay.arenas.give(arena)
        return Wait(((self._watched, READABLE),), self._relay.idle, self._resume)

    def abandon(self, ended: str) -> None:
        """The stream is its opener's again, who tells the client why."""
        self._relay.table.end(self.socket, ended)

    def _resume(self, ready: bool) -> Wait | None:
        return self.run() if ready else self._end()

    def _end(self) -> None:
        self._relay.table.end(self.socket)
        self.socket.close()

    def _forward(self, batch: Batch) -> None:
        arena, spans = batch
        forward, entries = self._relay.table.forward, self._relay.table.entries
        runs = Runs(lambda entry, run: forward(arena, entry, run))
        for offsets, length, last, address in spans:
            entry = self.entry
            if entry is None or entry.gone:
                entry = entries.get((self.socket, address)) or self._miss(address, len(offsets))
            if entry is not None:
                runs.add(entry, offsets, length, last)
        runs.flush()

    def _miss(self, address: Any, count: int) -> Entry | None:
        """A new entry, or None, and then `count` datagrams have been counted."""
        try:
            target = self._framing.parse(address)
        except ProtocolError:
            target = UNSPECIFIED_ADDRESS
        if not target.port:
            self._relay.counter.count("drops", "bad target", count)
            return None
        flow = self._flow._replace(target=target)
        table = self._relay.table
        entry = table.open((self.socket, address), self.client, flow, self._relay.router, count)
        if (
            entry is None and self.socket not in table.clients
        ):  # the table was closed: its listener is gone
            self.socket.ended = True
        if self.entry is not None:
            self.entry = entry
        return entry
