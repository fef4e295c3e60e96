"""Where the control socket is if no configuration names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netproxy.admin.control import places
from netproxy.admin.control.places import DefaultControl, default_control, default_paths

US = os.geteuid()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in place of /run."""
    monkeypatch.setattr(places, "SYSTEM_SOCKET", str(tmp_path / "run/netproxy/control.sock"))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_root_begins_with_the_socket_of_the_system() -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/0"}
    assert default_paths(environ, 0) == [
        "/run/netproxy/control.sock",
        "/run/user/0/netproxy/control.sock",
    ]


@pytest.mark.parametrize("environ", [{}, {"XDG_RUNTIME_DIR": "/run/user/1000"}])
def test_user_begins_with_the_own_runtime_directory(environ: dict[str, str]) -> None:
    assert default_paths(environ, 1000) == [
        "/run/user/1000/netproxy/control.sock",
        "/run/netproxy/control.sock",
    ]


def test_directory_of_the_service_manager_counts_for_every_daemon() -> None:
    environ = {"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/tmp"}
    for alone in (False, True):
        assert default_control(environ, US, alone) == DefaultControl("/run/a/control.sock", True)


def test_daemon_with_a_file_on_its_command_line_has_no_default(run: Path) -> None:
    assert default_control({"XDG_RUNTIME_DIR": str(run)}, US, alone=False) == DefaultControl()


@pytest.mark.parametrize("user", [0, 1000])
def test_first_place_that_can_be_made_is_chosen(run: Path, tmp_path: Path, user: int) -> None:
    """Hazard 170."""
    own = tmp_path / "user"
    own.mkdir()
    environ = {"XDG_RUNTIME_DIR": str(own)}
    found = [default_control(environ, user, alone=True).path]
    first, second = (run, own) if user == 0 else (own, run)
    first.rmdir()
    found.append(default_control(environ, user, alone=True).path)
    second.rmdir()
    found.append(default_control(environ, user, alone=True).path)
    assert found == [f"{first}/netproxy/control.sock", f"{second}/netproxy/control.sock", ""]


@pytest.mark.parametrize("folder", ["relative", f"/tmp/{'x' * 100}"])
def test_runtime_directory_that_holds_no_socket_is_passed_over(run: Path, folder: str) -> None:
    environ = {"XDG_RUNTIME_DIR": folder}
    assert default_control(environ, 1000, alone=True).path == f"{run}/netproxy/control.sock"


def test_runtime_directory_of_somebody_else_is_passed_over(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 170.  sudo and su may leave the variable of another user."""
    run.rmdir()
    (tmp_path / "user").mkdir()
    environ = {"XDG_RUNTIME_DIR": str(tmp_path / "user")}
    assert default_control(environ, US, alone=True).path
    monkeypatch.setattr(os, "geteuid", lambda: US + 1)
    assert default_control(environ, US, alone=True).path == ""
