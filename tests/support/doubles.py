"""Recorders that stand in for a Counter, a Log and an Observer, and on which a test can wait.

Any thread may write to them.  wait_for() returns when a record is there and fails the test if
it does not come in time, so that no test sleeps.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Callable, Hashable, Mapping

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import PacketDependencies
from netproxy.interfaces.flows import Record
from netproxy.interfaces.services import Refusal, Trace
from netproxy.observe.records import as_text
from netproxy.observe.trace import LogTrace
from tests.support.sockets import SECONDS


class _Recorder:
    def __init__(self) -> None:
        self._changed = threading.Condition()

    def _wait(self, there: Callable[[], Any], wanted: str) -> None:
        with self._changed:
            assert self._changed.wait_for(there, SECONDS), f"no {wanted} in {self!r}"


class Counts(_Recorder):
    """A Counter; `counts` maps (name, reason) to the total."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, str], int] = {}
        self.refusals: list[Refusal] = []

    def count(self, name: str, reason: str, amount: int = 1) -> None:
        with self._changed:
            self.counts[name, reason] = self.counts.get((name, reason), 0) + amount
            self._changed.notify_all()

    def refuse(self, refusal: Refusal, amount: int = 1) -> None:
        self.refusals.append(refusal)
        self.count(refusal.counter, refusal.reason, amount)

    def refuse_unrecorded(self, name: str, reason: str, client: str, amount: int) -> bool:
        return False  # each refusal is kept

    def of(self, name: str, reason: str = "") -> int:
        """Return the total of a counter."""
        with self._changed:
            return self.counts.get((name, reason), 0)

    def wait_for(self, name: str, reason: str = "", amount: int = 1) -> None:
        self._wait(
            lambda: self.counts.get((name, reason), 0) >= amount, f"{amount} {name}{{{reason}}}"
        )

    def __repr__(self) -> str:
        return f"Counts({self.counts})"


class Lines(_Recorder):
    """A Log.  A line of limited() has the level "limited"."""

    tracing = False

    def trace(self, listener: str, client: Address) -> Trace:
        return LogTrace(self, listener, client)

    def record(self, level: int, fields: Mapping[str, object]) -> None:
        self._add("record", as_text(fields), ())

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []
        """Levels and texts in order."""
        self.keys: list[Hashable] = []
        """The keys of limited() in order."""

    def debug(self, message: str, *values: object) -> None:
        self._add("debug", message, values)

    def info(self, message: str, *values: object) -> None:
        self._add("info", message, values)

    def warning(self, message: str, *values: object) -> None:
        self._add("warning", message, values)

    def error(self, message: str, *values: object) -> None:
        self._add("error", message, values)

    def limited(self, key: Hashable, message: str, *values: object) -> None:
        self.keys.append(key)
        self._add("limited", message, values)

    def auth_failed(self, client: str, user: str, listener: str) -> None:
        self._add("auth_failed", f"{client} {user} {listener}", ())

    def exception(self, doing: str) -> None:
        self._add("exception", f"{doing}: {sys.exc_info()[1]}", ())

    def of(self, level: str) -> list[str]:
        """Return the lines of a level."""
        with self._changed:
            return [text for line_level, text in self.lines if line_level == level]

    def wait_for(self, part: str) -> None:
        """Wait for a line that contains `part`."""
        self._wait(lambda: any(part in text for _, text in self.lines), f"'{part}'")

    def _add(self, level: str, message: str, values: tuple[object, ...]) -> None:
        with self._changed:
            self.lines.append((level, message % values if values else message))
            self._changed.notify_all()

    def __repr__(self) -> str:
        return f"Lines({self.lines})"


class Records(_Recorder):
    """An Observer."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []
        self.lives: list[Any] = []
        """Live flows in the order in which they began."""

    def began(self, live: Any, dialled: float | None = None) -> None:
        with self._changed:
            self.lives.append(live)
            live.number = len(self.lives)
            self._changed.notify_all()

    def finished(self, record: Record) -> None:
        with self._changed:
            self.records.append(record)
            self._changed.notify_all()

    def wait_for(self, amount: int) -> None:
        self._wait(lambda: len(self.records) >= amount, f"{amount} records")

    def __repr__(self) -> str:
        return f"Records({self.records})"


def no_packets() -> PacketDependencies:
    """Return the dependencies of dialers that open no packet connection."""
    return PacketDependencies(lambda stream, call: None, lambda task: False, Counts())
