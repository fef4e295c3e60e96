"""sd_notify(3): what systemd is told, and that the daemon works without it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.observe import notify
from tests.support.sockets import SECONDS


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        if request.param == "path":
            sock.bind(str(tmp_path / "notify"))
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        else:
            # The kernel chooses an abstract name.
            sock.bind("")
            monkeypatch.setenv("NOTIFY_SOCKET", "@" + sock.getsockname()[1:].decode())
        sock.settimeout(SECONDS)
        yield sock


def test_service_manager_is_told_of_readiness_reloads_and_stop(manager: socket.socket) -> None:
    notify.ready("serves tcp 127.0.0.1:1080")
    notify.reloading()
    notify.stopping(45.5)
    notify.status("going on")
    ready, reloading, stopping, status = (manager.recv(1000).decode() for _ in range(4))
    assert ready == "READY=1\nSTATUS=serves tcp 127.0.0.1:1080"
    assert stopping == "STOPPING=1\nEXTEND_TIMEOUT_USEC=45500000"
    assert status == "STATUS=going on"
    state, when = reloading.split("\n")
    assert state == "RELOADING=1" and when.removeprefix("MONOTONIC_USEC=").isdigit()


def test_service_manager_that_does_not_read_is_not_waited_for(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 133: the main thread must obey signals."""
    monkeypatch.setattr(notify, "SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(manager.getsockname())
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                sock.send(b"x")
    notify.status("lost")
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            assert manager.recv(1000) == b"x"
    notify.status("seen")
    assert manager.recv(1000) == b"STATUS=seen"


def test_status_is_one_line(manager: socket.socket) -> None:
    """A line of its own would be an assignment."""
    notify.status("serves \u202ea\nMAINPID=1")
    notify.ready("b\nSTATUS=c")
    assert manager.recv(1000) == rb"STATUS=serves \u202ea\nMAINPID=1"
    assert manager.recv(1000) == b"READY=1\nSTATUS=b\\nSTATUS=c"


@pytest.mark.parametrize("path", [None, "", "/nonexistent/notify", "@nobody-listens-here"])
def test_missing_service_manager_is_no_error(
    path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
    notify.ready("x")
    notify.stopping(1.0)


class TestWatchdog:
    def test_watchdog_pings_twice_in_each_timeout(
        self, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WATCHDOG_USEC", "30000000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        watchdog = notify.Watchdog()
        manager.setblocking(False)
        pinged = []
        for now in (100.0, 102.0, 114.9, 115.0, 117.0, 130.1):
            watchdog.ping(now)
            try:
                assert manager.recv(1000) == b"WATCHDOG=1"
                pinged.append(now)
            except BlockingIOError:
                pass
        assert (watchdog.seconds, pinged) == (15.0, [100.0, 115.0, 130.1])

    @pytest.mark.parametrize(
        "usec, pid", [(None, None), ("", None), ("soon", None), ("30000000", "1")]
    )
    def test_watchdog_is_off_unless_the_service_manager_asks_this_process(
        self,
        usec: str | None,
        pid: str | None,
        manager: socket.socket,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        watchdog = notify.Watchdog()
        watchdog.ping(100.0)
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(1000)
        assert watchdog.seconds == 0
