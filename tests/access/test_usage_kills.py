"""Usage of users survives kill -9: what was stored is there, and nothing is counted twice."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.support.usage import ADD_FOR_EVER, start_child, total_of

KILLS = 20
LINES = 30
"""The most commits that are awaited before a kill."""
LONGEST = 0.01
"""Seconds of several commits: the kill meets any step of one."""


def test_kill_at_any_moment_costs_nothing_that_was_stored(tmp_path: Path) -> None:
    """Hazard 147."""
    moment = random.Random(7)
    total = 0
    for _ in range(KILLS):
        with start_child(f"total = {total}\n{ADD_FOR_EVER}", tmp_path) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            for _ in range(moment.randrange(LINES)):
                total = int(child.stdout.readline())
            # Not a wait: the moment of the kill.
            time.sleep(moment.random() * LONGEST)
            child.kill()
            rest = child.stdout.read().splitlines(keepends=True)
        total = max([total, *(int(line) for line in rest if line.endswith("\n"))])
        up, down = total_of(tmp_path)
        assert up in (total, total + 1) and down == 2 * up
        assert total_of(tmp_path, "bob") == (3 * up, 4 * up)
        total = up
    assert total > KILLS
