"""What outlives a configuration: when the memory of a burst is given back."""

from __future__ import annotations

import pytest

from netproxy.daemon import runtime
from netproxy.daemon.runtime import BURST, COLLECT_SECONDS, MemoryTrimmer


class Held:
    """A Thrift that is told how much is held, and how often it has given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = 0
        self.collected = self.trimmed = 0
        monkeypatch.setattr(runtime.gc, "collect", self._collect)
        monkeypatch.setattr(runtime, "trim", self._trim)
        self._thrift = MemoryTrimmer(lambda: self.held)

    def _collect(self) -> int:
        self.collected += 1
        return 0

    def _trim(self) -> None:
        assert self.collected == self.trimmed + 1  # what is garbage cannot be given back
        self.trimmed += 1

    def look(self, held: int, now: float) -> int:
        """How often it has given back by then."""
        self.held = held
        self._thrift.expire(now)
        return self.trimmed


class TestThrift:
    def test_gives_back_at_the_start_what_the_configuration_took(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = Held(monkeypatch)
        assert [held.look(0, now) for now in (1.0, 2.0, 100.0)] == [1, 1, 1]

    def test_gives_back_when_half_of_a_burst_has_gone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = Held(monkeypatch)
        held.look(0, 1.0)
        assert [
            held.look(many, 100.0 + at) for at, many in enumerate((2000, 3000, 2000, 1501, 1500))
        ] == [1, 1, 1, 1, 2]

    def test_counts_from_what_was_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        held = Held(monkeypatch)
        held.look(0, 1.0)
        assert [
            held.look(many, now)
            for many, now in ((4000, 100.0), (1000, 101.0), (501, 200.0), (500, 201.0))
        ] == [1, 2, 2, 3]

    def test_rests_between_two_looks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        held = Held(monkeypatch)
        held.look(0, 1.0)
        held.look(4000, 100.0)
        assert held.look(2000, 101.0) == 2
        assert held.look(0, 101.0 + COLLECT_SECONDS / 2) == 2
        assert held.look(0, 101.0 + COLLECT_SECONDS) == 3

    def test_does_nothing_for_a_few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        held = Held(monkeypatch)
        held.look(0, 1.0)
        assert [held.look(many, 100.0 + many) for many in (BURST - 1, 0, BURST, 0)] == [1, 1, 1, 2]
