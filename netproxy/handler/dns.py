"""A caching DNS forwarder: what clients ask is answered from a cache, or by the name servers that its name is for.

A datagram, stop by stop: the query's key leads to a kept answer, whose TTLs are
lessened, and which leaves at once; a miss is asked by a worker, once for all who ask
the same meanwhile.  Messages pass untouched but for their ID.  handle_packets runs on
the reader thread of the listener, handle on a connection's own.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Callable, Container, Hashable, NamedTuple, Protocol

from netproxy.errors import EndOfStream, ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.datagrams import Batch
from netproxy.interfaces.services import Counter
from netproxy.net.address import from_sockaddr
from netproxy.net.datagram import ArenaPool
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.net.stream import Stream
from netproxy.protocol import dns

KEPT_SIZE = 4096  # bytes of an answer that is kept: with 4,096 of them 16 MiB at the very most
TTL_LIMIT = 86400  # seconds, as for our own lookups
WAITING_LIMIT = 64  # clients that wait for one answer under way
ANSWER_SECONDS = 10.0  # that a connection waits for an answer that somebody else has asked for: servers have five
IDLE_SECONDS = 30.0  # for the next query of a connection: RFC 7766 section 6.2.3 has seconds
KNOWN_LIMIT = 4096  # clients remembered as allowed


class Source(Protocol):
    """Where answers come from (resolver.forwarder)."""

    def answer(self, query: bytes) -> bytes | None:
        """One that needs no server, or None; ProtocolError."""

    def forward(self, query: bytes) -> bytes:
        """Blocks; ProtocolError."""


class _Kept(NamedTuple):
    message: bytes
    places: tuple[int, ...]  # of TTLs
    since: float  # monotonic
    until: float


class Answers:
    """The cache.  The listener's reader looks it up without the lock, which the GIL makes safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards writes
        self._kept: dict[bytes, _Kept] = {}  # oldest first

    def find(self, key: bytes, query: bytes, now: float) -> bytes | None:
        kept = self._kept.get(key)
        if kept is None or now >= kept.until:
            return None
        return dns.aged(kept.message, kept.places, query, int(now - kept.since))

    def keep(self, key: bytes, message: bytes, now: float) -> None:
        ttl = dns.least_ttl(message)
        if not ttl or len(message) > KEPT_SIZE or not self._limit:
            return
        message = dns.without_options(message)
        kept = _Kept(message, dns.ttl_places(message), now, now + min(ttl, TTL_LIMIT))
        with self._lock:
            self._kept.pop(key, None)
            while len(self._kept) >= self._limit:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = kept


Waiting = list[
    tuple[bytes, Callable[[bytes], None]]
]  # who waits for an answer: the query, and what takes its answer


