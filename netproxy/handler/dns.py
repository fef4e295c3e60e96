"""Forwards DNS queries of clients to name servers, and caches the answers.

A datagram's key leads to a cached answer, which leaves at once with reduced TTLs.  A worker
asks for what is not cached, once for all clients that ask the same meanwhile.  Messages
pass unchanged except for their ID.  handle_packets runs on the listener's reader thread
and never blocks; handle runs on a connection's own thread.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Hashable, Protocol

from netproxy.errors import EndOfStream, ProtocolError
from netproxy.handler.dns_cache import AnswerCache
from netproxy.handler.dns_waiting import PendingQuestion, PendingQuestions, WaitingStream
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.net.address import from_sockaddr
from netproxy.protocol import dns, dns_message

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import (
        Arena,
        Batch,
        DatagramSocket,
        Destination,
        SocketAddress,
    )
    from netproxy.interfaces.fairness import FairSubmit
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.services import Counter
    from netproxy.net.datagram import ArenaPool
    from netproxy.net.stream import Stream

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


class DnsHandler:
    """The Handler and PacketHandler of a dns listener."""

    def __init__(
        self,
        source: DnsSource,
        cache: int,
        clients: HostSet | None,
        submit: FairSubmit,
        arenas: ArenaPool,
        counter: Counter,
    ) -> None:
        """Answer by `source` and a cache of `cache` answers.

        `clients` may ask over UDP, None for everybody.
        """
        self._source = source
        self._answers = AnswerCache(cache)
        self._clients = clients
        self._submit = submit
        self._arenas = arenas
        self._counter = counter
        # Hosts that were found in `clients`.  Only the reader thread uses it.
        self._allowed_hosts: set[Hashable] = set()
        # By cache key, or by question if the answer is not cached.
        self._pending = PendingQuestions(partial(counter.count, "drops"))

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
                query = bytes(arena.view[at : at + size])
                answer = self._answer_without_server(query, now)
                if answer is None:
                    self._ask_later(_DatagramClient(self, query, local, peer, destination))
                elif answer:
                    self._send(answer, query, local, destination, out)
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

    def _answer_without_server(self, query: bytes, now: float) -> bytes | None:
        """Return a cached answer, or one that needs no server; None if a server must be asked.

        Returns b"" for a message that gets no answer.
        """
        key = dns_message.cache_key(query)
        answer = self._answers.find(key, query, now) if key else None
        return self._answer_at_once(query) if answer is None else answer

    def _answer_at_once(self, query: bytes) -> bytes | None:
        """Return the answer if it needs no server, else None.

        Returns b"" for a message that gets no answer.
        """
        try:
            header = dns.parse_header(query)
            if header.response:
                # Two servers that answer each other's answers would never end.
                raise ProtocolError("an answer")
        except ProtocolError:
            self._counter.count("drops", "malformed")
            return b""
        if header.opcode:
            self._counter.count("queries", "not implemented")
            return dns.encode_error(query, dns.NOTIMP)
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

    def send_later(
        self, answer: bytes, query: bytes, local: DatagramSocket, destination: Destination | None
    ) -> None:
        """Send an answer from another thread than the reader's."""
        out = self._arenas.take()
        self._send(answer, query, local, destination, out)
        self._arenas.give(out)

    def _ask_later(self, client: _DatagramClient) -> None:
        """Have a worker ask, or wait for the answer to a client that asks the same."""
        question, must_submit = self._pending.join(_question_key(client.query), client)
        if must_submit:
            self._submit(_QueryTask(self, question, client))

    # -- clients that ask the same at the same time

    def ask_in_turn(self, question: PendingQuestion, query: bytes) -> None:
        """Ask, unless another task does.  Blocks.  Thread: a worker's."""
        if self._pending.begin(question):
            self._ask(question, query)

    def drop(self, question: PendingQuestion, client: str) -> None:
        """Give up a client's turn to ask."""
        self._pending.drop_claim(question, client, "lookup queue full")

    def _ask(self, question: PendingQuestion, query: bytes) -> None:
        """Ask for all clients that wait.  Blocks.  Thread: a worker's or a connection's."""
        try:
            answer = self._forward(query)
        except BaseException:
            self._pending.fail(question, "internal error")
            raise
        self._pending.answer(question, partial(_addressed_to, answer))

    def _forward(self, query: bytes) -> bytes:
        self._counter.count("queries", "forwarded")
        answer = self._source.forward(query)
        key = dns_message.cache_key(query)
        if key is not None:
            self._answers.keep(key, answer, time.monotonic())
        return answer

    # -- connections (RFC 7766)

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        """Answer the queries of a connection.  Blocks."""
        stream.welcome()
        while _has_more(stream):
            query = stream.read_exactly(int.from_bytes(stream.read_exactly(2), "big"))
            answer = self._answer(query, client)
            if not answer:
                return None
            stream.write(len(answer).to_bytes(2, "big") + answer)
            stream.limit(IDLE_SECONDS)
            if not stream.unread():
                resume = partial(self._resume, stream, client)
                return Wait(((stream.socket, READABLE),), IDLE_SECONDS, resume, idle=True)
        return None

    def _resume(self, stream: Stream, client: Address, ready: bool) -> Wait | None:
        if not ready:
            return None
        stream.limit(IDLE_SECONDS)
        return self.handle(stream, client)

    def _answer(self, query: bytes, client: Address) -> bytes:
        """Return the answer, b"" for a message that gets none.  Blocks."""
        answer = self._answer_without_server(query, time.monotonic())
        return self._wait_for(query, client) if answer is None else answer

    def _wait_for(self, query: bytes, client: Address) -> bytes:
        """Ask, or wait for the answer to a client that asks the same.  Blocks."""
        waiting = WaitingStream(client.host, query)
        question, is_first = self._pending.join_now(_question_key(query), waiting)
        if is_first:
            self._ask(question, query)
        return waiting.wait() or dns.encode_error(query, dns.SERVFAIL)


