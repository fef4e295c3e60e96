"""netproxyd under a service manager: notifications, the watchdog and socket activation."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator

import pytest

from tests.support.ports import reserve_port

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0


class Managed:
    """A daemon, and the socket to which it sends its notifications."""

    def __init__(self, process: subprocess.Popen[str], manager: socket.socket) -> None:
        self.process = process
        self._manager = manager

    def said(self, wanted: str) -> dict[str, str]:
        """Return the next message that has a field of this name."""
        while True:
            fields = dict(
                line.split("=", 1) for line in self._manager.recv(4000).decode().splitlines()
            )
            if wanted in fields:
                return fields


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[Managed]:
    with managed_daemon(tmp_path, 1) as daemon:
        yield daemon


@contextlib.contextmanager
def managed_daemon(tmp_path: Path, workers: int) -> Iterator[Managed]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(SECONDS)
        process = subprocess.Popen(
            [sys.executable, "-m", "netproxy", "-l", "sps://127.0.0.1:0", "-w", str(workers)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "RUNTIME_DIRECTORY": str(tmp_path),
                "WATCHDOG_USEC": "200000",
            },
        )
        try:
            yield Managed(process, manager)
        finally:
            process.kill()
            process.communicate()


def test_daemon_notifies_readiness_watchdog_reload_and_stop(managed: Managed) -> None:
    assert "serves" in managed.said("READY")["STATUS"]
    for _ in range(3):
        assert managed.said("WATCHDOG") == {"WATCHDOG": "1"}
    managed.process.send_signal(signal.SIGHUP)
    assert managed.said("RELOADING")["MONOTONIC_USEC"].isdigit()
    assert managed.said("READY")["STATUS"].startswith("serves ")
    managed.process.terminate()
    # 30 s to drain and 15 s to end.
    assert managed.said("STOPPING")["EXTEND_TIMEOUT_USEC"] == "45000000"
    assert managed.process.wait(SECONDS) == 0


def test_daemon_ended_by_its_watchdog_prints_the_stacks_of_its_threads(managed: Managed) -> None:
    managed.said("WATCHDOG")
    managed.process.send_signal(signal.SIGABRT)
    _, err = managed.process.communicate(timeout=SECONDS)
    assert managed.process.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in err and " in _wait" in err


def test_worker_ended_by_the_watchdog_prints_the_stacks_of_its_threads(tmp_path: Path) -> None:
    with managed_daemon(tmp_path, 2) as managed:
        managed.said("WATCHDOG")
        pid = managed.process.pid
        worker = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(worker, signal.SIGABRT)
        error = managed.process.stderr
        assert error is not None
        lines: list[str] = []
        while "has died (SIGABRT)" not in (line := error.readline()):
            assert line
            lines.append(line)
        managed.process.terminate()
        assert managed.process.wait(SECONDS) == 0
    printed = "".join(lines)
    assert "Fatal Python error: Aborted" in printed and " in _obey" in printed


# Moves the sockets to the descriptors that a service manager uses, and becomes the daemon.
LAUNCH = """import os, sys
for number, descriptor in enumerate(sys.argv[1].split(",")):
    os.dup2(int(descriptor), 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="main:main")
listen = "sps://systemd:main?clients=127.0.0.0/8"
os.execv(sys.executable, [sys.executable, "-m", "netproxy", "-l", listen])
"""


@contextlib.contextmanager
def activated(*sockets: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """Run a daemon with these sockets, and wait until it is ready.

    The sockets are passed at high descriptors, so that LAUNCH overwrites none of them.
    """
    high = [os.dup2(sock.fileno(), 150 + number) for number, sock in enumerate(sockets)]
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(f"{folder}/notify")
        manager.settimeout(SECONDS)
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, ",".join(map(str, high))],
            cwd=ROOT,
            pass_fds=high,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify", "RUNTIME_DIRECTORY": folder},
        )
        try:
            assert b"READY=1" in manager.recv(4000)
            yield process
        finally:
            process.kill()
            process.communicate()
            for descriptor in high:
                os.close(descriptor)


def is_greeted(sock: socket.socket) -> bool:
    """Send a SOCKS5 greeting. Return True if it is answered."""
    sock.sendall(b"\x05\x01\x00")
    return sock.recv(2) == b"\x05\x00"


def test_restart_with_socket_activation_refuses_no_client() -> None:
    """Hazard 107. A client that connects between two daemons is served by the second."""
    address = "127.0.0.1", reserve_port().release()
    with socket.create_server(address) as stream, socket.socket(type=socket.SOCK_DGRAM) as datagram:
        datagram.bind(address)
        for number in range(2):
            if number:
                waiting = socket.create_connection(stream.getsockname(), SECONDS)
            with activated(stream, datagram) as process:
                if number:
                    with waiting:
                        assert is_greeted(waiting)
                with socket.create_connection(stream.getsockname(), SECONDS) as client:
                    assert is_greeted(client)
                    # UDP ASSOCIATE.
                    client.sendall(b"\x05\x03\x00\x01" + bytes(6))
                    assert client.recv(10)[:2] == b"\x05\x00"
                # A reload keeps the sockets.
                process.send_signal(signal.SIGHUP)
                with socket.create_connection(stream.getsockname(), SECONDS) as client:
                    assert is_greeted(client)
                process.terminate()
                assert process.wait(SECONDS) == 0


def test_socket_name_that_was_not_passed_is_an_error_with_status_69() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "netproxy", "-l", "sps://systemd:main?clients=127.0.0.0/8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert process.returncode == 69
    assert (
        "udp systemd:main: expected one activation socket of this name, found 0 (available: none)"
        in process.stderr
    )
