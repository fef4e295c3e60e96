"""Fixtures of the tests of UDP sockets."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.support.batches import BatchRig


@pytest.fixture(params=["mmsg", "trains", "single"])
def rig(request: pytest.FixtureRequest) -> Iterator[BatchRig]:
    """A rig of each level of batching that this machine has."""
    rig = BatchRig(request.param)
    if rig.datagrams.level != request.param:
        pytest.skip("this machine has no such level")
    yield rig
    for sock in rig.opened:
        sock.close()
