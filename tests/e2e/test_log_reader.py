"""The reader of the log stops: the daemon serves on, and tells later what is missing in the log."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import struct
import urllib.request
from contextlib import ExitStack
from itertools import count
from typing import Any, Callable, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol import capsule, connect_udp, uot
from tests.e2e.conftest import Start
from tests.e2e.peers import Association, TcpEcho, UdpEcho, Where, encode, exactly
from tests.e2e.support import LOOPBACK, Netproxyd, free_port, wait_for
from tests.support.sockets import Task

pytestmark = pytest.mark.e2e

CONNECTIONS, CLIENTS = 10_000, 8
DATAGRAMS, BURST = 10_000, 20
# Seconds for what needs no more than a moment on an idle machine.
PATIENCE = 60.0
QUEUE = 500
PING = b"ping"
REPORT = re.compile(r' warning msg="records were dropped here.*" records=(\d+) info=(\d+)$')
DNS_QUERY = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\4name\4test\0\0\1\0\1"
CONFIG = """
listeners:
- {{name: main, listen: '{host}:{port}', limits: {{connections_per_client: 1000}}}}
- {{name: tcp, protocol: tcp, listen: '{host}:{tcp}', target: '{host}:{tcp_echo}'}}
- {{name: udp, protocol: udp, listen: '{host}:{udp}', target: '{host}:{udp_echo}'}}
- {{name: dns, protocol: dns, listen: '{host}:{dns}'}}
dns: {{servers: ['{host}:9'], hosts: {{name.test: 192.0.2.1}}}}
metrics: '{host}:{metrics}'
log: {{level: info, queue: {queue}}}
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


