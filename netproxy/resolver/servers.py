"""Name servers: sends DNS messages to them and returns the answers, over UDP, TCP, TLS, HTTPS.

Each exchange() sends some queries and returns their answers in order.  It blocks its pool
thread until its deadline at most; only dialling an upstream may take longer.  An answer is
accepted if its source, its ID and its question are those of the query.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time

from netproxy.errors import DialError, NetProxyError
from netproxy.net.address import is_ipv6, to_sockaddr
from netproxy.net.stream import complete
from netproxy.protocol import dns, http1
from netproxy.protocol.dns_message import with_id
from netproxy.protocol.http.http1_message import Body, response_framing
from netproxy.typed import TYPE_CHECKING, Callable, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Steps, Stream

# Seconds to wait for an answer over UDP before the query is sent again, and attempts.
TRY_SECONDS = 1.0
TRIES = 3
# Connections kept for the next queries: few queries run at once.
IDLE_KEPT = 2
# Seconds that they are kept: servers and NATs forget idle connections soon after.
KEPT_SECONDS = 10.0
_MESSAGE_TYPE = b"application/dns-message"


class ServerError(NetProxyError):
    """A name server did not answer, or answered something else."""


class NameServer(Protocol):
    """A name server, or a group of them."""

    name: str
    """The server's URL, for messages."""

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """Return the answers to all queries, with the IDs of the queries.

        Blocks until `deadline` (monotonic seconds) at most.  Raises ServerError, and
        ProtocolError for an answer that cannot be parsed.
        """

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Remove idle connections; return calls that close them."""

    def close(self) -> None:
        """Close the idle connections.  Running exchanges go on."""


class UdpServer:
    """A name server over UDP.

    Each exchange has a new socket, hence a source port that an attacker cannot guess.  A
    truncated answer is asked for again over a stream.
    """

    def __init__(
        self, name: str, address: Address, stream: NameServer, check: Callable[[], object]
    ) -> None:
        """Ask the server at `address`, and `stream` for truncated answers.

        `check` raises DialError if the address must not be asked: it is our own listener.
        """
        self.name = name
        self._check = check
        self._stream = stream
        self._family = socket.AF_INET6 if is_ipv6(address.host) else socket.AF_INET
        self._sockaddr = to_sockaddr(address, self._family)

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """Exchange messages, as a NameServer does."""
        try:
            self._check()
            with socket.socket(self._family, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                # A connected socket receives from this address only.
                sock.connect(self._sockaddr)
                answers = self._ask(sock, [_with_random_id(query) for query in queries], deadline)
        except OSError as error:
            raise ServerError(f"{self.name}: {error.strerror}") from error
        except DialError as error:
            raise ServerError(f"{self.name}: {error}") from error
        return [
            self._stream.exchange([query], deadline)[0]
            if dns.parse_header(answer).truncated
            else with_id(answer, _id(query))
            for query, answer in zip(queries, answers, strict=True)
        ]

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Remove idle connections, as a NameServer does."""
        return self._stream.expire(now)

    def close(self) -> None:
        """Close the idle connections."""
        self._stream.close()

    def _ask(self, sock: socket.socket, queries: list[bytes], deadline: float) -> list[bytes]:
        """Send the queries until each has an answer.  Raises OSError or ServerError."""
        answers: dict[int, bytes] = {}
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        for _ in range(TRIES):
            if time.monotonic() >= deadline:
                break
            for number, query in enumerate(queries):
                if number not in answers:
                    sock.send(query)
            until = min(deadline, time.monotonic() + TRY_SECONDS)
            while len(answers) < len(queries) and (left := until - time.monotonic()) > 0:
                if poll.poll(left * 1000):
                    _assign(_receive(sock), queries, answers)
            if len(answers) == len(queries):
                return [answers[number] for number in range(len(queries))]
        raise ServerError(f"{self.name}: no answer")


class _StreamPool:
    """Exchanges over streams to one server; idle streams are kept for the next exchange."""

    def __init__(self, name: str, dial: Callable[[float], Stream]) -> None:
        """Connect by `dial(deadline)`, which raises NetProxyError."""
        self.name = name
        self._dial = dial
        # Guards _idle and _closed.
        self._lock = threading.Lock()
        # Idle streams and since when (monotonic seconds), oldest first.
        self._idle: list[tuple[Stream, float]] = []
        self._closed = False

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """Exchange messages, as a NameServer does.

        A kept stream that fails is replaced once.  It may be silent, behind a NAT that has
        forgotten it; it has half of the time.
        """
        with self._lock:
            stream = self._idle.pop()[0] if self._idle else None
        try:
            if stream is not None:
                try:
                    return self._exchange_over(stream, queries, share_of_time(deadline, 2))
                except NetProxyError:
                    pass
            if time.monotonic() >= deadline:
                raise ServerError(f"{self.name}: no answer")
            return self._exchange_over(self._dial(deadline), queries, deadline)
        except ServerError:
            raise
        except NetProxyError as error:
            raise ServerError(f"{self.name}: {error}") from error

    def close(self) -> None:
        """Close the idle streams; a stream in use is closed after its exchange."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for stream, _ in idle:
            stream.close()

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Remove streams that were idle for KEPT_SECONDS; return calls that close them."""
        with self._lock:
            stale = [stream for stream, since in self._idle if now - since >= KEPT_SECONDS]
            del self._idle[: len(stale)]
        return [stream.close for stream in stale]

    def _exchange_over(
        self, stream: Stream, queries: Sequence[bytes], deadline: float
    ) -> list[bytes]:
        try:
            stream.limit(max(0.0, deadline - time.monotonic()))
            answers = self._converse(stream, queries)
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

    def _converse(self, stream: Stream, queries: Sequence[bytes]) -> list[bytes]:
        """Send queries and read their answers.  Raises NetProxyError."""
        raise NotImplementedError


