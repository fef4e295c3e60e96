"""Forwards DNS queries of clients to name servers, and caches the answers.

A datagram's key leads to a cached answer, which leaves at once with reduced TTLs.  A worker
asks for what is not cached, once for all clients that ask the same meanwhile.  Messages
pass unchanged except for their ID.  handle_packets runs on the listener's reader thread
and never blocks; handle is a handshake as any handler's.
"""

from __future__ import annotations

import time
from functools import partial

from netproxy.errors import DialError, EndOfStream, ProtocolError, QueryRefused
from netproxy.handler.dns.waiting import (
    DatagramClient,
    PendingQuestion,
    PendingQuestions,
    QueryTask,
    RefreshTask,
    WaitingStream,
    question_key,
)
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Blocking, Events
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED
from netproxy.interfaces.services import Refusal
from netproxy.net.address import from_sockaddr
from netproxy.protocol import dns, dns_message
from netproxy.typed import TYPE_CHECKING, Hashable

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.dns.waiting import WaitingClient
    from netproxy.interfaces.connections import Handshake, Steps, Stream
    from netproxy.interfaces.datagrams import (
        Arena,
        Batch,
        DatagramSocket,
        Destination,
        SocketAddress,
    )
    from netproxy.interfaces.fairness import FairSubmit
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.interfaces.routing import DnsCache, DnsSource
    from netproxy.interfaces.services import Counter
    from netproxy.net.datagram import ArenaPool

# Seconds that servers have for an answer, and if there is a stale one (RFC 8767 section 5).
SERVER_SECONDS, STALE_SECONDS = 5.0, 1.8
# Seconds until the next query of a connection; RFC 7766 section 6.2.3 recommends a few.
IDLE_SECONDS = 30.0
# Client hosts remembered as allowed.
ALLOWED_LIMIT = 4096


