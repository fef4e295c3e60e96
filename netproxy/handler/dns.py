"""Forwards DNS queries of clients to name servers, and caches the answers.

A datagram's key leads to a cached answer, which leaves at once with reduced TTLs.  A worker
asks for what is not cached, once for all clients that ask the same meanwhile.  Messages
pass unchanged except for their ID.  handle_packets runs on the listener's reader thread
and never blocks; handle is a handshake as any handler's.
"""

from __future__ import annotations

import queue
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Callable, Hashable, Protocol

from netproxy.errors import EndOfStream, ProtocolError
from netproxy.handler.dns_cache import AnswerCache
from netproxy.interfaces.connections import READABLE, Blocking, Events
from netproxy.net.address import from_sockaddr
from netproxy.protocol import dns, dns_message

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Steps, Stream
    from netproxy.interfaces.datagrams import (
        Arena,
        Batch,
        DatagramSocket,
        Destination,
        SocketAddress,
    )
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.services import Counter
    from netproxy.net.datagram import ArenaPool

# Clients that wait for one answer.
WAITING_LIMIT = 64
# Seconds that a connection waits for an answer that another client has asked for: name servers
# have five seconds.
ANSWER_SECONDS = 10.0
# Seconds until the next query of a connection; RFC 7766 section 6.2.3 recommends a few.
IDLE_SECONDS = 30.0
# Client hosts remembered as allowed.
ALLOWED_LIMIT = 4096


class DnsSource(Protocol):
    """Where answers come from.  resolver.forwarder.DnsForwarder is the implementation."""

    def answer(self, query: bytes) -> bytes | None:
        """Return the answer if it needs no server, else None.  Raises ProtocolError."""

    def forward(self, query: bytes) -> bytes:
        """Return the answer of a server.  Blocks.  Raises ProtocolError."""


Waiting = list[tuple[bytes, Callable[[bytes], None]]]
"""Clients that wait for one answer: the query of each, and what takes its answer."""


