"""Suppresses log records that repeat: one a minute for each key; the number of others is told.

Thread: any.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from netproxy.typed import Callable, Hashable, Sequence

LIMITED_SECONDS = 60.0
"""Between two records of the same key."""
LIMITED_KEYS = 1024
"""Keys to remember: a key may hold a name that a stranger has chosen."""


class _Repeat:
    """When the last record of a key was written, and how many were suppressed since."""

    __slots__ = ("at", "text", "suppressed")

    def __init__(self, at: float, text: str) -> None:
        self.at = at
        self.text = text
        self.suppressed = 0


class Repeats:
    """The keys of the last minute."""

    def __init__(self, report: Callable[[int, str], None]) -> None:
        """`report(number, text)` tells how many records like `text` were suppressed."""
        self._report = report
        self.begin_in_child()

    def begin_in_child(self) -> None:
        """Forget all, also in a process that was forked while the lock was held."""
        # Guards _repeats.
        self._lock = threading.Lock()
        self._repeats: dict[Hashable, _Repeat] = {}

    def __len__(self) -> int:
        """Return the number of keys that are remembered."""
        return len(self._repeats)

    def admit(self, key: Hashable, text: str) -> bool:
        """Return whether a record of this key may be written; count it as suppressed if not."""
        now = time.monotonic()
        with self._lock:
            repeat = self._repeats.pop(key, None)
            if repeat is not None and now - repeat.at < LIMITED_SECONDS:
                repeat.suppressed += 1
                self._repeats[key] = repeat
                return False
            if repeat is None and len(self._repeats) >= LIMITED_KEYS:
                # The key that was quiet for longest makes room.
                repeat = self._repeats.pop(next(iter(self._repeats)))
            self._repeats[key] = _Repeat(now, text)
        if repeat is not None and repeat.suppressed:
            self._report(repeat.suppressed, repeat.text)
        return True

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Forget keys of more than a minute ago; return calls that report what they suppressed."""
        if not self._repeats:
            return ()
        with self._lock:
            expired = {
                key: repeat
                for key, repeat in self._repeats.items()
                if now - repeat.at >= LIMITED_SECONDS
            }
            for key in expired:
                del self._repeats[key]
        return [
            partial(self._report, repeat.suppressed, repeat.text)
            for repeat in expired.values()
            if repeat.suppressed
        ]
