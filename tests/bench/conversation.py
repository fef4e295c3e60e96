"""A conversation of a good client: its connections, its data, and the checks of what comes back."""

from __future__ import annotations

import random
import socket
import struct
import time
from contextlib import ExitStack
from typing import Callable, Mapping, NamedTuple

from rig import Endpoint
from world import NOISE, World

from tests.e2e.peers import encode, exactly, read_address

# Seconds for each wait.
PATIENCE = 60.0
# How often a datagram is sent, and how many seconds its answer is waited for.
TRIES, RESEND = 30, 1.0
SIZES = (1, 60, 1200, 4000, 20_000, 60_000)
# No larger than what fits a packet: towards targets the daemon sends no fragments.
DATAGRAM_SIZES = (0, 1, 100, 1200, 1400)
PIECE = 1 << 16
LOGIN = b"alice", b"a password of alice"


class Wrong(Exception):
    """A client got other bytes than it should."""


class Site(NamedTuple):
    """Where the daemon and the servers behind it are."""

    host: str
    """The daemon's address for good clients."""
    ports: Mapping[str, int]
    """Ports of the daemon: main, tls, tcp, udp, dns, and of the agent: tunnel, tunnel_udp."""
    world: World
    authority: str
    """A PEM file: who has signed the certificate of the TLS listener."""


class Conversation:
    """One conversation: its sockets and its data."""

    def __init__(self, site: Site, choices: random.Random, stack: ExitStack) -> None:
        self.site = site
        self.choices = choices
        self._stack = stack
        self.ports: list[int] = []

    # -- connections

    def dial(self, name: str = "main") -> socket.socket:
        """Connect to a port of the daemon."""
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((self.site.host, self.site.ports[name]))
        self.ports.append(sock.getsockname()[1])
        return sock

    def socks5(
        self, command: int, target: Endpoint, sock: socket.socket, login: bool = False
    ) -> Endpoint:
        """Make a request, with the user's name and password if `login`. Return BND."""
        sock.sendall(b"\5\1\2" if login else b"\5\1\0")
        same(exactly(sock, 2), b"\5\2" if login else b"\5\0")
        if login:
            sock.sendall(b"\1" + b"".join(bytes([len(part)]) + part for part in LOGIN))
            same(exactly(sock, 2), b"\1\0")
        sock.sendall(bytes([5, command, 0]) + encode(target))
        return reply(sock)

    def noise(self, size: int) -> bytes:
        """Return some bytes."""
        at = self.choices.randrange(len(NOISE) - size)
        return NOISE[at : at + size]

    def echo(self, sock: socket.socket, size: int) -> None:
        """Send bytes to an echo server, and check what comes back."""
        for start in range(0, size, PIECE):
            data = self.noise(min(PIECE, size - start))
            sock.sendall(data)
            same(exactly(sock, len(data)), data)

    def exchange(self, sock: socket.socket) -> None:
        """Exchange some messages, and end: what was sent before FIN comes back, then FIN."""
        for _ in range(self.choices.randint(1, 4)):
            self.echo(sock, self.choices.choice(SIZES))
        data = self.noise(self.choices.choice(SIZES))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        same(exactly(sock, len(data)), data)
        same(sock.recv(1), b"")

    # -- datagrams

    def datagrams(self, send: Callable[[bytes], object], receive: Callable[[], bytes]) -> None:
        """Send some datagrams, each until it comes back. `receive` raises TimeoutError.

        Those of others, and late copies, are left alone.
        """
        mark = self.choices.randbytes(8)
        for number in range(self.choices.randint(3, 8)):
            data = (
                mark + struct.pack("!I", number) + self.noise(self.choices.choice(DATAGRAM_SIZES))
            )
            for _ in range(TRIES):
                send(data)
                if self._comes_back(data, receive):
                    break
            else:
                raise TimeoutError("no answer to a datagram")

    @staticmethod
    def _comes_back(data: bytes, receive: Callable[[], bytes]) -> bool:
        deadline = time.monotonic() + RESEND
        while time.monotonic() < deadline:
            try:
                answer = receive()
            except (TimeoutError, ConnectionRefusedError):
                return False
            if answer[:12] == data[:12]:
                same(answer, data)
                return True
        return False

    def udp_socket(self) -> socket.socket:
        """Return a UDP socket that waits for RESEND seconds."""
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.settimeout(RESEND)
        return sock


def same(received: bytes, expected: bytes) -> None:
    """Raise Wrong if bytes are not the expected ones."""
    if received != expected:
        raise Wrong(f"{len(received)} bytes {received[:40]!r}, not {expected[:40]!r}")


def reply(sock: socket.socket) -> Endpoint:
    """Read a reply; return BND. Raises ConnectionError if the daemon refuses."""
    _, code, _ = exactly(sock, 3)
    bound = read_address(sock)
    if code:
        raise ConnectionError(f"SOCKS5 reply {code}")
    return bound


def head(sock: socket.socket) -> bytes:
    """Read the head of an HTTP response. Raises ConnectionError if it is no success."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += exactly(sock, 1)
    if data.split(b" ", 2)[1] not in (b"200", b"101"):
        raise ConnectionError(data.split(b"\r\n")[0].decode("latin-1"))
    return data


class Frames:
    """Reads the frames of a stream."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._data = b""

    def wait(self) -> None:
        """Wait for the first byte of a frame. Raises TimeoutError after RESEND seconds."""
        self._socket.settimeout(RESEND)
        try:
            self._receive(1)
        finally:
            self._socket.settimeout(PATIENCE)

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        self._receive(size)
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def _receive(self, size: int) -> None:
        while len(self._data) < size:
            piece = self._socket.recv(65536)
            if not piece:
                raise EOFError("the stream has ended")
            self._data += piece

    def varint(self) -> int:
        """Return the next number (RFC 9000 section 16)."""
        first = self.take(1)
        more = self.take((1 << (first[0] >> 6)) - 1)
        return int.from_bytes(bytes((first[0] & 0x3F,)) + more, "big")
