"""Clients that do not finish their handshake do not delay others, and are closed in the end."""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress
from typing import Any, Callable, Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import HELLO, Origin, serving
from tests.e2e.peers import (
    CONNECT,
    REPLY_SECONDS,
    Association,
    TcpEcho,
    UdpEcho,
    echo,
    exactly,
    socks5,
)
from tests.e2e.support import LOOPBACK, SECONDS, SPARE_DESCRIPTORS, Netproxyd, wait_for
from tests.support.certificates import Certificates, certificates

pytestmark = pytest.mark.e2e

UNFINISHED, GOOD, DRIPPING = 1000, 50, 200
# Seconds of `timeouts.handshake`: one that no test meets, and one that a test waits for.
LONG, SHORT = 300, 3
# The limit of a wait for the end of all unfinished clients.
GONE_SECONDS = 60.0
# Seconds between two bytes of a client that drips.
DRIP = 0.25
# The limit of a wait for the end of idle threads, which takes ten seconds.
IDLE_SECONDS = 60.0
# MiB of resident memory that a first burst may leave. What the clients hold meanwhile is twice
# as much.
KEPT_MIB = 10.0
# Threads of the pools that good clients have started, and that may still be idle.
SPARE_THREADS = 4
PLAIN, TLS = 0, 1
# Which listener a client connects to, and what it sends before it falls silent.
BEGINNINGS = (
    (PLAIN, b""),
    (PLAIN, b"\5"),
    (PLAIN, b"\5\2\0"),
    (PLAIN, b"\5\1\0\5\1\0\3\x0bexam"),
    (PLAIN, b"\4"),
    (PLAIN, b"\4\1\0\x50\x7f\0\0\1nobody"),
    (PLAIN, b"\4\1\0\x50\0\0\0\1me\0exam"),
    (PLAIN, b"G"),
    (PLAIN, b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: 127.0.0.1\r\nX-"),
    (PLAIN, b"CONNECT 127.0.0.1:80 HT"),
    (TLS, b""),
    (TLS, b"\x16\3\1\2\0"),
    (TLS, b"\x16\3\1\2\0\1\0\1\xfc\3\3" + bytes(100)),
)
CONFIG = """
listeners:
- {{name: plain, listen: "127.0.0.1:0", limits: {{connections: 2000}}}}
- {{name: tls, listen: "127.0.0.1:0", limits: {{connections: 2000}}, tls: {tls}}}
timeouts: {{handshake: {handshake}s}}
"""

Daemon = Callable[[int], Netproxyd]


@pytest.fixture(scope="module")
def files() -> Certificates:
    return certificates()


@pytest.fixture
def daemon_with(netproxyd: Start, files: Certificates) -> Daemon:
    """Return a function that starts a daemon with so many seconds for a handshake."""

    def start(handshake: int) -> Netproxyd:
        config = CONFIG.format(tls=files.listener(), handshake=handshake)
        return netproxyd(config=config)

    return start


@pytest.fixture(scope="module")
def tcp_echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


@pytest.fixture(scope="module")
def udp_echo() -> Iterator[UdpEcho]:
    with UdpEcho() as server:
        yield server


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


class UnfinishedClients:
    """Connections that have sent the beginning of a handshake. `closed` counts those that ended."""

    def __init__(self, daemon: Netproxyd) -> None:
        self._daemon = daemon
        self._poll = select.epoll()
        self._open: dict[int, socket.socket] = {}
        self.closed = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, number: int) -> None:
        """Connect one more client, with the next beginning."""
        listener, beginning = BEGINNINGS[number % len(BEGINNINGS)]
        address = self._daemon.host, self._daemon.tcp_ports[listener]
        sock = socket.create_connection(address, REPLY_SECONDS)
        self._open[sock.fileno()] = sock
        self._poll.register(sock, select.EPOLLIN)
        # The daemon may have closed it already, to make room for a later client.
        with suppress(OSError):
            sock.sendall(beginning)

    def look(self, seconds: float) -> None:
        """Find the clients that the daemon has closed. Wait at most `seconds` for the first."""
        for descriptor, _ in self._poll.poll(seconds):
            sock = self._open[descriptor]
            if has_ended(sock):
                self._poll.unregister(descriptor)
                del self._open[descriptor]
                self.closed += 1
                sock.close()

    def wait_until_gone(self) -> None:
        """Wait until the daemon has closed all of them."""
        deadline = time.monotonic() + GONE_SECONDS
        while self._open:
            assert time.monotonic() < deadline, f"{len(self)} clients are not closed"
            self.look(1)

    def drip(self) -> None:
        """Send one more byte from each client, which completes no handshake."""
        for sock in self._open.values():
            with suppress(OSError):
                sock.send(b"x")

    def __enter__(self) -> UnfinishedClients:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._open.values():
            sock.close()
        self._poll.close()


def has_ended(sock: socket.socket) -> bool:
    """Receive from a readable socket. Return True if the connection has ended."""
    try:
        return sock.recv(4096) == b""
    except ConnectionError:
        return True


# -- good clients


