"""What works through a transparent proxy, as its client sees it, for transparent_peers.py.

Each check is a function of the hosts.  It returns whether the thing works, and raises OSError, in
most cases TimeoutError, if nothing comes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import socket
import ssl
import struct
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from load import SIZE, TRAIN
from rig import SOL_UDP, UDP_GRO, Endpoint, send_train, udp_socket

from transparent_programs import BLOCKED

from netproxy.errors import ProtocolError
from netproxy.protocol import stun
from tests.e2e.namespaces import Namespace
from tests.e2e.peers import TcpEcho, UdpEcho, echo, exactly, family, listen, udp
from tests.e2e.quic import EchoServer, transfer
from tests.e2e.router import OTHER, SERVER, SERVER6, Net
from tests.support import dns
from tests.support.stun_server import StunServer

SECONDS = 2.0
"""How long a check waits for something that should come."""
ATTEMPTS = 2
"""How often a check is made: on a busy machine a datagram may be lost."""
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
Check = Callable[[Net], bool]


def works(check: Check, net: Net) -> bool:
    """Return whether a check passes."""
    for _ in range(ATTEMPTS):
        with contextlib.suppress(OSError, EOFError, AssertionError, ProtocolError):
            if check(net):
                return True
    return False


# -- helpers


class _Echo(UdpEcho):
    """Sends datagrams back.  A client that no proxy stands for cannot be reached."""

    def _serve(self, sock: Any) -> None:
        with contextlib.suppress(OSError):
            super()._serve(sock)


def _dial(host: Namespace, to: Endpoint) -> socket.socket:
    sock = host.socket(family(to[0]), socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    sock.connect(to)
    return sock


def _udp_client(net: Net, server: str = SERVER) -> socket.socket:
    sock = udp("::" if ":" in server else "0.0.0.0", net.client.socket)
    sock.settimeout(SECONDS)
    return sock


@contextmanager
def _server(net: Net, serve: Callable[[socket.socket], None]) -> Iterator[Endpoint]:
    """Serve one connection after the other with a function; yield the address."""

    def run() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return  # it was shut down
            with sock, contextlib.suppress(OSError, EOFError):
                sock.settimeout(SECONDS)
                serve(sock)

    with listen(SERVER, net.internet.socket) as listening:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


# -- TCP


def _tcp(net: Net, server: str) -> bool:
    with TcpEcho(server, net.internet.socket) as target:
        with _dial(net.client, target.address) as sock:
            echo(sock, b"hello" * 1000)
            return True


def _half_close(net: Net) -> bool:
    """The client ends its direction; then the target answers."""

    def serve(sock: socket.socket) -> None:
        count = 0
        while data := sock.recv(65536):
            count += len(data)
        sock.sendall(b"%d bytes" % count)

    with _server(net, serve) as address, _dial(net.client, address) as sock:
        sock.sendall(bytes(20_000))
        sock.shutdown(socket.SHUT_WR)
        return exactly(sock, 11) == b"20000 bytes" and not sock.recv(1)


def _websocket(net: Net) -> bool:
    """RFC 6455: the upgrade, then a masked frame whose payload comes back in a frame."""

    def serve(sock: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += exactly(sock, 1)
        key = head.partition(b"Sec-WebSocket-Key: ")[2].split(b"\r\n")[0]
        sock.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + _accept(key) + b"\r\n\r\n"
        )
        frame = exactly(sock, 2)
        mask, masked = exactly(sock, 4), exactly(sock, frame[1] & 0x7F)
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(masked))
        sock.sendall(bytes((frame[0], len(payload))) + payload)

    key = base64.b64encode(bytes(range(16)))
    with _server(net, serve) as address, _dial(net.client, address) as sock:
        sock.sendall(
            b"GET /chat HTTP/1.1\r\nHost: chat.example\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: " + key + b"\r\n\r\n"
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += exactly(sock, 1)
        text = b"a message"
        mask = b"\x11\x22\x33\x44"
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(text))
        sock.sendall(bytes((0x81, 0x80 | len(text))) + mask + masked)
        frame = bytes((0x81, len(text))) + text
        return _accept(key) in head and exactly(sock, len(frame)) == frame


def _accept(key: bytes) -> bytes:
    return base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID).digest())


def _client_hello(name: str) -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def _request(name: str) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: " + name.encode() + b"\r\n\r\n"


def _rule(net: Net, first_bytes: Callable[[str], bytes]) -> bool:
    """The rule refuses BLOCKED; another name at the same address passes unchanged."""
    with TcpEcho(SERVER, net.internet.socket) as target:
        with _dial(net.client, target.address) as sock:
            echo(sock, first_bytes("allowed.example"))
        with _dial(net.client, target.address) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(first_bytes(BLOCKED))
            return not sock.recv(1)
        return True


# -- UDP


def _udp(net: Net, server: str) -> bool:
    """An answer comes, from whatever address."""
    with _Echo(server, net.internet.socket) as target, _udp_client(net, server) as sock:
        sock.sendto(b"hello", (server, target.address[1]))
        return sock.recv(100) == b"hello"


def _reply_source(net: Net) -> bool:
    """Answers of two targets each come from the address that the client has written to."""
    with (
        _Echo(SERVER, net.internet.socket) as first,
        _Echo(OTHER, net.internet.socket) as second,
        _udp_client(net) as sock,
    ):
        for target in (first, second, first):
            sock.sendto(b"hello", target.address)
            if sock.recvfrom(100) != (b"hello", target.address):
                return False
        return True


def _large(net: Net) -> bool:
    """A datagram of 8,000 bytes, which takes several packets."""
    with _Echo(SERVER, net.internet.socket) as target, _udp_client(net) as sock:
        sock.sendto(b"hello", target.address)
        sock.recv(100)
        data = bytes(range(250)) * 32
        sock.sendto(data, target.address)
        return sock.recv(65535) == data


def _name_lookup(net: Net) -> bool:
    """DNS by UDP, at port 53."""
    asked = dns.question("a.example")
    answer = dns.answer(asked, (dns.a(60),))
    with _Echo(SERVER, net.internet.socket, lambda query: answer, 53), _udp_client(net) as sock:
        sock.connect((SERVER, 53))
        sock.send(dns.query(asked))
        return sock.recv(512) == answer


def _another_port(net: Net) -> bool:
    """As in TFTP: the server answers from a port of its own, and the client writes to that."""
    with (
        udp(SERVER, net.internet.socket) as well_known,
        udp(SERVER, net.internet.socket) as other,
        _udp_client(net) as sock,
    ):
        for server in (well_known, other):
            server.settimeout(SECONDS)
        sock.sendto(b"read request", well_known.getsockname())
        _, mapped = well_known.recvfrom(100)
        other.sendto(b"block 1", mapped)
        data, source = sock.recvfrom(100)
        if (data, source) != (b"block 1", other.getsockname()):
            return False
        sock.sendto(b"ack 1", source)
        return other.recv(100) == b"ack 1"


def _stun_server(net: Net, host: str) -> StunServer:
    sock = udp(host, net.internet.socket)
    sock.settimeout(None)  # so that its end wakes the server
    return StunServer(sock)


def _mapped(sock: socket.socket, server: Endpoint) -> Any:
    """Return the address that a STUN server sees; None if another one answers."""
    transaction = os.urandom(12)
    sock.sendto(stun.encode_request(stun.BindingRequest(transaction)), server)
    data, source = sock.recvfrom(1500)
    if source != server:
        return None
    answer = stun.parse_response(data)
    return answer.mapped if isinstance(answer, stun.BindingSuccess) else None


def _mapping(net: Net) -> bool:
    """STUN (RFC 5780): servers at two addresses see the client at the same one."""
    with (
        _stun_server(net, SERVER) as first,
        _stun_server(net, OTHER) as second,
        _udp_client(net) as sock,
    ):
        seen = [_mapped(sock, server.socket.getsockname()) for server in (first, second)]
        return seen[0] is not None and seen[0] == seen[1]


def _filtering(net: Net) -> bool:
    """STUN (RFC 5780): a host that the client has not written to reaches its mapping."""
    with (
        _stun_server(net, SERVER) as server,
        udp(OTHER, net.internet.socket) as stranger,
        _udp_client(net) as sock,
    ):
        mapped = _mapped(sock, server.socket.getsockname())
        if mapped is None:
            return False
        stranger.sendto(b"unasked", (mapped.host, mapped.port))
        return sock.recvfrom(100) == (b"unasked", stranger.getsockname())


def _quic(net: Net) -> bool:
    data, results = bytes(range(256)) * 1024, []

    def run() -> None:
        net.client.enter()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            results.append(transfer(server.port, data, 4 * SECONDS, SERVER))

    with (
        tempfile.TemporaryDirectory() as folder,
        EchoServer(Path(folder), SERVER, net.internet.enter) as server,
    ):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    return results == [data]


def _segments(sock: socket.socket) -> tuple[int, int]:
    """Return the bytes of one receive, and of each datagram in it."""
    data, control, _, _ = sock.recvmsg(65536, 64)
    for level, kind, value in control:
        if (level, kind) == (SOL_UDP, UDP_GRO):
            return len(data), int(struct.unpack_from("=i", value)[0])
    return len(data), len(data)


def _train(net: Net, down: bool) -> bool:
    """Datagrams of one send (UDP_SEGMENT) come in one receive (UDP_GRO)."""
    with (
        udp_socket(True, SERVER, net.internet.socket) as target,
        udp_socket(True, "0.0.0.0", net.client.socket) as client,
    ):
        for sock in (target, client):
            sock.settimeout(SECONDS)
        client.sendto(b"hello", target.getsockname())
        _, mapped = target.recvfrom(100)
        target.sendto(b"hello", mapped)
        client.recv(100)
        train = bytes(SIZE * TRAIN)
        if down:
            send_train(target, train, SIZE, mapped)
        else:
            send_train(client, train, SIZE, target.getsockname())
        return _segments(client if down else target) == (SIZE * TRAIN, SIZE)


TRAINS: dict[str, Check] = {
    "trains kept up (GSO)": lambda net: _train(net, False),
    "trains kept down (GSO)": lambda net: _train(net, True),
}
CHECKS: dict[str, Check] = {
    "TCP, IPv4": lambda net: _tcp(net, SERVER),
    "TCP, IPv6": lambda net: _tcp(net, SERVER6),
    "TCP half-close": _half_close,
    "WebSocket": _websocket,
    "rule by TLS name": lambda net: _rule(net, _client_hello),
    "rule by HTTP host": lambda net: _rule(net, _request),
    "UDP, IPv4": lambda net: _udp(net, SERVER),
    "UDP, IPv6": lambda net: _udp(net, SERVER6),
    "reply from the address written to": _reply_source,
    "reply from another port (TFTP)": _another_port,
    "datagram of 8,000 bytes": _large,
    "DNS by UDP": _name_lookup,
    "QUIC": _quic,
    "one mapping for all targets (STUN)": _mapping,
    "strangers reach the mapping (STUN)": _filtering,
}
