from __future__ import annotations

from typing import Iterator

import pytest

from netproxy.relay import nat as nat_module
from netproxy.relay import entry as opening_module
from tests.support.nat import NatRig


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[NatRig]:
    rig = NatRig()
    monkeypatch.setattr(nat_module, "time", rig.clock)
    monkeypatch.setattr(opening_module, "time", rig.clock)
    yield rig
    rig.workers.eager = True
    rig.workers.run()
    rig.table.close()