class DnsHandler:
    """The Handler and PacketHandler of a dns listener."""

    def __init__(
        self,
        source: DnsSource,
        cache: DnsCache,
        clients: AllowedClients,
        submit: FairSubmit,
        arenas: ArenaPool,
        counter: Counter,
        permission: Permission,
    ) -> None:
        """Answer from `cache`, else by `source`.

        `clients` may ask over UDP.  `permission` is asked for each query of a
        connection.
        """
        self._source = source
        self._cache = cache
        self._clients = clients
        self._submit = submit
        self._arenas = arenas
        self._counter = counter
        # Hosts that were found in `clients`.  Only the reader thread uses it.
        self._allowed_hosts: set[Hashable] = set()
        # By cache key, or by question if the answer is not cached.
        self._pending = PendingQuestions(self._note_drop)
        self._permission, self._listener = permission, permission.listener

    # -- datagrams

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Answer the queries of a batch, or have a worker ask.  Thread: the listener's reader."""
        arena, spans = batch.arena, batch.spans
        out, now = self._arenas.take(), time.monotonic()
        everybody = self._clients.everybody
        for offsets, length, last, peer in spans:
            if not everybody and (decided := self._refused_by(local.peer(peer))):
                client, count = _client(local, peer), len(offsets)
                self._refuse("drops", CLIENT_NOT_ALLOWED, client, decided, count)
                continue
            destination = local.reply_destination(peer)
            for at in offsets:
                size = last if at == offsets[-1] else length
                query = bytes(arena.view[at : at + size])
                answer = self._answer_without_server(query, now, local, peer)
                if answer is None:
                    self._ask_later(DatagramClient(self, query, local, peer, destination))
                elif answer:
                    self._send(answer, query, local, destination, out)
        self._arenas.give(out)

    def _refused_by(self, sockaddr: SocketAddress) -> str:
        """Return the key of the configuration that refuses a client, "" if none does."""
        host = sockaddr[0]
        if host in self._allowed_hosts:
            return ""
        if decided := self._clients.refused_by(from_sockaddr(sockaddr).host):
            return decided
        if len(self._allowed_hosts) >= ALLOWED_LIMIT:
            self._allowed_hosts.clear()
        self._allowed_hosts.add(host)
        return ""

    def _answer_without_server(
        self, query: bytes, now: float, local: DatagramSocket | None, peer: Hashable
    ) -> bytes | None:
        """Return a cached answer, or one that needs no server; None if a server must be asked.

        Returns b"" for a message that gets no answer.  `peer` is the client: its key at `local`,
        or its address if that is None.
        """
        answer = self._cache.ready(query, now)
        if answer is None and (key := dns_message.cache_key(query)):
            answer = self._cache.find(key, query, now)
        return self._answer_at_once(query, local, peer) if answer is None else answer

    def _answer_at_once(
        self, query: bytes, local: DatagramSocket | None, peer: Hashable
    ) -> bytes | None:
        """Return as _answer_without_server(), for a query whose answer is not cached."""
        client = _client(local, peer)
        try:
            header = dns.parse_header(query)
            if header.response:
                # Two servers that answer each other's answers would never end.
                raise ProtocolError("an answer")
        except ProtocolError as error:
            self._refuse("drops", "malformed", client, str(error))
            return b""
        if header.opcode:
            self._refuse("queries", "not implemented", client, f"opcode {header.opcode}")
            return dns.encode_error(query, dns.NOTIMP)
        try:
            return self._source.answer(query, client[0])
        except ProtocolError as error:
            self._refuse("queries", "malformed", client, str(error))
            return dns.encode_error(query, dns.FORMERR)
        except QueryRefused as error:
            self._refuse("queries", error.reason, client, error.decided)
            return dns.encode_error(query, dns.SERVFAIL)

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

    def _ask_later(self, client: WaitingClient) -> None:
        """Have a worker ask, or wait for the answer to a client that asks the same."""
        question, must_submit = self._pending.join(question_key(client.query), client)
        if must_submit:
            self._submit(QueryTask(self, question, client))

    def _refuse(
        self, counter: str, reason: str, client: tuple[str, str], decided: str = "", amount: int = 1
    ) -> None:
        """Count and record queries of a client: its host and its network."""
        host, network = client
        if not self._counter.refuse_unrecorded(counter, reason, host, amount):
            refusal = Refusal(counter, reason, self._listener, host, "", decided, network)
            self._counter.refuse(refusal, amount)

    def _note_drop(self, reason: str, client: WaitingClient) -> None:
        self._refuse("drops", reason, (client.client, client.network))

    # -- clients that ask the same at the same time

    def ask_in_turn(self, question: PendingQuestion, query: bytes, client: str) -> None:
        """Ask, unless another task does.  Blocks.  Thread: a worker's."""
        if self._pending.begin(question):
            self._ask(question, query, client)

    def give_up(self, question: PendingQuestion, client: str) -> None:
        """Give up a client's turn to ask."""
        self._pending.drop_claim(question, client, "lookup queue full")

    def forward(self, query: bytes, seconds: float = SERVER_SECONDS) -> bytes:
        """Return the answer of a server, and keep it.  Blocks."""
        self._counter.count("queries", "forwarded")
        answer = self._source.forward(query, seconds)
        key = dns_message.cache_key(query)
        if key is not None:
            self._cache.keep(key, answer, time.monotonic())
        return answer

    def _ask(self, question: PendingQuestion, query: bytes, client: str) -> None:
        """Ask for all clients that wait.  Blocks.  Thread: a worker's or a connection's."""
        key, began = dns_message.cache_key(query), time.monotonic()
        has_stale = key is not None and self._cache.has_stale(key, began)
        try:
            answer = self.forward(query, STALE_SECONDS if has_stale else SERVER_SECONDS)
        except BaseException:
            self._pending.fail(question, "internal error")
            raise
        if key is None or not has_stale or not dns_message.is_failure(answer):
            self._pending.answer(question, partial(_addressed_to, answer))
            return
        now = time.monotonic()
        self._cache.revive(key, now)
        self._counter.count("queries", "stale")
        self._pending.answer(question, partial(self._cached, key, answer))
        if now - began >= STALE_SECONDS:
            # The servers may be slow rather than silent.
            self._submit(RefreshTask(self, query, client))

    def _cached(self, key: bytes, other: bytes, query: bytes) -> bytes:
        """Return the cached answer to a query, `other` if there is none."""
        return self._cache.find(key, query, time.monotonic()) or _addressed_to(other, query)

    # -- connections (RFC 7766)

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Answer the queries of a connection, one after the other."""
        stream.handshaking = False
        while True:
            try:
                yield from stream.peek()
            except EndOfStream:
                return None
            length = yield from stream.read_exactly(2)
            query = yield from stream.read_exactly(int.from_bytes(length, "big"))
            try:
                # A reload may have come since the last query.
                self._permission.check_client(client.host)
            except DialError:
                return None
            answer = yield from self._answer(query, client)
            if not answer:
                return None
            yield from stream.write_all(len(answer).to_bytes(2, "big") + answer)
            if not stream.unread():
                watched = ((stream.socket, READABLE),)
                if not (yield Events(watched, IDLE_SECONDS, stream.light, idle=True)):
                    return None
            stream.limit(IDLE_SECONDS)

    def _answer(self, query: bytes, client: Address) -> Steps[bytes]:
        """Return the answer, b"" for a message that gets none."""
        answer = self._answer_without_server(query, time.monotonic(), None, client)
        if answer is None:
            answer = yield Blocking(partial(self._wait_for, query, client))
        return answer

    def _wait_for(self, query: bytes, client: Address) -> bytes:
        """Ask, or wait for the answer to a client that asks the same.  Blocks."""
        waiting = WaitingStream(client.host, query)
        question, is_first = self._pending.join_now(question_key(query), waiting)
        if is_first:
            self._ask(question, query, client.host)
        return waiting.wait() or dns.encode_error(query, dns.SERVFAIL)


def _addressed_to(answer: bytes, query: bytes) -> bytes:
    """Return an answer with the ID and the spelling of another query for the same."""
    if not dns.parse_header(answer).qdcount:
        return dns_message.with_id(answer, int.from_bytes(query[:2], "big"))
    return dns_message.aged(answer, (), query, 0)


def _client(local: DatagramSocket | None, peer: Hashable) -> tuple[str, str]:
    """Return host and network of a client; see _answer_without_server()."""
    if local is not None:
        return from_sockaddr(local.peer(peer)).host, "udp"
    assert isinstance(peer, Address)
    return peer.host, "tcp"
