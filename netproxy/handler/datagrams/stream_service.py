"""Forwards the datagrams of one stream, and of what stands beside it, through a NAT table.

A stream without frames for a moment returns its thread.  What comes beside the stream is forwarded
on the thread that brings it.
"""

from __future__ import annotations

import select
import threading
from functools import partial

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.flows import FlowCounter
from netproxy.net.frames.telling import TellingSocket
from netproxy.net.stream import poll_streams
from netproxy.relay.client import Client
from netproxy.relay.coalesce import Runs
from netproxy.relay.entry import EntryState
from netproxy.relay.table.reply_sources import ADDRESS_AND_PORT_DEPENDENT
from netproxy.typed import TYPE_CHECKING, Callable, Hashable

if TYPE_CHECKING:
    from netproxy.net.frames.framed import FramedSocket
    from netproxy.handler.datagrams.stream_udp import StreamUdpRelay
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Batch, Beside, Framing
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Route
    from netproxy.relay.entry import Entry
    from netproxy.relay.session import Session

STAY_SECONDS = 0.2
"""A stream without a frame for this long returns its thread.  A game sends more often."""
# At hand for the path of a datagram: Python 3.10 looks a member up with a call.
_GONE, _READY = EntryState.GONE, EntryState.READY


class StreamService:
    """One stream, and its client in the NAT table."""

    __slots__ = (
        *("_relay", "_flow", "_framing", "_socket", "_client", "_entry", "_poll", "_stream"),
        "_forwarding",
    )

    def __init__(
        self,
        relay: StreamUdpRelay,
        stream: Stream,
        flow: Flow,
        framing: Framing,
        wrap: Callable[[Address], bytes],
        beside: Beside | None = None,
    ) -> None:
        """Take the socket out of the stream.  Raises StreamError."""
        self._relay, self._flow, self._framing = relay, flow, framing
        self._stream = stream
        self._socket = self._make_socket(stream)
        self._client = Client(self._socket, flow.client, self._socket, wrap, self._socket)
        self._client.draining = self._socket
        # The entry of a stream with one target.
        self._entry: Entry | None = None
        self._watch()
        # Held by the thread that forwards: datagrams beside the stream come on another one.
        self._forwarding = threading.Lock()
        relay.table.add_client(self._client)
        if beside is not None:
            self._socket.use(beside, self._forward)

    def _make_socket(self, stream: Stream) -> FramedSocket:
        counter = FlowCounter(self._relay.counter, self._flow)
        return TellingSocket(stream, self._framing, counter)

    def open_now(self, route: Route, accepted: bytes) -> bytes:
        """Open the session of the only target; return the answer, which is `accepted`.

        Blocks.  Raises DialError.
        """
        self._client.filtering = ADDRESS_AND_PORT_DEPENDENT
        self._entry = self._relay.table.open_now((self._socket, b""), self._client, route)
        return accepted

    @property
    def closed(self) -> bool:
        """Whether the stream has ended."""
        return self._socket.closed or self._socket.ended

    def session(self) -> Session | None:
        """Return the session of the only target; None while it is not open."""
        entry = self._entry
        return entry.session if entry is not None and entry.state is _READY else None

    def tell(self, data: bytes) -> None:
        """Send a message between the frames, on a stream for one target.  Never blocks."""
        if isinstance(self._socket, TellingSocket):
            self._socket.tell(data)

    def run(self) -> Wait | None:
        """Forward frames until none comes for a moment, or the stream ends.

        Returns the wait for the next frame, None at the end.  Thread: one of the pool.
        """
        framed, arena = self._socket, self._relay.arenas.take()
        try:
            while framed.fresh or poll_streams(self._poll, STAY_SECONDS):
                self._forward(framed.receive(arena))
                if framed.ended:
                    if not framed.go_on():
                        self._end()
                        return None
                    self._watch()
        except BaseException:
            self._end()
            raise
        finally:
            self._relay.arenas.give(arena)
        return Wait(((self._stream.socket, READABLE),), self._relay.idle, self._resume)

    def _watch(self) -> None:
        """Watch the stream's socket: the first one, or that which has taken its place."""
        self._poll = select.poll()
        self._poll.register(self._stream.socket.fileno(), select.POLLIN)

    def abandon(self, ended: str) -> bool:
        """End the session, not the stream; return whether there was one, with its record."""
        return bool(self._relay.table.end(self._socket, ended))

    def _resume(self, ready: bool) -> Wait | None:
        beside = self._socket.beside
        # A stream may be silent for as long as datagrams pass beside it.
        if ready or (beside is not None and beside.take_used()):
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
        with self._forwarding:
            self._forward_alone(batch)

    def _forward_alone(self, batch: Batch) -> None:
        arena, spans = batch.arena, batch.spans
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
