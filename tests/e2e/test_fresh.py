"""A fresh checkout with nothing installed: the standard library alone, no site-packages."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, echo, socks5
from tests.e2e.support import ANY_PORT, LOOPBACK, ROOT, run_netproxyd
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

BARE = (sys.executable, "-S")
RESIDENT_LIMIT = 24 << 20  # bytes of an idle daemon


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a checkout has, and nobody has run yet."""
    shutil.copytree(
        ROOT / "netproxy",
        tmp_path / "checkout" / "netproxy",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path / "checkout"


def test_serves_with_nothing_installed(netproxyd: Start, tree: Path) -> None:
    port = free_port()
    daemon = netproxyd("-l", f"sps://{LOOPBACK}:{port}", python=BARE, cwd=tree)
    assert daemon.port == port
    with TcpEcho() as tcp, UdpEcho() as udp:
        with socks5(daemon.server, CONNECT, tcp.address)[0] as sock:
            echo(sock, b"hello")
        with Association(daemon.server) as association:
            assert association.bound == (LOOPBACK, port)
            assert association.echo(udp.address, b"hello") == (udp.address, association.bound)


def test_one_line_says_what_listens(netproxyd: Start, tree: Path) -> None:
    daemon = netproxyd("-l", ANY_PORT, python=BARE, cwd=tree)
    assert daemon.listens == [("udp", LOOPBACK, daemon.port), ("tcp", LOOPBACK, daemon.port)]
    assert len(daemon.log.splitlines()) == 1


def test_memory_when_idle(netproxyd: Start, tree: Path) -> None:
    daemon = netproxyd("-l", ANY_PORT, python=BARE, cwd=tree)
    resident = daemon.resident_bytes()
    print(f"netproxyd idle: {resident / (1 << 20):.1f} MiB resident")
    assert resident < RESIDENT_LIMIT


def test_a_file_needs_yaml_and_says_so(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "netproxyd.yaml"
    file.write_text("listeners: []\n")
    status, said = run_netproxyd("-c", str(file), flags=("-S",), cwd=tree)
    assert status == 78
    assert len(said.splitlines()) == 1 and "PyYAML" in said


def test_help_and_version(tree: Path) -> None:
    assert run_netproxyd("-V", flags=("-S",), cwd=tree)[0] == 0
    status, said = run_netproxyd("--help", flags=("-S",), cwd=tree)
    assert status == 0 and "sps://127.0.0.1:1080" in said
