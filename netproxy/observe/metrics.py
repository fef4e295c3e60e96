"""Counters, by name and reason, and histograms.  Nothing is lost in silence: what is dropped is counted here.

Never on the path of a datagram that goes through; any thread may count.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import Sequence


class Counters:
    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _values
        self._values: dict[tuple[str, str], int] = {}

    def count(self, name: str, reason: str, amount: int = 1) -> None:
        key = name, reason
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def value(self, name: str, reason: str = "") -> int:
        with self._lock:
            return self._values.get((name, reason), 0)

    def items(self) -> list[tuple[str, str, int]]:
        """(name, reason, value), sorted."""
        with self._lock:
            return sorted((name, reason, value) for (name, reason), value in self._values.items())


class Histogram:
    """How many values were within each bound, and their sum.  Guarded by whoever owns it."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend; one more, without an end, is behind the last."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        other = Histogram(self.bounds)
        other.counts, other.sum = list(self.counts), self.sum
        return other
