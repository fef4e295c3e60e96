"""A TCP listener with its pool and its poller, and doubles for its admission and its handler."""

from __future__ import annotations

import socket
from typing import Any

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Handler, Handshake, Stream
from netproxy.interfaces.listeners import DECIDED_BY, Resident
from netproxy.listener.poller import Poller
from netproxy.listener.pool import ThreadPool
from netproxy.listener.handshake_driver import Serving
from netproxy.listener.tcp import TcpListener
from tests.support.doubles import Counts, Lines
from tests.support.sockets import SECONDS, read_exactly, wait_until

LOCALHOST = Address("127.0.0.1", 0)


class RecordingAdmission:
    """An Admission that remembers its clients; `refusal` is its answer."""

    def __init__(self) -> None:
        self.refusal = ""
        # Clients whose connections are counted in, and all that have asked.
        self.inside: list[str] = []
        self.entered: list[str] = []
        self.residents: dict[Resident, None] = {}

    def enter(self, client: str) -> str:
        self.entered.append(client)
        if not self.refusal:
            self.inside.append(client)
        return self.refusal

    def decided_by(self, refusal: str, client: str) -> str:
        return DECIDED_BY.get(refusal, "")

    def leave(self, client: str, resident: Resident | None = None) -> None:
        self.inside.remove(client)
        if resident is not None:
            del self.residents[resident]


class Echo:
    """A handler that returns the first line of a connection and reads on to its end.

    It raises `raises` instead of answering, if that is set.
    """

    def __init__(self) -> None:
        self.raises: BaseException | None = None
        self.clients: list[Address] = []

    def handle(self, stream: Stream, client: Address) -> Handshake:
        self.clients.append(client)
        line = yield from stream.read_until(b"\n", 100)
        if self.raises:
            raise self.raises
        stream.reply(line)
        while (yield from stream.read_some(100)):
            pass
        return None


class TcpRig:
    """A listener on a loopback address; its thread is not started."""

    def __init__(self, threads: int = 8, address: Address = LOCALHOST) -> None:
        self.counts, self.log = Counts(), Lines()
        self.admission: Any = RecordingAdmission()  # Any: or an Admission, in some tests
        self.handler = Echo()
        self.handshakes = 256
        self.pool = ThreadPool("connection", threads, 0, self.log)
        self.poller = Poller(self.log)
        self.poller.start()
        self.serving = Serving(self.pool, self.poller, self.counts, self.log)
        try:
            self.listener = TcpListener(address, self.serving)
        except ListenError:
            self.poller.stop()
            raise
        self.configure(self.handler)
        self.clients: list[socket.socket] = []
        self.closed = False

    def configure(self, handler: Handler, handshake: float = 10 * SECONDS) -> None:
        """Set the handler of new connections, and the seconds of their handshake.

        Unless a test tells them, no handshake is over before the test has waited in vain.
        """
        self.listener.configure(handler, self.admission, handshake, self.handshakes)

    def connect(self, host: str = "", source: str = "") -> socket.socket:
        """Return a connection of a client, from the address `source`."""
        address = (host or self.listener.address.host, self.listener.address.port)
        sock = socket.create_connection(address, SECONDS, (source, 0) if source else None)
        self.clients.append(sock)
        return sock

    def ask(self, line: bytes = b"hello\n", source: str = "") -> socket.socket:
        """Return a connection, from `source`, whose first line was returned."""
        sock = self.connect(source=source)
        sock.sendall(line)
        assert read_exactly(sock, len(line)) == line
        return sock

    def all_ended(self) -> bool:
        """Return whether every connection has ended; a second end of one raises in leave()."""
        return not self.listener.live and not self.admission.inside and not len(self.poller)

    def outcomes(self) -> dict[str, int]:
        """Return the counters of connections, by reason."""
        return {
            reason: total
            for (name, reason), total in self.counts.counts.items()
            if name == "connections"
        }

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
