"""A small HTTP/1.1 server for metrics and for browsers: GET and HEAD, one request a connection.

One thread serves all clients.  No client can delay the others: all sockets are watched
together, and each has a deadline.  If there are too many, the address with most loses one.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time

from netproxy.errors import EndOfStream, LimitError, ListenError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.fairness import client_key
from netproxy.net.stream import complete
from netproxy.protocol import http1
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Steps
    from netproxy.interfaces.services import Log

CLIENTS_LIMIT = 32
"""Clients at once: a few scrapers and browsers."""
BACKLOG = 16
HEAD_LIMIT = 8192
"""Bytes of a request."""
SECONDS = 10.0
"""For a client to send its request, and again to receive the answer."""
LINGER_SECONDS = 2.0
"""For a client to close the connection once it has the whole answer."""
CHUNK = 65536
"""Bytes to read or write at a time."""
ACCEPT_PAUSE = 0.1
"""Seconds to wait if no client can be accepted."""
PHRASES = http1.PHRASES | {401: "Unauthorized", 404: "Not Found"}
PHRASES |= {500: "Internal Server Error", 503: "Service Unavailable"}
_READ, _WRITE = select.POLLIN, select.POLLOUT
# Fields that may come only once; http1 checks Host.
_SINGLE_FIELDS = (b"authorization", b"origin")


class HttpAnswer(NamedTuple):
    """What is sent back for a request."""

    status: int
    body: bytes = b""
    """Without one the body is the status and its phrase."""
    content_type: str = "text/plain; charset=utf-8"
    fields: tuple[tuple[bytes, bytes], ...] = ()
    """Further header fields."""


AnswerRequest: TypeAlias = Callable[[http1.HttpRequest, str], HttpAnswer]
"""Answers a request of the client with this address.  Must not block."""


class HeadReader:
    """A Reader over a request head that has been received completely."""

    def __init__(self, head: bytes) -> None:
        self._head = head

    def read_exactly(self, count: int) -> Steps[bytes]:
        """Return the next `count` bytes.  Raises EndOfStream."""
        yield from ()  # nothing to wait for
        if len(self._head) < count:
            raise EndOfStream("the head is too short", partial=bool(self._head))
        return self._take(count)

    def read_until(self, separator: bytes, limit: int) -> Steps[bytes]:
        """Return the bytes up to and including `separator`.  Raises EndOfStream, LimitError."""
        yield from ()  # nothing to wait for
        at = self._head.find(separator, 0, limit)
        if at >= 0:
            return self._take(at + len(separator))
        if len(self._head) >= limit:
            raise LimitError(f"no end within {limit} bytes")
        raise EndOfStream("the head is too short", partial=bool(self._head))

    def _take(self, count: int) -> bytes:
        data, self._head = self._head[:count], self._head[count:]
        return data


class _HttpClient:
    """A connected client."""

    __slots__ = ("socket", "peer", "deadline", "inbox", "outbox", "answered")

    def __init__(self, sock: socket.socket, peer: str, deadline: float) -> None:
        self.socket = sock
        self.peer = peer
        self.deadline = deadline  # monotonic
        # What was received of the request, and what is left of the answer.
        self.inbox, self.outbox = b"", memoryview(b"")
        self.answered = False


class HttpServer:
    """A listening socket with its clients, and the thread that serves them."""

    def __init__(self, name: str, address: Address, answer: AnswerRequest, log: Log) -> None:
        """Bind `address`, port 0 for any, for the key `name`.  Raises ListenError."""
        self._name = name
        self.configured = address
        self._answer = answer
        self._log = log
        self._stopped = False
        self._clients: dict[int, _HttpClient] = {}  # by descriptor, the oldest first
        try:
            self._socket, self.address = _listen(address)
        except OSError as error:
            raise ListenError(f"{name} {address}: {error.strerror or error}") from error
        self._poll = select.poll()
        self._poll.register(self._socket, _READ)
        self.thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread.  Raises ListenError."""
        try:
            self.thread.start()
        except RuntimeError as error:  # can't start new thread
            raise ListenError(f"{self._name} {self.configured}: {error}") from error

    def stop(self) -> None:
        """Close the socket and all clients."""
        self._stopped = True
        with contextlib.suppress(OSError):
            # Wakes poll(2).
            self._socket.shutdown(socket.SHUT_RDWR)
        if self.thread.is_alive():
            self.thread.join(SECONDS)
        self._socket.close()

    # -- the thread

    def _serve(self) -> None:
        while not self._stopped:
            for descriptor, _ in self._poll.poll(self._timeout()):
                if descriptor == self._socket.fileno():
                    self._accept()
                elif descriptor in self._clients:
                    self._resume(self._clients[descriptor])
            now = time.monotonic()
            for client in [client for client in self._clients.values() if client.deadline <= now]:
                self._close(client)
        for client in list(self._clients.values()):
            self._close(client)

    def _timeout(self) -> float | None:
        """Return the milliseconds until the next deadline, None without clients."""
        if not self._clients:
            return None
        deadline = min(client.deadline for client in self._clients.values())
        return max(0.0, deadline - time.monotonic()) * 1000 + 1

    def _accept(self) -> None:
        try:
            sock, sockaddr = self._socket.accept()
        except OSError as error:  # most likely out of descriptors
            if not self._stopped:
                self._log.limited(self._name, "%s: cannot accept: %s", self._name, error.strerror)
                time.sleep(ACCEPT_PAUSE)
            return
        sock.setblocking(False)
        peer = sockaddr[0].removeprefix("::ffff:")
        self._clients[sock.fileno()] = _HttpClient(sock, peer, time.monotonic() + SECONDS)
        self._poll.register(sock, _READ)
        if len(self._clients) > CLIENTS_LIMIT:
            self._close(self._expendable())

    def _expendable(self) -> _HttpClient:
        """Return the client to close: of the address with most, one without a request first."""
        by_key: dict[str, list[_HttpClient]] = {}
        for client in self._clients.values():
            by_key.setdefault(client_key(client.peer), []).append(client)
        clients = max(by_key.values(), key=len)
        clients = clients[:-1] or clients
        return next((client for client in clients if not client.answered), clients[0])

    def _resume(self, client: _HttpClient) -> None:
        try:
            if not client.answered:
                self._read(client)
            elif client.outbox:
                self._write(client)
            elif not client.socket.recv(CHUNK):
                self._close(client)  # it has the whole answer
        except BlockingIOError:
            pass
        except OSError:
            self._close(client)

    def _read(self, client: _HttpClient) -> None:
        data = client.socket.recv(CHUNK)
        client.inbox += data
        head, end, _ = client.inbox.partition(b"\r\n\r\n")
        if end or len(head) > HEAD_LIMIT:
            client.outbox = memoryview(self._respond(head + end, client.peer))
            client.answered, client.inbox = True, b""
            client.deadline = time.monotonic() + SECONDS
            self._write(client)
        elif not data:
            self._close(client)

    def _write(self, client: _HttpClient) -> None:
        with contextlib.suppress(BlockingIOError):
            client.outbox = client.outbox[client.socket.send(client.outbox[:CHUNK]) :]
        if client.outbox:
            self._poll.modify(client.socket, _WRITE)
            return
        # Whatever the client still sends is read: closing with unread bytes would reset the
        # connection, and the client could lose the answer.
        client.socket.shutdown(socket.SHUT_WR)
        client.deadline = time.monotonic() + LINGER_SECONDS
        self._poll.modify(client.socket, _READ)

    def _close(self, client: _HttpClient) -> None:
        if self._clients.pop(client.socket.fileno(), None) is not None:
            self._poll.unregister(client.socket)
            client.socket.close()

    def _respond(self, head: bytes, peer: str) -> bytes:
        method = b"GET"
        try:
            request = parse_request(head)
            method = request.method
            return encode(self._answer(request, peer), method)
        except http1.HttpError as error:
            return encode(HttpAnswer(error.status), method)
        except Exception:
            self._log.exception(f"answering for {self._name}")
            return encode(HttpAnswer(500), method)


