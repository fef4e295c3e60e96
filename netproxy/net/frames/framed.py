"""Datagrams in a stream, each behind a header that tells its length.

The TCP twin of net.datagram_socket.  A codec knows what the frames look like (Framing).
Reads put what is there into an arena and find the frames in place; frames with equal
headers are recognized as one train.  A run is written in one call.  What the stream does
not take waits in a small queue; beyond that datagrams are dropped and counted, because
a late datagram is worth less than a new one.
Thread: one receives, any may send.
"""

from __future__ import annotations

import select
import socket
import threading
import time

from netproxy.errors import DialError, ProtocolError, Reason, StreamError
from netproxy.interfaces.datagrams import Batch, Run, Span
from netproxy.interfaces.services import refuse_dropped
from netproxy.interfaces.sockets import LayeredSocket
from netproxy.net import stream as streams
from netproxy.net.address import FramedDestination, SourceAddresses
from netproxy.net.datagram import count_repeats
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Arena, Beside, Deliverer, Framing
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Counter

QUEUE_LIMIT = 1 << 16
"""Bytes that wait for the stream, and the rest of a frame.  A thousand slow clients: 64 MiB."""

ROOM = 1 << 19
"""Bytes taken from the stream at a time; an arena holds four times as many."""

NOTSENT_LIMIT = 1 << 18
"""Bytes that the kernel may hold unsent: more would mean delay, not speed."""

REST_SECONDS = 2.0
"""A connection that ends earlier is not replaced before this time has passed."""

PAUSE = 0.1
"""Seconds until the kernel may have memory again."""

FLUSH_SECONDS = 1.0
"""How often a thread that waits to send looks whether the stream is still open."""

TCP_NOTSENT_LOWAT = 25
"""Linux; the socket module of Python 3.10 and 3.11 does not name it."""


