"""Counters, by name and reason.  Nothing is lost in silence: what is dropped is counted here.

Never on the path of a datagram that goes through; any thread may count.
"""
from __future__ import annotations

import threading


class Counters:
    def __init__(self) -> None:
        self._lock = threading.Lock()       # guards _values
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
