"""docs/PROOFS.md is what tests/proofs makes of docs/proofs.json, and results replace older ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.results import VARIABLE, note

PROGRAM = Path(__file__).with_name("proofs")


def run(program: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_page_of_proofs_is_up_to_date() -> None:
    assert run(PROGRAM, "--check") == (0, "")


def test_all_results_passed() -> None:
    results = json.loads((PROGRAM.parents[1] / "docs" / "proofs.json").read_text())
    assert results and all(result["passed"] for result in results)


def test_new_result_replaces_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the program in another checkout, with results of its own."""
    program, folder = tmp_path / "tests" / "proofs", tmp_path / "results"
    for directory in ("tests", "docs"):
        (tmp_path / directory).mkdir()
    shutil.copy(PROGRAM, program)
    monkeypatch.setenv(VARIABLE, str(folder))
    for inputs, passed in ((1, False), (1234567, True)):
        note("fuzz", passed, "a command", target="a", engine="b", seconds=60, inputs=inputs)
    note("fuzz", True, "a command", target="c", engine="b", seconds=60, inputs=3)
    assert run(program, str(folder)) == (0, "")
    text = (tmp_path / "docs" / "PROOFS.md").read_text()
    assert "| a | b | 60 | 1,234,567 | no finding |\n| c | b | 60 | 3 | no finding |\n" in text
    assert "\n    a command\n" in text and "FINDING" not in text
    assert run(program, "--check") == (0, "")
    (tmp_path / "docs" / "PROOFS.md").write_text("edited")
    assert run(program, "--check")[0] == 1


def test_nothing_is_noted_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    note("fuzz", True, target="a")
    assert not list(tmp_path.iterdir())