class DnsHandler:
    """Handler and PacketHandler.  `submit` hands work to a bounded pool; False when that is full."""

    def __init__(
        self,
        source: Source,
        cache: int,
        clients: Container[str] | None,
        submit: Callable[[Callable[[], None]], bool],
        arenas: ArenaPool,
        counter: Counter,
    ) -> None:
        """`clients`: who may ask by datagrams, None for everybody."""
        self._source = source
        self._answers = Answers(cache)
        self._clients = clients
        self._submit = submit
        self._arenas = arenas
        self._counter = counter
        self._known: set[Hashable] = (
            set()
        )  # hosts of clients that were found to be allowed; the reader's
        self._lock = threading.Lock()  # guards _pending
        self._pending: dict[bytes, Waiting] = {}

    # -- datagrams

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        arena, spans = batch
        out, now = self._arenas.take(), time.monotonic()
        for offsets, length, last, peer in spans:
            if self._clients is not None and not self._allowed(local.peer(peer)):
                self._counter.count("drops", "client not allowed", len(offsets))
                continue
            for at in offsets:
                size = last if at == offsets[-1] else length
                self._serve(bytes(arena.view[at : at + size]), local, local.reply_destination(peer), out, now)
        self._arenas.give(out)

    def _allowed(self, sockaddr: tuple) -> bool:
        host = sockaddr[0]
        if host in self._known:
            return True
        if from_sockaddr(sockaddr).host not in (self._clients or ()):
            return False
        if len(self._known) >= KNOWN_LIMIT:
            self._known.clear()
        self._known.add(host)
        return True

    def _serve(self, query: bytes, local: DatagramSocket, reply_destination: Any, out: Any, now: float) -> None:
        key = dns.cache_key(query)
        found = self._answers.find(key, query, now) if key else None
        if found is None:
            found = self._at_once(query)
            if found is None:
                self._ask_later(key, query, local, reply_destination)
                return
        if found:
            self._send(found, query, local, reply_destination, out)

    def _at_once(self, query: bytes) -> bytes | None:
        """An answer that needs no server, b"" for what is to have none; None where one must be asked."""
        try:
            if dns.parse_head(query).response:
                raise ProtocolError("an answer")  # to answer it could go on for ever
        except ProtocolError:
            self._counter.count("drops", "malformed")
            return b""
        try:
            return self._source.answer(query)
        except ProtocolError:
            self._counter.count("queries", "malformed")
            return dns.encode_error(query, dns.FORMERR)

    def _send(
        self, answer: bytes, query: bytes, local: DatagramSocket, reply_destination: Any, out: Any
    ) -> None:
        if len(answer) > dns.UDP_LIMIT:
            answer = dns.truncate(answer, dns.udp_size(query))
        local.send(out, out.put(answer), reply_destination)

    def _ask_later(self, key: bytes | None, query: bytes, local: DatagramSocket, reply_destination: Any) -> None:
        """By a worker, or by who asks the same already."""
        asked = key or _question_of(query)
        first = self._join(
            asked, query, lambda answer: self._send_later(answer, query, local, reply_destination)
        )
        if first and not self._submit(lambda: self._ask(asked, key, query)):
            self._counter.count("drops", "lookup queue full", len(self._taken(asked)))

    def _send_later(self, answer: bytes, query: bytes, local: DatagramSocket, reply_destination: Any) -> None:
        out = self._arenas.take()
        self._send(answer, query, local, reply_destination, out)
        self._arenas.give(out)

    # -- who asks the same meanwhile waits for the same answer

    def _join(self, asked: bytes, query: bytes, give: Callable[[bytes], None]) -> bool:
        """Whether it is the first, who has to ask; `give` is called with the answer, unless too many wait."""
        with self._lock:
            waiting = self._pending.get(asked)
            if waiting is None:
                self._pending[asked] = [(query, give)]
            elif len(waiting) < WAITING_LIMIT:
                waiting.append((query, give))
            else:
                self._counter.count("drops", "waiting queue full")
        return waiting is None

    def _taken(self, asked: bytes) -> Waiting:
        with self._lock:
            return self._pending.pop(asked)

    def _ask(self, asked: bytes, key: bytes | None, query: bytes) -> None:
        """On a thread that may wait."""
        try:
            answer = self._forward(key, query)
        except BaseException:
            self._counter.count("drops", "internal error", len(self._taken(asked)))
            raise
        for waiting, give in self._taken(asked):
            give(_addressed(answer, waiting))

    def _forward(self, key: bytes | None, query: bytes) -> bytes:
        self._counter.count("queries", "forwarded")
        answer = self._source.forward(query)
        if key is not None:
            self._answers.keep(key, answer, time.monotonic())
        return answer

    # -- connections (RFC 7766)

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        stream.welcome()
        while _more(stream):
            query = stream.read_exactly(int.from_bytes(stream.read_exactly(2), "big"))
            answer = self._answer(query)
            if not answer:
                return None
            stream.write(len(answer).to_bytes(2, "big") + answer)
            stream.limit(IDLE_SECONDS)
            if not stream.unread():
                return Wait(
                    ((stream.socket, READABLE),),
                    IDLE_SECONDS,
                    lambda ready: self._resume(stream, client, ready),
                    idle=True,
                )

        return None

    def _resume(self, stream: Stream, client: Address, ready: bool) -> Wait | None:
        if not ready:
            return None
        stream.limit(IDLE_SECONDS)
        return self.handle(stream, client)

    def _answer(self, query: bytes) -> bytes:
        key = dns.cache_key(query)
        found = self._answers.find(key, query, time.monotonic()) if key else None
        if found is None:
            found = self._at_once(query)
        return self._wait_for(key, query) if found is None else found

    def _wait_for(self, key: bytes | None, query: bytes) -> bytes:
        """On the thread of the connection, which asks itself unless somebody does."""
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        asked = key or _question_of(query)
        if self._join(asked, query, answers.put):
            self._ask(asked, key, query)
        try:
            return answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            return dns.encode_error(query, dns.SERVFAIL)


def _question_of(query: bytes) -> bytes:
    """What a query shares with one that is not kept: all but its ID, so that one that comes back in a circle of servers goes
    round no more.  Updates and the like are each for itself: they ask for more than an answer.
    """
    return query[2:] if not dns.parse_head(query).opcode else query


def _addressed(answer: bytes, query: bytes) -> bytes:
    """An answer for another who has asked the same: what differs are the ID and the spelling of the name."""
    if not dns.parse_head(answer).questions:
        return dns.with_id(answer, int.from_bytes(query[:2], "big"))
    return dns.aged(answer, (), query, 0)


def _more(stream: Stream) -> bool:
    """Whether a client asks on, or has closed."""
    try:
        stream.peek()
    except EndOfStream:
        return False
    return True
