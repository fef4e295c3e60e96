"""The files that the packages of other proxies install: how much of them is carried.

Directives that these files have as examples, behind a "#", count as well where there are many.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from netproxy.ctl.convert.notes import Kind
from tests.ctl.convert.converting import converted

pytest.importorskip("yaml")

WHOLE = 0.9
"""The part of the directives that is carried, or needs no setting."""
# Format, file, and the examples to be counted: what is taken away in front of them.
FILES = [
    ("dante", "/etc/danted.conf", ""),
    ("dante", "/usr/share/doc/dante-server/examples/danted-basic.conf", r"^#(?=[a-z]+[.: ]|\}|  )"),
    ("redsocks", "/etc/redsocks.conf", ""),
    ("squid", "/etc/squid/squid.conf", ""),
    ("tinyproxy", "/etc/tinyproxy/tinyproxy.conf", ""),
]


@pytest.mark.parametrize("form, path, examples", FILES, ids=[path for _, path, _ in FILES])
def test_most_directives_of_an_installed_file_are_carried(
    form: str, path: str, examples: str
) -> None:
    if not Path(path).exists():
        pytest.skip(f"{path} is not installed")
    text = Path(path).read_text()
    if examples:
        text = re.sub(examples, "", text, flags=re.MULTILINE)
    result = converted(form, text, path)
    total = len(result.notes.directives)
    assert total > 3
    assert result.notes.counts()[Kind.LOST] <= total * (1 - WHOLE), result.lost
