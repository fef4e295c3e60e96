"""A lock that makes calls after its release.

What is found out under the lock of a busy table is then counted and written to the log without
it: other threads must not wait for a record.
"""

from __future__ import annotations

import threading

from netproxy.typed import Callable, Sequence


class DeferringLock:
    """A lock, used with `with`.  Not reentrant."""

    __slots__ = ("_lock", "_deferred")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by the lock.
        self._deferred: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        """Release the lock, then make the deferred calls in their order."""
        deferred: Sequence[Callable[[], None]] = ()
        if self._deferred:
            deferred, self._deferred = self._deferred, []
        self._lock.release()
        for call in deferred:
            call()

    def defer(self, call: Callable[[], None]) -> None:
        """Make a call after the release.  The caller holds the lock."""
        self._deferred.append(call)
