"""Divides an amount of memory between checks of passwords.  Knows nothing of passwords."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from contextlib import contextmanager
from typing import Iterator


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

    Those that wait get it in turn by client: many guesses of a client delay another by one.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of all checks together."""
        self._limit = limit
        # Guards _free and _waiting.
        self._lock = threading.Lock()
        self._free = limit
        self._waiting: OrderedDict[str, deque[_Turn]] = OrderedDict()
        """By client; the first client is the next one."""

    @contextmanager
    def of(self, size: int, client: str = "") -> Iterator[None]:
        """Reserve `size` bytes, or the whole limit if that is less, until the end; may wait."""
        size = min(size, self._limit)
        turn = self._enter(size, client)
        if turn is not None:
            turn.granted.acquire()
        try:
            yield
        finally:
            self._leave(size)

    def _enter(self, size: int, client: str) -> _Turn | None:
        """Take memory, or return the turn to wait for."""
        with self._lock:
            if not self._waiting and size <= self._free:
                self._free -= size
                return None
            turn = _Turn(size)
            self._waiting.setdefault(client, deque()).append(turn)
            return turn

    def _leave(self, size: int) -> None:
        """Give memory back, and grant it to those whose turn it is."""
        with self._lock:
            self._free += size
            while self._waiting:
                client, turns = next(iter(self._waiting.items()))
                # Small checks do not overtake a large one.
                if turns[0].size > self._free:
                    return
                turn = turns.popleft()
                self._free -= turn.size
                self._waiting.move_to_end(client)
                if not turns:
                    del self._waiting[client]
                turn.granted.release()
