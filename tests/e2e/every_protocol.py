"""One client of each protocol, for a daemon with a listener of each, and the servers behind it."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack
from typing import Any, Callable

from netproxy.interfaces.addresses import Address
from netproxy.protocol import uot
from netproxy.protocol.http import capsule
from netproxy.protocol.http import connect_udp
from tests.e2e.peers import Association, TcpEcho, UdpEcho, Endpoint, encode, exactly
from tests.support.ports import free_port

LOOPBACK = "127.0.0.1"
# Seconds for 10,000 connections, which take most of a minute where other tests run beside them.
PATIENCE = 600.0
BURST = 20
PING = b"ping"
DNS_QUERY = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\4name\4test\0\0\1\0\1"
LISTENERS = """
listeners:
- {{name: main, listen: '{host}:{main}', auth: optional, limits: {{connections_per_client: 1000}}}}
- {{name: tcp, protocol: tcp, listen: '{host}:{tcp}', target: '{host}:{tcp_echo}'}}
- {{name: udp, protocol: udp, listen: '{host}:{udp}', target: '{host}:{udp_echo}'}}
- {{name: dns, protocol: dns, listen: '{host}:{dns}'}}
dns: {{servers: ['{host}:9'], hosts: {{name.test: 192.0.2.1}}}}
users: {{alice: {{password: secret}}}}
metrics: '{host}:{metrics}'
"""


class HttpOrigin(TcpEcho):
    """Answers a request with PING and closes."""

    def _serve(self, sock: Any) -> None:
        if sock is self.socket:
            super()._serve(sock)
            return
        if sock.recv(65536):
            sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\n" + PING)
        self._selector.unregister(sock)
        sock.close()


class Clients:
    """One client of each protocol.  Each makes one access record when it ends."""

    def __init__(self, stack: ExitStack) -> None:
        self.ports = {name: free_port() for name in ("main", "tcp", "udp", "dns", "metrics")}
        self.server = LOOPBACK, self.ports["main"]
        self.echo = stack.enter_context(TcpEcho()).address
        self.udp_echo = stack.enter_context(UdpEcho()).address
        self.origin = stack.enter_context(HttpOrigin()).address
        self.all: tuple[Callable[[], None], ...] = (
            self.socks4,
            self.socks5,
            self.http_connect,
            self.tcp_forward,
            self.http_forward,
            self.socks5_udp,
            self.connect_udp,
            self.uot,
        )

    @property
    def config(self) -> str:
        """The configuration with a listener of each protocol."""
        echoes = {"tcp_echo": self.echo[1], "udp_echo": self.udp_echo[1]}
        return LISTENERS.format(host=LOOPBACK, **echoes, **self.ports)

    # -- connections

    def socks4(self) -> None:
        host, port = self.echo
        request = struct.pack("!BBH4sx", 4, 1, port, socket.inet_aton(host))
        with self.dial(request + PING) as sock:
            assert exactly(sock, 12)[8:] == PING

    def socks5(self) -> None:
        with self.dial(b"\5\1\0\5\1\0" + encode(self.echo) + PING) as sock:
            assert exactly(sock, 16)[12:] == PING

    def http_connect(self) -> None:
        with self.dial(b"CONNECT %s:%d HTTP/1.1\r\nHost: a\r\n\r\n" % _bytes(self.echo)) as sock:
            assert _head(sock).startswith(b"HTTP/1.1 200 ")
            sock.sendall(PING)
            assert exactly(sock, 4) == PING

    def http_forward(self) -> None:
        request = b"GET http://%s:%d/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        with self.dial(request % _bytes(self.origin)) as sock:
            assert _head(sock).startswith(b"HTTP/1.1 200 ")
            assert exactly(sock, 4) == PING

    def tcp_forward(self) -> None:
        with self.dial(PING, self.ports["tcp"]) as sock:
            assert exactly(sock, 4) == PING

    # -- datagrams

    def socks5_udp(self) -> None:
        with Association(self.server) as association:
            association.echo(self.udp_echo, PING)

    def connect_udp(self) -> None:
        target = Address(*self.udp_echo)
        with self.dial(connect_udp.encode_request(target, "a")) as sock:
            assert _head(sock).startswith(b"HTTP/1.1 101 ")
            datagram = capsule.datagram_header(len(PING)) + PING
            sock.sendall(datagram)
            assert exactly(sock, len(datagram)) == datagram

    def uot(self) -> None:
        request = uot.encode_request(uot.UotRequest(True, Address(*self.udp_echo)))
        frame = b"\0\4" + PING
        with self.dial(b"\5\1\0\5\1\0" + encode((uot.MAGIC, 0)) + request + frame) as sock:
            assert exactly(sock, 12)[3] == 0
            assert exactly(sock, 6) == frame

    def many_datagrams(self, bursts: int) -> None:
        """Send bursts through an association, and after each a datagram to the other listeners."""
        with (
            Association(self.server) as association,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        ):
            sock.settimeout(PATIENCE)
            for number in range(bursts):
                for _ in range(BURST):
                    association.send(self.udp_echo, b"%d" % number)
                assert [association.receive()[0] for _ in range(BURST)] == [b"%d" % number] * BURST
                for listener, data in (("udp", PING), ("dns", DNS_QUERY)):
                    sock.sendto(data, (LOOPBACK, self.ports[listener]))
                    answer = sock.recv(512)
                    assert answer == PING or answer.endswith(socket.inet_aton("192.0.2.1"))

    def dial(self, data: bytes, port: int = 0) -> socket.socket:
        """Connect to the main listener, or to another port, and send."""
        sock = socket.create_connection((LOOPBACK, port or self.server[1]), PATIENCE)
        sock.sendall(data)
        return sock


def _bytes(where: Endpoint) -> tuple[bytes, int]:
    return where[0].encode(), where[1]


def _head(sock: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += exactly(sock, 1)
    return head
