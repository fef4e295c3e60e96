"""An HTTP proxy connection with both ends: a scripted origin, HttpHandler, and a client.

Everything runs over TCP on loopback, and both ends keep every byte that they receive.  Their
parser of messages knows one spelling only, so that a test fails if the proxy writes another
one.  No end waits longer than PATIENCE.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from typing import Any, Callable, Mapping, NamedTuple

from netproxy.access.login import Login
from netproxy.access.users import Users
from netproxy.errors import DialError, NetProxyError, Reason
from netproxy.handler.http import HttpHandler
from netproxy.handler.http_forward import Forwarder
from netproxy.handler.outbound import Outbound
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, Record
from netproxy.interfaces.routing import Dialer, Route
from netproxy.net.address import from_sockaddr
from netproxy.net.connect import connect
from netproxy.net.socket_options import tune
from netproxy.net.stream import Stream, complete
from netproxy.observe.metrics import Counters
from netproxy.relay.pipe import PipeLimits
from tests.support.accounts import account_book
from tests.support.flows import NamesNothing
from tests.support.handlers import permission
from tests.support.sockets import SECONDS
from tests.support.waits import run_to_end

PATIENCE = SECONDS
"""Seconds that any wait may take; only a failing test comes near."""
_FIELD = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+): ?"
    rb"((?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)\Z"
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def get(host: bytes, path: bytes = b"/", *fields: bytes) -> bytes:
    """Return a GET as a client sends it to a proxy."""
    return b"".join(
        [
            b"GET http://%b%b HTTP/1.1\r\nHost: %b\r\n" % (host, path, host),
            *[field + b"\r\n" for field in fields],
            b"\r\n",
        ]
    )


class Message(NamedTuple):
    """A request or an answer."""

    start: bytes
    """The start line."""
    fields: list[tuple[bytes, bytes]]
    body: bytes
    whole: bool
    """False if the connection ended within the message."""

    @property
    def status(self) -> int:
        return int(self.start.split(b" ")[1])

    def get(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def names(self) -> set[bytes]:
        return {name.lower() for name, _ in self.fields}


class Wire:
    """One end of a connection; it keeps all bytes that came in `seen`."""

    def __init__(self, sock: socket.socket | None, seen: bytes = b"") -> None:
        self.socket = sock
        self.seen = bytearray(seen)
        # How the connection ended: "", "closed" or "reset".
        self.end = "" if sock else "closed"
        # The end of what was read.
        self._at = 0
        if sock:
            sock.settimeout(PATIENCE)

    def send(self, *segments: bytes) -> None:
        """Send each in a segment of its own.

        Bytes that the other end does not take any more are lost, as on a network.
        """
        try:
            for segment in segments:
                self.socket.sendall(segment)
        except ConnectionError:
            pass

    def head(self) -> Message:
        """Read a start line and its fields, in the one spelling that is right."""
        start, fields = self.line(), []
        while line := self.line():
            match = _FIELD.match(line)
            assert match, f"not a field: {line!r}"
            fields.append((match[1], match[2]))
        return Message(start, fields, b"", True)

    def request(self) -> Message:
        """Read the next request."""
        return self.with_body(self.head(), True)

    def answer(self, method: bytes = b"GET") -> Message:
        """Read the next answer, or interim answer, to a `method` request."""
        head = self.head()
        without_body = method == b"HEAD" or head.status in (204, 304) or head.status < 200
        return head if without_body else self.with_body(head, False)

    def rest(self) -> bytes:
        """Read all that comes until the other end closes."""
        while self._fill():
            pass
        return self.take(len(self.seen) - self._at)

    def line(self) -> bytes:
        """Read a line; return it without its CRLF.  Raises EOFError."""
        while (at := self.seen.find(b"\r\n", self._at)) < 0:
            if not self._fill():
                raise EOFError(f"{self.end} within a head: {bytes(self.seen[self._at :])!r}")
        line = self.take(at + 2 - self._at)[:-2]
        assert b"\r" not in line and b"\n" not in line, f"a line end within {line!r}"
        return line

    def take(self, count: int) -> bytes:
        """Read `count` bytes, or fewer if the connection ends."""
        while len(self.seen) - self._at < count and self._fill():
            pass
        data = bytes(self.seen[self._at : self._at + count])
        self._at += len(data)
        return data

    def all_taken(self) -> bool:
        """Return whether all bytes that came were read."""
        return self._at == len(self.seen)

    def stop_sending(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        self.socket.close()

    def with_body(self, head: Message, request: bool) -> Message:
        """Read the body behind a head; return both."""
        lengths, codings = head.get(b"content-length"), head.get(b"transfer-encoding")
        assert len(lengths) + len(codings) <= 1, f"two framings: {head}"
        if codings:
            assert codings == [b"chunked"]
            body, whole = self.chunks()
            return head._replace(body=body, whole=whole)
        if lengths or request:
            count = int(lengths[0]) if lengths else 0
            body = self.take(count)
            return head._replace(body=body, whole=len(body) == count)
        body = self.rest()
        return head._replace(body=body, whole=self.end == "closed")

    def chunks(self) -> tuple[bytes, bool]:
        """Read a chunked body; return it, and whether it is whole."""
        body = bytearray()
        try:
            while True:
                line = self.line()
                assert re.match(rb"[0-9a-f]{1,8}\Z", line), f"not a chunk size: {line!r}"
                size = int(line, 16)
                piece = self.take(size)
                body += piece
                if len(piece) < size:
                    return bytes(body), False
                ending = self.line()
                assert not ending, f"behind a chunk: {ending!r}"
                if not size:
                    return bytes(body), True
        except EOFError:
            return bytes(body), False

    def _fill(self) -> bool:
        if self.end:
            return False
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            self.end = "reset"
            return False
        if not data:
            self.end = "closed"
        self.seen += data
        return bool(data)


class OriginConnection(Wire):
    """One connection to the origin, as a play has it."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        """`number`: the connections of an origin are counted from 0."""
        super().__init__(sock)
        self.number = number

    def requests(self) -> list[Message]:
        """Return every request in what was received; the last one may be truncated."""
        wire, requests = Wire(None, bytes(self.seen)), []
        while not wire.all_taken():
            requests.append(wire.request())
        return requests


Play = Callable[[OriginConnection], None]
"""What an origin does with a connection."""


def answers(*messages: bytes) -> Play:
    """Return a play that answers each whole request; the last answer is repeated."""

    def play(connection: OriginConnection) -> None:
        left = list(messages)
        while True:
            try:
                connection.request()
            except EOFError:
                return
            connection.send(left.pop(0) if len(left) > 1 else left[0])

    return play


def answers_and_closes(*segments: bytes) -> Play:
    """Return a play that answers one whole request and closes."""

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(*segments)
        connection.close()

    return play


def in_turn(*plays: Play) -> Play:
    """Return a play that has another one for each connection."""
    return lambda connection: plays[connection.number](connection)


class Origin:
    """A server that plays `play` on every connection.

    It reads on to the end of a connection unless the play has closed it.
    """

    def __init__(self, play: Play, host: str = "127.0.0.1") -> None:
        self._play = play
        # The address of the peer that close() connects: no other comes behind it.
        self._last: object = None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family)
        self.address = from_sockaddr(self._listening.getsockname())
        self.connections: list[OriginConnection] = []
        self.faults: list[BaseException] = []
        self._threads = [threading.Thread(target=self._accept, name="test-origin", daemon=True)]
        self._threads[0].start()

    def requests(self) -> list[Message]:
        """Return the requests of all connections, which have ended."""
        return [request for connection in self.connections for request in connection.requests()]

    def close(self) -> None:
        """Wait until every connection was accepted and has ended, then close."""
        last = socket.socket(self._listening.family)
        last.bind((self.address.host, 0))
        self._last = last.getsockname()
        last.connect(self._listening.getsockname())
        # The list grows until its first thread, which accepts, has ended.
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the origin is not done"
        last.close()
        self._listening.close()

    def _accept(self) -> None:
        while True:
            sock, peer = self._listening.accept()
            if peer == self._last:
                sock.close()
                return
            tune(sock)
            connection = OriginConnection(sock, len(self.connections))
            self.connections.append(connection)
            self._threads.append(
                threading.Thread(
                    target=self._serve, args=(connection,), name="test-origin", daemon=True
                )
            )
            self._threads[-1].start()

    def _serve(self, connection: OriginConnection) -> None:
        try:
            self._play(connection)
            if connection.socket.fileno() >= 0:
                connection.rest()
        except BaseException as error:
            self.faults.append(error)
        finally:
            connection.close()


class LoopbackDialer:
    """A dialer that leads every target to an origin.

    `elsewhere` has the origins of other hosts.  It fails as `failing` says.
    """

    carries = frozenset({"tcp"})
    symmetric = knows_bound = False

    def __init__(
        self, origin: Origin, elsewhere: Mapping[str, Origin], name: str = "loopback"
    ) -> None:
        self.name = name
        self.dialled: list[Address] = []
        # The reasons for which the next dials fail, in their order.
        self.failing: list[Reason | None] = []
        self._origin = origin
        self._elsewhere = elsewhere

    def dial(self, flow: Flow) -> Stream:
        self.dialled.append(flow.target)
        if self.failing and (reason := self.failing.pop(0)):
            raise DialError(reason, str(flow.target))
        return Stream(
            connect([self._elsewhere.get(flow.target.host, self._origin).address], PATIENCE)
        )


_OK_ANSWERS = answers(OK)
_NO_LOGIN = Login(Users({}), "none")


class Rig(NamesNothing):
    """HttpHandler as a listener drives it, in front of one origin; also its Router and Observer.

    The end of the context waits for the thread of every connection, and fails if one is stuck
    or has raised anything but a NetProxyError.
    """

    def __init__(
        self,
        play: Play = _OK_ANSWERS,
        *,
        login: Login = _NO_LOGIN,
        idle: float = PATIENCE,
        handshake: float = PATIENCE,
        elsewhere: Mapping[str, Origin] = {},
        counters: Counters | None = None,
    ) -> None:
        self.origin = Origin(play)
        self.dialer = LoopbackDialer(self.origin, elsewhere)
        # Other upstreams, by the target's host.
        self.by_host: dict[str, Dialer] = {}
        self.counters = counters or Counters()
        self.records: list[Record] = []
        limits = PipeLimits(idle, idle)
        self.outbound = outbound = Outbound(self, limits, self.counters, self, account_book())
        self._handler = HttpHandler(
            "rig", outbound, Forwarder(outbound, idle), permission(login), self.counters
        )
        self._handshake = handshake
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._clients: list[Wire] = []
        self._threads: list[threading.Thread] = []
        self._faults: list[BaseException] = []

    def route(self, flow: Flow) -> Route:
        return Route(self.by_host.get(flow.target.host, self.dialer), flow)

    route_without_blocking = route

    def began(self, live: Any, dialled: float | None = None) -> None:
        """Note nothing."""

    def finished(self, record: Record) -> None:
        self.records.append(record)

    @property
    def dialled(self) -> list[str]:
        return [str(target) for target in self.dialer.dialled]

    def client(self, *segments: bytes) -> Wire:
        """Connect a client and send `segments`."""
        client = Wire(socket.create_connection(self._listening.getsockname()))
        sock, sockaddr = self._listening.accept()
        tune(client.socket)
        tune(sock)
        self._clients.append(client)
        thread = threading.Thread(
            target=self._serve,
            args=(Stream(sock), from_sockaddr(sockaddr)),
            name="test-rig",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()
        client.send(*segments)
        return client

    def join(self, seconds: float = PATIENCE) -> None:
        """Wait until the handler has returned from every connection."""
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive(), "a connection still holds its thread"

    def _serve(self, stream: Stream, client: Address) -> None:
        try:
            stream.limit(self._handshake)
            run_to_end(complete(self._handler.handle(stream, client)))
        except NetProxyError:
            pass
        except BaseException as error:
            self._faults.append(error)
        finally:
            stream.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._listening.close()
        for client in self._clients:
            client.close()
        if kind:
            return  # the test has failed already
        self.join()
        self.origin.close()
        assert not self._faults and not self.origin.faults, (self._faults, self.origin.faults)


def check_refused(client: Wire, status: bytes, method: bytes = b"GET") -> Message:
    """Read a whole error response of ours with a status line; the connection ends behind it."""
    answer = client.answer(method)
    assert answer.start == b"HTTP/1.1 " + status and answer.whole
    assert answer.get(b"connection") == [b"close"]
    assert client.rest() == b"" and client.end == "closed"
    return answer
