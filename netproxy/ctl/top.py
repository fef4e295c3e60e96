"""netproxyctl top: the flows, users or clients that carry the most, drawn once a second.

It needs no more of a terminal than three ANSI sequences: cursor home, clear the rest of the
line, clear the rest of the screen; so a serial line will do.  Rates are differences between two
answers of the daemon, which is asked for the details of the flows on the screen only.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time

from netproxy.ctl.accounts import (
    clients_text,
    rate_clients,
    rate_users,
    sort_clients,
    sort_users,
    users_text,
)
from netproxy.ctl.console import amount_text, duration_text, format_table
from netproxy.typed import TYPE_CHECKING, Mapping, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import (
        ClientsAnswer,
        FlowRow,
        JsonValue,
        TrafficAnswer,
        UsersAnswer,
    )

SECONDS = 1.0
"""Between two pictures."""
ROWS, COLUMNS = 24, 80
"""The size of a terminal that does not tell its size."""
BATCH_ROWS = 40
"""Flows in a picture that is printed once."""
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_COLUMN_NAMES = ("id", "client", "target", "upstream", "age", "to client", "to target", "bytes")
_QUIT_KEYS = (b"", b"q", b"Q", b"\x03", b"\x04")
_VIEW_KEYS = {b"f": "flow", b"u": "user", b"c": "client"}
"""What is shown after a key: a value of command_line.VIEWS."""
SERVING = "serving"
"""The state of a worker that answers."""
_HINT = "f flows, u users, c clients, q quit"
# The index of the local modes in what tcgetattr(3) returns.
_LOCAL_MODES = 3


class Ask(Protocol):
    """admin.control.ask.ask for one socket."""

    def __call__(self, command: str, **details: object) -> JsonValue:
        """Return the answer to a command."""


class Rate(NamedTuple):
    """How fast one flow is."""

    number: int
    up: float
    """Bytes a second, client to target."""
    down: float
    """Bytes a second, target to client."""
    carried: int
    """Bytes in both directions since the flow began."""


def rates(before: TrafficAnswer, now: TrafficAnswer) -> list[Rate]:
    """Return the rates of all flows, the fastest first; 0 for flows that are new."""
    seconds = _seconds_between(before, now)
    carried_before = {number: (sent, received) for number, sent, received in before["flows"]}
    flow_rates = []
    for number, sent, received in now["flows"]:
        sent_before, received_before = carried_before.get(number, (sent, received))
        up = max(0, sent - sent_before) / seconds
        down = max(0, received - received_before) / seconds
        flow_rates.append(Rate(number, up, down, sent + received))
    return sorted(flow_rates, key=_fastest_first)


def _fastest_first(rate: Rate) -> tuple[float, int, int]:
    return -rate.up - rate.down, -rate.carried, rate.number


def _seconds_between(before: TrafficAnswer, now: TrafficAnswer) -> float:
    return max(1e-3, now["at"] - before["at"])


def picture(
    before: TrafficAnswer,
    now: TrafficAnswer,
    fastest: Sequence[Rate],
    details: Mapping[int, FlowRow],
) -> list[str]:
    """Return the lines of a picture: totals, then the flows of `fastest` that have `details`."""
    rows: list[Sequence[str]] = [_COLUMN_NAMES]
    for rate in fastest:
        if rate.number in details:
            rows.append(_cells(rate, details[rate.number]))
    return [*head(before, now), *format_table(rows).split("\n")]


def head(before: TrafficAnswer, now: TrafficAnswer) -> list[str]:
    """Return the lines with the totals, and an empty one."""
    seconds = _seconds_between(before, now)
    up = max(0, now["bytes"]["up"] - before["bytes"]["up"]) / seconds
    down = max(0, now["bytes"]["down"] - before["bytes"]["down"]) / seconds
    drops = max(0, now["drops"] - before["drops"]) / seconds
    return [
        f"netproxyd {now['state']}, up {duration_text(now['uptime'])}; "
        f"{now['connections']} connections, {now['sessions']} UDP sessions, "
        f"{now['threads']} threads, {amount_text(now['memory'])}",
        f"to clients {amount_text(down * 8, 'bit/s')}, from clients {amount_text(up * 8, 'bit/s')};"
        f" drops {drops:.0f}/s, {now['drops']} in total",
        *_worker_lines(now),
        "",
    ]


def _worker_lines(now: TrafficAnswer) -> list[str]:
    """Return one line for all workers, none in a daemon of one process."""
    uses = [
        f"{row['index']}: {row['cpu']:.0%}"
        if row["state"] == SERVING
        else f"{row['index']}: {row['state']}"
        for row in now.get("workers", ())
    ]
    return [f"workers {', '.join(uses)}"] if uses else []


def _cells(rate: Rate, row: FlowRow) -> Sequence[str]:
    client = f"{row['user']}@{row['client']}" if row["user"] else row["client"]
    return (
        str(rate.number),
        client,
        f"{row['network']} {row['target']}",
        row["upstream"],
        duration_text(row["age"]),
        amount_text(rate.down * 8, "bit/s"),
        amount_text(rate.up * 8, "bit/s"),
        amount_text(rate.carried),
    )


class Top:
    """Draws pictures of a daemon."""

    def __init__(self, ask: Ask, view: str = "flow") -> None:
        """`view`: one of command_line.VIEWS."""
        self._ask = ask
        self._view = view
        # The answers before, with which the next ones are compared; None for none yet.
        self._users: UsersAnswer | None = None
        self._clients: ClientsAnswer | None = None
        self._traffic: TrafficAnswer = ask("traffic")

    def once(self) -> str:
        """Return one picture, after a second."""
        self._look(0)
        time.sleep(SECONDS)
        return "\n".join(self._look(BATCH_ROWS))

    def run(self) -> None:
        """Draw until q, the end of standard input, or an interrupt."""
        self._look(0)
        keyboard = _Keyboard()
        _write(_HIDE_CURSOR + _HOME + _CLEAR_BELOW)
        try:
            while (key := keyboard.read_key(SECONDS)) not in _QUIT_KEYS:
                self._view = _VIEW_KEYS.get(key or b"", self._view)
                rows, columns = _terminal_size()
                # The last line of the head is empty; the names of the columns follow it.
                hint_at = len(head(self._traffic, self._traffic)) - 1
                lines = self._look(max(1, rows - hint_at - 3))
                lines[hint_at] = _HINT
                visible = [line[: columns - 1] + _CLEAR_LINE for line in lines[: rows - 1]]
                _write(_HOME + "\n".join(visible) + _CLEAR_BELOW)
        except KeyboardInterrupt:
            pass
        finally:
            _write("\n" + _SHOW_CURSOR)
            keyboard.restore()

    def _look(self, rows: int) -> list[str]:
        """Ask the daemon again; return a picture of up to `rows` flows, users or clients."""
        before, now = self._traffic, self._ask("traffic")
        self._traffic = now
        if self._view == "user":
            return [*head(before, now), *self._user_lines(rows)]
        if self._view == "client":
            return [*head(before, now), *self._client_lines(rows)]
        fastest = rates(before, now)[:rows]
        shown = self._ask("flows", ids=[rate.number for rate in fastest]) if fastest else []
        return picture(before, now, fastest, {row["id"]: row for row in shown})

    def _user_lines(self, rows: int) -> list[str]:
        now: UsersAnswer = self._ask("users")
        before, self._users = self._users or now, now
        return users_text(sort_users(rate_users(before, now), "rate")[:rows]).split("\n")

    def _client_lines(self, rows: int) -> list[str]:
        now: ClientsAnswer = self._ask("clients")
        before, self._clients = self._clients or now, now
        return clients_text(sort_clients(rate_clients(before, now), "rate")[:rows]).split("\n")


class _Keyboard:
    """Standard input; if it is a terminal, keys arrive without Enter and are not echoed."""

    def __init__(self) -> None:
        self._saved = termios.tcgetattr(sys.stdin.fileno()) if sys.stdin.isatty() else None
        if self._saved is not None:
            modes = list(self._saved)
            modes[_LOCAL_MODES] = self._saved[_LOCAL_MODES] & ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, modes)

    def restore(self) -> None:
        """Restore the modes of the terminal."""
        if self._saved is not None:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._saved)

    def read_key(self, seconds: float) -> bytes | None:
        """Wait for a key; return it, b"" at the end of the input, None if there was no key."""
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 64) if ready else None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _terminal_size() -> tuple[int, int]:
    """Return rows and columns; a serial line knows neither."""
    try:
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        columns = rows = 0
    return rows or ROWS, columns or COLUMNS
