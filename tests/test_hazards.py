"""tests/HAZARDS.md lists every hazard with its tests, as the docstrings of the tests name them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_table_of_hazards_is_complete_and_up_to_date() -> None:
    """Every row has a test or a reason, and every number that a docstring names has a row."""
    command = [sys.executable, Path(__file__).with_name("hazards"), "--check"]
    check = subprocess.run(command, capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
