"""Descriptors run out, or there are very many; nobody reads the log (HAZARDS 92, 93, 102)."""

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
from tests.e2e.support import ANY_PORT, LOOPBACK, Netproxyd, wait_for
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

FEW = 40  # descriptors
LOOK = 2.0  # seconds for which a starved daemon is watched
ACCEPTS_A_SECOND = 20
BUSY = 0.1  # of a processor
MANY = 600  # connections, two descriptors each


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
    """As many as may be had, for this process, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3 * MANY + 200:
        pytest.skip(f"only {hard} descriptors may be had")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def knock(daemon: Netproxyd, count: int, stack: ExitStack) -> None:
    """Connections that say nothing."""
    for _ in range(count):
        stack.enter_context(socket.create_connection(daemon.server, 5.0))


def test_no_descriptors_left(netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho) -> None:
    """It neither spins nor floods the log, and serves again as soon as it can (row 92)."""
    daemon = netproxyd("-l", ANY_PORT)
    before = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        sock = stack.enter_context(socks5(daemon.server, CONNECT, tcp_echo.address)[0])
        association = stack.enter_context(Association(daemon.server))
        association.echo(udp_echo.address, b"before")
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (FEW, before[1]))
        knock(daemon, 2 * FEW, stack)
        wait_for(lambda: daemon.lines("cannot accept"), 5.0, "it says that it cannot accept")
        counted, said, used = (
            daemon.status(),
            len(daemon.log.splitlines()),
            daemon.processor_seconds(),
        )
        time.sleep(LOOK)
        used = daemon.processor_seconds() - used
        said = len(daemon.log.splitlines()) - said
        failed = daemon.status()["accept_errors{EMFILE}"] - counted["accept_errors{EMFILE}"]
        echo(sock, b"still here")
        association.echo(udp_echo.address, b"still here")
    assert daemon.answers(), "within a second of the release"
    assert 0 < failed <= ACCEPTS_A_SECOND * (LOOK + 0.5)
    assert said <= LOOK
    assert used <= BUSY * LOOK
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, before)


def test_started_with_few_descriptors(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    """It takes no more connections than it has descriptors for; the others wait their turn."""
    daemon = netproxyd(
        "-l", ANY_PORT, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    )
    with ExitStack() as stack:
        sock, _ = socks5(daemon.server, CONNECT, tcp_echo.address)
        stack.enter_context(sock)
        association = stack.enter_context(Association(daemon.server))
        knock(daemon, 60, stack)
        used = daemon.processor_seconds()
        time.sleep(LOOK / 2)
        assert daemon.processor_seconds() - used <= BUSY * LOOK / 2
        echo(sock, b"still here")
        association.echo(udp_echo.address, b"still here")
        assert "accept_errors{EMFILE}" not in daemon.status()
    assert daemon.answers()


def test_soft_limit_is_raised(netproxyd: Start) -> None:
    """The soft limit of a login shell is no limit for a daemon (and select(2) is the reason why it exists)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    daemon = netproxyd(
        "-l", ANY_PORT, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    )
    assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_more_than_1100_descriptors(
    netproxyd: Start, many_descriptors: None, tcp_echo: TcpEcho, udp_echo: UdpEcho
) -> None:
    """Nothing uses select(2) (row 93): connections and datagrams work beyond its limit, and all are given back."""
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
        with serving() as origin, socket.create_connection(daemon.server, 5.0) as http:
            head = f"PUT {origin.url()} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
            http.sendall(head.encode())  # its body waits for two sockets at a time
            time.sleep(0.05)
            http.sendall(b"body")
            assert http.recv(100).startswith(b"HTTP/1.1 200 ")
            assert origin.seen[0].body == b"body"
        wait_for(lambda: daemon.status()["connections"] == MANY, 5.0, "only the many are left")
        used = daemon.processor_seconds()
        time.sleep(0.5)
        assert daemon.processor_seconds() - used <= 0.1, "idle connections cost nothing"


# -- the log


def test_log_on_a_full_disk(netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho) -> None:
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


def test_log_into_a_closed_pipe(netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho) -> None:
    """Whoever read the log has gone: SIGPIPE ends no daemon."""
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
def test_log_closed_from_the_start(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, closed: tuple[int, ...]
) -> None:
    """Nothing else may get a closed standard error's number: records of others would go to whatever has it."""
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
    """Records are made, and go nowhere else."""
    with ExitStack() as stack:
        flows = [
            stack.enter_context(socks5(daemon.server, CONNECT, tcp_echo.address)[0])
            for _ in range(5)
        ]
        association = stack.enter_context(Association(daemon.server))
        for _ in range(3):
            with socks5(daemon.server, CONNECT, tcp_echo.address)[0] as short:
                echo(short, b"a record is due")
            daemon.signal(signal.SIGUSR1)
            for sock in flows:
                echo(sock, b"still here")
            association.echo(udp_echo.address, b"still here")
        with socket.create_connection(daemon.server, 5.0) as nonsense:
            nonsense.sendall(b"\x99 nonsense\r\n\r\n")
            assert not re.search(rb"debug|info|warning", nonsense.recv(1000))
