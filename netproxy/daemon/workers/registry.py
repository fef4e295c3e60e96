"""Which worker has the session of which agent, in memory that all workers share.

Each worker writes its own table only, and reads all.  The parent makes the tables and clears
that of a worker that has died.
"""

from __future__ import annotations

import mmap
import threading

ENTRY = 64
"""Bytes of an entry: the length of the name, the name (at most 63 bytes), zeros."""
AGENTS_LIMIT = 4096
"""Agents of one worker that the others can find."""
_FREE = bytes(ENTRY)
_TABLE = ENTRY * AGENTS_LIMIT


class AgentRegistry:
    """The tables of all workers.  Thread: any."""

    def __init__(self, workers: int) -> None:
        """Make the tables; use_index() must follow in each worker."""
        self._workers = workers
        self._memory = mmap.mmap(-1, workers * _TABLE)
        self._index = 0
        # Guards writing to the own table.
        self._lock = threading.Lock()

    def use_index(self, index: int) -> None:
        """Be the worker with this number from now on."""
        self._index = index

    def holder(self, agent: str) -> int | None:
        """Return the worker that has the session of an agent, None if no worker has it."""
        entry = _entry(agent)
        for worker in range(self._workers):
            if self._find(worker, entry) >= 0:
                return worker
        return None

    def add(self, agent: str) -> bool:
        """Note that this worker has the session; return False if another worker has one."""
        entry = _entry(agent)
        with self._lock:
            free = self._find(self._index, _FREE)
            if free >= 0:
                self._memory[free : free + ENTRY] = entry
        # Written first: of two workers that add it at once, neither misses the other.
        if all(self._find(worker, entry) < 0 for worker in self._others()):
            return True
        self.remove(agent)
        return False

    def remove(self, agent: str) -> None:
        """Note that the session of an agent has ended here."""
        with self._lock:
            at = self._find(self._index, _entry(agent))
            if at >= 0:
                self._memory[at : at + ENTRY] = _FREE

    def clear(self, worker: int) -> None:
        """Forget the agents of a worker that has died."""
        self._memory[worker * _TABLE : (worker + 1) * _TABLE] = bytes(_TABLE)

    def _others(self) -> list[int]:
        return [worker for worker in range(self._workers) if worker != self._index]

    def _find(self, worker: int, entry: bytes) -> int:
        """Return where an entry is in a worker's table, -1 if it is not there."""
        at, end = worker * _TABLE, (worker + 1) * _TABLE
        while (at := self._memory.find(entry, at, end)) >= 0:
            if not at % ENTRY:
                return at
            at += 1
        return -1


def _entry(agent: str) -> bytes:
    name = agent.encode()
    return (bytes((len(name),)) + name).ljust(ENTRY, b"\0")
