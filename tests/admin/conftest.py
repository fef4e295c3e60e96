"""Ways to talk to a daemon whose control socket is `control` in tmp_path."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from netproxy import cli
from netproxy.admin.control.ask import ask
from netproxy.interfaces.addresses import Address
from tests.support.sockets import server


@pytest.fixture
def tell(tmp_path: Path) -> Callable[..., Any]:
    """Send a command to the daemon; return its answer."""
    return lambda command, **details: ask(str(tmp_path / "control"), command, **details)


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run netproxyctl; return its exit status, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.control_main(["-s", str(tmp_path / "control"), *arguments])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def echo() -> Iterator[Address]:
    def script(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with server(script) as address:
        yield address