class FramedStream:
    """A stream that carries datagrams: what its two roles share."""

    def __init__(self, stream: Stream, framing: Framing, counter: Counter) -> None:
        """Take over a connected stream.  Raises StreamError."""
        self._stream = stream
        self._socket, self._unread = stream.detach()
        self._layered = self._socket if isinstance(self._socket, LayeredSocket) else None
        self._tune()
        self._framing = framing
        self._counter = counter
        self.beside: Beside | None = None
        """None: the stream carries all."""
        # Guards _queue, and the reads and writes of a TLS socket, which allows one at a time.
        self._lock = threading.Lock()
        self._queue = bytearray()
        self.fresh = True
        """True until the first receive: bytes may have been read ahead, of which poll(2) on the
        descriptor tells nothing."""
        self._skip = 0
        """Bytes still to come of a frame that is skipped."""
        self.ended = False
        """True if nothing more will come."""
        self.failed = False
        """True if the stream has failed: datagrams may have been lost."""
        self.closed = False
        self._successor: Stream | None = None
        """What is to replace the stream, as soon as its reader notices.  Under the lock."""
        self._stand_in: socket.socket | None = None
        """The other end of what stands for a stream that has failed.  Under the lock."""

    def _tune(self) -> None:
        for option, value in ((socket.TCP_NODELAY, 1), (TCP_NOTSENT_LOWAT, NOTSENT_LIMIT)):
            try:
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
            except OSError:
                pass  # a unix socket, or gone: then the first read fails

    def use(self, beside: Beside, sink: Callable[[Batch], None]) -> None:
        """Send beside the stream what can go there; what comes there goes to `sink`."""
        self.beside = beside
        beside.sink, beside.gone, beside.attach = sink, self.shutdown, self.attach

    # -- receiving

    def receive(self, arena: Arena) -> Batch:
        """Return the frames that are there; the keys of the spans are raw addresses.

        Does not block.  Sets `ended` at the end.
        """
        spans: list[Span] = []
        self.fresh = False
        kept = len(self._unread)
        arena.view[:kept] = self._unread
        self._unread = b""
        try:
            with self._lock:
                count = self._socket.recv_into(arena.view[kept : kept + ROOM])
            # Within TLS the peer's end is known before the descriptor tells of it.
            self.ended = not count or (self._layered is not None and self._layered.peer_ended)
        except BlockingIOError:
            count = 0
        except OSError:
            count, self.ended, self.failed = 0, True, True
        filled = kept + count
        try:
            rest = self._find_frames(arena, filled, spans)
        except ProtocolError:
            # Where the next frame begins is unknown.
            refuse_dropped(self._counter, "malformed")
            self.ended, rest = True, filled
        self._unread = bytes(arena.view[rest:filled])
        if self.ended and (self._unread or self._skip):
            refuse_dropped(self._counter, "cut off")
        if self.beside is not None and spans:
            self.beside.came_by_stream()
        return Batch(arena, [] if self.closed else spans)

    def _find_frames(self, arena: Arena, filled: int, spans: list[Span]) -> int:
        """Add the frames in the first `filled` bytes; return where the incomplete one begins."""
        memory, find = arena.memory, self._framing.find
        at = min(self._skip, filled)
        self._skip -= at
        while at < filled:
            frame = find(memory, at, filled)
            if frame is None:
                break
            payload, end, address = frame
            if address is None:
                if payload < end:
                    refuse_dropped(self._counter, "unknown context")
                at, self._skip = min(end, filled), max(0, end - filled)
                continue
            length, stride = end - payload, end - at
            count = 1 + count_repeats(memory, at, payload - at, stride, filled)
            behind = payload + count * stride
            offsets = (payload,) if count == 1 else range(payload, behind, stride)
            spans.append((offsets, length, length, address))
            at += count * stride
        return at

    # -- sending

    def _send_frames(self, arena: Arena, run: Run, address: bytes, before: bytes) -> None:
        """Send a run, each payload behind `before`, in frames with a raw address.

        Never blocks, never raises; what cannot be sent is counted by reason.
        """
        view, length, offsets = arena.view, run.length, run.offsets
        if len(before) + length > self._framing.payload_limit:
            refuse_dropped(self._counter, "too big", len(offsets))
            return
        if self.beside is not None and self.beside.send(arena, run, address + before):
            return
        prefix = self._framing.prefix(address, len(before) + length) + before
        parts: list[bytes | memoryview] = [prefix] * (2 * len(offsets))
        parts[1::2] = [view[at : at + length] for at in offsets]
        if run.last != length:
            parts[-2] = self._framing.prefix(address, len(before) + run.last) + before
            parts[-1] = view[offsets[-1] : offsets[-1] + run.last]
        data, frame = b"".join(parts), len(prefix) + length
        with self._lock:
            if self.closed:
                refuse_dropped(self._counter, "closed", len(offsets))
                return
            was_empty = not self._queue
            sent = self._write(data) if was_empty and self._stand_in is None else 0
            if self.failed or self._stand_in is not None:
                refuse_dropped(self._counter, "stream failed", len(offsets))
                return
            # A frame that has begun must be finished; others wait as far as there is room.
            begun = -(-sent // frame)
            fitting = min(len(offsets), (sent + QUEUE_LIMIT - len(self._queue)) // frame)
            kept = max(begun, fitting)
            if kept < len(offsets):
                refuse_dropped(self._counter, "stream full", len(offsets) - kept)
            self._queue += data[sent : kept * frame]
            begins_to_wait = was_empty and bool(self._queue)
        if begins_to_wait:
            self._watch()

    def _write(self, data: bytes | bytearray) -> int:
        """Write what the stream takes.  Under the lock.

        A frame that was cut would make nonsense of those behind it: a stream that fails ends,
        and its reader sees that.
        """
        if not self.failed:
            try:
                return self._stream.write_some(data)
            except StreamError:
                self.failed = True
                self._stream.shutdown()
        return len(data)

    def flush(self) -> bool:
        """Write what waits in the queue; return whether nothing is left."""
        with self._lock:
            if self._queue and not self.closed:
                del self._queue[: self._write(self._queue)]
            return not self._queue

    def _watch(self) -> None:
        """Note that something begins to wait in the queue."""

    # -- another stream in place of the first

    def attach(self, stream: Stream) -> bool:
        """Go on with another stream, once the reader notices; False if this one has ended.

        What waits for the stream before is lost.  Thread: any; never blocks.
        """
        with self._lock:
            if self.closed:
                return False
            if self._successor is not None:
                self._successor.close()
            self._successor = stream
            self._end_socket()
            return True

    def go_on(self) -> bool:
        """Return whether datagrams go on after the end of the stream, in what takes its place.

        That is another stream, or nothing for a while.  Thread: the one that receives.
        """
        with self._lock:
            try:
                goes_on = not self.closed and (self._take_successor() or self._take_stand_in())
            except StreamError:
                return False
            if goes_on:
                if self._queue:
                    refuse_dropped(self._counter, "stream failed")
                self._queue.clear()
                self.fresh, self._skip, self.ended, self.failed = True, 0, False, False
            return goes_on

    def _take_successor(self) -> bool:
        """Go on with another stream, if there is one.  Under the lock.  Raises StreamError."""
        stream, self._successor = self._successor, None
        if stream is None:
            return False
        self._use_socket(stream)
        if self._stand_in is not None:
            self._stand_in.close()
            self._stand_in = None
        if self.beside is not None:
            self.beside.attached()
        return True

    def _take_stand_in(self) -> bool:
        """Put something silent in the place of a stream that has ended, if that is right."""
        # What another worker relays ends in the same way if it was reset.
        is_relayed = self._layered is None and self._socket.family == socket.AF_UNIX
        if self.beside is None or not self.beside.hold(self.failed or is_relayed):
            return False
        try:
            near, far = socket.socketpair()
        except OSError:
            return False
        near.setblocking(False)
        self._stand_in = far
        self._use_socket(streams.Stream(near))
        return True

    def _use_socket(self, stream: Stream) -> None:
        """Go on with the socket of another stream.  Under the lock.  Raises StreamError."""
        self._stream.replace(stream)
        self._socket, self._unread = self._stream.detach()
        self._layered = self._socket if isinstance(self._socket, LayeredSocket) else None
        self._tune()

    # -- ends

    def shutdown(self) -> None:
        """End both directions; a thread that waits wakes.  The descriptor stays until close()."""
        self.closed = True
        if self.beside is not None:
            self.beside.close()
        self._end_socket()

    def _end_socket(self) -> None:
        """Have the thread that waits for the stream see its end."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has just ended

    def close(self) -> None:
        """Close the stream."""
        self.closed = True
        if self.beside is not None:
            self.beside.close()
        with self._lock:
            for left in (self._stream, self._successor, self._stand_in):
                if left is not None:
                    left.close()


class FramedSocket(FramedStream):
    """The stream of a client, which sends datagrams and receives replies.

    It has the methods of a DatagramSocket that replies need.  The header of a reply is the raw
    address of its source.
    """

    def reply_destination(self, peer: Hashable) -> None:
        """Return None: replies go where the stream goes."""

    def send(self, arena: Arena, run: Run, destination: None) -> None:
        """Send replies.  Never blocks; drain() sends what has to wait."""
        self._send_frames(arena, run, run.header.data if run.header else b"", b"")

    @property
    def waits(self) -> bool:
        """Whether replies wait for the stream."""
        return bool(self._queue)

    def drain(self, given_up: Callable[[], object]) -> None:
        """Block until the queue is empty, or given_up() is true, or the stream has ended.

        Thread: the one that sends replies, which has no other client.
        """
        if not self._queue:
            return
        poll = select.poll()
        try:
            poll.register(self._socket.fileno(), select.POLLOUT)
        except ValueError:
            return  # just closed
        while not (self.closed or given_up() or self.flush()):
            try:
                poll.poll(FLUSH_SECONDS * 1000)
            except OSError:
                time.sleep(PAUSE)


class FramedConn(FramedStream):
    """A PacketConn: the stream leads to a proxy, which forwards the datagrams."""

    bound: Sequence[Address] = ()

    def __init__(self, stream: Stream, framing: Framing, counter: Counter) -> None:
        """Take over a connected stream.  Raises DialError; then the stream is closed."""
        try:
            super().__init__(stream, framing, counter)
            # Unlike a poll object, epoll lets a sender change what the reader waits for.
            self._events = select.epoll()
            self._events.register(self._socket.fileno(), select.EPOLLIN)
        except (OSError, ValueError, StreamError) as error:
            stream.close()
            said = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise DialError(Reason.GENERAL, said=said) from error
        self.member = stream.member
        self._opened = time.monotonic()
        self._shut_down = threading.Event()
        self.deliverer: Deliverer | None = None
        self.sink: Callable[[Batch], None] | None = None
        """As that of a Deliverer: takes what comes beside the stream."""
        self._is_nudged = False
        # Guards _sources, which datagrams beside the stream need as well.
        self._learning = threading.Lock()
        self._sources = SourceAddresses(framing.parse)

    def send_beside(self, beside: Beside) -> None:
        """Send beside the stream what can go there, and take what comes there."""
        self.deliverer = self
        self.use(beside, self._came_beside)

    def reaches(self, target: Address) -> bool:
        """Return whether the framing has frames for a target."""
        try:
            return self._framing.encode(target) is not None
        except ValueError:
            return False

    def prepare(self, flow: Flow) -> FramedDestination:
        """Return the destination for the flow's target.  Raises DialError."""
        target = flow.target
        try:
            return FramedDestination(self._framing.encode(target), target)
        except ValueError as error:
            raise DialError(Reason.UNSUPPORTED, str(target), str(error)) from error

    def send(self, arena: Arena, run: Run, destination: FramedDestination) -> None:
        """Send a run.  Never blocks, never raises; what cannot be sent is counted by reason."""
        if self.ended and (self.beside is None or not self.failed):
            refuse_dropped(self._counter, "upstream closed", len(run.offsets))
            return
        header = run.header.data if run.header else b""
        self._send_frames(arena, run, destination.address, header)

    def wait(self) -> bool:
        """Block until something may be received, and flush meanwhile; False once closed."""
        while not self.closed:
            if self.ended:
                if self.go_on():
                    continue
                # Do not ask a proxy again at once that has hung up at once.
                self._shut_down.wait(max(0.0, self._opened + REST_SECONDS - time.monotonic()))
                return False
            if self.fresh or self._is_nudged:
                self._is_nudged = False
                return True
            try:
                ready = self._events.poll()
            except OSError:
                time.sleep(PAUSE)
                continue
            for _, events in ready:
                if events & select.EPOLLOUT and self.flush():
                    self._watch()
                if events & ~select.EPOLLOUT:
                    return True
        return False

    def receive(self, arena: Arena) -> Batch:
        """Return the frames that are there and have a valid address."""
        return self._learned(super().receive(arena))

    def _came_beside(self, batch: Batch) -> None:
        """Deliver what has come beside the stream.  Thread: that of `beside`."""
        sink = self.sink
        if sink is None or self.closed or (self.ended and not self.failed):
            count = sum(len(span[0]) for span in batch.spans)
            refuse_dropped(self._counter, "closed", count)
            return
        sink(self._learned(batch))

    def _learned(self, batch: Batch) -> Batch:
        """Return a batch with the spans whose addresses are valid."""
        spans: list[Span] = []
        for span in batch.spans:
            try:
                with self._learning:
                    self._sources.learn(span[3], spans)  # type: ignore[arg-type]  # a raw address
                spans.append(span)
            except ProtocolError:
                refuse_dropped(self._counter, "malformed", len(span[0]))
        return Batch(batch.arena, spans)

    def nudge(self) -> None:
        """Let wait() return True once.  Thread: any."""
        self._is_nudged = True
        with self._lock:
            if not self.closed:
                # The stream has room: that wakes the reader.
                self._events.modify(self._socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def source(self, peer: Hashable) -> Address:
        """Return the address that the key of a span stands for."""
        return self._sources[peer]

    def shutdown(self) -> None:
        """End both directions, and wait() as well."""
        super().shutdown()
        self._shut_down.set()

    def close(self) -> None:
        """Close the stream."""
        super().close()
        # No circle of references keeps a session that has ended.
        self.sink = self.deliverer = None
        with self._lock:
            self._events.close()

    def _use_socket(self, stream: Stream) -> None:
        try:
            self._events.unregister(self._socket.fileno())
            super()._use_socket(stream)
            self._events.register(self._socket.fileno(), select.EPOLLIN)
        except (OSError, ValueError) as error:
            raise StreamError(str(error)) from error

    def _watch(self) -> None:
        """Let the reader wait for room as well as long as the queue is not empty."""
        with self._lock:
            if not self.closed:
                events = select.EPOLLIN | (select.EPOLLOUT if self._queue else 0)
                self._events.modify(self._socket.fileno(), events)
