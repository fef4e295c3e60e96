"""Finds other versions of Python on this machine that can run the daemon."""

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

from tests.support.sockets import SECONDS

OLDEST = (3, 10)
# The search by name ends with python3.29.
NEWEST_MINOR = 30
_TELL_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


class Interpreter(NamedTuple):
    """A Python that can run the daemon, with the variables that it needs for that."""

    version: tuple[int, int]
    path: str
    environment: dict[str, str]

    @property
    def name(self) -> str:
        """The version as "3.11"."""
        return "%d.%d" % self.version


def lowest_and_highest() -> tuple[Interpreter, Interpreter]:
    """Return the oldest and the newest. Skip the test if there is only one version."""
    usable, reasons = _usable()
    if len(usable) < 2:
        pytest.skip("; ".join(("no second version of Python that can run the daemon", *reasons)))
    return usable[0], usable[-1]


@functools.cache
def _usable() -> tuple[list[Interpreter], list[str]]:
    """Return an interpreter of each version, oldest first, and why others cannot be used."""
    usable: dict[tuple[int, int], Interpreter] = {}
    reasons = []
    for path in _candidates():
        text = _run(path, _TELL_VERSION)
        if not re.fullmatch(r"3\.\d+", text):
            continue
        version = 3, int(text[2:])
        if version < OLDEST or version in usable:
            continue
        for environment in ({}, {"PYTHONPATH": _folder_with_yaml()}):
            if _run(path, "import ssl, yaml; print(yaml.__version__)", environment):
                usable[version] = Interpreter(version, path, environment)
                break
        else:
            reasons.append(f"{path} has no yaml")
    return [usable[version] for version in sorted(usable)], reasons


def _candidates() -> Iterator[str]:
    yield sys.executable
    for minor in range(OLDEST[1], NEWEST_MINOR):
        if path := shutil.which(f"python3.{minor}"):
            yield path
    root = os.environ.get("PYENV_ROOT") or _output(["pyenv", "root"])
    if root:
        yield from map(str, sorted(Path(root).glob("versions/3.*/bin/python3")))


def _run(path: str, code: str, environment: dict[str, str] | None = None) -> str:
    """Return what the code prints; "" if it fails, as does a pyenv shim without a version."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return _output([path, "-c", code], {**kept, **(environment or {})})


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        process = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if not process.returncode else ""


@functools.cache
def _folder_with_yaml() -> str:
    """Return a folder for PYTHONPATH with the yaml package of this Python and nothing else.

    Every version can run it: yaml works without its C extension.
    """
    import yaml

    folder = tempfile.TemporaryDirectory(prefix="netproxy-yaml-")
    _folders.append(folder)
    (Path(folder.name) / "yaml").symlink_to(Path(yaml.__file__).parent)
    return folder.name


# Keeps the folders until the interpreter ends, which removes them.
_folders: list[tempfile.TemporaryDirectory[str]] = []
