"""Other versions of Python on this machine that the daemon can run in."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

OLDEST = (3, 10)
NEWEST_MINOR = 30  # of those that are looked for by name
_TELL = "import sys; print('%d.%d' % sys.version_info[:2])"


class Interpreter(NamedTuple):
    version: tuple[int, int]
    path: str
    environment: dict[str, str]  # what it needs besides ours

    @property
    def name(self) -> str:
        return "%d.%d" % self.version


def lowest_and_highest() -> tuple[Interpreter, Interpreter]:
    """The test is skipped where all that can be used are of one version."""
    found, why = _usable()
    if len(found) < 2:
        pytest.skip(
            "no second version of Python that can run the daemon"
            + "".join(f"; {one}" for one in why)
        )
    return found[0], found[-1]


@functools.cache
def _usable() -> tuple[list[Interpreter], list[str]]:
    """One of each version, lowest first, and why others are none."""
    found: dict[tuple[int, int], Interpreter] = {}
    why = []
    for path in _candidates():
        version = _run(path, _TELL)
        if (
            not re.fullmatch(r"3\.\d+", version)
            or (number := (3, int(version[2:]))) < OLDEST
            or number in found
        ):
            continue
        for environment in ({}, {"PYTHONPATH": _yaml_alone()}):
            if _run(path, "import ssl, yaml; print(yaml.__version__)", environment):
                found[number] = Interpreter(number, path, environment)
                break
        else:
            why.append(f"{path} has no yaml")
    return [found[number] for number in sorted(found)], why


def _candidates() -> Iterator[str]:
    yield sys.executable
    for minor in range(OLDEST[1], NEWEST_MINOR):
        if path := shutil.which(f"python3.{minor}"):
            yield path
    root = os.environ.get("PYENV_ROOT") or _output(["pyenv", "root"])
    if root:
        yield from map(str, sorted(Path(root).glob("versions/3.*/bin/python3")))


def _run(path: str, code: str, environment: dict[str, str] = {}) -> str:
    """What it prints, "" where it fails, as a shim does that stands for no version."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "COVERAGE_PROCESS_START")
    }
    return _output([path, "-c", code], {**kept, **environment})


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if not done.returncode else ""


@functools.cache
def _yaml_alone() -> str:
    """A folder with our own yaml and nothing else that another version may not have: without its C part it runs anywhere."""
    import yaml

    made = tempfile.TemporaryDirectory(prefix="netproxy-yaml-")
    _kept.append(made)
    (Path(made.name) / "yaml").symlink_to(Path(yaml.__file__).parent)
    return made.name


_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed when the tests end
