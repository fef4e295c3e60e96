"""A thousand silent clients hold no thread, nor do the clients that are served meanwhile."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, TcpEcho, exactly, socks5
from tests.e2e.support import LOOPBACK, SECONDS, wait_for

pytestmark = pytest.mark.e2e

# With four listeners, none has so many handshaking connections that it sheds the oldest.
SILENT, LISTENERS, GOOD = 1000, 4, 50
LISTENER = "{{name: l{}, listen: '127.0.0.1:0', network: [tcp], limits: {{connections: 2000}}}}"
CONFIG = f"""
listeners: [{", ".join(LISTENER.format(number) for number in range(LISTENERS))}]
timeouts: {{handshake: 300s}}
"""


@pytest.fixture(scope="module")
def tcp_echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


def test_silent_clients_and_idle_relays_hold_no_thread(netproxyd: Start, tcp_echo: TcpEcho) -> None:
    daemon = netproxyd(config=CONFIG)
    before = daemon.threads_at_rest()
    with ExitStack() as stack:
        for number in range(SILENT):
            stack.enter_context(
                socket.create_connection((LOOPBACK, daemon.tcp_ports[number % LISTENERS]), SECONDS)
            )
        for number in range(GOOD):
            control, _ = socks5(
                (LOOPBACK, daemon.tcp_ports[number % LISTENERS]), CONNECT, tcp_echo.address
            )
            stack.enter_context(control)
            control.sendall(b"%04d" % number)
            assert exactly(control, 4) == b"%04d" % number
        assert daemon.threads() == before
        all_wait = {"connections": SILENT + GOOD, "parked": SILENT + GOOD, "threads": 0}
        wait_for(
            lambda: all_wait.items() <= daemon.status().items(), SECONDS, "all wait, no thread does"
        )
    wait_for(lambda: daemon.status()["connections"] == 0, SECONDS, "no connection left")
