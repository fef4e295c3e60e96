"""UDP datagrams that a client sends within a stream: connect-udp (RFC 9298), UDP over TCP.

A stream begins with a request for connect-udp, or with a connection to the name of UDP over
TCP (UoT); the streams of a tunnel are served in the same way.  Its frames are received where
they lie in an arena and go through the listener's NAT table as datagrams do.  Replies come
back on the threads of the sessions.  A stream without frames for a moment returns its thread.
"""

from __future__ import annotations

import select
from functools import partial
from typing import TYPE_CHECKING, Callable, Hashable

from netproxy.errors import DialError, EndOfStream, FlowRefused, ProtocolError, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.flows import Record
from netproxy.net.framed import FramedSocket
from netproxy.net.stream import complete, poll_streams
from netproxy.protocol import connect_udp, uot
from netproxy.protocol.capsule import Capsules
from netproxy.relay.client import Client, no_header
from netproxy.relay.coalesce import Runs
from netproxy.relay.entry import EntryState
from netproxy.relay.session import ADDRESS_AND_PORT_DEPENDENT

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Batch
    from netproxy.interfaces.flows import Flow, Observer
    from netproxy.interfaces.routing import Route, Router
    from netproxy.interfaces.services import Counter
    from netproxy.net.datagram import ArenaPool
    from netproxy.net.framed import Framing
    from netproxy.protocol import http1
    from netproxy.relay.entry import Entry
    from netproxy.relay.nat import NatTable

STAY_SECONDS = 0.2
"""A stream without a frame for this long returns its thread.  A game sends more often."""
NO_UPSTREAM = "-"  # in the record of a flow that was not routed
# At hand for the path of a datagram: Python 3.10 looks a member up with a call.
_GONE = EntryState.GONE


class StreamUdpRelay:
    """Serves the datagrams in the streams of one listener."""

    def __init__(
        self,
        router: Router,
        table: NatTable,
        arenas: ArenaPool,
        counter: Counter,
        observer: Observer,
        idle: float,
        permission: Permission | None,
    ) -> None:
        """`idle`: seconds that a stream may be silent.  `permission`: None in a tunnel."""
        self.router, self.table, self.arenas = router, table, arenas
        self.counter, self.observer, self.idle = counter, observer, idle
        self.permission = permission  # asked for each new target

    def connect_udp(self, stream: Stream, request: http1.HttpRequest, flow: Flow) -> Wait | None:
        """Answer a request for connect-udp and serve its datagrams (RFC 9298 section 3).

        Raises HttpError or DialError; nothing has been answered then.
        """
        target = connect_udp.parse_target(request)
        flow = flow._replace(network="udp", target=target)
        return self.serve_one(stream, flow, Capsules(target), connect_udp.encode_accept())

    def uot(self, stream: Stream, flow: Flow, reply: bytes) -> Wait | None:
        """Accept a connection to the name of UoT with `reply` and serve its datagrams.

        Raises EndOfStream or StreamError if the client leaves.
        """
        stream.write(reply)
        request = uot.UotRequest(False, UNSPECIFIED_ADDRESS)
        try:
            if flow.target.host != uot.MAGIC_V1:
                request = complete(uot.read_request(stream))
        except EndOfStream:
            raise
        except ProtocolError as error:
            self.counter.refuse(flow.refusal("connections_refused", "no UoT request", error))
            # The stream is open, and UoT has no message for an error: a reset says it.
            stream.reset()
            return None
        if not request.connected:
            return self.serve_all(stream, flow, uot.Frames(), uot.encode_address)
        flow = flow._replace(network="udp", target=request.target)
        try:
            return self.serve_one(stream, flow, uot.Frames(request.target), b"")
        except DialError:  # counted and recorded
            stream.reset()
            return None

    def serve_one(
        self, stream: Stream, flow: Flow, framing: Framing, accepted: bytes
    ) -> Wait | None:
        """Serve a stream for one target; only the target may reply.

        The target's name is resolved before `accepted` is written (RFC 9298 section 3.1).
        Raises DialError; nothing has been written then.
        """
        route = self._route(flow)
        service = _Service(self, stream, flow, framing, no_header)
        try:
            service.open_now(route)
            stream.write(accepted)
        except DialError as error:
            self._refused(flow, route, error, service.abandon(error.reason.value))
            raise
        except BaseException:
            service.abandon("failed")
            raise
        return service.run()

    def serve_all(
        self, stream: Stream, flow: Flow, framing: Framing, wrap: Callable[[Address], bytes]
    ) -> Wait | None:
        """Serve a stream whose frames name their targets.

        It is a client with endpoint-independent mapping, as a SOCKS5 association is.
        `wrap` encodes the source of a reply.
        """
        return _Service(self, stream, flow._replace(network="udp"), framing, wrap).run()

    def permit(self, flow: Flow) -> None:
        """Raise DialError, counted and recorded, if no datagram of a stream could leave."""
        try:
            refuse_without_udp(self.router, flow._replace(network="udp"))
        except DialError as error:
            self._refused(flow, None, error)
            raise

    def _route(self, flow: Flow) -> Route:
        """Return the route of a flow's datagrams.  Raises DialError, counted and recorded."""
        route = None
        try:
            route = self.router.route(flow._replace(network="udp"))
            if not flow.target.port:
                raise DialError(Reason.REFUSED, f"{flow.target}: port 0")
            if "udp" not in route.dialer.carries:
                raise DialError(route.dialer.refusal, said=f"{route.dialer.name} carries no UDP")
            return route
        except DialError as error:
            self._refused(flow, route, error)
            raise

    def _refused(
        self, flow: Flow, route: Route | None, error: DialError, recorded: bool = False
    ) -> None:
        """Count a flow that could not begin, and record it unless a session has done so."""
        if isinstance(error, FlowRefused):
            self.counter.refuse(flow.refusal("requests_refused", error.said, error.decided))
            return
        self.counter.count("dial_failures", error.reason.value)
        if not recorded:
            upstream, rule = (route.dialer.name, route.rule) if route else (NO_UPSTREAM, "")
            record = Record(flow, upstream, 0, 0, 0.0, str(error), rule=rule)
            self.observer.finished(record._replace(decided=error.decided_by(rule)))


