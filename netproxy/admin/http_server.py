"""A small HTTP/1.1 server for figures: GET and HEAD, one request a connection, everything on one thread.

No client can hold it up: all sockets are watched at once, each has a deadline,
and when there are too many the oldest that has not asked yet goes.  What is
answered is another's business (observe.site).
"""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from typing import Callable, Mapping, NamedTuple

from netproxy.errors import ListenError, ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.services import Log

CLIENTS_LIMIT = 32  # at once: a few scrapers and browsers
BACKLOG = 16
HEAD_LIMIT = 8192  # bytes of a request
SECONDS = 10.0  # for a client to ask, and as long again to take its answer
LINGER_SECONDS = 2.0  # for it to close, once it has all
PIECE = 65536  # bytes read or written at a time
PAUSE = 0.1  # seconds, where no client can be accepted
REASONS = {
    200: "OK",
    302: "Found",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
READ, WRITE = select.POLLIN, select.POLLOUT


class Request(NamedTuple):
    """`fields` are by lower-case name; `peer` is the client's address."""

    method: str
    path: str
    minor: int  # of HTTP/1.x
    fields: Mapping[str, str]
    peer: str


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    fields: tuple[tuple[str, str], ...] = ()


class BadRequest(ProtocolError):
    """What was sent is no request that is taken here; `status` answers it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class _Client:
    __slots__ = ("socket", "peer", "deadline", "inbox", "outbox", "answered")

    def __init__(self, sock: socket.socket, peer: str, deadline: float) -> None:
        self.socket = sock
        self.peer = peer
        self.deadline = deadline
        self.inbox = b""
        self.outbox = memoryview(b"")
        self.answered = False


class WebServer:
    def __init__(self, address: Address, answer: Callable[[Request], Answer], log: Log) -> None:
        """Binds; ListenError."""
        self.wanted = address
        self._answer = answer
        self._log = log
        self._stopped = False
        self._clients: dict[int, _Client] = {}  # by descriptor, oldest first
        try:
            self._socket = _listen(address)
        except OSError as error:
            raise ListenError(f"metrics {address}: {error.strerror or error}") from error
        self.address = Address(*self._socket.getsockname()[:2])
        self._poll = select.poll()
        self._poll.register(self._socket, READ)
        self.thread = threading.Thread(target=self._serve, name="metrics", daemon=True)

    def start(self) -> None:
        """ListenError."""
        try:
            self.thread.start()
        except RuntimeError as error:  # can't start new thread
            raise ListenError(f"metrics {self.wanted}: {error}") from error

    def stop(self) -> None:
        self._stopped = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes poll(2)
        except OSError:
            pass
        if self.thread.is_alive():
            self.thread.join(SECONDS)
        self._socket.close()

    def _serve(self) -> None:
        while not self._stopped:
            for descriptor, events in self._poll.poll(self._patience()):
                if descriptor == self._socket.fileno():
                    self._accept()
                elif descriptor in self._clients:
                    self._go_on(self._clients[descriptor])
            now = time.monotonic()
            for client in [client for client in self._clients.values() if client.deadline <= now]:
                self._end(client)
        for client in list(self._clients.values()):
            self._end(client)

    def _patience(self) -> float | None:
        """Milliseconds until the next deadline, None where there is none."""
        if not self._clients:
            return None
        return (
            max(0.0, min(client.deadline for client in self._clients.values()) - time.monotonic())
            * 1000
            + 1
        )

    def _accept(self) -> None:
        try:
            sock, sockaddr = self._socket.accept()
        except OSError as error:
            if not self._stopped:  # out of descriptors, most likely
                self._log.limited("metrics", "metrics: cannot accept: %s", error.strerror)
                time.sleep(PAUSE)
            return
        sock.setblocking(False)
        if len(self._clients) >= CLIENTS_LIMIT:
            self._end(
                next(
                    (client for client in self._clients.values() if not client.answered),
                    next(iter(self._clients.values())),
                )
            )
        self._clients[sock.fileno()] = _Client(
            sock, sockaddr[0].removeprefix("::ffff:"), time.monotonic() + SECONDS
        )
        self._poll.register(sock, READ)

    def _go_on(self, client: _Client) -> None:
        try:
            if not client.answered:
                self._read(client)
            elif client.outbox:
                self._write(client)
            elif not client.socket.recv(PIECE):  # it has all, and only its end is waited for
                self._end(client)
        except BlockingIOError:
            pass
        except OSError:
            self._end(client)

    def _read(self, client: _Client) -> None:
        data = client.socket.recv(PIECE)
        client.inbox += data
        head, end, _ = client.inbox.partition(b"\r\n\r\n")
        if end or len(client.inbox) > HEAD_LIMIT:
            client.outbox = memoryview(self._respond(head, client.peer))
            client.answered, client.inbox = True, b""
            client.deadline = time.monotonic() + SECONDS
            self._write(client)
        elif not data:
            self._end(client)

    def _write(self, client: _Client) -> None:
        try:
            client.outbox = client.outbox[client.socket.send(client.outbox[:PIECE]) :]
        except BlockingIOError:
            pass
        if client.outbox:
            self._poll.modify(client.socket, WRITE)
            return
        client.socket.shutdown(
            socket.SHUT_WR
        )  # and the rest of what it sends is read, or our close would cost it the answer
        client.deadline = time.monotonic() + LINGER_SECONDS
        self._poll.modify(client.socket, READ)

    def _end(self, client: _Client) -> None:
        if self._clients.pop(client.socket.fileno(), None) is not None:
            self._poll.unregister(client.socket)
            client.socket.close()

    def _respond(self, head: bytes, peer: str) -> bytes:
        try:
            request = parse(head, peer)
        except BadRequest as error:
            return encode(Answer(error.status), "GET")
        try:
            return encode(self._answer(request), request.method)
        except Exception:
            self._log.exception("answering on the metrics listener")
            return encode(Answer(500), request.method)


def parse(head: bytes, peer: str) -> Request:
    """Of a request's head, without the empty line; BadRequest."""
    if len(head) > HEAD_LIMIT:
        raise BadRequest(431)
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if (
        len(parts) != 3
        or not parts[1].startswith("/")
        or not parts[2].startswith("HTTP/")
        or not first.isprintable()
    ):
        raise BadRequest(400)
    if parts[2] not in ("HTTP/1.0", "HTTP/1.1"):
        raise BadRequest(505)
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if (
            not colon
            or not name
            or name != name.strip()
            or name in fields
            and name in ("host", "authorization", "origin")
        ):
            raise BadRequest(400)
        fields[name] = value.strip()
    minor = int(parts[2][-1])
    if minor and "host" not in fields:
        raise BadRequest(400)  # RFC 9112 section 3.2
    return Request(parts[0], parts[1].partition("?")[0], minor, fields, peer)


def encode(answer: Answer, method: str) -> bytes:
    """Head and body; what a browser must not do with it is said each time."""
    reason = REASONS[answer.status]
    body = answer.body or (b"" if answer.status == 302 else f"{answer.status} {reason}\n".encode())
    fields = [
        ("Content-Type", answer.content_type),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        *answer.fields,
    ]
    head = (
        f"HTTP/1.1 {answer.status} {reason}\r\n"
        + "".join(f"{name}: {value}\r\n" for name, value in fields)
        + "\r\n"
    )
    return head.encode("latin-1") + (b"" if method == "HEAD" else body)


def _listen(address: Address) -> socket.socket:
    """A socket that listens and does not wait; on a machine without IPv6 every address is IPv4's."""
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
            sock.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address.host == "::" else 1
            )
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
