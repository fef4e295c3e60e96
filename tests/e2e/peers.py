"""Provides the peers of a proxy: a SOCKS5 client written from RFC 1928, and echo servers.

`make` parameters create sockets as socket.socket does, so that a peer may live in another network
namespace.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from typing import Any, Callable

from tests.support.sockets import SECONDS

CONNECT, BIND, ASSOCIATE = 1, 2, 3
# The limit of a peer's wait for an answer, long enough for a slow machine.
REPLY_SECONDS = SECONDS

Endpoint = tuple[str, int]
Login = tuple[str, str]
Make = Callable[..., socket.socket]


class Refused(OSError):
    """The proxy refused the request. `code` is the REP field of its reply, 255 for a bad login."""

    def __init__(self, code: int) -> None:
        super().__init__(f"SOCKS5 reply {code}")
        self.code = code


def family(host: str) -> int:
    """Return the address family of a literal address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(host: str, make: Make = socket.socket, port: int = 0) -> socket.socket:
    """Return a listening TCP socket."""
    server = make(family(host), socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((host, port))
    server.listen(1024)
    return server


def udp(host: str, make: Make = socket.socket, port: int = 0) -> socket.socket:
    """Return a bound UDP socket with a timeout."""
    sock = make(family(host), socket.SOCK_DGRAM)
    sock.settimeout(REPLY_SECONDS)
    sock.bind((host, port))
    return sock


def exactly(sock: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes. Raises EOFError if the connection ends before."""
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError(f"closed after {len(data)} of {count} bytes")
        data += piece
    return data


# -- SOCKS5


def encode(address: Endpoint) -> bytes:
    """Return ATYP, address and port (RFC 1928 section 5)."""
    host, port = address
    for kind, number in ((socket.AF_INET, 1), (socket.AF_INET6, 4)):
        try:
            return bytes([number]) + socket.inet_pton(kind, host) + struct.pack("!H", port)
        except OSError:
            pass
    return bytes([3, len(host)]) + host.encode() + struct.pack("!H", port)


def read_address(sock: socket.socket) -> Endpoint:
    """Read ATYP, address and port."""
    kind = exactly(sock, 1)[0]
    if kind == 3:
        host = exactly(sock, exactly(sock, 1)[0]).decode()
    elif kind == 1:
        host = socket.inet_ntop(socket.AF_INET, exactly(sock, 4))
    else:
        host = socket.inet_ntop(socket.AF_INET6, exactly(sock, 16))
    return host, struct.unpack("!H", exactly(sock, 2))[0]


def socks5(
    server: Endpoint,
    command: int,
    target: Endpoint,
    login: Login | None = None,
    make: Make = socket.socket,
    seconds: float = REPLY_SECONDS,
) -> tuple[socket.socket, Endpoint]:
    """Send a request. Return the connection and the BND address of the reply.

    `seconds` limits each wait. Raises Refused if the proxy refuses.
    """
    sock = make(family(server[0]), socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(server)
        sock.sendall(b"\5\1\2" if login else b"\5\1\0")
        assert exactly(sock, 2) == (b"\5\2" if login else b"\5\0")
        if login:
            user, password = (part.encode() for part in login)
            sock.sendall(b"\1" + bytes([len(user)]) + user + bytes([len(password)]) + password)
            if exactly(sock, 2)[1]:
                raise Refused(255)
        sock.sendall(bytes([5, command, 0]) + encode(target))
        version, code, _ = exactly(sock, 3)
        assert version == 5
        bound = read_address(sock)
        if code:
            raise Refused(code)
    except BaseException:
        sock.close()
        raise
    return sock, bound


class Association:
    """A UDP ASSOCIATE and a UDP socket for it. The request names `hint`, or the socket's port."""

    def __init__(
        self,
        server: Endpoint,
        login: Login | None = None,
        make: Make = socket.socket,
        hint: Endpoint | None = None,
    ) -> None:
        self.socket = udp("::" if ":" in server[0] else "0.0.0.0", make)
        try:
            self.control, self.bound = socks5(
                server, ASSOCIATE, hint or self.socket.getsockname()[:2], login, make
            )
        except BaseException:
            self.socket.close()
            raise

    def send(self, target: Endpoint, data: bytes) -> None:
        """Send a datagram to the target through the proxy."""
        self.socket.sendto(b"\0\0\0" + encode(target) + data, self.bound)

    def receive(self) -> tuple[bytes, Endpoint, Endpoint]:
        """Return payload, source as the header names it, and the address that sent the datagram."""
        data, peer = self.socket.recvfrom(65535)
        assert data[:3] == b"\0\0\0"
        size = {1: 4, 4: 16}[data[3]]
        kind = socket.AF_INET if size == 4 else socket.AF_INET6
        source = (
            socket.inet_ntop(kind, data[4 : 4 + size]),
            struct.unpack("!H", data[4 + size : 6 + size])[0],
        )
        return data[6 + size :], source, peer[:2]

    def echo(self, target: Endpoint, data: bytes) -> tuple[Endpoint, Endpoint]:
        """Send data to an echo server and check what comes back. Return its source and sender."""
        self.send(target, data)
        payload, source, sender = self.receive()
        assert payload == data
        return source, sender

    def close(self) -> None:
        """Close the control connection and the socket."""
        self.control.close()
        self.socket.close()

    def __enter__(self) -> Association:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def echo(sock: socket.socket, data: bytes) -> None:
    """Send data to an echo server and check what comes back."""
    sock.sendall(data)
    assert exactly(sock, len(data)) == data


# -- servers


class _Server:
    """Serves one socket with a thread until close()."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.address: Endpoint = sock.getsockname()[:2]
        self._end, self._ended = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._selector.register(self._ended, selectors.EVENT_READ)
        sock.setblocking(False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._ended:
                    return
                try:
                    self._serve(key.fileobj)
                except BlockingIOError:
                    pass

    def _serve(self, sock: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._end.close()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TcpEcho(_Server):
    """Sends back what it receives, on any number of connections, with one thread."""

    def __init__(self, host: str = "127.0.0.1", make: Make = socket.socket, port: int = 0) -> None:
        super().__init__(listen(host, make, port))

    def _serve(self, sock: Any) -> None:
        if sock is self.socket:
            client, _ = sock.accept()
            self._selector.register(client, selectors.EVENT_READ)
            return
        try:
            data = sock.recv(65536)
            if data:
                # Messages of tests are small: they never fill the buffer.
                sock.setblocking(True)
                sock.sendall(data)
                sock.setblocking(False)
                return
        except ConnectionError:
            pass
        self._selector.unregister(sock)
        sock.close()


class UdpEcho(_Server):
    """Answers each datagram with `answer(datagram)` and records the senders in `sources`."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        make: Make = socket.socket,
        answer: Callable[[bytes], bytes] = bytes,
        port: int = 0,
    ) -> None:
        self.sources: list[Endpoint] = []
        self._answer = answer
        super().__init__(udp(host, make, port))

    def _serve(self, sock: Any) -> None:
        data, peer = sock.recvfrom(65535)
        self.sources.append(peer[:2])
        sock.sendto(self._answer(data), peer)
