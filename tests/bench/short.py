"""Runs a benchmark in its short form and reads its tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# The limit of a run, which takes some seconds on a machine without other work.
SECONDS = 300.0
# The exit status of a benchmark whose figures are not good enough.
BELOW_TARGET = 1


def output(name: str, *arguments: str) -> str:
    """Run a benchmark and return its output."""
    process = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert process.returncode in (0, BELOW_TARGET), process.stdout
    assert "internal error" not in process.stdout and "Traceback" not in process.stdout
    return process.stdout


def rows(text: str, pattern: str) -> list[tuple[str, ...]]:
    """Return the groups of the lines that begin with the pattern."""
    found = re.findall(rf"^ *{pattern}", text, re.MULTILINE)
    return [row if isinstance(row, tuple) else (row,) for row in found]
