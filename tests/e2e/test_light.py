"""A daemon on a Python without the packages that small distributions split off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, echo, socks5

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]
LIGHT = Path(__file__).resolve().parents[1] / "support" / "light.py"


def test_daemon_runs_with_the_modules_of_python3_light(netproxyd: Start) -> None:
    """Without a file, as the options of the init script start it: TCP and UDP, by two protocols."""
    python = (sys.executable, str(LIGHT))
    daemon = netproxyd("-l", "sps://127.0.0.1:0", python=python)
    assert "Traceback" not in daemon.log
    with TcpEcho() as tcp, UdpEcho() as udp, Association(daemon.server) as client:
        sock, _ = socks5(daemon.server, CONNECT, tcp.address)
        with sock:
            echo(sock, b"hello")
        assert client.echo(udp.address, b"hello") == (udp.address, client.bound)