class DnsHandler:
    """The Handler and PacketHandler of a dns listener."""

    def __init__(
        self,
        source: DnsSource,
        cache: int,
        clients: HostSet | None,
        submit: Callable[[Callable[[], None]], bool],
        arenas: ArenaPool,
        counter: Counter,
    ) -> None:
        """Answer by `source` and a cache of `cache` answers.

        `clients` may ask over UDP, None for everybody.  `submit` runs a task on a bounded
        pool; it returns False if too many tasks wait.
        """
        self._source = source
        self._answers = AnswerCache(cache)
        self._clients = clients
        self._submit = submit
        self._arenas = arenas
        self._counter = counter
        # Hosts that were found in `clients`.  Only the reader thread uses it.
        self._allowed_hosts: set[Hashable] = set()
        # Guards _pending.
        self._lock = threading.Lock()
        # Waiting clients by cache key, or by question if the answer is not cached.
        self._pending: dict[bytes, Waiting] = {}

    # -- datagrams

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Answer the queries of a batch, or have a worker ask.  Thread: the listener's reader."""
        arena, spans = batch
        out, now = self._arenas.take(), time.monotonic()
        for offsets, length, last, peer in spans:
            if self._clients is not None and not self._is_allowed(local.peer(peer)):
                self._counter.count("drops", "client not allowed", len(offsets))
                continue
            destination = local.reply_destination(peer)
            for at in offsets:
                size = last if at == offsets[-1] else length
                self._serve(bytes(arena.view[at : at + size]), local, destination, out, now)
        self._arenas.give(out)

    def _is_allowed(self, sockaddr: SocketAddress) -> bool:
        host = sockaddr[0]
        if host in self._allowed_hosts:
            return True
        if from_sockaddr(sockaddr).host not in (self._clients or ()):
            return False
        if len(self._allowed_hosts) >= ALLOWED_LIMIT:
            self._allowed_hosts.clear()
        self._allowed_hosts.add(host)
        return True

    def _serve(
        self,
        query: bytes,
        local: DatagramSocket,
        destination: Destination | None,
        out: Arena,
        now: float,
    ) -> None:
        key = dns_message.cache_key(query)
        answer = self._answers.find(key, query, now) if key else None
        if answer is None:
            answer = self._answer_at_once(query)
            if answer is None:
                self._ask_later(key, query, local, destination)
                return
        if answer:
            self._send(answer, query, local, destination, out)

    def _answer_at_once(self, query: bytes) -> bytes | None:
        """Return the answer if it needs no server, else None.

        Returns b"" for a message that gets no answer.
        """
        try:
            if dns.parse_header(query).response:
                # Two servers that answer each other's answers would never end.
                raise ProtocolError("an answer")
        except ProtocolError:
            self._counter.count("drops", "malformed")
            return b""
        try:
            return self._source.answer(query)
        except ProtocolError:
            self._counter.count("queries", "malformed")
            return dns.encode_error(query, dns.FORMERR)

    def _send(
        self,
        answer: bytes,
        query: bytes,
        local: DatagramSocket,
        destination: Destination | None,
        out: Arena,
    ) -> None:
        if len(answer) > dns.UDP_LIMIT:
            answer = dns_message.truncate(answer, dns_message.udp_size(query))
        local.send(out, out.put(answer), destination)

    def _ask_later(
        self,
        key: bytes | None,
        query: bytes,
        local: DatagramSocket,
        destination: Destination | None,
    ) -> None:
        """Have a worker ask, or wait for the answer to a client that asks the same."""
        question = key or _question_key(query)
        send = partial(self._send_later, query, local, destination)
        is_first = self._join(question, query, send)
        if is_first and not self._submit(partial(self._ask, question, key, query)):
            self._counter.count("drops", "lookup queue full", len(self._take(question)))

    def _send_later(
        self, query: bytes, local: DatagramSocket, destination: Destination | None, answer: bytes
    ) -> None:
        """Send an answer from a worker's thread."""
        out = self._arenas.take()
        self._send(answer, query, local, destination, out)
        self._arenas.give(out)

    # -- clients that ask the same at the same time

    def _join(self, question: bytes, query: bytes, give: Callable[[bytes], None]) -> bool:
        """Wait for an answer; return True for the first client, which has to ask.

        `give` is called with the answer, unless too many clients wait for it.
        """
        with self._lock:
            waiting = self._pending.get(question)
            if waiting is None:
                self._pending[question] = [(query, give)]
            elif len(waiting) < WAITING_LIMIT:
                waiting.append((query, give))
            else:
                self._counter.count("drops", "waiting queue full")
        return waiting is None

    def _take(self, question: bytes) -> Waiting:
        """Remove and return the clients that wait for an answer."""
        with self._lock:
            return self._pending.pop(question)

    def _ask(self, question: bytes, key: bytes | None, query: bytes) -> None:
        """Ask for all clients that wait.  Blocks.  Thread: a worker's or a connection's."""
        try:
            answer = self._forward(key, query)
        except BaseException:
            self._counter.count("drops", "internal error", len(self._take(question)))
            raise
        for waiting_query, give in self._take(question):
            give(_addressed_to(answer, waiting_query))

    def _forward(self, key: bytes | None, query: bytes) -> bytes:
        self._counter.count("queries", "forwarded")
        answer = self._source.forward(query)
        if key is not None:
            self._answers.keep(key, answer, time.monotonic())
        return answer

    # -- connections (RFC 7766)

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Answer the queries of a connection, one after the other."""
        stream.end_handshake()
        while True:
            try:
                yield from stream.peek()
            except EndOfStream:
                return None
            length = yield from stream.read_exactly(2)
            query = yield from stream.read_exactly(int.from_bytes(length, "big"))
            answer = yield from self._answer(query)
            if not answer:
                return None
            yield from stream.write_all(len(answer).to_bytes(2, "big") + answer)
            if not stream.unread():
                watched = ((stream.socket, READABLE),)
                if not (yield Events(watched, IDLE_SECONDS, stream.light, idle=True)):
                    return None
            stream.limit(IDLE_SECONDS)

    def _answer(self, query: bytes) -> Steps[bytes]:
        """Return the answer, b"" for a message that gets none."""
        key = dns_message.cache_key(query)
        answer = self._answers.find(key, query, time.monotonic()) if key else None
        if answer is None:
            answer = self._answer_at_once(query)
        if answer is None:
            answer = yield Blocking(partial(self._wait_for, key, query))
        return answer

    def _wait_for(self, key: bytes | None, query: bytes) -> bytes:
        """Ask, or wait for the answer to a client that asks the same.  Blocks."""
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        question = key or _question_key(query)
        if self._join(question, query, answers.put):
            self._ask(question, key, query)
        try:
            return answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            return dns.encode_error(query, dns.SERVFAIL)


def _question_key(query: bytes) -> bytes:
    """Return what a query without a cache key shares with others that ask the same.

    It is all but the ID, so that a query that comes back through a circle of servers is not
    asked again.  An update and the like ask for more than an answer: they share nothing.
    """
    return query if dns.parse_header(query).opcode else query[2:]


def _addressed_to(answer: bytes, query: bytes) -> bytes:
    """Return an answer with the ID and the spelling of another query for the same."""
    if not dns.parse_header(answer).qdcount:
        return dns_message.with_id(answer, int.from_bytes(query[:2], "big"))
    return dns_message.aged(answer, (), query, 0)
