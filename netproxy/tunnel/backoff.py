"""Delays the refusal of failed agent logins.

The delay doubles with each failure from the same address, so that tokens cannot be guessed fast.
Only delays are computed here; the bridge lets the connection wait.  Any thread.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 8.0
"""Below the time that a listener allows for a handshake."""

FORGET_SECONDS = 60.0
"""An address without a failure for so long starts again at FIRST_SECONDS."""

ADDRESSES_LIMIT = 1024
"""Addresses remembered.  The oldest is forgotten: attackers choose their addresses."""


class _Failures(NamedTuple):
    number: int
    last: float
    """Monotonic seconds."""


class BackOff:
    """The failed logins of each client address, and the delay that follows from them."""

    def __init__(self) -> None:
        # Guards _failures.
        self._lock = threading.Lock()
        self._failures: dict[str, _Failures] = {}
        """By client address, oldest first."""

    def __len__(self) -> int:
        return len(self._failures)

    def next_delay(self, host: str, now: float) -> float:
        """Count one more failure of a client address; return its delay in seconds."""
        with self._lock:
            before = self._failures.pop(host, _Failures(0, now))
            number = before.number if now - before.last < FORGET_SECONDS else 0
            while len(self._failures) >= ADDRESSES_LIMIT:
                del self._failures[next(iter(self._failures))]
            self._failures[host] = _Failures(number + 1, now)
        return min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(number, 16))