class _DatagramClient:
    """The sender of a query over UDP (handler.dns_waiting.WaitingClient)."""

    __slots__ = ("client", "query", "_handler", "_local", "_destination")

    def __init__(
        self,
        handler: DnsHandler,
        query: bytes,
        local: DatagramSocket,
        peer: Hashable,
        destination: Destination | None,
    ) -> None:
        self.client = from_sockaddr(local.peer(peer)).host
        self.query = query
        self._handler = handler
        self._local = local
        self._destination = destination

    def give(self, answer: bytes) -> None:
        """Send the answer.  Thread: a worker's or a connection's."""
        self._handler.send_later(answer, self.query, self._local, self._destination)

    def drop(self) -> None:
        """Do nothing: the client asks again."""


class _QueryTask:
    """A question on behalf of one client (interfaces.fairness.ClientTask)."""

    __slots__ = ("client", "_handler", "_question", "_query")

    def __init__(
        self, handler: DnsHandler, question: PendingQuestion, client: _DatagramClient
    ) -> None:
        self.client = client.client
        self._handler = handler
        self._question = question
        self._query = client.query

    def run(self) -> None:
        """Ask a server; blocks."""
        self._handler.ask_in_turn(self._question, self._query)

    def drop(self) -> None:
        """Give up the client's turn."""
        self._handler.drop(self._question, self.client)


def _question_key(query: bytes) -> bytes:
    """Return what a query shares with others that may get the same answer.

    Without a cache key it is all but the ID, so that a query that comes back through a
    circle of servers is not asked again.
    """
    key = dns_message.cache_key(query)
    return query[2:] if key is None else key


def _addressed_to(answer: bytes, query: bytes) -> bytes:
    """Return an answer with the ID and the spelling of another query for the same."""
    if not dns.parse_header(answer).qdcount:
        return dns_message.with_id(answer, int.from_bytes(query[:2], "big"))
    return dns_message.aged(answer, (), query, 0)


def _has_more(stream: Stream) -> bool:
    """Return whether a client asks again, False if it has closed.  Blocks."""
    try:
        stream.peek()
    except EndOfStream:
        return False
    return True
