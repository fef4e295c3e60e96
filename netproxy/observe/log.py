"""The log on standard error: one record a line, as text or JSON, and the access records.

It is made by hand because the logging package costs 2.4 MiB and fifteen times the time.
Deceiving characters in anything that a peer has sent are escaped.  Repeated warnings are
suppressed; their number is logged later.  Any thread may log and none waits: records are
written by a thread of their own (log_writer), and no file is read here.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque

from netproxy.interfaces.services import NO_ACCESS_FILE, AccessFileName, Counter, Trace
from netproxy.observe.escaping import escape
from netproxy.observe.incidents import LOGIN
from netproxy.observe.writing.log_queue import LineQueue
from netproxy.observe.writing.log_writer import LogWriter
from netproxy.observe.records import DEBUG, ERROR, INFO, LEVEL_NAMES, WARNING
from netproxy.observe.records import LEVELS as LEVELS
from netproxy.observe.records import Fields, LineFormat, as_text, calls_of
from netproxy.observe.writing.repeats import Repeats
from netproxy.observe.trace import LogTrace
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Callable, Hashable, Iterable, Mapping, Sequence
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.flows import Record
    from netproxy.observe.incidents import Incidents
    from netproxy.observe.writing.access_file import AccessFile

RECENT = 20
"""Warnings and errors to remember for the status page."""
QUEUE = 8192
"""Records that may wait for the reader of the log, if the configuration says nothing else."""
FLUSH_SECONDS = 1.0
"""How long the end of the daemon waits for the reader of the log."""
DROPPED = "records were dropped here: the log could not be written in time"
LATER_LIMIT = 16  # texts of later() that the janitor has not written yet


class Notice(NamedTuple):
    """A warning or an error, as it was written."""

    at: float
    """Seconds since the epoch."""
    level: str
    text: str


class Log:
    """The log.  The janitor's expire() reports suppressed records."""

    recent: deque[Notice]
    """The last warnings and errors, the newest last."""

    tracing: bool
    """True at level debug: connections and sessions then tell their steps."""

    counter: Counter | None = None
    """Counts the records that had to be dropped, by level; None counts nothing."""

    incidents: Incidents | None = None
    """Remembers refused logins; None remembers none."""

    def __init__(
        self,
        level: str = "info",
        record_format: str = "text",
        access: bool = True,
        queue: int = QUEUE,
        file: AccessFileName = NO_ACCESS_FILE,
        descriptor: int = 2,
    ) -> None:
        """Write records of at least `level` to `descriptor`.

        `record_format` is "text" or "json"; `access` tells whether finished flows are logged, in
        `file` if it names one.  Up to `queue` records wait for the reader.
        """
        self._format = LineFormat("JOURNAL_STREAM" in os.environ)
        self._file: AccessFile | None = None
        # Whether the lines of flows go there; it stays open if a reload takes it away.
        self._to_file = False
        lines = LineQueue(tuple(LEVELS.values()), queue)
        self._writer = LogWriter(descriptor, lines, self._report_dropped, self._count_dropped)
        self.recent = deque(maxlen=RECENT)
        self._later: deque[str] = deque(maxlen=LATER_LIMIT)
        self._repeats = Repeats(self._report_suppressed)
        self.configure(level, record_format, access, queue, file)

    def configure(
        self,
        level: str,
        record_format: str,
        access: bool,
        queue: int,
        file: AccessFileName = NO_ACCESS_FILE,
    ) -> None:
        """Apply a new configuration.  Thread: main."""
        self.level, self._access = level, access
        self._format.configure(record_format)
        self._writer.set_limit(queue)
        # Assigned once: a flow that ends meanwhile has its line in one place.
        self._to_file = bool(file.path) and self._use_file(file, queue)

    def _use_file(self, file: AccessFileName, queue: int) -> bool:
        """Open a file for the lines of flows; return False if it cannot be opened."""
        # late: few logs have such a file
        from netproxy.observe.writing.access_file import AccessFile

        try:
            if self._file is None:
                self._file = AccessFile(file, queue, self._count_lost_line)
            else:
                self._file.use(file, queue)
        except OSError as error:
            self.error("log.file: cannot open %s: %s", file.path, error.strerror)
            return False
        return True

    def reopen(self) -> None:
        """Begin a new access file: the old one was renamed.  Thread: main."""
        if self._to_file and self._file is not None:
            try:
                self._file.reopen()
            except OSError as error:
                self.error("log.file: cannot open it again: %s", error.strerror)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors of its own files, which a forked process needs as well."""
        return () if self._file is None else (self._file.descriptor,)

    def close(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Write what waits, for at most `seconds`; return False if something still waits.

        Records that come later are written if the process lives long enough.
        """
        self._write_later()
        if self._file is not None:
            self._file.close(seconds)
        return self._writer.close(seconds)

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked: threads of the parent held the locks.

        daemon.main registers it with os.register_at_fork().
        """
        self._repeats.begin_in_child()
        self.recent = deque(maxlen=RECENT)
        self._writer.begin_in_child()
        if self._file is not None:
            self._file.begin_in_child()

    @property
    def level(self) -> str:
        """The name of the level, a key of LEVELS."""
        return LEVEL_NAMES[self._level]

    @level.setter
    def level(self, name: str) -> None:
        """Set the level until the next configure()."""
        self._level = LEVELS[name]
        self.tracing = self._level <= DEBUG

    # -- records

    def debug(self, message: str, *values: object) -> None:
        """Write a record at level debug, formatted with %."""
        if self._level <= DEBUG:
            self._write(DEBUG, message, values)

    def info(self, message: str, *values: object) -> None:
        """Write a record at level info."""
        if self._level <= INFO:
            self._write(INFO, message, values)

    def warning(self, message: str, *values: object) -> None:
        """Write a record at level warning."""
        if self._level <= WARNING:
            self._write(WARNING, message, values)

    def error(self, message: str, *values: object) -> None:
        """Write a record at level error, which no setting hides."""
        self._write(ERROR, message, values)

    def answer(self, message: str, *values: object) -> None:
        """Write a record at level info that an operator has asked for: no setting hides it."""
        self._write(INFO, message, values)

    def answers(self, lines: Iterable[str]) -> None:
        """Write several records as answer() does."""
        for line in lines:
            self.answer("%s", line)

    def limited(self, key: Hashable, message: str, *values: object) -> None:
        """Write a warning, at most once a minute for each `key`."""
        text = message % values if values else message
        if self._repeats.admit(key, text):
            self.warning("%s", text)

    def auth_failed(self, client: str, user: str, listener: str) -> None:
        """Write the record of a refused login.

        Never suppressed, and in a fixed form: programs that ban addresses count these lines.
        """
        fields = {"msg": "auth_failed", "client": client, "user": user or "-", "listener": listener}
        if self.incidents is not None:
            fields["id"] = self.incidents.add(LOGIN, client, {**fields, "reason": "wrong login"})
        if self._level <= WARNING:
            self._emit(WARNING, fields)

    def exception(self, doing: str) -> None:
        """Write the exception that is being handled, with its traceback, as one record.

        The same exception from the same line is written once a minute.
        """
        self.fault(doing, sys.exc_info()[1])

    def fault(self, doing: str, error: BaseException | None) -> None:
        """Write an exception as exception() does."""
        kind = type(error).__name__ if error else "?"
        calls = calls_of(error.__traceback__ if error else None)
        if self._repeats.admit((kind, calls[:1]), f"internal error while {doing}"):
            self.error(
                "internal error while %s: %s: %s (%s)", doing, kind, error, " < ".join(calls)
            )

    def later(self, text: str) -> None:
        """Have the janitor write an error: for callers that may hold a lock of the log."""
        self._later.append(text)

    def finished(self, record: Record) -> None:
        """Write the access record of a flow: to the access file, or at level info.

        Without access records a refused flow has one nevertheless, once a minute and client.
        """
        file = self._file
        if file is not None and self._to_file:
            file.put(record)
        elif self._level <= INFO:
            decided, client = record.decided, record.flow.client.host
            if self._access or (decided and self._repeats.admit(("flow", client), decided)):
                self._writer.put(INFO, self._format.access_line(record))

    def record(self, level: int, fields: Fields) -> None:
        """Write a record of several fields."""
        if self._level <= level:
            self._emit(level, fields)

    def trace(self, listener: str, client: Address) -> Trace:
        """Return what writes the steps of a client's connection or session."""
        return LogTrace(self, listener, client)

    # -- suppressed records

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Forget keys of more than a minute ago; return calls that report what they suppressed."""
        self._write_later()
        return self._repeats.expire(now)

    def _report_suppressed(self, number: int, text: str) -> None:
        self.warning("suppressed %d similar messages: %s", number, text)

    # -- writing

    def _write_later(self) -> None:
        while self._later:
            self.error("%s", self._later.popleft())

    def _write(self, level: int, message: str, values: tuple[object, ...]) -> None:
        text = escape(message % values if values else message)
        self._emit(level, {"msg": text})

    def _emit(self, level: int, fields: Fields) -> None:
        if level >= WARNING:
            self.recent.append(Notice(time.time(), LEVEL_NAMES[level], as_text(fields)))
        self._writer.put(level, self._format.line(level, fields))

    # -- dropped records

    def _count_dropped(self, level: int) -> None:
        if self.counter is not None:
            self.counter.count("log_dropped", LEVEL_NAMES[level])

    def _count_lost_line(self, level: int) -> None:
        """Count a line that the access file does not take, and tell it while it lasts."""
        self._count_dropped(level)
        self.limited("log.file", "log.file: lines are lost: the disk is full, or nobody reads")

    def _report_dropped(self, dropped: Mapping[int, int]) -> tuple[int, bytes]:
        """Return the level and the line of a record that stands for `dropped`, by level."""
        fields: dict[str, object] = {"msg": DROPPED, "records": sum(dropped.values())}
        for level in sorted(dropped):
            fields[LEVEL_NAMES[level]] = dropped[level]
        self.recent.append(Notice(time.time(), LEVEL_NAMES[WARNING], as_text(fields)))
        return WARNING, self._format.line(WARNING, fields)
