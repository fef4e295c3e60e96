"""Fixtures of the tunnel tests."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.support.agents import BridgeRig


@pytest.fixture
def rig() -> Iterator[BridgeRig]:
    """Return a bridge that waits for agents; check that none caused an internal error."""
    rig = BridgeRig()
    yield rig
    rig.close()
    assert not rig.counts.of("connections", "internal error")
