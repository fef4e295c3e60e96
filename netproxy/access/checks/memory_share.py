"""Divides an amount of memory between checks of passwords.  Knows nothing of passwords."""

from __future__ import annotations

import threading
from collections import deque


class _Turn:
    """A check that waits for memory."""

    __slots__ = ("size", "granted")

    def __init__(self, size: int) -> None:
        self.size = size
        self.granted = threading.Lock()
        """Held until the check has its memory."""
        self.granted.acquire()


class MemoryShare:
    """Divides an amount of memory between the checks that run at the same time.

    Those that wait get it in the order in which they have come.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of all checks together."""
        self._limit = limit
        # Guards _free and _waiting.
        self._lock = threading.Lock()
        self._free = limit
        self._waiting: deque[_Turn] = deque()

    def of(self, size: int) -> _Reserved:
        """Return a context with `size` bytes, or the whole limit if that is less; may wait."""
        return _Reserved(self, min(size, self._limit))

    def take(self, size: int) -> _Turn | None:
        """Take memory, or return the turn to wait for."""
        with self._lock:
            if not self._waiting and size <= self._free:
                self._free -= size
                return None
            turn = _Turn(size)
            self._waiting.append(turn)
            return turn

    def give_back(self, size: int) -> None:
        """Give memory back, and grant it to those whose turn it is."""
        with self._lock:
            self._free += size
            # Small checks do not overtake a large one.
            while self._waiting and self._waiting[0].size <= self._free:
                turn = self._waiting.popleft()
                self._free -= turn.size
                turn.granted.release()


class _Reserved:
    """Memory of a share that is taken within the context."""

    __slots__ = ("_share", "_size")

    def __init__(self, share: MemoryShare, size: int) -> None:
        self._share, self._size = share, size

    def __enter__(self) -> None:
        turn = self._share.take(self._size)
        if turn is not None:
            turn.granted.acquire()

    def __exit__(self, *error: object) -> None:
        self._share.give_back(self._size)
