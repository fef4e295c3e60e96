"""The samples of the last day."""

from __future__ import annotations

from typing import Any

from netproxy.interfaces.flows import Traffic
from netproxy.observe.flows import FlowTotal, TotalKey
from netproxy.observe.history import SAMPLE_SECONDS, SAMPLES, History


class FakeFlows:
    """Flows whose totals a test sets."""

    def __init__(self) -> None:
        self.up = self.down = self.live = 0

    def totals(self) -> dict[TotalKey, FlowTotal]:
        traffic = Traffic(self.up, self.down)
        return {TotalKey("tcp", "main", "direct"): FlowTotal(self.live, self.live, traffic)}

    def __len__(self) -> int:
        return self.live


def test_samples_are_what_was_moved_in_each_period() -> None:
    flows: Any = FakeFlows()
    flows.up = 7
    history = History(flows)
    history.expire(1000.0)
    assert history.row() == {"seconds": SAMPLE_SECONDS, "samples": []}
    flows.up, flows.down, flows.live = 107, 50, 3
    history.expire(1000.0 + SAMPLE_SECONDS - 1)
    assert not history.row()["samples"]
    history.expire(1000.0 + SAMPLE_SECONDS)
    flows.live = 0
    history.expire(1000.0 + 2 * SAMPLE_SECONDS + 1)
    assert history.row()["samples"] == [[100, 50, 3], [0, 0, 0]]


def test_samples_of_the_last_day_are_kept() -> None:
    flows: Any = FakeFlows()
    history = History(flows)
    for period in range(SAMPLES + 20):
        flows.up = period * (period - 1) // 2
        history.expire(5.0 + period * SAMPLE_SECONDS)
    samples = history.row()["samples"]
    assert len(samples) == SAMPLES and SAMPLES * SAMPLE_SECONDS >= 86400
    assert (samples[0][0], samples[-1][0]) == (19, SAMPLES + 18)


def test_late_sample_does_not_hurry_the_next_ones() -> None:
    flows: Any = FakeFlows()
    history = History(flows)
    history.expire(1.0)
    for late in (10_000.0, 10_001.0, 10_002.0):
        history.expire(late)
    assert len(history.row()["samples"]) == 1
    history.expire(10_000.0 + SAMPLE_SECONDS)
    assert len(history.row()["samples"]) == 2