def refuse_without_udp(router: Router, flow: Flow) -> None:
    """Raise DialError if no datagram of a client could leave, whatever its target.

    It is better refused now than lost one by one.
    """
    dialers = list(router.candidates(flow))
    if not any("udp" in dialer.carries for dialer in dialers):
        raise DialError(dialers[-1].refusal, said=f"{dialers[-1].name} carries no UDP")


class UotStream:
    """What a client gets for a connection to the name of UoT: a stream of datagrams."""

    def __init__(self, relay: StreamUdpRelay, flow: Flow) -> None:
        self._relay, self._flow = relay, flow

    def bound(self) -> Address:
        """Return the address for the reply: there is no socket yet that has one."""
        return UNSPECIFIED_ADDRESS

    def accept(self, client: Stream, reply: bytes) -> Wait:
        """Tell the client that it is connected, then serve its datagrams, on a pool thread.

        Reading the request of UoT may block, and so may opening its session.
        """
        return Wait((), None, partial(self._serve, client, reply))

    def _serve(self, client: Stream, reply: bytes, ready: bool) -> Wait | None:
        return self._relay.uot(client, self._flow, reply)


class _Service:
    """One stream, and its client in the NAT table."""

    __slots__ = ("_relay", "_flow", "_framing", "_socket", "_client", "_entry", "_poll", "_watched")

    def __init__(
        self,
        relay: StreamUdpRelay,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        wrap: Callable[[Address], bytes],
    ) -> None:
        """Take the socket out of the stream.  Raises StreamError."""
        self._relay, self._flow, self._framing = relay, flow, framing
        self._watched = stream.socket
        self._socket = FramedSocket(stream, framing, relay.counter)
        self._client = Client(self._socket, flow.client, self._socket, wrap, self._socket)
        self._client.draining = self._socket
        # The entry of a stream with one target.
        self._entry: Entry | None = None
        self._poll = select.poll()
        self._poll.register(stream.socket.fileno(), select.POLLIN)
        relay.table.add_client(self._client)

    def open_now(self, route: Route) -> None:
        """Open the session of the only target.  Blocks.  Raises DialError."""
        self._client.filtering = ADDRESS_AND_PORT_DEPENDENT
        self._entry = self._relay.table.open_now((self._socket, b""), self._client, route)

    def run(self) -> Wait | None:
        """Forward frames until none comes for a moment, or the stream ends.

        Returns the wait for the next frame, None at the end.  Thread: one of the pool.
        """
        framed, arena = self._socket, self._relay.arenas.take()
        try:
            while framed.fresh or poll_streams(self._poll, STAY_SECONDS):
                self._forward(framed.receive(arena))
                if framed.ended:
                    self._end()
                    return None
        except BaseException:
            self._end()
            raise
        finally:
            self._relay.arenas.give(arena)
        return Wait(((self._watched, READABLE),), self._relay.idle, self._resume)

    def abandon(self, ended: str) -> bool:
        """End the session, not the stream; return whether there was one, with its record."""
        return bool(self._relay.table.end(self._socket, ended))

    def _resume(self, ready: bool) -> Wait | None:
        if ready:
            return self.run()
        self._end()
        return None

    def _end(self) -> None:
        if self._socket.failed:
            self._relay.counter.count("connections", "broken off")
            self._relay.table.end(self._socket, "client reset")
        else:
            self._relay.table.end(self._socket)
        self._socket.close()

    def _forward(self, batch: Batch) -> None:
        arena, spans = batch
        table, entries = self._relay.table, self._relay.table.entries
        runs: Runs[Entry] = Runs(partial(table.forward, arena))
        for offsets, length, last, address in spans:
            entry = self._entry
            if entry is None or entry.state is _GONE:
                entry = entries.get((self._socket, address)) or self._miss(address, len(offsets))
            if entry is not None:
                runs.add(entry, offsets, length, last)
        runs.flush()

    def _miss(self, address: Hashable, count: int) -> Entry | None:
        """Return the entry of a frame's raw address, or None if `count` datagrams were dropped."""
        assert isinstance(address, bytes)
        relay, permission = self._relay, self._relay.permission
        try:
            target = self._framing.parse(address)
        except ProtocolError:
            target = UNSPECIFIED_ADDRESS
        flow = self._flow._replace(target=target)
        entry: Entry | None = None
        if not target.port:
            relay.counter.refuse(flow.refusal("drops", "bad target", "not a target"), count)
        elif permission is None or not permission.refuses(flow, count):
            key = self._socket, address
            entry = relay.table.open(key, self._client, flow, relay.router, count)
        if entry is None and self._socket not in relay.table.clients:
            # The table was closed: a reload has removed the listener.
            self._socket.ended = True
        if self._entry is not None:
            self._entry = entry
        return entry
