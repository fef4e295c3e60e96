"""netproxyctl and netproxyd as processes: what the main thread does when another process asks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest

from tests.e2e.conftest import Start
from tests.e2e.support import Netproxyd, environment
from tests.support.sockets import SECONDS, read_exactly, server

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
LISTENERS = "listeners: [{listen: '127.0.0.1:0', name: main}]\n"
RELOADS = 30


@pytest.fixture
def control(tmp_path: Path) -> str:
    return str(tmp_path / "control")


@pytest.fixture
def ctl(control: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run netproxyctl."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from netproxy.cli import control_main; sys.exit(control_main())",
                "-s",
                control,
                *arguments,
            ],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_reload_waits_and_prints_all_errors(
    netproxyd: Start,
    tmp_path: Path,
    control: str,
    ctl: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Hazard 105."""
    daemon = netproxyd(config=f"control: unix:{control}\n{LISTENERS}")
    path = tmp_path / "netproxyd1.yaml"
    path.write_text(f"control: unix:{control}\n{LISTENERS}timeouts: {{connect: 3s}}\n")
    done = ctl("reload")
    assert (done.returncode, done.stdout, done.stderr) == (0, "reloaded\n", "")
    daemon.said("reloaded; serves")
    path.write_text(f"control: unix:{control}\nlistners: []\ntimeouts: {{conect: 3s}}\n")
    done = ctl("reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"netproxyctl: {path}:3:12: timeouts.conect: unknown key (did you mean 'connect'?)\n"
        f"netproxyctl: {path}:2:1: listners: unknown key (did you mean 'listeners'?)\n"
    )
    assert ctl("status").stdout.startswith("netproxyd ")


def test_reload_may_move_the_control_socket(
    netproxyd: Start,
    tmp_path: Path,
    control: str,
    ctl: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    netproxyd(config=f"control: unix:{control}\n{LISTENERS}")
    (tmp_path / "netproxyd1.yaml").write_text(f"control: unix:{control}2\n{LISTENERS}")
    assert ctl("reload").returncode == 0
    assert ctl("status").returncode == 3
    assert ctl("-s", control + "2", "status").returncode == 0


def test_reloads_by_signal_and_command_break_no_flow(
    netproxyd: Start, control: str, ctl: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Hazard 106."""
    daemon: Netproxyd = netproxyd(
        config=f"control: unix:{control}\nmetrics: 127.0.0.1:0\n{LISTENERS}"
    )

    def script(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with server(script) as target, socket.create_connection(daemon.server, SECONDS) as client:
        client.sendall(b"CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n" % str(target).encode())
        assert read_exactly(client, 39).startswith(b"HTTP/1.1 200 ")
        # The parent of workers has then asked them, which takes threads.
        daemon.status()
        before = daemon.descriptors()
        threads = len(os.listdir(f"/proc/{daemon.process.pid}/task"))
        for _ in range(RELOADS):
            daemon.signal(signal.SIGHUP)
            assert ctl("reload").returncode == 0
            client.sendall(b"ping")
            assert read_exactly(client, 4) == b"ping"
        deadline = time.monotonic() + SECONDS
        while (
            daemon.descriptors() > before
            or len(os.listdir(f"/proc/{daemon.process.pid}/task")) > threads + 2
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_drain_lets_running_connections_finish(
    netproxyd: Start, control: str, ctl: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    daemon = netproxyd(config=f"control: unix:{control}\n{LISTENERS}")

    def script(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with server(script) as target, socket.create_connection(daemon.server, SECONDS) as client:
        client.sendall(b"CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n" % str(target).encode())
        assert read_exactly(client, 39).startswith(b"HTTP/1.1 200 ")
        done = ctl("drain")
        assert (done.returncode, done.stdout) == (0, "draining: 1 connections may finish\n")
        daemon.said("stopping: 1 connections may finish")
        assert "is draining" in ctl("status").stdout
        client.sendall(b"ping")
        assert read_exactly(client, 4) == b"ping"
    assert daemon.wait(SECONDS) == 0
