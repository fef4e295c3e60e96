"""Fails a test that is stuck in a call, such as a regular expression that backtracks.

For inputs on which only a computation of more than linear time takes longer than the patience.
Main thread only.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Iterator


@contextlib.contextmanager
def stuck_after(seconds: float) -> Iterator[None]:
    """Raise AssertionError in the context if it takes longer."""

    def fail(*_: object) -> None:
        raise AssertionError(f"still not finished after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
