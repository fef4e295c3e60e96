"""The access log in a file of its own: a line for each finished flow, in one of four forms.

Lines are written by a thread of their own (log_writer), as those of the log are.  reopen() begins
a new file after logrotate has renamed the old one: the descriptor stays the same, so that no line
is lost and no lock is needed.
"""

from __future__ import annotations

import os

from netproxy.observe.writing.access_formats import make_format
from netproxy.observe.writing.log_queue import LineQueue
from netproxy.observe.writing.log_writer import LogWriter
from netproxy.observe.records import INFO
from netproxy.typed import TYPE_CHECKING, Callable, Mapping

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Record
    from netproxy.interfaces.services import AccessFileName

MODE = 0o640
"""Permissions of a new file: it tells who has talked to whom."""
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""A FIFO without a reader is an error instead of a wait; processes append whole lines."""


class AccessFile:
    """An access log.  put() may be called by any thread; everything else by the main one."""

    def __init__(self, file: AccessFileName, queue: int, count: Callable[[int], None]) -> None:
        """Open the file.  Raises OSError.  Up to `queue` lines wait for the disk.

        `count` is told the level of each lost line.  Any thread may call it.
        """
        self._path = file.path
        self._line = make_format(file.form)
        self.descriptor = os.open(file.path, _FLAGS, MODE)
        lines = LineQueue((INFO,), queue)
        self._writer = LogWriter(self.descriptor, lines, _no_report, count)

    def use(self, file: AccessFileName, queue: int) -> None:
        """Write to another file, in another form.  Raises OSError."""
        self._writer.set_limit(queue)
        self._path = file.path
        self._line = make_format(file.form)
        self.reopen()

    def put(self, record: Record) -> None:
        """Have the line of a flow written.  Never blocks."""
        self._writer.put(INFO, self._line(record))

    def reopen(self) -> None:
        """Write to the file that has the path now; make it if there is none.  Raises OSError."""
        fresh = os.open(self._path, _FLAGS, MODE)
        try:
            os.dup2(fresh, self.descriptor, inheritable=False)
        finally:
            os.close(fresh)

    def close(self, seconds: float) -> bool:
        """Write what waits, for at most `seconds`; return False if something still waits.

        The descriptor stays open: a flow that ends at this moment still has its line.
        """
        return self._writer.close(seconds)

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked: what waits is written by its parent."""
        self._writer.begin_in_child()


def _no_report(dropped: Mapping[int, int]) -> tuple[int, bytes]:
    """Return nothing to write: programs that read this file know no record of lost lines."""
    return INFO, b""
