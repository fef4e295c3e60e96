"""Writes log records on a thread of its own: no caller waits for the reader of the log.

Records wait in a bounded queue.  If it is full, the least important record is dropped, errors
last.  Dropped records are counted by level, and a record in their place says how many they
were.  The thread starts with the first record.  A descriptor that fails costs records, never
the service: a full disk is tried again, any other error drops what could not be written.
"""

from __future__ import annotations

import errno
import math
import os
import select
import threading
import time

from netproxy.observe.writing.log_queue import Line, LineQueue
from netproxy.typed import Callable, Mapping, Sequence

WRITE_BYTES = 4096
"""Bytes of one write, unless a single record is longer.  Writes of up to PIPE_BUF bytes are
atomic (pipe(7)): lines of processes that share a pipe do not mix."""
GATHER_SECONDS = 0.01
"""How long the thread lets records gather after the first one.  A busy daemon wakes it 100 times
a second at most, not once for each record."""
RETRY_SECONDS = 1.0
"""Between two attempts to write while there is no space."""
_NEWLINE = ord("\n")
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS, errno.ENOMEM})


class LogWriter:
    """The queue of a descriptor, and the thread that writes it.  Any thread may put records."""

    def __init__(
        self,
        descriptor: int,
        queue: LineQueue,
        report: Callable[[Mapping[int, int]], tuple[int, bytes]],
        count: Callable[[int], None],
    ) -> None:
        """Write to `descriptor`.

        `report(dropped)` returns the level and the line of a report.  `count(level)` counts a
        dropped record.  Both run on any thread and must not block.
        """
        self._descriptor = descriptor
        self._queue = queue
        self._report = report
        self._count = count
        self._begin()

    def _begin(self) -> None:
        # Of the thread that writes alone: whether the last write failed, and whether what has
        # been written ends within a line.
        self._failing = self._torn = False
        # Guards _queue and all below.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._idle = False
        self._closing = False

    def put(self, level: int, data: bytes) -> None:
        """Have a record written: a line with its newline.  Never blocks."""
        fresh: threading.Thread | None = None
        with self._lock:
            dropped = self._queue.put(level, data)
            if self._thread is None:
                fresh = self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            elif self._idle:
                self._idle = False
                self._wake.notify()
        for dropped_level in dropped:
            self._count(dropped_level)
        if fresh is not None:
            try:
                fresh.start()
            except RuntimeError:
                # No thread can be had now: the next record tries again.
                self._note_end(fresh)

    def set_limit(self, records: int) -> None:
        """Let up to `records` records wait from now on."""
        with self._lock:
            self._queue.limit = records

    def close(self, seconds: float) -> bool:
        """Write what waits, for at most `seconds`, and end the thread.

        Returns False if something still waits for the reader.  A later record starts another
        thread, which ends as soon as it has written.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            self._closing = True
            self._wake.notify()
            self._ended.wait_for(self._has_no_thread, seconds)
        # Records are left if no thread could be had for them.
        while self._has_no_thread() and self._is_due() and time.monotonic() < deadline:
            self._write(self._take(), deadline)
        return self._has_no_thread() and not self._is_due()

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked: what waits is written by its parent."""
        self._queue = self._queue.empty_copy()
        self._begin()

    def _has_no_thread(self) -> bool:
        return self._thread is None

    def _note_end(self, thread: threading.Thread) -> None:
        """Note that a thread has ended, or never began."""
        with self._lock:
            if self._thread is thread:
                self._thread = None
                self._ended.notify_all()

    # -- the thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._write(self._take())
        finally:
            self._note_end(threading.current_thread())

    def _wait(self) -> bool:
        """Wait until there is something to write; return False if the thread is to end."""
        with self._lock:
            while not self._is_due():
                if self._closing:
                    self._thread = None
                    self._ended.notify_all()
                    return False
                self._idle = True
                self._wake.wait()
                if not self._closing:
                    # Only close() ends this wait early: put() wakes an idle thread alone.
                    self._wake.wait(GATHER_SECONDS)
        return True

    def _is_due(self) -> bool:
        """Return whether a record waits, or a report that may succeed without a record."""
        return bool(self._queue) or (self._queue.has_gap and not self._failing)

    def _take(self) -> list[Line]:
        """Return the next lines to write; the first may be a report."""
        with self._lock:
            gap = self._queue.take_gap()
            lines = self._queue.take(WRITE_BYTES)
        if gap is not None:
            number, dropped = gap
            level, data = self._report(dropped)
            lines.insert(0, Line(number, level, data, dropped))
        return lines

    def _write(self, lines: Sequence[Line], deadline: float = math.inf) -> None:
        """Write lines until `deadline` (monotonic seconds); drop what cannot be written."""
        written = self._write_bytes(b"".join(line.data for line in lines), deadline)
        for line in lines:
            written -= len(line.data)
            if written < 0:
                self._drop(line)

    def _drop(self, line: Line) -> None:
        with self._lock:
            self._queue.note_dropped(line)
        if line.reported is None:
            self._count(line.level)

    def _write_bytes(self, data: bytes, deadline: float) -> int:
        """Write `data`; return how many of its bytes were written."""
        # The rest of a line that was torn is lost; it must not swallow the next line.
        before = b"\n" if self._torn else b""
        data = before + data
        left = memoryview(data)
        while left and self._has_time(deadline):
            try:
                left = left[os.write(self._descriptor, left) :]
                self._failing = False
            except BlockingIOError:
                self._wait_for_reader(min(RETRY_SECONDS, deadline - time.monotonic()))
            except OSError as error:
                self._failing = True
                if error.errno not in _NO_SPACE:
                    break
                self._rest(min(RETRY_SECONDS, deadline - time.monotonic()))
        written = len(data) - len(left)
        if written:
            self._torn = data[written - 1] != _NEWLINE
        return max(0, written - len(before))

    def _has_time(self, deadline: float) -> bool:
        """Return whether a write may be tried; with a deadline it must not block either."""
        if deadline == math.inf:
            return True
        seconds = deadline - time.monotonic()
        return seconds > 0 and self._wait_for_reader(seconds)

    def _wait_for_reader(self, seconds: float) -> bool:
        """Wait until the descriptor takes more; return False if it does not within `seconds`."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def _rest(self, seconds: float) -> None:
        with self._lock:
            self._wake.wait(max(0.0, seconds))
