"""netproxyd in a fresh checkout, with nothing but the standard library."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, echo, socks5
from tests.e2e.support import ANY_PORT, LOOPBACK, PROCESSES, ROOT, run_netproxyd
from tests.support.ports import reserve_port

pytestmark = pytest.mark.e2e

BARE = (sys.executable, "-S")
# Bytes of resident memory of an idle daemon.
RESIDENT_LIMIT = 24 << 20


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package without bytecode."""
    shutil.copytree(
        ROOT / "netproxy",
        tmp_path / "checkout" / "netproxy",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path / "checkout"


def test_daemon_serves_without_installed_packages(netproxyd: Start, tree: Path) -> None:
    with reserve_port() as port:
        listen = f"sps://{LOOPBACK}:{port.release()}"
    daemon = netproxyd("-l", listen, python=BARE, cwd=tree)
    assert daemon.port == port.number
    with TcpEcho() as tcp, UdpEcho() as udp:
        with socks5(daemon.server, CONNECT, tcp.address)[0] as sock:
            echo(sock, b"hello")
        with Association(daemon.server) as association:
            assert association.bound == (LOOPBACK, port.number)
            assert association.echo(udp.address, b"hello") == (udp.address, association.bound)


def test_daemon_logs_one_line_with_its_listeners(netproxyd: Start, tree: Path) -> None:
    daemon = netproxyd("-l", ANY_PORT, python=BARE, cwd=tree)
    assert daemon.listens == [("udp", LOOPBACK, daemon.port), ("tcp", LOOPBACK, daemon.port)]
    assert len(daemon.log.splitlines()) == 1


@pytest.mark.skipif(PROCESSES > 1, reason="the limit is that of a daemon without workers")
def test_idle_daemon_needs_little_memory(netproxyd: Start, tree: Path) -> None:
    daemon = netproxyd("-l", ANY_PORT, python=BARE, cwd=tree)
    resident = daemon.resident_bytes()
    print(f"netproxyd idle: {resident / (1 << 20):.1f} MiB resident")
    assert resident < RESIDENT_LIMIT


@pytest.mark.any_workers
def test_configuration_file_without_yaml_is_a_clear_error(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "netproxyd.yaml"
    file.write_text("listeners: []\n")
    status, said = run_netproxyd("-c", str(file), flags=("-S",), cwd=tree)
    assert status == 78
    assert len(said.splitlines()) == 1 and "PyYAML" in said


@pytest.mark.any_workers
def test_help_and_version_need_no_packages(tree: Path) -> None:
    assert run_netproxyd("-V", flags=("-S",), cwd=tree)[0] == 0
    status, said = run_netproxyd("--help", flags=("-S",), cwd=tree)
    assert status == 0 and "sps://127.0.0.1:1080" in said
