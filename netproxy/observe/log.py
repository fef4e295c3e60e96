"""The log on standard error: one record a line, as text or JSON, and the access records.

It is made by hand because the logging package costs 2.4 MiB and fifteen times the time.
Deceiving characters in anything that a peer has sent are escaped.  Repeated warnings are
suppressed; their number is logged later.  Any thread may log and none waits: records are
written by a thread of their own (log_writer), and no file is read here.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Callable, Hashable, Mapping, NamedTuple, Sequence

from netproxy.observe.escaping import escape
from netproxy.observe.log_queue import LineQueue
from netproxy.observe.log_writer import LogWriter
from netproxy.observe.records import DEBUG, ERROR, INFO, LEVEL_NAMES, WARNING
from netproxy.observe.records import LEVELS as LEVELS
from netproxy.observe.records import Fields, LineFormat, access_fields, as_text, calls_of
from netproxy.observe.trace import LogTrace

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.flows import Record
    from netproxy.interfaces.services import Counter, Trace

LIMITED_SECONDS = 60.0
"""Between two records of the same key."""
LIMITED_KEYS = 1024
"""Keys to remember: a key may hold a name that a stranger has chosen."""
RECENT = 20
"""Warnings and errors to remember for the status page."""
QUEUE = 8192
"""Records that may wait for the reader of the log, if the configuration says nothing else."""
FLUSH_SECONDS = 1.0
"""How long the end of the daemon waits for the reader of the log."""
DROPPED = "records were dropped here: the log could not be written in time"
"""The message of a record that stands for dropped ones."""
LATER_LIMIT = 16
"""Texts of later() that the janitor has not written yet."""


class Notice(NamedTuple):
    """A warning or an error, as it was written."""

    at: float
    """Seconds since the epoch."""
    level: str
    text: str


class _Repeat:
    """When the last record of a key was written, and how many were suppressed since."""

    __slots__ = ("at", "text", "suppressed")

    def __init__(self, at: float, text: str) -> None:
        self.at = at
        self.text = text
        self.suppressed = 0


class Log:
    """The log.  The janitor's expire() reports suppressed records."""

    recent: deque[Notice]
    """The last warnings and errors, the newest last."""

    tracing: bool
    """True at level debug: connections and sessions then tell their steps."""

    counter: Counter | None = None
    """Counts the records that had to be dropped, by level; None counts nothing."""

    def __init__(
        self,
        level: str = "info",
        record_format: str = "text",
        access: bool = True,
        queue: int = QUEUE,
        descriptor: int = 2,
    ) -> None:
        """Write records of at least `level` to `descriptor`.

        `record_format` is "text" or "json"; `access` tells whether finished flows are logged.
        Up to `queue` records wait for the reader.
        """
        self._format = LineFormat()
        lines = LineQueue(tuple(LEVELS.values()), queue)
        self._writer = LogWriter(descriptor, lines, self._report_dropped, self._count_dropped)
        self.configure(level, record_format, access, queue)
        self.recent = deque(maxlen=RECENT)
        self._later: deque[str] = deque(maxlen=LATER_LIMIT)
        # Guards _repeats.
        self._lock = threading.Lock()
        self._repeats: dict[Hashable, _Repeat] = {}

    def configure(self, level: str, record_format: str, access: bool, queue: int) -> None:
        """Apply a new configuration.  Thread: main."""
        self.level, self._access = level, access
        self._format.configure(record_format)
        self._writer.set_limit(queue)

    def close(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Write what waits, for at most `seconds`; return False if something still waits.

        Records that come later are written if the process lives long enough.
        """
        self._write_later()
        return self._writer.close(seconds)

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked: threads of the parent held the locks.

        daemon.main registers it with os.register_at_fork().
        """
        self._lock = threading.Lock()
        self._writer.begin_in_child()

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

    def limited(self, key: Hashable, message: str, *values: object) -> None:
        """Write a warning, at most once a minute for each `key`."""
        text = message % values if values else message
        if self._admit(key, text):
            self.warning("%s", text)

    def auth_failed(self, client: str, user: str, listener: str) -> None:
        """Write the record of a refused login.

        Never suppressed, and in a fixed form: programs that ban addresses count these lines.
        """
        if self._level <= WARNING:
            self._emit(
                WARNING,
                {"msg": "auth_failed", "client": client, "user": user or "-", "listener": listener},
            )

    def exception(self, doing: str) -> None:
        """Write the exception that is being handled, with its traceback, as one record.

        The same exception from the same line is written once a minute.
        """
        self.fault(doing, sys.exc_info()[1])

    def fault(self, doing: str, error: BaseException | None) -> None:
        """Write an exception as exception() does."""
        kind = type(error).__name__ if error else "?"
        calls = calls_of(error.__traceback__ if error else None)
        if self._admit((kind, calls[:1]), f"internal error while {doing}"):
            self.error(
                "internal error while %s: %s: %s (%s)", doing, kind, error, " < ".join(calls)
            )

    def later(self, text: str) -> None:
        """Have the janitor write an error: for callers that may hold a lock of the log."""
        self._later.append(text)

    def finished(self, record: Record) -> None:
        """Write the access record of a flow, at level info.

        Without access records a refused flow has one nevertheless, once a minute and client.
        """
        if self._level <= INFO:
            decided, client = record.decided, record.flow.client.host
            if self._access or (decided and self._admit(("flow", client), decided)):
                self._emit(INFO, access_fields(record))

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
            partial(self._report_suppressed, repeat)
            for repeat in expired.values()
            if repeat.suppressed
        ]

    def _admit(self, key: Hashable, text: str) -> bool:
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
            self._report_suppressed(repeat)
        return True

    def _report_suppressed(self, repeat: _Repeat) -> None:
        self.warning("suppressed %d similar messages: %s", repeat.suppressed, repeat.text)

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

    def _report_dropped(self, dropped: Mapping[int, int]) -> tuple[int, bytes]:
        """Return the level and the line of a record that stands for `dropped`, by level."""
        fields: dict[str, object] = {"msg": DROPPED, "records": sum(dropped.values())}
        for level in sorted(dropped):
            fields[LEVEL_NAMES[level]] = dropped[level]
        self.recent.append(Notice(time.time(), LEVEL_NAMES[WARNING], as_text(fields)))
        return WARNING, self._format.line(WARNING, fields)
