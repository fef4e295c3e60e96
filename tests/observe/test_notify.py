"""sd_notify(3): what systemd is told, and that its absence stops nothing."""
from __future__ import annotations

import socket
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.observe import notify


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        if request.param == "path":
            sock.bind(str(tmp_path / "notify"))
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        else:
            sock.bind("")           # the kernel chooses an abstract name
            monkeypatch.setenv("NOTIFY_SOCKET", "@" + sock.getsockname()[1:].decode())
        sock.settimeout(5)
        yield sock


def test_says_when_it_is_ready_when_it_reloads_and_when_it_stops(manager: socket.socket) -> None:
    notify.ready("serves tcp 127.0.0.1:1080")
    notify.reloading()
    notify.stopping()
    ready, reloading, stopping = (manager.recv(1000).decode() for _ in range(3))
    assert ready == "READY=1\nSTATUS=serves tcp 127.0.0.1:1080"
    assert stopping == "STOPPING=1"
    state, when = reloading.split("\n")
    assert state == "RELOADING=1" and when.removeprefix("MONOTONIC_USEC=").isdigit()


@pytest.mark.parametrize("path", [None, "", "/nonexistent/notify", "@nobody-listens-here"])
def test_without_a_service_manager_nothing_happens(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if path is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
    notify.ready("x")
    notify.stopping()
