"""A TCP listener with its pool and its poller, and stand-ins for its admission and its handler."""

from __future__ import annotations

import socket

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.listener.poller import Poller
from netproxy.listener.pool import ThreadPool
from netproxy.listener.serving import Serving
from netproxy.listener.tcp import TcpListener
from netproxy.net.stream import Stream
from tests.support.doubles import Counts, Lines
from tests.support.sockets import SECONDS, read_exactly, wait_until

LOCALHOST = Address("127.0.0.1", 0)


class Door:
    """An Admission that records its calls; `refusal` is its answer."""

    def __init__(self) -> None:
        self.refusal = ""
        self.inside: list[str] = []
        self.entered: list[str] = []

    def enter(self, client: str) -> str:
        self.entered.append(client)
        if not self.refusal:
            self.inside.append(client)
        return self.refusal

    def leave(self, client: str) -> None:
        self.inside.remove(client)


class Echo:
    """A handler that echoes one line and records its clients; if set, it raises `raises`."""

    def __init__(self) -> None:
        self.raises: BaseException | None = None
        self.clients: list[Address] = []

    def handle(self, stream: Stream, client: Address) -> None:
        self.clients.append(client)
        line = stream.read_until(b"\n", 100)
        if self.raises:
            raise self.raises
        stream.write(line)
        while stream.read_some(100):
            pass


class TcpRig:
    """A running listener and its clients."""

    def __init__(self, threads: int = 8, address: Address = LOCALHOST) -> None:
        self.counts, self.log, self.door, self.handler = Counts(), Lines(), Door(), Echo()
        self.pool = ThreadPool("connection", threads, 0, self.log)
        self.poller = Poller(self.log)
        self.poller.start()
        try:
            self.listener = TcpListener(
                address, Serving(self.pool, self.poller, self.counts, self.log)
            )
        except ListenError:
            self.poller.stop()
            raise
        self.listener.configure(self.handler, self.door, 5.0)
        self.clients: list[socket.socket] = []
        self.closed = False

    def connect(self, host: str = "") -> socket.socket:
        sock = socket.create_connection(
            (host or self.listener.address.host, self.listener.address.port), SECONDS
        )
        self.clients.append(sock)
        return sock

    def ask(self, line: bytes = b"hello\n") -> socket.socket:
        """Return a connection that has been served."""
        sock = self.connect()
        sock.sendall(line)
        assert read_exactly(sock, len(line)) == line
        return sock

    def close(self) -> None:
        self.listener.stop()
        self.listener.abort()
        if not self.closed:
            wait_until(lambda: not self.listener.live)
            self.poller.stop()
            self.closed = True
        self.pool.stop(SECONDS)
        for sock in self.clients:
            sock.close()