class StreamServer(_StreamPool):
    """A name server over TCP (RFC 7766), or over TLS (RFC 7858) if `dial` adds it.

    All queries are sent at once; their answers may come in any order.
    """

    def _converse(self, stream: Stream, queries: Sequence[bytes]) -> list[bytes]:
        sent = [_with_random_id(query) for query in queries]
        stream.write(b"".join(len(query).to_bytes(2, "big") + query for query in sent))
        answers: dict[int, bytes] = {}
        while len(answers) < len(sent):
            before = len(answers)
            _assign(complete(_read_message(stream)), sent, answers)
            if len(answers) == before:
                raise ServerError(f"{self.name}: the answer is to another question")
        return [with_id(answers[number], _id(query)) for number, query in enumerate(queries)]


def _read_message(stream: Stream) -> Steps[bytes]:
    """Read a message behind its length (RFC 1035 section 4.2.2)."""
    length = yield from stream.read_exactly(2)
    return (yield from stream.read_exactly(int.from_bytes(length, "big")))


class HttpsServer(_StreamPool):
    """A name server over HTTPS (RFC 8484): POST over HTTP/1.1."""

    def __init__(self, name: str, dial: Callable[[float], Stream], host: str, path: str) -> None:
        """Connect by `dial(deadline)`.  `host` is the value of the field Host."""
        super().__init__(name, dial)
        self._host, self._path = host.encode("ascii"), path.encode("ascii")

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        """Exchange messages one after the other: a server may close after each."""
        return [super(HttpsServer, self).exchange([query], deadline)[0] for query in queries]

    def _converse(self, stream: Stream, queries: Sequence[bytes]) -> list[bytes]:
        return [self._post(stream, query) for query in queries]

    def _post(self, stream: Stream, query: bytes) -> bytes:
        # RFC 8484 section 4.1: ID 0, so that caches on the path see equal requests.
        sent = with_id(query, 0)
        fields = [
            (b"Host", self._host),
            (b"Accept", _MESSAGE_TYPE),
            (b"Content-Type", _MESSAGE_TYPE),
            (b"Content-Length", b"%d" % len(sent)),
        ]
        stream.write(http1.encode_request(http1.HttpRequest(b"POST", self._path, 1, fields)) + sent)
        response = complete(http1.read_response(stream))
        while response.status < 200:
            response = complete(http1.read_response(stream))
        framing = response_framing(response, b"POST")
        reader, body = Body(stream, framing, 502), b""
        while piece := complete(reader.read()):
            body += piece
            if len(body) > dns.MESSAGE_LIMIT:
                raise ServerError(f"{self.name}: the answer is too long")
        if response.status != 200:
            raise ServerError(f"{self.name}: answered {response.status}")
        if not dns.is_answer(body, sent):
            raise ServerError(f"{self.name}: the answer is to another question")
        if framing.until_close or b"close" in http1.field_list(response.fields, b"connection"):
            stream.close()
        return with_id(body, _id(query))


def share_of_time(deadline: float, attempts: int) -> float:
    """Return the deadline of the next of so many attempts, so that all have equal time."""
    now = time.monotonic()
    return now + max(0.0, deadline - now) / attempts


def _id(query: bytes) -> int:
    return int.from_bytes(query[:2], "big")


def _with_random_id(query: bytes) -> bytes:
    return os.urandom(2) + query[2:]


def _receive(sock: socket.socket) -> bytes:
    """Return a datagram, b"" if the kernel has dropped it after poll(2).  Raises OSError."""
    try:
        return sock.recv(dns.MESSAGE_LIMIT)
    except BlockingIOError:
        return b""


def _assign(message: bytes, queries: Sequence[bytes], answers: dict[int, bytes]) -> None:
    """Store a message as the answer to the first open query that it answers."""
    for number, query in enumerate(queries):
        if number not in answers and dns.is_answer(message, query):
            answers[number] = message
            return
