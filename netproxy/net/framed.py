"""Datagrams in a stream, each behind a header that tells its length: the TCP twin of net.datagram.

What the frames look like is a codec's (Framing).  Reads take what is there into an
arena and find the frames where they lie; a train of equal ones is found at a glance.
Writes join a run into one; what the stream does not take waits in a small queue, and
beyond that datagrams are dropped and counted: old ones are worth less than new.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from typing import Any, Callable, Hashable, Protocol

from netproxy.errors import DialError, ProtocolError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, Run, Span
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Counter
from netproxy.net.address import Sources
from netproxy.net.stream import Stream

QUEUE_LIMIT = (
    1 << 16
)  # bytes that wait for the stream, and the rest of a frame: with a thousand slow clients 64 MiB
ROOM = 1 << 19  # bytes taken from the stream at a time: an arena holds four times that
NOTSENT_LIMIT = (
    1 << 18
)  # bytes the kernel may hold that are not on their way: more is delay, not speed
REST_SECONDS = 2.0  # a connection that ends sooner is not replaced before that
PAUSE = 0.1  # seconds until the kernel may have memory again
FLUSH_SECONDS = 1.0  # between two looks of a sender that waits at whether the stream still lives
TCP_NOTSENT_LOWAT = 25  # Linux, not named by the socket module of Python 3.10 and 3.11


class Framing(Protocol):
    payload_limit: int  # bytes

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """The frame at `start` of what is there up to `end`: where its payload begins, where it ends, its raw address.

        None until it is whole.  An address of None says that it is nothing for us, and such a frame may end beyond
        `end`.  ProtocolError.
        """

    def prefix(self, address: bytes, size: int) -> bytes:
        """What goes before a payload of `size` bytes."""

    def encode(self, target: Address) -> bytes:
        """A target as raw address; ValueError where the stream does not lead there."""

    def parse(self, address: bytes) -> Address:
        """ProtocolError."""


class FramedSocket:
    """The stream of a client: its frames are received, and answers sent behind the header that a run brings.

    One thread receives, any may send.
    """

    def __init__(self, stream: Stream, framing: Framing, counter: Counter) -> None:
        """StreamError."""
        self._stream = stream
        self._socket, self._tail = stream.detach()
        for option, value in ((socket.TCP_NODELAY, 1), (TCP_NOTSENT_LOWAT, NOTSENT_LIMIT)):
            try:
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
            except OSError:
                pass  # a unix socket, or gone: the first read tells
        self._framing = framing
        self._counter = counter
        self._lock = (
            threading.Lock()
        )  # guards _queue, and all calls of a socket that is no plain one
        self._queue = bytearray()
        self.fresh = (
            True  # nothing was received yet: what was read ahead no look at the socket tells of
        )
        self._skip = 0  # bytes to come of a frame that is nothing for us
        self.ended = False  # nothing will come any more
        self.closed = False

    # -- receiving

    def receive(self, arena: Any) -> Batch:
        """The frames that are there, as spans whose keys are raw addresses.  Does not block.  Sets `ended` at the end."""
        spans: list[Span] = []
        self.fresh = False
        kept = len(self._tail)
        arena.view[:kept] = self._tail
        self._tail = b""
        try:
            with self._lock:
                count = self._socket.recv_into(arena.view[kept : kept + ROOM])
            self.ended = not count or getattr(
                self._socket, "over", False
            )  # TLS knows its end before its socket does
        except BlockingIOError:
            count = 0
        except OSError:
            count, self.ended = 0, True
        try:
            rest = self._cut(arena, kept + count, spans)
        except ProtocolError:
            self._counter.count("drops", "malformed")
            self.ended, rest = True, kept + count  # nobody knows where the next one begins
        self._tail = bytes(arena.view[rest : kept + count])
        if self.ended and (self._tail or self._skip):
            self._counter.count("drops", "cut off")
        return Batch(arena, [] if self.closed else spans)

    def _cut(self, arena: Any, filled: int, spans: list[Span]) -> int:
        """Adds the frames in the first `filled` bytes; where the one begins that is not whole."""
        memory, find = arena.memory, self._framing.find
        at = min(self._skip, filled)
        self._skip -= at
        while at < filled:
            frame = find(memory, at, filled)
            if frame is None:
                break
            payload, end, address = frame
            if address is None:
                self._skip = max(0, end - filled)
                at = min(end, filled)
                continue
            length, stride = end - payload, end - at
            count = 1 + _repeats(memory, at, payload - at, stride, filled)
            if count == 1:
                spans.append(((payload,), length, length, address))
            else:
                spans.append(
                    (
                        range(payload, payload + (count - 1) * stride + 1, stride),
                        length,
                        length,
                        address,
                    )
                )
            at += count * stride
        return at

    # -- sending

    def reply_destination(self, peer: Hashable) -> None:
        """As net.datagram.DatagramSocket's: answers go where the stream goes."""

    def send(self, arena: Any, run: Run, destination: None) -> None:
        """Sends answers; their header is the raw address of their source.  drain() sends what had to wait."""
        self._put(arena, run, run.header.data if run.header else b"", b"")

    def _put(self, arena: Any, run: Run, address: bytes, before: bytes) -> None:
        """Never raises; what cannot go is counted by reason."""
        view, length, offsets = arena.view, run.length, run.offsets
        if len(before) + length > self._framing.payload_limit:
            self._counter.count("drops", "too big", len(offsets))
            return
        prefix = self._framing.prefix(address, len(before) + length) + before
        parts: list[Any] = [prefix] * (2 * len(offsets))
        parts[1::2] = [view[at : at + length] for at in offsets]
        if run.last != length:
            parts[-2:] = (
                self._framing.prefix(address, len(before) + run.last) + before,
                view[offsets[-1] : offsets[-1] + run.last],
            )
        data, frame = b"".join(parts), len(prefix) + length
        with self._lock:
            if self.closed:
                self._counter.count("drops", "closed", len(offsets))
                return
            waiting = bool(self._queue)
            sent = 0 if waiting else self._write(data)
            kept = -(
                -sent // frame
            )  # those begun are finished, and others wait as far as there is room
            kept = max(kept, min(len(offsets), (sent + QUEUE_LIMIT - len(self._queue)) // frame))
            if kept < len(offsets):
                self._counter.count("drops", "stream full", len(offsets) - kept)
            self._queue += data[sent : kept * frame]
            congested = not waiting and bool(self._queue)
        if congested:
            self._watch()

    def _write(self, data: bytes | bytearray) -> int:
        """Under the lock.  What a stream that has failed does not take its reader will find out."""
        try:
            return self._stream.write_some(data)
        except StreamError:
            return len(data)

    def flush(self) -> bool:
        """Writes what waits; whether nothing is left."""
        with self._lock:
            if self._queue and not self.closed:
                del self._queue[: self._write(self._queue)]
            return not self._queue

    def _watch(self) -> None:
        """Something waits to be sent."""

    def drain(self, given_up: Callable[[], Any]) -> None:
        """Waits until nothing waits any more, or it is given up: on the thread that sends answers, which has this client alone."""
        if not self._queue:
            return
        poll = select.poll()
        try:
            poll.register(self._socket.fileno(), select.POLLOUT)
        except ValueError:
            return  # just closed
        while not (self.closed or given_up() or self.flush()):
            _patiently(lambda: poll.poll(FLUSH_SECONDS * 1000))

    # -- ends

    def shutdown(self) -> None:
        """Whoever waits on it finds its end; the descriptor stays until close()."""
        self.closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has just ended

    def close(self) -> None:
        self.closed = True
        with self._lock:
            self._stream.close()


class FramedDestination:
    """A target as a raw address."""

    __slots__ = ("address", "sockaddr")

    def __init__(self, address: bytes, target: Address) -> None:
        self.address = address
        self.sockaddr = (*target,)


class FramedConn(FramedSocket):
    """The same as a PacketConn: the stream leads to a proxy, which sends the datagrams on."""

    def __init__(self, stream: Stream, framing: Framing, counter: Counter) -> None:
        """DialError, and then the stream is closed."""
        try:
            super().__init__(stream, framing, counter)
            # unlike a poll object it can be told by a sender what its waiting reader is to wait for
            self._events = select.epoll()
            self._events.register(self._socket.fileno(), select.EPOLLIN)
        except (OSError, ValueError, StreamError) as error:
            stream.close()
            raise DialError(
                Reason.GENERAL, said=getattr(error, "strerror", None) or str(error)
            ) from error
        self._opened = time.monotonic()
        self._gone = threading.Event()
        self._sources = Sources(framing.parse)

    def prepare(self, flow: Flow) -> FramedDestination:
        target = flow.target
        try:
            return FramedDestination(self._framing.encode(target), target)
        except ValueError as error:
            raise DialError(Reason.UNSUPPORTED, str(target), str(error)) from error

    def send(self, arena: Any, run: Run, destination: FramedDestination) -> None:
        if self.ended:
            self._counter.count("drops", "upstream closed", len(run.offsets))
            return
        self._put(arena, run, destination.address, run.header.data if run.header else b"")

    def wait(self) -> bool:
        while not self.closed:
            if self.ended:
                # a proxy that hangs up at once is not asked again at once
                self._gone.wait(max(0.0, self._opened + REST_SECONDS - time.monotonic()))
                return False
            if self.fresh:
                return True
            for _, events in _patiently(self._events.poll):
                if events & select.EPOLLOUT and self.flush():
                    self._watch()
                if events & ~select.EPOLLOUT:
                    return True
        return False

    def receive(self, arena: Any) -> Batch:
        known: list[Span] = []
        for span in super().receive(arena).spans:
            try:
                self._sources.learn(span[3], known)  # type: ignore[arg-type]
                known.append(span)
            except ProtocolError:
                self._counter.count("drops", "malformed", len(span[0]))
        return Batch(arena, known)

    def source(self, peer: Hashable) -> Address:
        return self._sources[peer]  # type: ignore[index]

    def shutdown(self) -> None:
        super().shutdown()
        self._gone.set()

    def close(self) -> None:
        super().close()
        with self._lock:
            self._events.close()

    def _watch(self) -> None:
        """Lets the reader wait for room as well, while something waits for it."""
        with self._lock:
            if not self.closed:
                self._events.modify(
                    self._socket.fileno(), select.EPOLLIN | (select.EPOLLOUT if self._queue else 0)
                )


def _patiently(poll: Callable[[], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """What a poll gives; nothing, a moment later, where the kernel has no memory for it."""
    try:
        return poll()
    except OSError:
        time.sleep(PAUSE)
        return []


def _repeats(memory: bytearray, at: int, header: int, stride: int, end: int) -> int:
    """How many frames behind the one at `at` have its very header, and so its length."""
    room = (end - at) // stride - 1
    if room <= 0 or memory[at + stride : at + stride + header] != memory[at : at + header]:
        return 0
    for column in range(at, at + header):
        # the bytes at one place of all headers: as many as begin it equal go on
        values = memory[column + stride : column + stride * (room + 1) : stride]
        room = min(room, len(values) - len(values.lstrip(memory[column : column + 1])))
    return room