class Log:
    """A pipe as standard error, which is read from begin() on."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, 4096)
        self.lines: list[str] = []

    def begin(self) -> Task:
        os.close(self.write)
        return Task(self._collect)

    def _collect(self) -> None:
        with open(self._read, encoding="utf-8") as file:
            for line in file:
                assert line.endswith("\n")
                self.lines.append(line[:-1])

    def find(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    @property
    def dropped(self) -> int:
        """Return how many records were told to be missing."""
        return sum(int(found[1]) for line in self.lines if (found := REPORT.search(line)))


class Clients:
    """One client of each protocol.  Each makes one record when it ends."""

    def __init__(self, ports: dict[str, int], stack: ExitStack) -> None:
        self.echo = stack.enter_context(TcpEcho()).address
        self.udp_echo = stack.enter_context(UdpEcho()).address
        self.origin = stack.enter_context(HttpOrigin()).address
        self.server = LOOPBACK, ports["port"]
        self._ports = ports
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

    # -- connections

    def socks4(self) -> None:
        host, port = self.echo
        request = struct.pack("!BBH4sx", 4, 1, port, socket.inet_aton(host))
        with self._dial(request + PING) as sock:
            assert exactly(sock, 12)[8:] == PING

    def socks5(self) -> None:
        with self._dial(b"\5\1\0\5\1\0" + encode(self.echo) + PING) as sock:
            assert exactly(sock, 16)[12:] == PING

    def http_connect(self) -> None:
        with self._dial(b"CONNECT %s:%d HTTP/1.1\r\nHost: a\r\n\r\n" % _bytes(self.echo)) as sock:
            assert _head(sock).startswith(b"HTTP/1.1 200 ")
            sock.sendall(PING)
            assert exactly(sock, 4) == PING

    def http_forward(self) -> None:
        request = b"GET http://%s:%d/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        with self._dial(request % _bytes(self.origin)) as sock:
            assert _head(sock).startswith(b"HTTP/1.1 200 ")
            assert exactly(sock, 4) == PING

    def tcp_forward(self) -> None:
        with self._dial(PING, self._ports["tcp"]) as sock:
            assert exactly(sock, 4) == PING

    # -- datagrams

    def socks5_udp(self) -> None:
        with Association(self.server) as association:
            association.echo(self.udp_echo, PING)

    def connect_udp(self) -> None:
        target = Address(*self.udp_echo)
        with self._dial(connect_udp.encode_request(target, "a")) as sock:
            assert _head(sock).startswith(b"HTTP/1.1 101 ")
            datagram = capsule.datagram_header(len(PING)) + PING
            sock.sendall(datagram)
            assert exactly(sock, len(datagram)) == datagram

    def uot(self) -> None:
        request = uot.encode_request(uot.Request(True, Address(*self.udp_echo)))
        with self._dial(
            b"\5\1\0\5\1\0" + encode((uot.MAGIC, 0)) + request + b"\0\4" + PING
        ) as sock:
            assert exactly(sock, 12)[3] == 0
            assert exactly(sock, 6) == b"\0\4" + PING

    def many_datagrams(self) -> None:
        """Send DATAGRAMS through one association, through the udp listener, and to the dns one."""
        with (
            Association(self.server) as association,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        ):
            sock.settimeout(PATIENCE)
            for number in range(DATAGRAMS // BURST):
                for _ in range(BURST):
                    association.send(self.udp_echo, b"%d" % number)
                assert [association.receive()[0] for _ in range(BURST)] == [b"%d" % number] * BURST
                for listener, data in (("udp", PING), ("dns", DNS_QUERY)):
                    sock.sendto(data, (LOOPBACK, self._ports[listener]))
                    answer = sock.recv(512)
                    assert answer == PING or answer.endswith(socket.inet_aton("192.0.2.1"))

    def _dial(self, data: bytes, port: int = 0) -> socket.socket:
        sock = socket.create_connection((LOOPBACK, port or self.server[1]), PATIENCE)
        sock.sendall(data)
        return sock


def _bytes(where: Where) -> tuple[bytes, int]:
    return where[0].encode(), where[1]


def _head(sock: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += exactly(sock, 1)
    return head


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    for descriptor in (log._read, log.write):
        try:
            os.close(descriptor)
        except OSError:
            pass


@pytest.fixture
def clients() -> Iterator[Clients]:
    names = ("port", "tcp", "udp", "dns", "metrics")
    with ExitStack() as stack:
        yield Clients({name: free_port() for name in names}, stack)


def start(netproxyd: Start, clients: Clients, log: Log) -> Netproxyd:
    config = CONFIG.format(
        host=LOOPBACK,
        tcp_echo=clients.echo[1],
        udp_echo=clients.udp_echo[1],
        queue=QUEUE,
        **clients._ports,
    )
    port = clients.server[1]
    return netproxyd(config=config, port=port, log_read=False, stdout=log.write, stderr=log.write)


def dropped(clients: Clients) -> dict[str, int]:
    """Return what /metrics tells of dropped records, by level."""
    url = f"http://{LOOPBACK}:{clients._ports['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        text = answer.read().decode()
    found = re.findall(r'^netproxy_log_records_dropped_total\{reason="(\w+)"\} (\d+)$', text, re.M)
    return {level: int(number) for level, number in found}


def serve_all(clients: Clients) -> None:
    """Make CONNECTIONS connections of all protocols, and exchange datagrams meanwhile."""
    numbers = count()

    def work() -> None:
        while (number := next(numbers)) < CONNECTIONS:
            clients.all[number % len(clients.all)]()

    tasks = [Task(work) for _ in range(CLIENTS)] + [Task(clients.many_datagrams)]
    for task in tasks:
        task.result(PATIENCE)


def test_daemon_serves_while_nobody_reads_its_log(
    netproxyd: Start, clients: Clients, log: Log
) -> None:
    """Hazard 133: 10,000 connections and as many datagrams, on all protocols."""
    daemon = start(netproxyd, clients, log)
    serve_all(clients)
    wait_for(
        lambda: dropped(clients).get("info", 0) > CONNECTIONS // 2, PATIENCE, "dropped records"
    )
    assert daemon.answers(PATIENCE)
    reading = log.begin()
    wait_for(lambda: log.dropped, PATIENCE, "the report of what is missing")
    clients.socks5()
    wait_for(lambda: "upstream=direct sent=4" in log.lines[-1], PATIENCE, "a new record")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(PATIENCE) == 0
    reading.result(PATIENCE)
    assert log.find(" info netproxyd .* serves ") and log.lines[-1].endswith(" info stopped")
    # Those of the start and of answers(), the last one, the udp listener's and the association's.
    finished = CONNECTIONS + 5
    # Attempts before the end of the start have no upstream.
    assert len(log.find(" info msg=finished .* upstream=direct ")) + log.dropped == finished
    assert not log.find("Traceback|internal error|has died| error ")


def test_daemon_ends_although_nobody_reads_its_log(
    netproxyd: Start, clients: Clients, log: Log
) -> None:
    """Hazard 133."""
    daemon = start(netproxyd, clients, log)
    while not dropped(clients):
        for _ in range(QUEUE):
            clients.socks4()
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
        daemon.signal(number)
    assert daemon.wait(PATIENCE) == 0
    log.begin().result(PATIENCE)
