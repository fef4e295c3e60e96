"""What a forked process keeps of its parent."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.sockets import SECONDS

# Opens descriptors far apart, lowers the limit below some of them, and tells which are left.
LOWERED = """
import os, resource, sys
from netproxy.daemon.process.forked import close_others

kept = {0, 1, 2, *map(int, sys.argv[1:])}
for number in (40, 41, 100, 101):
    os.dup2(1, number)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (50, hard))
close_others(kept)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
found = []
for number in range(3, 200):
    try:
        os.fstat(number)
    except OSError:
        continue
    found.append(number)
print(*found)
"""


@pytest.mark.parametrize("kept", [(), (40,), (101,), (41, 100)])
def test_descriptors_beyond_a_lowered_limit_are_closed(kept: tuple[int, ...]) -> None:
    command = [sys.executable, "-c", LOWERED, *map(str, kept)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(number) for number in kept]
