"""Gives memory back to the system: after a burst of connections, and while there are many.

Thread: the janitor's.
"""

from __future__ import annotations

import gc

from netproxy.net.syscalls import trim
from netproxy.typed import Callable, Sequence

BURST = 16
"""Threads, flows and the like that must have gone before memory is given back."""
COLLECT_SECONDS = 15.0
"""The least time between two collections: with 10,000 connections one takes 50 ms."""
STEADY_SECONDS = 60.0
"""How often memory is given back while there are BURST things or more.  Flows that come and go
leave holes in the heap, which would grow for hours."""


class MemoryTrimmer:
    """Gives memory back to the system once half of a burst has gone, and every STEADY_SECONDS.

    Expirable: the janitor calls it every second.
    """

    def __init__(self, count: Callable[[], int], release: Callable[[], None]) -> None:
        """`count()` returns how many things take memory: threads, flows, watched descriptors.

        `release()` lets spare buffers go.
        """
        self._count, self._release = count, release
        # The most since memory was given back.  At the start, reading the configuration counts
        # as a burst.
        self._most = 2 * BURST
        self._rest_until = 0.0
        # When memory was given back the last time.
        self._trimmed_at = 0.0

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Collect and trim if it is worth it at `now` (monotonic seconds); nothing expires."""
        count = self._count()
        self._most = max(self._most, count)
        if self._most - count >= max(BURST, count) and now >= self._rest_until:
            self._most, self._rest_until = count, now + COLLECT_SECONDS
            # Garbage of connections keeps pages in use that could go otherwise.
            gc.collect()
            self._trim(now)
        elif count >= BURST and now >= self._trimmed_at + STEADY_SECONDS:
            self._trim(now)
        return ()

    def _trim(self, now: float) -> None:
        self._trimmed_at = now
        self._release()
        trim()
