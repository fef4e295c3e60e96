"""Load for transparent_peers.py: clients that know of no proxy, in a network namespace."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Sequence

from load import SIZE, TRAIN, Clients, Process
from rig import Endpoint, can_segment, readable, udp_socket
from tcp import PIECE

from tests.e2e.namespaces import Namespace

PATIENCE = 60.0
"""The limit of a wait for a byte of a connection, in seconds."""
ANSWER_SECONDS, ATTEMPTS = 0.5, 4
"""How long a datagram waits for its answer, and how often it is sent."""


class TcpClients(Process):
    """A process of the client's namespace, with TCP connections."""

    def __init__(self, host: Namespace) -> None:
        self._host = host
        super().__init__()

    # -- calls

    def rate(self, to: Endpoint, seconds: float) -> int:
        """Open connections one after the other, each with a byte there and back; count them."""
        done, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            self._opened(to).close()
            done += 1
        return done

    def bulk(self, to: Endpoint, direction: bytes, seconds: float) -> int:
        """Move bytes over one connection, down (b"d") or up (b"u"); return how many."""
        with socket.create_connection(to, PATIENCE) as sock:
            traffic, end = 0, time.monotonic() + seconds
            sock.sendall(direction)
            while time.monotonic() < end:
                if direction == b"u":
                    traffic += sock.send(PIECE)
                else:
                    traffic += len(sock.recv(1 << 20))
        return traffic

    def hold(self, to: Endpoint, count: int) -> int:
        """Open connections and keep them; return how many."""
        self._held = [self._opened(to) for _ in range(count)]
        return len(self._held)

    def release(self) -> None:
        """Close what is held."""
        for sock in self._held:
            sock.close()

    # -- in its process

    def begin(self) -> None:
        self._host.enter()
        self._held: list[socket.socket] = []

    def _opened(self, to: Endpoint) -> socket.socket:
        sock = socket.create_connection(to, PATIENCE)
        sock.sendall(b"x")
        if sock.recv(1) != b"x":
            raise SystemExit("a connection was closed without its byte")
        return sock


class UdpClients(Clients):
    """A process of the client's namespace, with UDP sockets."""

    def __init__(self, host: Namespace) -> None:
        self._host = host
        super().__init__()

    # -- calls

    # The parameters are those of this kind of client.
    def open(self, targets: Sequence[Endpoint]) -> int:  # type: ignore[override]
        """Open a socket for each target; return how many targets have answered."""
        self._sockets = [_connected(target) for target in targets]
        answered = sum(map(_answers, self._sockets))
        for sock in self._sockets:
            sock.setblocking(False)
        self._poll = readable(self._sockets)
        self._by_descriptor = {sock.fileno(): sock for sock in self._sockets}
        self._targets = 1
        self._singles, self._trains = [bytes(SIZE)], [bytes(SIZE * TRAIN)]
        self._can_segment = can_segment()
        return answered

    def hold(self, to: Endpoint, count: int) -> int:
        """Open sockets that exchange a datagram, and keep them; return how many had an answer."""
        self._held = [_connected(to) for _ in range(count)]
        return sum(map(_answers, self._held))

    def release(self) -> None:
        """Close what is held."""
        for sock in self._held:
            sock.close()

    def close(self) -> None:
        """Close the sockets of open()."""
        self._poll.close()
        for sock in self._sockets:
            sock.close()

    # -- in its process

    def begin(self) -> None:
        self._host.enter()
        self._held: list[socket.socket] = []


def _connected(target: Endpoint) -> socket.socket:
    sock = udp_socket(host="0.0.0.0")
    sock.connect(target)
    return sock


def _answers(sock: socket.socket) -> bool:
    """Send a datagram until its answer comes; return whether it has come."""
    sock.settimeout(ANSWER_SECONDS)
    for _ in range(ATTEMPTS):
        with contextlib.suppress(OSError):
            sock.send(b"open")
            if sock.recv(64) == b"open":
                return True
    return False
