"""A bounded queue of log records in their order; if it is full, the least important ones go.

Records that are dropped leave a gap.  The queue remembers where it is and how many records of
each level were lost, so that the log can tell it in that place.
"""

from __future__ import annotations

import math
from collections import deque

from netproxy.typed import Mapping, NamedTuple, Sequence

RECORD_BYTES = 512
"""Bytes of memory for each record of the queue's limit.  Most records have 200; long names that
strangers choose must not multiply the memory."""


class Line(NamedTuple):
    """A line to write: a record, or the report of records that were dropped."""

    number: int
    """Position in the log; of a report, that of the first dropped record."""
    level: int
    data: bytes
    """With the newline."""
    reported: Mapping[int, int] | None = None
    """The numbers of dropped records by level that a report tells, None for a record."""


class LineQueue:
    """A bounded queue of records in their order.  The owner guards it with a lock."""

    def __init__(self, levels: Sequence[int], limit: int) -> None:
        """Hold `limit` records; `levels` are all levels, ascending."""
        self.limit = limit
        # By level, so that the least important record is found at once.
        self._lines: dict[int, deque[Line]] = {level: deque() for level in levels}
        self._all = tuple(self._lines.values())
        self._count = self._bytes = self._number = 0
        # Records dropped since the last report, by level, and the position of the first.
        self._dropped: dict[int, int] = {}
        self._gap: float = math.inf

    def empty_copy(self) -> LineQueue:
        """Return a queue with the same limit and without records."""
        return LineQueue(tuple(self._lines), self.limit)

    def __len__(self) -> int:
        """Return the number of records."""
        return self._count

    @property
    def has_gap(self) -> bool:
        """Whether records were dropped that no report has told yet."""
        return bool(self._dropped)

    def put(self, level: int, data: bytes) -> Sequence[int]:
        """Add a record; return the levels of the records that were dropped for want of room.

        The new record is dropped unless a less important one waits.  Of those the newest goes,
        so that what is left has few gaps.
        """
        self._number += 1
        line = Line(self._number, level, data)
        dropped: list[int] = []
        while self._is_full(len(data)):
            lowest = next(filter(self._lines.__getitem__, self._lines))
            victim = line if lowest >= level else self._remove(self._lines[lowest].pop())
            self.note_dropped(victim)
            dropped.append(victim.level)
            if victim is line:
                return dropped
        self._lines[level].append(line)
        self._count += 1
        self._bytes += len(data)
        return dropped

    def note_dropped(self, line: Line) -> None:
        """Count a line that could not be written, for the next report."""
        self._gap = min(self._gap, line.number)
        for level, count in (line.reported or {line.level: 1}).items():
            self._dropped[level] = self._dropped.get(level, 0) + count

    def take_gap(self) -> tuple[int, Mapping[int, int]] | None:
        """Return what the next report has to tell, if its place in the order has come.

        That is the position of the first dropped record, and their numbers by level.
        """
        if not self._dropped or any(lines and lines[0].number < self._gap for lines in self._all):
            return None
        gap, self._gap = int(self._gap), math.inf
        dropped, self._dropped = self._dropped, {}
        return gap, dropped

    def take(self, size: int) -> list[Line]:
        """Remove and return the next records: up to `size` bytes, at least one, up to a gap."""
        taken: list[Line] = []
        while waiting := list(filter(None, self._all)):
            # Most of the time all have one level.
            first = waiting[0] if len(waiting) == 1 else min(waiting, key=_number_of_first)
            line = first[0]
            size -= len(line.data)
            if line.number > self._gap or (taken and size < 0):
                break
            taken.append(self._remove(first.popleft()))
        return taken

    def _is_full(self, size: int) -> bool:
        """Return whether there is no room for another record of `size` bytes."""
        if not self._count:
            return False
        return self._count >= self.limit or self._bytes + size > self.limit * RECORD_BYTES

    def _remove(self, line: Line) -> Line:
        """Count a line out that was taken from its deque."""
        self._count -= 1
        self._bytes -= len(line.data)
        return line


def _number_of_first(lines: deque[Line]) -> int:
    return lines[0].number