def parse_request(head: bytes) -> http1.HttpRequest:
    """Parse a complete head; return it with a target that is a path, without its query.

    Raises HttpError with the status to answer.
    """
    if len(head) > HEAD_LIMIT:
        raise http1.HttpError(431, "the head is too long")
    request = complete(http1.read_request(HeadReader(head)))
    if not request.target.startswith(b"/"):
        raise http1.HttpError(400, "the target is not a path")
    for name in _SINGLE_FIELDS:
        if len(http1.field_values(request.fields, name)) > 1:
            raise http1.HttpError(400, "a field comes twice")
    return request._replace(target=request.target.partition(b"?")[0])


def encode(answer: HttpAnswer, method: bytes) -> bytes:
    """Encode an answer; it tells browsers not to store, guess or embed the body."""
    phrase = PHRASES[answer.status]
    body = answer.body or f"{answer.status} {phrase}\n".encode()
    fields = [
        (b"Content-Type", answer.content_type.encode()),
        (b"Content-Length", b"%d" % len(body)),
        (b"Connection", b"close"),
        (b"Cache-Control", b"no-store"),
        (b"X-Content-Type-Options", b"nosniff"),
        (b"Referrer-Policy", b"no-referrer"),
        (b"Cross-Origin-Resource-Policy", b"same-origin"),
        *answer.fields,
    ]
    head = http1.encode_response(http1.HttpResponse(1, answer.status, phrase.encode(), fields))
    return head + (b"" if method == b"HEAD" else body)


def _listen(address: Address) -> tuple[socket.socket, Address]:
    """Return a non-blocking listening socket and its address; without IPv6, `::` becomes 0.0.0.0.

    Raises OSError.
    """
    family, _, _, _, sockaddr = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    )[0]
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT and address.host == "::":
            return _listen(address._replace(host="0.0.0.0"))
        raise
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            v6_only = 0 if address.host == "::" else 1
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return sock, Address(*sock.getsockname()[:2])
    except OSError:
        sock.close()
        raise
