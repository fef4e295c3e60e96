"""The log: one record a line on standard error, text or JSON, and the access records.

Written by hand because the logging package costs 2.4 MiB and fifteen times the
time.  Control characters in anything a peer sent are escaped.  A standard error
that cannot be written to costs the record, never the service.  What is left out
because it repeats itself is said as a number.  Any thread may log; the janitor
asks each second for numbers that are due.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections import deque
from typing import Callable, Hashable, NamedTuple, Sequence

from netproxy.interfaces.flows import Record

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR}
_NAMES = {value: name for name, value in LEVELS.items()}
_PRIORITIES = {DEBUG: 7, INFO: 6, WARNING: 4, ERROR: 3}  # sd-daemon(3)
LIMITED_SECONDS = 60.0  # between two records of the same key
LIMITED_KEYS = 1024  # remembered: keys may hold what strangers chose
RECENT = 20  # warnings and errors remembered for the status page
# C0, DEL, C1, the line separators of Unicode, and lone surrogates
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SIMPLE = re.compile(r"[!#-~]+\Z")  # printable ASCII without blank and quotation mark


def escape(text: str) -> str:
    """Fit for one line of a log."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Notice(NamedTuple):
    """A warning or an error, as it was written."""

    at: float  # seconds since the epoch
    level: str
    text: str


class _Repeat:
    """Of one key: when it was written, and how often it was not since."""

    __slots__ = ("at", "text", "left_out")

    def __init__(self, at: float, text: str) -> None:
        self.at = at
        self.text = text
        self.left_out = 0


class Log:
    """Expirable: the janitor asks for what was left out."""

    def __init__(
        self, level: str = "info", form: str = "text", access: bool = True, descriptor: int = 2
    ) -> None:
        self._level = LEVELS[level]
        self._json = form == "json"
        self._access = access
        self._stamp = (0, "")  # the last second, as text
        self._descriptor = descriptor
        self._journal = "JOURNAL_STREAM" in os.environ
        self.recent: deque[Notice] = deque(maxlen=RECENT)
        self._lock = threading.Lock()  # guards _said
        self._said: dict[Hashable, _Repeat] = {}

    def configure(self, level: str, form: str, access: bool) -> None:
        """After a reload."""
        self._level, self._json, self._access = LEVELS[level], form == "json", access

    @property
    def level(self) -> str:
        return _NAMES[self._level]

    @level.setter
    def level(self, name: str) -> None:
        """Until it is set again, or configured."""
        self._level = LEVELS[name]

    def debug(self, message: str, *values: object) -> None:
        if self._level <= DEBUG:
            self._write(DEBUG, message, values)

    def info(self, message: str, *values: object) -> None:
        if self._level <= INFO:
            self._write(INFO, message, values)

    def warning(self, message: str, *values: object) -> None:
        if self._level <= WARNING:
            self._write(WARNING, message, values)

    def error(self, message: str, *values: object) -> None:
        self._write(ERROR, message, values)

    def limited(self, key: Hashable, message: str, *values: object) -> None:
        """A warning, at most once a minute for each key; how many were left out is said later."""
        text = message % values if values else message
        if self._enter(key, text):
            self.warning("%s", text)

    def auth_failed(self, client: str, user: str, listener: str) -> None:
        """A login that was refused: one line each, whose form is for programs that ban addresses."""
        if self._level <= WARNING:
            self._emit(
                WARNING,
                {"msg": "auth_failed", "client": client, "user": user or "-", "listener": listener},
            )

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Of what has not been written for a minute, how often it was left out."""
        if not self._said:
            return ()
        with self._lock:
            over = {key: one for key, one in self._said.items() if now - one.at >= LIMITED_SECONDS}
            for key in over:
                del self._said[key]
        return [lambda one=one: self._say_left_out(one) for one in over.values() if one.left_out]

    def _enter(self, key: Hashable, text: str) -> bool:
        """Whether a record of this key may be written; else it is counted."""
        now = time.monotonic()
        with self._lock:
            one = self._said.pop(key, None)
            if one is not None and now - one.at < LIMITED_SECONDS:
                one.left_out += 1
                self._said[key] = one
                return False
            if one is None and len(self._said) >= LIMITED_KEYS:
                one = self._said.pop(next(iter(self._said)))
            self._said[key] = _Repeat(now, text)
        if one is not None and one.left_out:
            self._say_left_out(one)
        return True

    def _say_left_out(self, one: _Repeat) -> None:
        self.warning("%d more like this one: %s", one.left_out, one.text)

    def exception(self, doing: str) -> None:
        """The exception being handled, with its stack, as one record; the same from the same line once a minute."""
        import traceback  # late: only where something is wrong

        kind, error, _ = sys.exc_info()
        frames = traceback.extract_tb(error.__traceback__) if error else []
        where = " < ".join(
            f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"
            for frame in reversed(frames)
        )
        key = (kind, frames[-1].filename, frames[-1].lineno) if frames else kind
        if self._enter(key, f"internal error while {doing}"):
            self.error(
                "internal error while %s: %s: %s (%s)",
                doing,
                kind.__name__ if kind else "?",
                error,
                where,
            )

    def finished(self, record: Record) -> None:
        """An access record; INTERFACE section 3."""
        if self._access and self._level <= INFO:
            self._emit(INFO, _access_fields(record))

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
            pass  # a full disk or a closed descriptor must not stop the service

    def _now(self) -> str:
        """The time, made anew once a second: a busy proxy writes thousands of records in one."""
        second = int(time.time())
        if self._stamp[0] != second:
            self._stamp = second, time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second))
        return self._stamp[1]

    def _as_json(self, level: int, fields: dict[str, object]) -> str:
        import json  # late: only where that format is wanted

        return json.dumps({"time": self._now(), "level": _NAMES[level], **fields})


def _as_text(fields: dict[str, object]) -> str:
    """One line, without the time."""
    if len(fields) == 1:
        return str(fields["msg"])
    values = [str(value) for value in fields.values()]
    if not (all(values) and _SIMPLE.match("".join(values))):
        values = list(map(_plain, values))  # few have what must be escaped or quoted
    return " ".join(map("=".join, zip(fields, values)))


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


def _plain(text: str) -> str:
    text = escape(text)
    return (
        '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        if " " in text or '"' in text or not text
        else text
    )
