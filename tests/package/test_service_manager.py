"""netproxyd as a process under a service manager: what it is told, and when."""

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

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30.0


class Managed:
    def __init__(self, process: subprocess.Popen[str], manager: socket.socket) -> None:
        self.process = process
        self._manager = manager

    def said(self, wanted: str) -> dict[str, str]:
        """The first message from now on with a field of this name."""
        while True:
            fields = dict(
                line.split("=", 1) for line in self._manager.recv(4000).decode().splitlines()
            )
            if wanted in fields:
                return fields


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[Managed]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(SECONDS)
        process = subprocess.Popen(
            [sys.executable, "-m", "netproxy", "-l", "sps://127.0.0.1:0"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "WATCHDOG_USEC": "200000",
            },
        )
        try:
            yield Managed(process, manager)
        finally:
            process.kill()
            process.communicate()


def test_readiness_life_reload_and_end(managed: Managed) -> None:
    assert "serves" in managed.said("READY")["STATUS"]
    for _ in range(3):
        assert managed.said("WATCHDOG") == {"WATCHDOG": "1"}
    managed.process.send_signal(signal.SIGHUP)
    assert managed.said("RELOADING")["MONOTONIC_USEC"].isdigit()
    assert managed.said("READY")["STATUS"].startswith("serves ")
    managed.process.terminate()
    assert managed.said("STOPPING")["EXTEND_TIMEOUT_USEC"] == "45000000"  # 30 s to drain, 15 to end
    assert managed.process.wait(SECONDS) == 0


def test_ended_by_its_watchdog_it_says_what_its_threads_did(managed: Managed) -> None:
    managed.said("WATCHDOG")
    managed.process.send_signal(signal.SIGABRT)
    _, err = managed.process.communicate(timeout=SECONDS)
    assert managed.process.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in err and " in _wait" in err


# becomes the daemon, with the sockets where a service manager would have put them
LAUNCH = """import os, sys
for number, descriptor in enumerate(sys.argv[1].split(",")):
    os.dup2(int(descriptor), 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="main:main")
os.execv(sys.executable, [sys.executable, "-m", "netproxy", "-l", "sps://systemd:main?clients=127.0.0.0/8"])
"""


@contextlib.contextmanager
def activated(*sockets: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """A daemon by sockets of ours, ready; the sockets are at descriptors that the launcher's moves cannot meet."""
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
            env={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"},
        )
        try:
            assert b"READY=1" in manager.recv(4000)
            yield process
        finally:
            process.kill()
            process.communicate()
            for descriptor in high:
                os.close(descriptor)


def greets(sock: socket.socket) -> bool:
    sock.sendall(b"\x05\x01\x00")
    return sock.recv(2) == b"\x05\x00"


def test_nobody_is_refused_between_one_daemon_and_the_next() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as stream,
        socket.socket(type=socket.SOCK_DGRAM) as datagram,
    ):
        datagram.bind(stream.getsockname())
        for number in range(2):
            if number:  # while none is there
                waiting = socket.create_connection(stream.getsockname(), SECONDS)
            with activated(stream, datagram) as process:
                if number:
                    with waiting:
                        assert greets(waiting)
                with socket.create_connection(stream.getsockname(), SECONDS) as client:
                    assert greets(client)
                    client.sendall(b"\x05\x03\x00\x01" + bytes(6))  # UDP ASSOCIATE
                    assert client.recv(10)[:2] == b"\x05\x00"
                process.send_signal(signal.SIGHUP)  # keeps them
                with socket.create_connection(stream.getsockname(), SECONDS) as client:
                    assert greets(client)
                process.terminate()
                assert process.wait(SECONDS) == 0


def test_a_name_that_was_not_passed_is_69_and_names_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "netproxy", "-l", "sps://systemd:main?clients=127.0.0.0/8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 69
    assert (
        "udp systemd:main: expected one activation socket of this name, found 0 (available: none)"
        in done.stderr
    )
