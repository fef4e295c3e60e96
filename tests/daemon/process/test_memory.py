"""MemoryTrimmer gives the memory of a burst back."""

from __future__ import annotations

import pytest

from netproxy.daemon.process import memory
from netproxy.daemon.process.memory import BURST, COLLECT_SECONDS, STEADY_SECONDS, MemoryTrimmer


class Trimmed:
    """A MemoryTrimmer that is told how many things take memory; counts what it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.collected = self.released = self.trimmed = 0
        monkeypatch.setattr(memory.gc, "collect", self._collect)
        monkeypatch.setattr(memory, "trim", self._trim)
        self._trimmer = MemoryTrimmer(lambda: self.count, self._release)

    def _collect(self) -> int:
        self.collected += 1
        return 0

    def _release(self) -> None:
        self.released += 1

    def _trim(self) -> None:
        # Buffers that are still kept cannot be given back.
        assert self.released == self.trimmed + 1
        self.trimmed += 1

    def look(self, count: int, now: float) -> int:
        """Return how often the memory of a burst was given back by `now`."""
        self.count = count
        self._trimmer.expire(now)
        return self.collected


class TestMemoryTrimmer:
    def test_memory_of_reading_the_configuration_is_given_back_at_the_start(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trimmed = Trimmed(monkeypatch)
        assert [trimmed.look(0, now) for now in (1.0, 2.0, 100.0)] == [1, 1, 1]

    def test_memory_is_given_back_once_half_of_a_burst_has_gone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trimmed = Trimmed(monkeypatch)
        trimmed.look(0, 1.0)
        assert [
            trimmed.look(many, 100.0 + at) for at, many in enumerate((2000, 3000, 2000, 1501, 1500))
        ] == [1, 1, 1, 1, 2]

    def test_next_burst_counts_from_what_was_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trimmed = Trimmed(monkeypatch)
        trimmed.look(0, 1.0)
        assert [
            trimmed.look(many, now)
            for many, now in ((4000, 100.0), (1000, 101.0), (501, 200.0), (500, 201.0))
        ] == [1, 2, 2, 3]

    def test_trimmer_rests_after_a_collection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trimmed = Trimmed(monkeypatch)
        trimmed.look(0, 1.0)
        trimmed.look(4000, 100.0)
        assert trimmed.look(2000, 101.0) == 2
        assert trimmed.look(0, 101.0 + COLLECT_SECONDS / 2) == 2
        assert trimmed.look(0, 101.0 + COLLECT_SECONDS) == 3

    def test_a_few_things_are_no_burst(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trimmed = Trimmed(monkeypatch)
        trimmed.look(0, 1.0)
        assert [trimmed.look(many, 100.0 + many) for many in (BURST - 1, 0, BURST, 0)] == [
            1,
            1,
            1,
            2,
        ]

    def test_garbage_is_collected_before_the_memory_of_a_burst_is_given_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[str] = []
        monkeypatch.setattr(memory.gc, "collect", lambda: done.append("collected"))
        monkeypatch.setattr(memory, "trim", lambda: done.append("trimmed"))
        MemoryTrimmer(lambda: 0, lambda: done.append("released")).expire(1.0)
        assert done == ["collected", "released", "trimmed"]

    def test_memory_is_given_back_from_time_to_time_while_a_load_lasts(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 189."""
        trimmed = Trimmed(monkeypatch)
        counts = []
        for now in (1.0, STEADY_SECONDS, STEADY_SECONDS + 1.0, 2 * STEADY_SECONDS):
            trimmed.look(BURST if now > 1.0 else 0, now)
            counts.append(trimmed.trimmed)
        trimmed.look(BURST, 2 * STEADY_SECONDS + 1.0)
        assert [*counts, trimmed.trimmed] == [1, 1, 2, 2, 3]
        # A load that lasts has no garbage of a burst.
        assert trimmed.collected == 1

    def test_idle_daemon_has_nothing_to_give_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trimmed = Trimmed(monkeypatch)
        trimmed.look(0, 1.0)
        trimmed.look(BURST - 1, 10 * STEADY_SECONDS)
        assert trimmed.trimmed == 1
