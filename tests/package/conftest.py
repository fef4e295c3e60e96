"""Deselects the tests marked `package` unless -m names them.

They need minutes, root and a network. The other tests of this folder run with all tests.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "package" in config.getoption("markexpr"):
        return
    deselected = [item for item in items if item.get_closest_marker("package")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("package")]
