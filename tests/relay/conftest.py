from __future__ import annotations

from typing import Iterator

import pytest

from tests.support.nat import NatRig


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[NatRig]:
    rig = NatRig()
    rig.use_clock(monkeypatch)
    yield rig
    rig.close()
