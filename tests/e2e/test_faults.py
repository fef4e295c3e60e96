"""Too few descriptors, very many descriptors, and a log that cannot be written."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import serving
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, echo, socks5
from tests.e2e.support import ANY_PORT, LOOPBACK, PROCESSES, SECONDS, Netproxyd, wait_for
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

# Descriptors of a starved daemon.
FEW = 40
# Failed accepts while two clients get an answer. A daemon that does not pause after each of them
# makes some 100,000 a second.
FAILED_ACCEPTS = 1_000
# Connections with two descriptors each: more than select(2) can watch.
MANY = 600


@pytest.fixture
def tcp_echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


@pytest.fixture
def udp_echo() -> Iterator[UdpEcho]:
    with UdpEcho() as server:
        yield server


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Raise the limit of descriptors of this process and of those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3 * MANY + 200:
        pytest.skip(f"the limit of descriptors is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect_silently(daemon: Netproxyd, count: int, stack: ExitStack) -> None:
    """Open connections that send nothing."""
    for _ in range(count):
        stack.enter_context(socket.create_connection(daemon.server, SECONDS))


def test_daemon_without_free_descriptors_pauses_and_serves_again_later(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    """Hazard 92. It has no busy loop, logs one line, and running connections continue."""
    daemon = netproxyd("-l", ANY_PORT)
    serving = daemon.workers() or daemon.processes()
    before = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        sock = stack.enter_context(socks5(daemon.server, CONNECT, tcp_echo.address)[0])
        association = stack.enter_context(Association(daemon.server))
        association.echo(udp_echo.address, b"before")
        for pid in serving:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (FEW, before[1]))
        connect_silently(daemon, 2 * FEW * PROCESSES, stack)
        daemon.said("cannot accept", PROCESSES)
        failed = failed_accepts(daemon)
        echo(sock, b"still here")
        association.echo(udp_echo.address, b"still here")
        assert failed_accepts(daemon) - failed <= FAILED_ACCEPTS * PROCESSES
        wait_for(lambda: failed_accepts(daemon) > failed, SECONDS, "another failed accept")
        daemon.check_idle()
        assert len(daemon.lines("cannot accept")) == PROCESSES
    assert daemon.answers()
    for pid in serving:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def failed_accepts(daemon: Netproxyd) -> int:
    """Return how often accept() has failed for lack of descriptors."""
    return daemon.status()["accept_errors{EMFILE}"]


def test_daemon_with_few_descriptors_lets_clients_wait(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    """It accepts no more connections than it has descriptors for, and has no busy loop."""
    daemon = netproxyd(
        "-l", ANY_PORT, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    )
    with ExitStack() as stack:
        sock, _ = socks5(daemon.server, CONNECT, tcp_echo.address)
        stack.enter_context(sock)
        association = stack.enter_context(Association(daemon.server))
        connect_silently(daemon, 60, stack)
        daemon.check_idle()
        echo(sock, b"still here")
        association.echo(udp_echo.address, b"still here")
        assert "accept_errors{EMFILE}" not in daemon.status()
    assert daemon.answers()


def test_daemon_raises_its_soft_limit_of_descriptors(netproxyd: Start) -> None:
    """The soft limit protects programs that use select(2). netproxyd does not."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    daemon = netproxyd(
        "-l", ANY_PORT, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    )
    assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_connections_and_datagrams_work_with_more_than_1100_descriptors(
    netproxyd: Start, many_descriptors: None, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    """Hazard 93. Nothing uses select(2), and all descriptors are closed afterwards."""
    daemon = netproxyd("-l", ANY_PORT)
    with ExitStack() as stack:
        flows = [
            stack.enter_context(socks5(daemon.server, CONNECT, tcp_echo.address)[0])
            for _ in range(MANY)
        ]
        assert daemon.descriptors() > 1100
        for sock in (flows[0], flows[MANY // 2], *flows[-10:]):
            echo(sock, os.urandom(5000))
        with Association(daemon.server) as association:
            association.echo(udp_echo.address, b"beyond the limit")
            association.echo(("localhost", udp_echo.address[1]), b"and by name")
        with serving() as origin, socket.create_connection(daemon.server, SECONDS) as http:
            head = f"PUT {origin.url()} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
            # The daemon waits for the body and for the origin's answer at the same time.
            http.sendall(head.encode())
            time.sleep(0.05)
            http.sendall(b"body")
            assert http.recv(100).startswith(b"HTTP/1.1 200 ")
            assert origin.seen[0].body == b"body"
        wait_for(lambda: daemon.status()["connections"] == MANY, SECONDS, "only the idle ones left")
        daemon.check_idle()


# -- the log


def test_daemon_serves_while_its_log_is_on_a_full_disk(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    """Hazard 102."""
    port = free_port()
    with open("/dev/full", "wb") as full:
        daemon = netproxyd(
            "-v",
            "-l",
            f"sps://{LOOPBACK}:{port}",
            port=port,
            log_read=False,
            stdout=full,
            stderr=full,
        )
    _works(daemon, tcp_echo, udp_echo)


def test_daemon_serves_when_the_reader_of_its_log_has_gone(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    """Hazards 102, 108. SIGPIPE does not end the daemon."""
    port = free_port()
    reader, writer = os.pipe()
    os.close(reader)
    try:
        daemon = netproxyd(
            "-v",
            "-l",
            f"sps://{LOOPBACK}:{port}",
            port=port,
            log_read=False,
            stdout=writer,
            stderr=writer,
        )
    finally:
        os.close(writer)
    _works(daemon, tcp_echo, udp_echo)


@pytest.mark.parametrize("closed", ((2,), (0, 1, 2)), ids=str)
def test_daemon_started_with_closed_standard_error_serves(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, closed: tuple[int, ...]
) -> None:
    """Hazard 102. The closed numbers are opened as /dev/null.

    Otherwise a socket could get the number, and log lines would be sent to a client.
    """
    port = free_port()

    def close() -> None:
        for number in closed:
            os.close(number)

    daemon = netproxyd(
        "-v",
        "-l",
        f"sps://{LOOPBACK}:{port}",
        port=port,
        log_read=False,
        preexec_fn=close,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert {number: _open_as(daemon, number) for number in closed} == dict.fromkeys(
        closed, os.devnull
    )
    _works(daemon, tcp_echo, udp_echo)


def _open_as(daemon: Netproxyd, number: int) -> str:
    try:
        return os.readlink(f"/proc/{daemon.process.pid}/fd/{number}")
    except FileNotFoundError:
        return ""


def _works(daemon: Netproxyd, tcp_echo: TcpEcho, udp_echo: UdpEcho) -> None:
    """Check that clients are served, and that none of them receives log records."""
    with ExitStack() as stack:
        flows = [
            stack.enter_context(socks5(daemon.server, CONNECT, tcp_echo.address)[0])
            for _ in range(5)
        ]
        association = stack.enter_context(Association(daemon.server))
        for _ in range(3):
            with socks5(daemon.server, CONNECT, tcp_echo.address)[0] as short:
                echo(short, b"its end is logged")
            daemon.signal(signal.SIGUSR1)
            for sock in flows:
                echo(sock, b"still here")
            association.echo(udp_echo.address, b"still here")
        with socket.create_connection(daemon.server, SECONDS) as invalid:
            invalid.sendall(b"\x99 no protocol\r\n\r\n")
            assert not re.search(rb"debug|info|warning", invalid.recv(1000))
