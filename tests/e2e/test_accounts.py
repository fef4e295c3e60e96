"""Users and clients of a real daemon, limited and banned by netproxyctl while curl downloads."""

from __future__ import annotations

import json
import socket
import re
import subprocess
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from tests.e2e.conftest import Start
from tests.e2e.support import SECONDS, Netproxyd, environment, program, wait_for
from tests.e2e.test_control import control, ctl  # noqa: F401
from tests.support.sockets import server

pytestmark = pytest.mark.e2e

Ctl = Callable[..., "subprocess.CompletedProcess[str]"]
CONFIG = (
    "listeners: [{listen: '127.0.0.1:0', name: main, auth: optional}]\n"
    "users: {alice: {password: secret, limits: {connections: 8}}}\n"
)


@pytest.fixture
def daemon(netproxyd: Start, control: str) -> Netproxyd:  # noqa: F811
    return netproxyd(config=f"control: unix:{control}\n{CONFIG}")


@pytest.fixture
def origin() -> Iterator[Address]:
    """A web server whose pages do not end before their reader does."""

    def script(sock: socket.socket) -> None:
        sock.recv(65536)
        try:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
            while True:
                sock.sendall(b"x" * 10000)
                # The files of readers stay small.
                time.sleep(0.005)
        except OSError:
            # The reader has ended.
            pass

    with server(script) as address:
        yield address


class Download:
    """curl with an endless download through the daemon."""

    def __init__(self, path: Path, proxy: str, origin: Address) -> None:
        self._output = path
        command = [program("curl"), "-sS", "--noproxy", "", "-x", proxy, f"http://{origin}/"]
        with open(path, "wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.DEVNULL, env=environment()
            )

    def wait_for_bytes(self) -> None:
        before = self._output.stat().st_size
        wait_for(lambda: self._output.stat().st_size > before, SECONDS, "more bytes of a download")

    def wait(self) -> int:
        """Return curl's exit status."""
        return self._process.wait(SECONDS)

    def __enter__(self) -> Download:
        self.wait_for_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


@pytest.mark.parametrize("scheme, refused", [("socks5h", 97), ("http", 22)])
def test_ban_of_a_user_ends_its_download_and_refuses_the_next(
    daemon: Netproxyd,
    ctl: Ctl,  # noqa: F811
    origin: Address,
    tmp_path: Path,
    scheme: str,
    refused: int,
) -> None:
    proxy = daemon.url(scheme, "alice:secret")
    with Download(tmp_path / "a", proxy, origin) as download:
        done = ctl("ban", "alice", "for", "1h")
        assert (done.stdout, done.stderr) == ("user alice banned for 1h, 1 flows ended\n", "")
        # A transfer that has ended too early.
        assert download.wait() in (18, 56)
    daemon.said(r'msg=finished .* user=alice .* ended="user banned"')
    daemon.said("banned user alice for 1h: 1 flows ended")
    command = [program("curl"), "-sSf", "--noproxy", "", "-x", proxy, f"http://{origin}/"]
    again = subprocess.run(command, env=environment(), capture_output=True, timeout=SECONDS)
    assert again.returncode == refused
    assert ctl("unban", "alice").stdout == "alice: no longer banned\n"
    with Download(tmp_path / "b", proxy, origin):
        pass


def test_ban_of_an_address_ends_its_download(
    daemon: Netproxyd,
    ctl: Ctl,  # noqa: F811
    origin: Address,
    tmp_path: Path,
) -> None:
    with Download(tmp_path / "a", daemon.url("socks5h"), origin) as download:
        done = ctl("ban", "127.0.0.1", "--for", "1h")
        assert done.stdout == "client 127.0.0.1 banned for 1h, 1 flows ended\n"
        assert download.wait() in (18, 56)
    daemon.said('ended="client banned"')
    (line,) = ctl("ban").stdout.splitlines()[1:]
    assert re.fullmatch(r"client  127\.0\.0\.1  for (1h|5\dm\d+s)", line)
    assert ctl("unban", "127.0.0.1").returncode == 0


def test_limit_holds_for_a_download_that_runs(
    daemon: Netproxyd,
    ctl: Ctl,  # noqa: F811
    origin: Address,
    tmp_path: Path,
) -> None:
    with Download(tmp_path / "a", daemon.url("socks5h", "alice:secret"), origin) as download:
        done = ctl("limit", "alice", "rate=8Mbit/s", "connections=1")
        assert done.stdout == (
            "alice: connections=1 rate=8Mbit/s (set by limit, until the next start)\n"
        )
        # Paced, not cut.
        download.wait_for_bytes()
        (row,) = json.loads(ctl("users", "--json").stdout)
        assert row["limits"] == {"connections": 1, "rate_up": 1_000_000, "rate_down": 1_000_000}
        assert (row["connections"], row["total"]["down"] > 0) == (1, True)
        proxy = daemon.url("socks5h", "alice:secret")
        command = [program("curl"), "-sS", "--noproxy", "", "-x", proxy, f"http://{origin}/"]
        second = subprocess.run(command, env=environment(), capture_output=True, timeout=SECONDS)
        assert second.returncode == 97
        daemon.said("decided=users.alice.limits.connections")
        assert ctl("limit", "alice", "--reset").stdout == "alice: connections=8\n"
        download.wait_for_bytes()
