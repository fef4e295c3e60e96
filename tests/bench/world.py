"""What is behind the daemon in the mixed loads: echo servers, an origin and a name server.

All are in one process, with a thread for each connection.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from typing import Callable, NamedTuple

from load import Process
from rig import Endpoint

Make = Callable[..., socket.socket]

NOISE = random.Random(14).randbytes(1 << 20)
"""What the origin answers with, from its beginning."""
STACK = 256 << 10
BACKLOG = 1024


class World(NamedTuple):
    """The addresses of the servers. All sockets are on one host."""

    tcp: Endpoint
    """Sends everything back; the daemon reaches it directly."""
    tcp_chain: Endpoint
    """The same; rules lead to it through two hops."""
    tcp_group: Endpoint
    """The same; rules lead to it through a group."""
    silent: Endpoint
    """Accepts connections, reads, and says nothing."""
    http: Endpoint
    """An origin: GET /N has N bytes of NOISE, POST sends the body back."""
    udp: Endpoint
    """Sends datagrams back; the daemon reaches it directly."""
    udp_chain: Endpoint
    """The same; rules lead to it through a hop."""
    dns: Endpoint
    """Knows the addresses in names such as any.x192-0-2-1.test; silent for names of .silent."""


class Servers(Process):
    """The process with the servers. `world` has their addresses."""

    def __init__(self, host: str, make: Make = socket.socket) -> None:
        """Bind all sockets to `host`. `make` creates them, perhaps in another namespace."""
        self._sockets = {
            name: _bound(make, host, datagrams="udp" in name or name == "dns")
            for name in World._fields
        }
        self.world = World(*(sock.getsockname()[:2] for sock in self._sockets.values()))
        super().__init__()
        for sock in self._sockets.values():
            sock.close()

    def begin(self) -> None:
        threading.stack_size(STACK)
        serve: dict[str, Callable[[socket.socket], None]] = {
            "silent": serve_silence,
            "http": serve_http,
        }
        for name, sock in self._sockets.items():
            if name == "dns":
                run = (answer_names, sock)
            elif sock.type == socket.SOCK_DGRAM:
                run = (echo_datagrams, sock)
            else:
                run = (accept, sock, serve.get(name, serve_echo))
            threading.Thread(target=run[0], args=run[1:], daemon=True).start()


def _bound(make: Make, host: str, datagrams: bool) -> socket.socket:
    sock = make(socket.AF_INET, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM)
    sock.bind((host, 0))
    if not datagrams:
        sock.listen(BACKLOG)
    return sock


def accept(listening: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    """Serve each connection with a thread."""

    def run(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            serve(sock)

    while True:
        sock, _ = listening.accept()
        threading.Thread(target=run, args=(sock,), daemon=True).start()


def serve_echo(sock: socket.socket) -> None:
    """Send everything back, and then the end."""
    while data := sock.recv(65536):
        sock.sendall(data)


def serve_silence(sock: socket.socket) -> None:
    """Read to the end."""
    while sock.recv(65536):
        pass


def serve_http(sock: socket.socket) -> None:
    """Answer requests until the connection ends."""
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            piece = sock.recv(65536)
            if not piece:
                return
            data += piece
        head, _, data = data.partition(b"\r\n\r\n")
        method, path = head.split(b" ", 2)[:2]
        if method == b"POST":
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            while len(data) < length:
                piece = sock.recv(65536)
                if not piece:
                    return
                data += piece
            body, data = data[:length], data[length:]
        else:
            body = NOISE[: int(path.strip(b"/") or b"0")]
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def echo_datagrams(sock: socket.socket) -> None:
    """Send all datagrams back."""
    while True:
        # ECONNREFUSED: an earlier answer had no receiver.
        with contextlib.suppress(OSError):
            data, peer = sock.recvfrom(65536)
            sock.sendto(data, peer)


def answer_names(sock: socket.socket) -> None:
    """Answer queries for A with the address in the name; other types have no data."""
    while True:
        with contextlib.suppress(OSError, ValueError, IndexError, struct.error):
            query, peer = sock.recvfrom(4096)
            end = query.index(0, 12)
            (kind,) = struct.unpack_from("!H", query, end + 1)
            labels = _labels(query[12:end])
            if labels[-1] == b"silent":
                continue
            head = query[:2] + b"\x85\x80\0\1\0%c\0\0\0\0" % (kind == 1)
            answer = head + query[12 : end + 5]
            if kind == 1:
                address = labels[-2].removeprefix(b"x").replace(b"-", b".").decode()
                answer += b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(address)
            sock.sendto(answer, peer)


def _labels(wire: bytes) -> list[bytes]:
    labels, at = [], 0
    while at < len(wire):
        labels.append(wire[at + 1 : at + 1 + wire[at]].lower())
        at += 1 + wire[at]
    return labels
