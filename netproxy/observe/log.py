"""The log: one record a line on standard error, text or JSON, and the access records.

Written by hand because the logging package costs 2.4 MiB and fifteen times the
time.  Control characters in anything a peer sent are escaped.  A standard error
that cannot be written to costs the record, never the service.  Any thread may log.
"""
from __future__ import annotations

import os
import re
import sys
import threading
import time
from typing import Hashable, Sequence

from netproxy.interfaces import Observer, Record

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR}
_NAMES = {value: name for name, value in LEVELS.items()}
_PRIORITIES = {DEBUG: 7, INFO: 6, WARNING: 4, ERROR: 3}     # sd-daemon(3)
LIMITED_SECONDS = 60.0      # between two records of the same key
LIMITED_KEYS = 1024         # remembered: keys may hold what strangers chose
# C0, DEL, C1, the line separators of Unicode, and lone surrogates
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def escape(text: str) -> str:
    """Fit for one line of a log."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Log:
    def __init__(self, level: str = "info", form: str = "text", access: bool = True, descriptor: int = 2) -> None:
        self._level = LEVELS[level]
        self._json = form == "json"
        self._access = access
        self._descriptor = descriptor
        self._journal = "JOURNAL_STREAM" in os.environ
        self._lock = threading.Lock()       # guards _said
        self._said: dict[Hashable, float] = {}

    def configure(self, level: str, form: str, access: bool) -> None:
        """After a reload."""
        self._level, self._json, self._access = LEVELS[level], form == "json", access

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
        """A warning, at most once a minute for each key."""
        if self._due(key):
            self.warning(message, *values)

    def _due(self, key: Hashable) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(key, -LIMITED_SECONDS) < LIMITED_SECONDS:
                return False
            if len(self._said) >= LIMITED_KEYS:
                self._said.clear()
            self._said[key] = now
            return True

    def exception(self, doing: str) -> None:
        """The exception being handled, with its stack, as one record; the same from the same line once a minute."""
        import traceback    # late: only where something is wrong
        kind, error, _ = sys.exc_info()
        frames = traceback.extract_tb(error.__traceback__) if error else []
        where = " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        if self._due((kind, frames[-1].filename, frames[-1].lineno) if frames else kind):
            self.error("internal error while %s: %s: %s (%s)", doing, kind.__name__ if kind else "?", error, where)

    def finished(self, record: Record) -> None:
        """An access record; INTERFACE section 3."""
        if self._access and self._level <= INFO:
            self._emit(INFO, _access_fields(record))

    def _write(self, level: int, message: str, values: tuple[object, ...]) -> None:
        text = escape(message % values if values else message)
        self._emit(level, {"msg": text})

    def _emit(self, level: int, fields: dict[str, object]) -> None:
        if self._json:
            line = self._as_json(level, fields)
        else:
            line = str(fields["msg"]) if len(fields) == 1 else " ".join(f"{key}={_plain(value)}" for key, value in fields.items())
            if not self._journal:
                line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {_NAMES[level]} {line}"
        if self._journal:
            line = f"<{_PRIORITIES[level]}>{line}"
        try:
            os.write(self._descriptor, line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError:
            pass        # a full disk or a closed descriptor must not stop the service

    @staticmethod
    def _as_json(level: int, fields: dict[str, object]) -> str:
        import json     # late: only where that format is wanted
        return json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "level": _NAMES[level], **fields})


class Witnesses:
    """An Observer that tells others."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def finished(self, record: Record) -> None:
        for observer in self._observers:
            observer.finished(record)


def _access_fields(record: Record) -> dict[str, object]:
    flow = record.flow
    fields: dict[str, object] = {
        "msg": "finished", "listener": flow.listener, "client": str(flow.client), "user": flow.user or "-",
        "network": flow.network, "target": str(flow.target), "way": record.way, "sent": record.sent,
        "received": record.received, "seconds": round(record.seconds, 3), "ended": record.ended}
    if flow.network == "udp":
        fields["datagrams_sent"] = record.datagrams_sent
        fields["datagrams_received"] = record.datagrams_received
    return fields


def _plain(value: object) -> str:
    text = escape(str(value))
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if " " in text or '"' in text or not text else text
