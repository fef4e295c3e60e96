"""The samples of the last day."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from netproxy.observe import history as history_module
from netproxy.observe.flows import Carried
from netproxy.observe.history import FILE, SAMPLE_SECONDS, SAMPLES, History


class FakeFlows:
    """A CarriedSource whose sums a test sets."""

    def __init__(self) -> None:
        self.up = self.down = self.live = 0

    def carried(self) -> Carried:
        return Carried(self.up, self.down, self.live)


def test_samples_are_what_was_moved_in_each_period() -> None:
    flows = FakeFlows()
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
    flows = FakeFlows()
    history = History(flows)
    for period in range(SAMPLES + 20):
        flows.up = period * (period - 1) // 2
        history.expire(5.0 + period * SAMPLE_SECONDS)
    samples = history.row()["samples"]
    assert len(samples) == SAMPLES and SAMPLES * SAMPLE_SECONDS >= 86400
    assert (samples[0][0], samples[-1][0]) == (19, SAMPLES + 18)


def test_late_sample_does_not_hurry_the_next_ones() -> None:
    flows = FakeFlows()
    history = History(flows)
    history.expire(1.0)
    for late in (10_000.0, 10_001.0, 10_002.0):
        history.expire(late)
    assert len(history.row()["samples"]) == 1
    history.expire(10_000.0 + SAMPLE_SECONDS)
    assert len(history.row()["samples"]) == 2


def moved(history: History, flows: FakeFlows, start: float, periods: int) -> None:
    """Let 100 bytes pass in each of some periods, and the janitor do what it is asked."""
    for period in range(periods + 1):
        for call in history.expire(start + period * SAMPLE_SECONDS):
            call()
        flows.up += 100


def test_samples_outlive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(history_module, "time", SimpleNamespace(time=lambda: now[0]))
    flows = FakeFlows()
    moved(History(flows, lambda: str(tmp_path)), flows, 50.0, 2)
    now[0] += 2.5 * SAMPLE_SECONDS
    flows = FakeFlows()
    later = History(flows, lambda: str(tmp_path))
    moved(later, flows, 7.0, 1)
    assert [sample[0] for sample in later.row()["samples"]] == [100, 100, 0, 0, 100]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"at": 1}', '{"at": 1, "values": [-1]}'),
        *("[" * 50_000, "9" * 5000, f'{{"at": {10**40}, "values": [{10**40}]}}'),
        f'{{"at": {10**400}, "values": []}}',
    ],
    ids=lambda content: content[:30],
)
def test_damaged_file_is_no_history(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    flows = FakeFlows()
    history = History(flows, lambda: str(tmp_path))
    moved(history, flows, 7.0, 1)
    assert len(history.row()["samples"]) == 1


def test_folder_that_is_gone_costs_nothing(tmp_path: Path) -> None:
    flows = FakeFlows()
    history = History(flows, lambda: str(tmp_path / "gone"))
    moved(history, flows, 7.0, 2)
    assert len(history.row()["samples"]) == 2
