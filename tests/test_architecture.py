"""The documents of the code name the modules that exist, all of them and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"
DOCUMENTS = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("conf/**/*.md"),
        *ROOT.glob("tests/**/*.md"),
    )
    if path.name != "HAZARDS.md"
)
LINE = 100
ROOM = re.compile(r"### `(netproxy/(?:\w+/)*)`")
MODULE = re.compile(r"\| `(\w+\.(?:py|html))` \|")
# `handler/sps.py`: within the repository or within netproxy/; not /etc/hosts or conf.d/*.yaml.
NAMED_FILE = re.compile(r"`([a-z][\w.-]*/[\w./-]+\.(?:py|md|yaml|html|toml|\d))`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def listed_modules() -> set[str]:
    """Return the modules in the tables of rooms, as paths from the root."""
    room, listed = "", set()
    for line in ARCHITECTURE.read_text().splitlines():
        if line.startswith("## "):
            room = ""
        elif match := ROOM.match(line):
            room = match[1]
        elif room and (match := MODULE.match(line)):
            listed.add(room + match[1])
    return listed


def existing_modules() -> set[str]:
    """Return the modules of the package and the files beside them, as paths from the root."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "netproxy").rglob("*")
        if path.suffix in (".py", ".html") and path.name != "__init__.py"
    }


def test_every_module_is_in_the_architecture() -> None:
    assert existing_modules() - listed_modules() == set()


def test_architecture_lists_no_module_that_is_gone() -> None:
    assert listed_modules() - existing_modules() == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
class TestDocument:
    def test_named_files_exist(self, path: Path) -> None:
        missing = [
            name
            for name in NAMED_FILE.findall(path.read_text())
            if not ((ROOT / name).exists() or (ROOT / "netproxy" / name).exists())
        ]
        assert not missing

    def test_links_lead_to_files(self, path: Path) -> None:
        missing = [
            target
            for target in LINK.findall(path.read_text())
            if target and not (path.parent / target).exists()
        ]
        assert not missing

    def test_lines_are_short(self, path: Path) -> None:
        lines = enumerate(path.read_text().splitlines(), 1)
        assert not [number for number, line in lines if len(line) > LINE]
