"""A relay at each level of batching.  Clients and targets must not notice which."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.support.nat import NatRig
from tests.support.relays import SPS, Running, running

LEVELS = ("mmsg", "trains", "single")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    """Return a line for a configuration."""
    return "\nudp: {batching: %s}" % request.param


@pytest.fixture
def relay(level: str) -> Iterator[Running]:
    """Run a relay; check that it never truncated a datagram, whatever the test sent."""
    with running(SPS + level) as relay:
        if relay.daemon._runtime.datagrams.level not in level:
            pytest.skip("this machine has no such level")
        yield relay
        assert not relay.count("drops", "truncated")


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[NatRig]:
    """Return a table on test doubles, for tests of a certain moment."""
    rig = NatRig()
    rig.use_clock(monkeypatch)
    yield rig
    rig.close()
