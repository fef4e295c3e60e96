"""The command line of netproxyctl: mistakes, and what they are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from netproxy import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["statsu"], "netproxyctl: unknown command 'statsu' (did you mean 'status'?)"),
        (["-s", "x", "statsu"], "netproxyctl: unknown command 'statsu' (did you mean 'status'?)"),
        (
            ["sessions", "--usr", "x"],
            "netproxyctl sessions: unknown option --usr (did you mean '--user'?)",
        ),
        (["users", "--client=x"], "netproxyctl users: unknown option --client (try --help)"),
        (["conn"], "netproxyctl: unknown command 'conn' (did you mean 'connections'?)"),
        (["frobnicate"], "netproxyctl: unknown command 'frobnicate' (try --help)"),
        (["log", "inof"], "netproxyctl log: argument LEVEL: unknown 'inof' (did you mean 'info'?)"),
        (
            ["top", "--by", "x"],
            "netproxyctl top: argument --by: unknown 'x' (known: flow, user, client) (try --help)",
        ),
        ([], "netproxyctl: the following arguments are required: COMMAND (try --help)"),
    ],
)
def test_mistake_is_one_line_that_says_what_was_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.control_main(arguments)
    assert (caught.value.code, capsys.readouterr().err) == (64, f"{said}\n")


def test_checkout_has_netproxyctl_without_an_installation() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "netproxy", "ctl", "statsu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "netproxyctl: unknown command 'statsu' (did you mean 'status'?)\n"
