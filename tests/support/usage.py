"""A child process that stores usage until it is killed, and what tests read of the file."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from netproxy.access.accounts.usage_store import UsageStore
from tests.support.handlers import RecordingLog

ROOT = Path(__file__).resolve().parents[2]
DAY, MONTH = "2026-11-29", "2026-11"

PREPARE = """
import sys
from netproxy.access.accounts.usage_store import Usage, UsageStore
from tests.support.handlers import RecordingLog

DAY, MONTH = "2026-11-29", "2026-11"
log = RecordingLog()
"""
"""Begins the program of a child: the folder is its argument."""

ADD_FOR_EVER = (
    PREPARE
    + """
store = UsageStore(sys.argv[1], log)
print("open", flush=True)
while True:
    if not store.add(DAY, MONTH, {"alice": Usage(1, 2), "bob": Usage(3, 4)}):
        sys.exit(str(log.lines))
    total += 1
    print(total, flush=True)
"""
)
"""Adds in a loop and prints how many times it has done so, from `total` on."""


def start_child(program: str, folder: Path) -> subprocess.Popen[str]:
    """Start a Python program; its standard output is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def rows(path: Path) -> list[tuple[str, bytes, int, int]]:
    """Return the rows of a file that no store has open."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT period, user, up, down FROM usage").fetchall()


def total_of(folder: Path, user: str = "alice") -> tuple[int, int]:
    """Return the total of a user.  Fails if the file was moved aside."""
    log = RecordingLog()
    with closing(UsageStore(str(folder), log)) as store:
        total = store.load(DAY, MONTH)[user][2]
    assert log.lines == [] and not list(folder.glob("*.corrupt-*"))
    return total
