"""Which daemon netproxyctl asks, and what it says if there is none."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.admin.control.ask import NotRunning
from netproxy.ctl import daemons
from netproxy.ctl.daemons import find_socket, is_netproxyd, running
from tests.support.sockets import wait_until


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the default places, both in a folder of the test; there is no process."""
    places = [str(tmp_path / "a"), str(tmp_path / "b")]
    monkeypatch.setattr(daemons, "default_paths", lambda environ, user: places)
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(daemons, "PROC", tmp_path / "proc")
    return places


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        yield sock


@pytest.mark.parametrize("at", [0, 1])
def test_first_place_at_which_somebody_listens_is_asked(
    paths: list[str], listener: socket.socket, at: int
) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(paths[1 - at])
    listener.bind(paths[at])
    listener.listen()
    assert find_socket() == paths[at]


def test_error_names_all_places_and_says_not_running(paths: list[str]) -> None:
    with pytest.raises(NotRunning) as caught:
        find_socket()
    assert str(caught.value) == (
        f"not running: nothing answers at {paths[0]} and {paths[1]}, and no netproxyd was found"
    )


def add_process(proc: Path, pid: int, command: str, parent: int = 1) -> Path:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")
    (folder / "stat").write_text(f"{pid} (a (b) c) S {parent} 1 1")
    return folder


def test_daemon_without_a_socket_is_named_once_with_its_workers(
    paths: list[str], tmp_path: Path
) -> None:
    command = "/usr/bin/python3 -m netproxy -c /etc/a.yaml"
    for pid, parent in ((70, 1), (71, 70), (72, 70)):
        add_process(tmp_path / "proc", pid, command, parent)
    add_process(tmp_path / "proc", 80, "/bin/sh -c netproxyd")
    with pytest.raises(NotRunning) as caught:
        find_socket()
    assert str(caught.value) == (
        f"netproxyd runs as process 70 ({command}), but has no control socket: "
        "set control: in its configuration"
    )


def test_daemon_with_a_socket_elsewhere_is_named_with_its_path(
    paths: list[str], tmp_path: Path
) -> None:
    folder = add_process(tmp_path / "proc", 70, "/usr/bin/python3 -I /usr/sbin/netproxyd")
    (folder / "fd/5").symlink_to("socket:[4711]")
    (folder / "fd/6").symlink_to("socket:[4712]")
    (tmp_path / "proc/net").mkdir()
    (tmp_path / "proc/net/unix").write_text(
        "Num RefCount Protocol Flags Type St Inode Path\n"
        "0: 00000002 00000000 00010000 0001 01 4711 /run/a place/control\n"
        "0: 00000003 00000000 00000000 0001 03 4712 /run/connected\n"
        "0: 00000003 00000000 00000000 0001 03 4713\n"
    )
    with pytest.raises(NotRunning, match="default control socket: use -s /run/a place/control$"):
        find_socket()


def test_socket_of_another_user_is_told_as_such(
    paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "_probe", lambda path: 13)
    with pytest.raises(NotRunning, match=f"^{paths[0]}: permission denied; the daemon belongs"):
        find_socket()


@pytest.mark.parametrize(
    "command, expected",
    [
        ("/usr/sbin/netproxyd", True),
        ("/usr/bin/python3 -I /usr/sbin/netproxyd -c x", True),
        ("python3 -m netproxy", True),
        ("python3 -m netproxy -l sps://:1080", True),
        ("python3 -m netproxy ctl status", False),
        ("python3 -m netproxy_other", False),
        ("netproxyd -t -c x", False),
        ("vi /etc/netproxyd", False),
        ("sudo netproxyd", False),
        ("sh -c netproxyd", False),
        ("", False),
    ],
)
def test_command_lines_of_daemons_are_known(command: str, expected: bool) -> None:
    assert is_netproxyd(command.split(" ")) is expected


def test_real_process_is_found_with_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); "
        f"s.bind({str(path)!r}); s.listen(); sys.stdin.read()"
    )
    # As a name of the program only: `python3 netproxyd` runs this file.
    (tmp_path / "netproxyd").write_text(code)
    command = [sys.executable, str(tmp_path / "netproxyd")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until(lambda: any(p.pid == process.pid and p.sockets for p in running()))
        (found,) = [p for p in running() if p.pid == process.pid]
        assert (found.command, list(found.sockets)) == (" ".join(command), [str(path)])
        process.communicate(b"")
