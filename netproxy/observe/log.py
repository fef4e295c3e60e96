"""The log on standard error: one record a line, as text or JSON, and the access records.

It is written by hand because the logging package costs 2.4 MiB and fifteen times the time.
Control characters in anything that a peer has sent are escaped.  A standard error that
cannot be written to costs the record, never the service.  Repeated warnings are suppressed;
their number is logged later.  Any thread may log; the janitor asks for these numbers.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Callable, Hashable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Record

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR}
_NAMES = {value: name for name, value in LEVELS.items()}
# The priorities of sd-daemon(3).
_PRIORITIES = {DEBUG: 7, INFO: 6, WARNING: 4, ERROR: 3}
LIMITED_SECONDS = 60.0
"""Between two records of the same key."""
LIMITED_KEYS = 1024
"""Keys to remember: a key may hold a name that a stranger has chosen."""
RECENT = 20
"""Warnings and errors to remember for the status page."""
# C0, DEL, C1, the line separators of Unicode, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Printable ASCII without blank and quotation mark.
_SIMPLE = re.compile(r"[!#-~]+\Z")


def escape(text: str) -> str:
    """Return `text` with its control characters escaped, fit for one line of a log."""
    return _UNSAFE.sub(_escape_match, text)


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

    def __init__(
        self,
        level: str = "info",
        record_format: str = "text",
        access: bool = True,
        descriptor: int = 2,
    ) -> None:
        """Write records of at least `level` to `descriptor`.

        `record_format` is "text" or "json"; `access` tells whether finished flows are logged.
        """
        self._level = LEVELS[level]
        self._json = record_format == "json"
        self._access = access
        # The current second since the epoch, and its text.
        self._stamp = (0, "")
        self._descriptor = descriptor
        self._journal = "JOURNAL_STREAM" in os.environ
        self.recent = deque(maxlen=RECENT)
        # Guards _repeats.
        self._lock = threading.Lock()
        self._repeats: dict[Hashable, _Repeat] = {}

    def configure(self, level: str, record_format: str, access: bool) -> None:
        """Apply a new configuration."""
        self._level, self._json, self._access = LEVELS[level], record_format == "json", access

    @property
    def level(self) -> str:
        """The name of the level, a key of LEVELS."""
        return _NAMES[self._level]

    @level.setter
    def level(self, name: str) -> None:
        """Set the level until the next configure()."""
        self._level = LEVELS[name]

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
        # Imported late: only needed if something is wrong.
        import traceback

        kind, error, _ = sys.exc_info()
        kind_name = kind.__name__ if kind else "?"
        frames = traceback.extract_tb(error.__traceback__) if error else []
        calls = " < ".join(
            f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"
            for frame in reversed(frames)
        )
        raised_at = (frames[-1].filename, frames[-1].lineno) if frames else None
        if self._admit((kind_name, raised_at), f"internal error while {doing}"):
            self.error("internal error while %s: %s: %s (%s)", doing, kind_name, error, calls)

    def finished(self, record: Record) -> None:
        """Write the access record of a flow, at level info."""
        if self._access and self._level <= INFO:
            self._emit(INFO, _access_fields(record))

    # -- suppressed records

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

    def _write(self, level: int, message: str, values: tuple[object, ...]) -> None:
        text = escape(message % values if values else message)
        self._emit(level, {"msg": text})

    def _emit(self, level: int, fields: dict[str, object]) -> None:
        if level >= WARNING:
            self.recent.append(Notice(time.time(), _NAMES[level], _as_text(fields)))
        if self._json:
            line = self._as_json(level, fields)
        else:
            line = _as_text(fields)
            if not self._journal:
                line = f"{self._now()} {_NAMES[level]} {line}"
        if self._journal:
            line = f"<{_PRIORITIES[level]}>{line}"
        try:
            os.write(self._descriptor, line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError:
            # A full disk or a closed descriptor must not stop the service.
            pass

    def _now(self) -> str:
        """Return the time as text, made once a second: a busy proxy logs thousands of records."""
        second = int(time.time())
        if self._stamp[0] != second:
            self._stamp = second, time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second))
        return self._stamp[1]

    def _as_json(self, level: int, fields: dict[str, object]) -> str:
        # Imported late: only needed for this format.
        import json

        return json.dumps({"time": self._now(), "level": _NAMES[level], **fields})


def _escape_match(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _as_text(fields: dict[str, object]) -> str:
    """Return a record as one line, without its time."""
    if len(fields) == 1:
        return str(fields["msg"])
    values = [str(value) for value in fields.values()]
    # Few records have a value that must be escaped or quoted: one match tells for all values.
    if not (all(values) and _SIMPLE.match("".join(values))):
        values = [_quote(value) for value in values]
    return " ".join(map("=".join, zip(fields, values, strict=True)))


def _access_fields(record: Record) -> dict[str, object]:
    flow = record.flow
    fields: dict[str, object] = {
        "msg": "finished",
        "listener": flow.listener,
        "client": str(flow.client),
        "user": flow.user or "-",
        "network": flow.network,
        "target": str(flow.target),
        "upstream": record.upstream,
        "sent": record.sent,
        "received": record.received,
        "seconds": round(record.seconds, 3),
        "ended": record.ended,
    }
    if flow.network == "udp":
        fields["datagrams_sent"] = record.datagrams_sent
        fields["datagrams_received"] = record.datagrams_received
    return fields


def _quote(text: str) -> str:
    """Return a value escaped, in quotation marks if it is empty or has a blank or a mark."""
    text = escape(text)
    if text and " " not in text and '"' not in text:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
