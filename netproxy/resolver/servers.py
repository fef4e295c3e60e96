"""Name servers: how a message gets to one and its answer back, over UDP, TCP, TLS and HTTPS.

Each exchange() sends some queries and gives their answers in order.  It blocks its
thread, one of a pool, for no longer than its deadline, or where an upstream has to be
dialled than that takes.  An answer counts when its source, its ID and its question are
those of the query.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import Callable, Protocol, Sequence

from netproxy.errors import DialError, NetProxyError, ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.net.address import is_ipv6, to_sockaddr
from netproxy.interfaces.connections import Steps
from netproxy.net.stream import Stream, complete
from netproxy.protocol import dns, http1
from netproxy.protocol.http1_message import Body, response_framing

TRY_SECONDS = 1.0  # for an answer by UDP before a query is sent again
TRIES = 3
IDLE_KEPT = 2  # connections kept for the next queries: few ask at once
KEPT_SECONDS = 10.0  # and for so long: servers and NATs forget idle ones soon after
REST_SECONDS = 5.0  # a server that has failed is asked last for so long
_CONTENT = (b"Content-Type", b"application/dns-message")


def _read_message(stream: Stream) -> Steps[bytes]:
    """Read a DNS message behind its length."""
    length = yield from stream.read_exactly(2)
    return (yield from stream.read_exactly(int.from_bytes(length, "big")))


class ServerError(NetProxyError):
    """A name server did not answer, or not what it was asked."""


class Server(Protocol):
    name: str

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """The answers to all, with their queries' IDs; `deadline` is monotonic.  ServerError."""

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Closes, each to be called, of what nobody has used for a while."""

    def close(self) -> None:
        """What is kept; what is in use goes on."""


class UdpServer:
    """A fresh socket for each exchange, hence a port that nobody can guess.  What does not fit is asked for again by `stream`."""

    def __init__(
        self, name: str, address: Address, stream: Server, check: Callable[[], object]
    ) -> None:
        """`check` raises DialError where the address is not to be asked: one of our own listeners'."""
        self.name = name
        self._check = check
        self._stream = stream
        family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
        self._family, self._sockaddr = family, to_sockaddr(address, family)

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        try:
            self._check()
            with socket.socket(self._family, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect(self._sockaddr)  # so that the kernel takes answers from there alone
                found = self._ask(sock, [_renumbered(query) for query in queries], deadline)
        except OSError as error:
            raise ServerError(f"{self.name}: {error.strerror}") from error
        except DialError as error:
            raise ServerError(f"{self.name}: {error}") from error
        return [
            dns.with_id(answer, int.from_bytes(query[:2], "big"))
            if not dns.parse_head(answer).truncated
            else self._stream.exchange([query], deadline)[0]
            for query, answer in zip(queries, found)
        ]

    def expire(self, now: float) -> list[Callable[[], None]]:
        return self._stream.expire(now)

    def close(self) -> None:
        self._stream.close()

    def _ask(self, sock: socket.socket, queries: list[bytes], deadline: float) -> list[bytes]:
        """OSError, ServerError."""
        answers: dict[int, bytes] = {}
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        for _ in range(TRIES):
            if time.monotonic() >= deadline:
                break
            for at, query in enumerate(queries):
                if at not in answers:
                    sock.send(query)
            until = min(deadline, time.monotonic() + TRY_SECONDS)
            while len(answers) < len(queries) and (left := until - time.monotonic()) > 0:
                if poll.poll(left * 1000):
                    _sort_in(_receive(sock), queries, answers)
            if len(answers) == len(queries):
                return [answers[at] for at in range(len(queries))]
        raise ServerError(f"{self.name}: no answer")


class _Connections:
    """Streams to one server, kept for the next exchange."""

    def __init__(self, name: str, dial: Callable[[float], Stream]) -> None:
        """`dial(deadline)` gives a new one; NetProxyError."""
        self.name = name
        self._dial = dial
        self._lock = threading.Lock()  # guards what follows
        self._idle: list[tuple[Stream, float]] = []  # and since when (monotonic), oldest first
        self._closed = False

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """What the server has closed meanwhile is replaced, once; what is silent, as behind a NAT that has forgotten it, in time."""
        with self._lock:
            stream = self._idle.pop()[0] if self._idle else None
        try:
            if stream is not None:
                try:
                    return self._by(stream, queries, _share(deadline, 2))
                except NetProxyError:
                    pass
            if time.monotonic() >= deadline:
                raise ServerError(f"{self.name}: no answer")
            return self._by(self._dial(deadline), queries, deadline)
        except ServerError:
            raise
        except NetProxyError as error:
            raise ServerError(f"{self.name}: {error}") from error

    def close(self) -> None:
        """Of what an exchange uses now nothing is kept."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for stream, _ in idle:
            stream.close()

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Closes, each to be called, of the connections that nobody has used for a while."""
        with self._lock:
            stale = [stream for stream, since in self._idle if now - since >= KEPT_SECONDS]
            del self._idle[: len(stale)]
        return [stream.close for stream in stale]

    def _by(self, stream: Stream, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        try:
            stream.limit(max(0.0, deadline - time.monotonic()))
            answers = self._talk(stream, queries)
        except BaseException:
            stream.close()
            raise
        self._keep(stream)
        return answers

    def _keep(self, stream: Stream) -> None:
        with self._lock:
            if stream.open and not self._closed and len(self._idle) < IDLE_KEPT:
                self._idle.append((stream, time.monotonic()))
                return
        stream.close()

    def _talk(self, stream: Stream, queries: Sequence[bytes]) -> list[bytes]:
        raise NotImplementedError


class StreamServer(_Connections):
    """RFC 7766, and RFC 7858 where `dial` brings TLS: all queries are sent at once, answers may come in any order."""

    def _talk(self, stream: Stream, queries: Sequence[bytes]) -> list[bytes]:
        sent = [_renumbered(query) for query in queries]
        stream.write(b"".join(len(query).to_bytes(2, "big") + query for query in sent))
        answers: dict[int, bytes] = {}
        while len(answers) < len(sent):
            before = len(answers)
            _sort_in(complete(_read_message(stream)), sent, answers)
            if len(answers) == before:
                raise ServerError(f"{self.name}: an answer to something else")
        return [
            dns.with_id(answers[at], int.from_bytes(query[:2], "big"))
            for at, query in enumerate(queries)
        ]


class HttpsServer(_Connections):
    """RFC 8484, POST over HTTP/1.1."""

    def __init__(self, name: str, dial: Callable[[float], Stream], host: str, path: str) -> None:
        """`host`: as the field Host has it."""
        super().__init__(name, dial)
        self._host, self._path = host.encode("ascii"), path.encode("ascii")

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """One after the other, for a server may close after each."""
        return [super(HttpsServer, self).exchange([query], deadline)[0] for query in queries]

    def _talk(self, stream: Stream, queries: Sequence[bytes]) -> list[bytes]:
        return [self._post(stream, query) for query in queries]

    def _post(self, stream: Stream, query: bytes) -> bytes:
        sent = dns.with_id(
            query, 0
        )  # RFC 8484 section 4.1: so that caches on the way see equal ones
        fields = [
            (b"Host", self._host),
            (b"Accept", _CONTENT[1]),
            _CONTENT,
            (b"Content-Length", b"%d" % len(sent)),
        ]
        stream.write(http1.encode_request(http1.HttpRequest(b"POST", self._path, 1, fields)) + sent)
        response = complete(http1.read_response(stream))
        while response.status < 200:
            response = complete(http1.read_response(stream))
        framing = response_framing(response, b"POST")
        body = b""
        reader = Body(stream, framing, 502)
        while piece := complete(reader.read()):
            body += piece
            if len(body) > dns.MESSAGE_LIMIT:
                raise ServerError(f"{self.name}: an answer that is too long")
        if response.status != 200:
            raise ServerError(f"{self.name}: answered {response.status}")
        if not dns.is_answer(body, sent):
            raise ServerError(f"{self.name}: an answer to something else")
        if framing.until_close or b"close" in http1.field_list(response.fields, b"connection"):
            stream.close()
        return dns.with_id(body, int.from_bytes(query[:2], "big"))


class Servers:
    """Several name servers for the same names: the first that answers; one that has failed is asked last for a while."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = tuple(servers)
        self._failed_at: dict[
            Server, float
        ] = {}  # monotonic; writes need no lock, the newest is as good as any

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """ServerError names what each has said.  A server that can only say that it has failed is one that has."""
        now = time.monotonic()
        failures: list[str] = []
        order = sorted(
            self.servers,
            key=lambda server: now - self._failed_at.get(server, -REST_SECONDS) < REST_SECONDS,
        )
        spare: list[bytes] = []
        for left, server in zip(range(len(order), 0, -1), order):
            share = _share(deadline, left)
            try:
                answers = server.exchange(queries, share)
                if any(
                    dns.parse_head(answer).code in (dns.SERVFAIL, dns.REFUSED) for answer in answers
                ):
                    spare = spare or answers
                    raise ServerError(f"{server.name}: failed")
                return answers
            except (ServerError, ProtocolError) as error:
                self._failed_at[server] = time.monotonic()
                failures.append(str(error))
        if spare:
            return spare
        raise ServerError("; ".join(failures))

    def expire(self, now: float) -> list[Callable[[], None]]:
        return [close for server in self.servers for close in server.expire(now)]

    def close(self) -> None:
        for server in self.servers:
            server.close()


def _share(deadline: float, left: int) -> float:
    """Until when one of `left` servers may take its time, so that the last has as much as the first."""
    now = time.monotonic()
    return now + max(0.0, deadline - now) / left


def _renumbered(query: bytes) -> bytes:
    return os.urandom(2) + query[2:]


def _receive(sock: socket.socket) -> bytes:
    """A datagram; none where it was no good after all, as poll(2) cannot know.  OSError."""
    try:
        return sock.recv(dns.MESSAGE_LIMIT)
    except BlockingIOError:
        return b""


def _sort_in(message: bytes, queries: Sequence[bytes], answers: dict[int, bytes]) -> None:
    for at, query in enumerate(queries):
        if at not in answers and dns.is_answer(message, query):
            answers[at] = message
            return
