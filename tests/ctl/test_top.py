"""netproxyctl top: rates from two answers, and a picture that any terminal can show."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from netproxy.admin.control.server import ControlServer
from netproxy.ctl import top as top_module
from netproxy.ctl.top import Rate, Top, picture, rates
from tests.ctl.test_accounts import client, user
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS

ROOT = Path(__file__).resolve().parents[2]


def traffic(
    at: float, flows: list[list[int]], up: int = 0, down: int = 0, drops: int = 0
) -> dict[str, Any]:
    """Return an answer to the command of this name."""
    return {
        "at": at,
        "state": "serving",
        "uptime": at,
        "connections": 2,
        "sessions": 0,
        "threads": 5,
        "memory": 16e6,
        "bytes": {"up": up, "down": down},
        "drops": drops,
        "flows": flows,
    }


def flow(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "network": "tcp",
        "client": "192.0.2.1:5000",
        "user": "",
        "target": "example.com:443",
        "upstream": "direct",
        "age": 5.0,
        **more,
    }


def test_rates_are_differences_and_the_fastest_is_first() -> None:
    before, now = (
        traffic(10.0, [[1, 100, 0], [2, 0, 0]]),
        traffic(12.0, [[1, 300, 0], [2, 0, 5000], [3, 7, 7]]),
    )
    assert rates(before, now) == [Rate(2, 0, 2500, 5000), Rate(1, 100, 0, 300), Rate(3, 0, 0, 14)]


def test_picture_has_totals_and_a_line_for_each_flow() -> None:
    before, now = traffic(10.0, [[1, 0, 0]]), traffic(11.0, [[1, 1000, 250_000]], 1000, 250_000, 3)
    lines = picture(before, now, rates(before, now), {1: flow(1, user="alice")})
    assert lines == [
        "netproxyd serving, up 11s; 2 connections, 0 UDP sessions, 5 threads, 16.0 MB",
        "to clients 2.0 Mbit/s, from clients 8.0 kbit/s; drops 3/s, 3 in total",
        "",
        "id  client                target               upstream  age  to client   to target"
        "   bytes",
        "1   alice@192.0.2.1:5000  tcp example.com:443  direct    5s   2.0 Mbit/s  8.0 kbit/s"
        "  251 kB",
    ]


def test_picture_has_a_line_of_all_workers() -> None:
    now: Any = traffic(11.0, [])
    rows = [{"index": 0, "state": "serving", "cpu": 0.5}, {"index": 1, "state": "silent", "cpu": 1}]
    lines = picture(now, {**now, "workers": rows}, [], {})
    assert lines[2:4] == ["workers 0: 50%, 1: silent", ""]


def test_flow_that_ended_between_two_answers_has_no_line() -> None:
    now = traffic(11.0, [[1, 0, 0]])
    assert len(picture(traffic(10.0, []), now, rates(traffic(10.0, []), now), {})) == 4


KEYS = {b"u": r"user +connections", b"c": r"client +connections", b"f": r"client +target"}
"""What is drawn after a key."""


class FakeDaemon:
    """Answers what top asks: 100 flows that carry 1000 bytes a second."""

    def __init__(self) -> None:
        self.looks = self.account_looks = 0
        self.asked: list[Any] = []

    def ask(self, command: str, **details: Any) -> Any:
        if command == "traffic":
            self.looks += 1
            return traffic(
                float(self.looks), [[number, 1000 * self.looks, 0] for number in range(100)]
            )
        if command in ("users", "clients"):
            self.account_looks += 1
            row = user if command == "users" else client
            rows = [row(f"{command}{at}", at * self.account_looks * 1000) for at in range(100)]
            return {"at": float(self.account_looks), command: rows}
        self.asked.append(details["ids"])
        return [flow(number, user="a\x1b[2J") for number in details["ids"]]


def test_batch_asks_for_the_details_of_shown_flows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_module, "SECONDS", 0.0)
    daemon = FakeDaemon()
    text = Top(daemon.ask).once()
    assert daemon.asked == [list(range(top_module.BATCH_ROWS))]
    assert "\x1b" not in text
    assert len(text.split("\n")) == 4 + top_module.BATCH_ROWS


@pytest.mark.parametrize("view, name", [("user", "users"), ("client", "clients")])
def test_batch_lists_users_or_clients_by_rate(
    monkeypatch: pytest.MonkeyPatch, view: str, name: str
) -> None:
    monkeypatch.setattr(top_module, "SECONDS", 0.0)
    lines = Top(FakeDaemon().ask, view).once().split("\n")
    assert len(lines) == 4 + top_module.BATCH_ROWS
    names = [line.split()[0] for line in lines[4:]]
    assert names == [f"{name}{at}" for at in range(99, 99 - top_module.BATCH_ROWS, -1)]
    assert "792 kbit/s" in lines[4]


@pytest.mark.parametrize("rows, columns, shown", [(12, 60, (12, 60)), (0, 0, (24, 80))])
def test_pictures_fit_the_terminal_until_q(
    tmp_path: Path, rows: int, columns: int, shown: tuple[int, int]
) -> None:
    """A serial line has no size; then it is 24 lines of 80 columns."""
    daemon = FakeDaemon()
    server = ControlServer(
        str(tmp_path / "socket"),
        {
            "traffic": lambda request: daemon.ask("traffic"),
            "flows": lambda request: daemon.ask("flows", ids=request["ids"]),
            "users": lambda request: daemon.ask("users"),
            "clients": lambda request: daemon.ask("clients"),
        },
        Lines(),
    )
    server.start()
    child, master = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.execv(
            sys.executable,
            [
                sys.executable,
                "-c",
                "import sys, time; from netproxy.ctl import top; top.SECONDS = 0.05; "
                "from netproxy.cli import control_main; sys.exit(control_main())",
                "-s",
                server.path,
                "top",
            ],
        )
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    try:
        painted = _read(master, lambda text: text.count("\x1b[H") > 3)
        for key, columns_shown in KEYS.items():
            os.write(master, key)
            _read(master, partial(re.search, columns_shown))
        os.write(master, b"q")
        painted += _read(master, lambda text: "\x1b[?25h" in text)
        _, status = os.waitpid(child, 0)
        child = 0
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(master)
        server.stop()
    picture_text = painted.split("\x1b[H")[3]
    lines = picture_text.split("\r\n")
    assert set(re.findall(r"\x1b\[[?\d]*[A-Za-z]", picture_text)) <= {"\x1b[K", "\x1b[J"}
    assert (
        len(lines) == shown[0] - 1
        and max(len(line.replace("\x1b[K", "").replace("\x1b[J", "")) for line in lines)
        <= shown[1] - 1
    )


def _read(descriptor: int, there: Any) -> str:
    """Return what is drawn until `there` is true."""
    text, deadline = "", time.monotonic() + SECONDS
    while not there(text):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, text
        try:
            text += os.read(descriptor, 65536).decode()
        except OSError:
            # The other end has closed.
            return text
    return text
