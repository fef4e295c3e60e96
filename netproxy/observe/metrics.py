"""Counters by name and reason, and histograms.

Whatever is dropped, refused or failed is counted here, so that nothing is lost in silence.
A datagram that is forwarded touches no counter.  Any thread may count.
"""

from __future__ import annotations

import threading
from bisect import bisect_left

from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.services import Refusal


class Counters:
    """Totals since the start, by name and reason.  Thread: any."""

    def __init__(
        self,
        note: Callable[[Refusal, int], str] | None = None,
        leaves_out: Callable[[str, str, str, int], bool] | None = None,
    ) -> None:
        """`note(refusal, amount)` writes the record of a refusal and returns its id, if it has one.

        None writes none.

        `leaves_out(name, reason, client, amount)` tells before that it would write none.
        """
        self._note = note
        self._leaves_out = leaves_out
        # Guards _values.
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], int] = {}

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked: its parent keeps what was counted before.

        Another thread of the parent may have held the lock.
        """
        self._lock = threading.Lock()
        self._values = {}

    def count(self, name: str, reason: str, amount: int = 1) -> None:
        """Add `amount`."""
        key = name, reason
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def refuse(self, refusal: Refusal, amount: int = 1) -> str:
        """Count `amount` refusals, and write their record; return its id, "" without a record."""
        self.count(refusal.counter, refusal.reason, amount)
        return "" if self._note is None else self._note(refusal, amount)

    def refuse_unrecorded(self, name: str, reason: str, client: str, amount: int) -> bool:
        """Count `amount` refusals if they get no record now; return whether it did."""
        if self._leaves_out is None or not self._leaves_out(name, reason, client, amount):
            return False
        self.count(name, reason, amount)
        return True

    def value(self, name: str, reason: str = "") -> int:
        """Return one total; 0 if nothing was counted."""
        with self._lock:
            return self._values.get((name, reason), 0)

    def items(self) -> list[tuple[str, str, int]]:
        """Return (name, reason, total) of each counter, sorted."""
        with self._lock:
            return sorted((name, reason, value) for (name, reason), value in self._values.items())


class Histogram:
    """How many values were within each bound, and their sum.  Its owner guards it."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Count values up to each of `bounds`, which ascend, and above the last."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """Return a copy that does not change."""
        other = Histogram(self.bounds)
        other.counts, other.sum = list(self.counts), self.sum
        return other