def by_socks(daemon: Netproxyd, tcp_echo: TcpEcho, **_: Any) -> None:
    """A SOCKS5 client."""
    with socks5(daemon.server, CONNECT, tcp_echo.address)[0] as sock:
        echo(sock, b"hello")


def by_udp(daemon: Netproxyd, udp_echo: UdpEcho, **_: Any) -> None:
    """A UDP client."""
    with Association(daemon.server) as association:
        association.echo(udp_echo.address, b"hello")


def by_http(daemon: Netproxyd, origin: Origin, **_: Any) -> None:
    """An HTTP client."""
    with socket.create_connection(daemon.server, REPLY_SECONDS) as sock:
        get(sock, origin)


def by_tls(daemon: Netproxyd, origin: Origin, files: Certificates, **_: Any) -> None:
    """An HTTP client with TLS to the proxy."""
    address = daemon.host, daemon.tcp_ports[TLS]
    with socket.create_connection(address, REPLY_SECONDS) as sock, files.secure(sock) as secure:
        get(secure, origin)


def get(sock: socket.socket, origin: Origin) -> None:
    """Send a GET and check the answer."""
    sock.sendall(f"GET {origin.url()} HTTP/1.1\r\nHost: {LOOPBACK}:{origin.port}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += exactly(sock, 1)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert exactly(sock, len(HELLO)) == HELLO


GOOD_CLIENTS = (by_socks, by_http, by_tls, by_udp)


class Usage:
    """The resources that a daemon uses now."""

    def __init__(self, daemon: Netproxyd) -> None:
        self.threads = daemon.threads()
        self.descriptors = daemon.descriptors()
        self.mib = daemon.resident_bytes() / (1 << 20)

    def __repr__(self) -> str:
        return f"{self.threads} threads, {self.descriptors} descriptors, {self.mib:.1f} MiB"

    def is_like(self, before: Usage) -> bool:
        """Return True if nothing has been kept since `before`, except what may be kept."""
        return (
            self.threads <= before.threads + SPARE_THREADS
            and self.descriptors <= before.descriptors + SPARE_DESCRIPTORS
            and self.mib <= before.mib + KEPT_MIB
        )


def check_usage(daemon: Netproxyd, before: Usage) -> None:
    """Wait until the daemon has no connection and uses no more than before."""
    wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "no connection left")
    with suppress(AssertionError):
        wait_for(lambda: Usage(daemon).is_like(before), IDLE_SECONDS, "")
    after = Usage(daemon)
    print(f"before: {before}; afterwards: {after}")
    assert after.is_like(before), f"before: {before}; afterwards: {after}"


# -- the tests


def test_clients_are_served_while_a_thousand_handshakes_are_unfinished(
    daemon_with: Daemon, tcp_echo: TcpEcho, udp_echo: UdpEcho, origin: Origin, files: Certificates
) -> None:
    """Hazards 2, 69 and 119. Nothing is left when the unfinished clients have gone."""
    daemon = daemon_with(LONG)
    peers = {
        "daemon": daemon,
        "tcp_echo": tcp_echo,
        "udp_echo": udp_echo,
        "origin": origin,
        "files": files,
    }
    # Threads and memory that the first client of each kind needs are no leak.
    for client in GOOD_CLIENTS:
        client(**peers)
    # The parent of workers has then asked them, which takes threads.
    daemon.status()
    before = Usage(daemon)
    with UnfinishedClients(daemon) as unfinished:
        for number in range(UNFINISHED):
            unfinished.add(number)
        for number in range(GOOD):
            GOOD_CLIENTS[number % len(GOOD_CLIENTS)](**peers)
        unfinished.look(0)
        assert len(unfinished) >= GOOD
        print(f"{len(unfinished)} unfinished clients: {Usage(daemon)}")
    check_usage(daemon, before)


def test_unfinished_clients_are_closed_at_the_deadline(
    daemon_with: Daemon, tcp_echo: TcpEcho
) -> None:
    """Hazards 2, 69 and 119."""
    daemon = daemon_with(SHORT)
    with UnfinishedClients(daemon) as unfinished:
        for number in range(UNFINISHED):
            unfinished.add(number)
        unfinished.wait_until_gone()
        assert unfinished.closed == UNFINISHED
    wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "no connection left")
    by_socks(daemon, tcp_echo)


def test_dripping_clients_are_closed_at_the_deadline_of_the_whole_handshake(
    daemon_with: Daemon, tcp_echo: TcpEcho
) -> None:
    """Hazards 1 and 69. A client that sends a byte now and then gets no more time."""
    daemon = daemon_with(SHORT)
    rounds = 0
    deadline = time.monotonic() + GONE_SECONDS
    with UnfinishedClients(daemon) as unfinished:
        for number in range(DRIPPING):
            unfinished.add(number)
        while len(unfinished):
            assert time.monotonic() < deadline, f"{len(unfinished)} clients are not closed"
            unfinished.drip()
            by_socks(daemon, tcp_echo)
            time.sleep(DRIP)
            unfinished.look(0)
            rounds += 1
        assert unfinished.closed == DRIPPING
    assert rounds > 1
