"""Tests of the package: the cheap ones run with all others, those marked `package` only where they are asked for."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Minutes, root and a network: not unless `-m` names them."""
    if "package" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("package")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("package")]
