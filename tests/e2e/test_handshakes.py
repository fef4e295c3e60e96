"""A thousand clients that say nothing cost the daemon no thread, nor do those that it serves meanwhile."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, TcpEcho, exactly, socks5
from tests.e2e.support import LOOPBACK, Netproxyd, wait_for

pytestmark = pytest.mark.e2e

SILENT, LISTENERS, GOOD = 1000, 4, 50  # of each listener fewer than make room for others
CONFIG = "".join(
    [
        "listeners:\n",
        *[
            f"- {{name: l{number}, listen: '{LOOPBACK}:0', network: [tcp], limits: {{connections: 2000}}}}\n"
            for number in range(LISTENERS)
        ],
        "timeouts: {handshake: 60s}\n",
    ]
)


@pytest.fixture(scope="module")
def tcp_echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


def threads(daemon: Netproxyd) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/task"))


def test_silent_clients_and_those_served_meanwhile_take_no_thread(
    netproxyd: Start, tcp_echo: TcpEcho
) -> None:
    daemon = netproxyd(config=CONFIG)
    before = threads(daemon)
    with ExitStack() as stack:
        for number in range(SILENT):
            stack.enter_context(
                socket.create_connection((LOOPBACK, daemon.tcp_ports[number % LISTENERS]), 5)
            )
        for number in range(GOOD):
            control, _ = socks5(
                (LOOPBACK, daemon.tcp_ports[number % LISTENERS]), CONNECT, tcp_echo.address
            )
            stack.enter_context(control)
            control.sendall(b"%04d" % number)
            assert exactly(control, 4) == b"%04d" % number
        assert threads(daemon) == before
        status = daemon.status()
        assert (status["connections"], status["parked"], status["threads"]) == (
            SILENT + GOOD,
            SILENT + GOOD,
            0,
        )
    wait_for(lambda: daemon.status()["connections"] == 0, 5.0, "no connection left")
