"""Makes lines of log records: text for people, JSON for programs, priorities for the journal.

A record is a mapping of fields; "msg" is its message, and the only field of most records.
Thread: any.  No file is read here.
"""

from __future__ import annotations

import os
import time
from collections import deque

from netproxy.observe.escaping import escape
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, Protocol, TypeAlias

if TYPE_CHECKING:
    from types import TracebackType

    from netproxy.interfaces.flows import Record

CALLS_LIMIT = 32
"""Calls of a traceback in one record: a recursion that has no end has a thousand."""
DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR}
LEVEL_NAMES = {value: name for name, value in LEVELS.items()}
ACCESS_BLANKS = 11
"""Blanks between the fields of access_text()."""
Fields: TypeAlias = Mapping[str, object]
# The priorities of sd-daemon(3).
_PRIORITIES = {DEBUG: 7, INFO: 6, WARNING: 4, ERROR: 3}


class RecordLog(Protocol):
    """What writes the records."""

    def record(self, level: int, fields: Fields) -> None:
        """Write a record, unless the level of the log hides it."""


class LineFormat:
    """The form of the lines of a log."""

    def __init__(self, journal: bool) -> None:
        """Begin with text; `journal`: systemd's journal reads the lines, and knows the time."""
        # The current second since the epoch, and its text.
        self._stamp = (0, "")
        self._journal = journal
        # Encodes a record as JSON, None for text.
        self._encode: Callable[[object], str] | None = None
        # Reads /etc/localtime now, which no thread that logs may do.
        self._now()

    def configure(self, name: str) -> None:
        """Make lines of the form "text" or "json" from now on.  Thread: main."""
        if name != "json":
            self._encode = None
            return
        # Imported late: only needed for this form.
        import json

        self._encode = json.dumps

    def line(self, level: int, fields: Fields) -> bytes:
        """Return a record as one line, with its newline."""
        encode = self._encode
        if encode is None:
            return self._text_line(level, as_text(fields))
        line = encode({"time": self._now(), "level": LEVEL_NAMES[level], **fields})
        return (f"<{_PRIORITIES[level]}>{line}\n" if self._journal else f"{line}\n").encode()

    def access_line(self, record: Record) -> bytes:
        """Return the access record of a flow as line() does, at level info."""
        if self._encode is None and (text := access_text(record)):
            return self._text_line(INFO, text)
        return self.line(INFO, access_fields(record))

    def _text_line(self, level: int, text: str) -> bytes:
        if self._journal:
            line = f"<{_PRIORITIES[level]}>{text}\n"
        else:
            line = f"{self._now()} {LEVEL_NAMES[level]} {text}\n"
        return line.encode("utf-8", "backslashreplace")

    def _now(self) -> str:
        """Return the time as text, made once a second: a busy proxy logs thousands of records."""
        second = int(time.time())
        if self._stamp[0] != second:
            self._stamp = second, _time_text(second)
        return self._stamp[1]


def as_text(fields: Fields) -> str:
    """Return a record as one line, without its time."""
    if len(fields) == 1:
        return str(fields["msg"])
    line = " ".join([f"{name}={value}" for name, value in fields.items()])
    # Few records have a value that must be escaped or quoted, and the line tells for all values.
    if _is_simple(line, len(fields) - 1):
        return line
    return " ".join([f"{name}={_quote(str(value))}" for name, value in fields.items()])


def access_fields(record: Record) -> Fields:
    """Return the fields of the access record of a flow."""
    flow = record.flow
    fields: dict[str, object] = {
        "msg": "finished",
        "listener": flow.listener,
        "client": str(flow.client),
        "user": flow.user or "-",
        "network": flow.network,
        "target": str(flow.target),
        "rule": record.rule or "-",
        "upstream": f"{record.upstream}/{record.member}" if record.member else record.upstream,
        "sent": record.sent,
        "received": record.received,
        "seconds": round(record.seconds, 3),
        "ended": record.ended,
    }
    if flow.seen is not None:
        fields["name"] = flow.seen.host
        fields["seen_in"] = flow.seen.seen_in
    if flow.port_route is not None:
        fields["route"] = flow.port_route.place
        if flow.seen is None and flow.port_route.name:
            fields["route_name"] = flow.port_route.name
    if flow.network == "udp":
        fields["datagrams_sent"] = record.datagrams_sent
        fields["datagrams_received"] = record.datagrams_received
    if record.decided:
        fields["decided"] = record.decided
    if record.id:
        fields["id"] = record.id
    return fields


def access_text(record: Record) -> str:
    """Return the text of access_fields(), made at once: every connection has such a record.

    Returns "" for a record with further fields, or if a value must be escaped or quoted.
    """
    flow = record.flow
    if record.decided or record.id or record.member or flow.network != "tcp":
        return ""
    if flow.seen is not None or flow.port_route is not None:
        return ""
    line = (
        f"msg=finished listener={flow.listener} client={flow.client} user={flow.user or '-'} "
        f"network=tcp target={flow.target} rule={record.rule or '-'} upstream={record.upstream} "
        f"sent={record.sent} received={record.received} seconds={round(record.seconds, 3)} "
        f"ended={record.ended}"
    )
    return line if _is_simple(line, ACCESS_BLANKS) else ""


def calls_of(traceback: TracebackType | None) -> tuple[str, ...]:
    """Return the innermost calls of a traceback, the innermost first.

    The module traceback would read the source files.
    """
    calls: deque[str] = deque(maxlen=CALLS_LIMIT)
    while traceback is not None:
        code = traceback.tb_frame.f_code
        file = os.path.basename(code.co_filename)
        calls.appendleft(f"{file}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return tuple(calls)


def _is_simple(line: str, blanks: int) -> bool:
    """Return whether no value of a line must be escaped or quoted.

    `blanks` are those between the fields: another one is within a value.
    """
    if not line.isascii() or not line.isprintable() or '"' in line:
        return False
    return line.count(" ") == blanks and "= " not in line and line[-1] != "="


def _quote(text: str) -> str:
    """Return a value escaped, in quotation marks if it is empty or has a blank or a mark."""
    text = escape(text)
    if text and " " not in text and '"' not in text:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _time_text(second: int) -> str:
    """Return local time in ISO 8601.  strftime(3) would look at /etc/localtime each time."""
    local = time.localtime(second)
    date = f"{local.tm_year:04}-{local.tm_mon:02}-{local.tm_mday:02}"
    sign, minutes = "-" if local.tm_gmtoff < 0 else "+", abs(local.tm_gmtoff) // 60
    offset = f"{sign}{minutes // 60:02}{minutes % 60:02}"
    return f"{date}T{local.tm_hour:02}:{local.tm_min:02}:{local.tm_sec:02}{offset}"
