"""netproxyd as a process under a service manager: what it is told, and when."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
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
            fields = dict(line.split("=", 1) for line in self._manager.recv(4000).decode().splitlines())
            if wanted in fields:
                return fields


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[Managed]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(SECONDS)
        process = subprocess.Popen(
            [sys.executable, "-m", "netproxy", "-l", "sps://127.0.0.1:0"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"})
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
    assert managed.said("STOPPING")["EXTEND_TIMEOUT_USEC"] == "45000000"        # 30 s to drain, 15 to end
    assert managed.process.wait(SECONDS) == 0


def test_ended_by_its_watchdog_it_says_what_its_threads_did(managed: Managed) -> None:
    managed.said("WATCHDOG")
    managed.process.send_signal(signal.SIGABRT)
    _, err = managed.process.communicate(timeout=SECONDS)
    assert managed.process.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in err and " in _wait" in err
