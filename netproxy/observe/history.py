"""The history of the last day: bytes and flows, a sample every five minutes, in memory.

Expirable: the janitor takes the samples.  The status page reads them on its thread.
"""

from __future__ import annotations

import threading
from array import array
from typing import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import HistoryRow
    from netproxy.observe.flows import Flows

SAMPLE_SECONDS = 300.0
SAMPLES = 288
"""A day of samples, 24 bytes each."""
_FIELDS = 3


class History:
    """Remembers what flows have moved in each period of the last day."""

    def __init__(self, flows: Flows) -> None:
        """`flows` has the totals and the running flows."""
        self._flows = flows
        # Guards everything below.
        self._lock = threading.Lock()
        # Of each period: bytes up, bytes down, and the flows that were running at its end.
        self._values = array("Q")
        self._up = self._down = 0
        self._due = 0.0
        """When the next sample is taken, monotonic seconds; 0 before the first period."""

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Take a sample if a period has ended at `now` (monotonic seconds); nothing expires."""
        if now < self._due:
            return ()
        totals = self._flows.totals().values()
        up = sum(total.traffic.sent for total in totals)
        down = sum(total.traffic.received for total in totals)
        with self._lock:
            if self._due:
                self._values.extend((up - self._up, down - self._down, len(self._flows)))
                del self._values[: -SAMPLES * _FIELDS]
            self._up, self._down = up, down
            late = now - self._due
            # A machine that was busy for longer than a period skips samples.
            self._due = now + SAMPLE_SECONDS - (late if late < SAMPLE_SECONDS else 0.0)
        return ()

    def row(self) -> HistoryRow:
        """Return the samples, the oldest first."""
        with self._lock:
            values = self._values.tolist()
        samples = [values[at : at + _FIELDS] for at in range(0, len(values), _FIELDS)]
        return {"seconds": SAMPLE_SECONDS, "samples": samples}
