"""netproxyctl top: the flows that move most, drawn anew each second.

Plain ANSI on whatever terminal there is, a serial line too: the cursor goes home,
each line clears its rest, no other sequence is used.  Rates are differences between
two answers of the daemon, which is asked for details of those flows alone that are shown.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
from typing import Any, Callable, NamedTuple, Sequence

from netproxy.ctl.console import amount, lasted, plain, table

SECONDS = 1.0  # between two pictures
ROWS, COLUMNS = 24, 80  # of a terminal that does not tell
BATCH_ROWS = 40  # of flows, where it is printed once
HEAD_ROWS = 4
_HOME, _REST, _BELOW, _HIDE, _SHOW = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[?25l", "\x1b[?25h"
_HEADS = ("id", "client", "target", "way out", "age", "to client", "to target", "bytes")
Ask = Callable[..., Any]  # observe.control.ask, its socket known


class Rate(NamedTuple):
    """Of one flow, bytes a second."""

    number: int
    up: float
    down: float
    carried: int  # bytes, in all


def rates(before: dict[str, Any], now: dict[str, Any]) -> list[Rate]:
    """The fastest first; a flow that was not there before has none yet."""
    seconds = max(1e-3, now["at"] - before["at"])
    old = {number: (sent, received) for number, sent, received in before["flows"]}
    found = []
    for number, sent, received in now["flows"]:
        was_sent, was_received = old.get(number, (sent, received))
        found.append(
            Rate(
                number,
                max(0, sent - was_sent) / seconds,
                max(0, received - was_received) / seconds,
                sent + received,
            )
        )
    return sorted(found, key=lambda rate: (-rate.up - rate.down, -rate.carried, rate.number))


def picture(
    before: dict[str, Any],
    now: dict[str, Any],
    fastest: Sequence[Rate],
    details: dict[int, dict[str, Any]],
) -> list[str]:
    """Lines: totals, then the flows of `fastest` that `details` are known of."""
    seconds = max(1e-3, now["at"] - before["at"])

    def each(key: str) -> float:
        return max(0, now["bytes"][key] - before["bytes"][key]) / seconds

    lines = [
        f"netproxyd {now['state']}, up {lasted(now['uptime'])}; {now['connections']} connections, {now['sessions']} UDP sessions, "
        f"{now['threads']} threads, {amount(now['memory'])}",
        f"to clients {amount(each('down') * 8, 'bit/s')}, from clients {amount(each('up') * 8, 'bit/s')}; "
        f"drops {max(0, now['drops'] - before['drops']) / seconds:.0f}/s, {now['drops']} in all",
        "",
    ]
    rows: list[Sequence[str]] = [_HEADS]
    for rate in fastest:
        one = details.get(rate.number)
        if one is not None:
            client = f"{one['user']}@{one['client']}" if one["user"] else one["client"]
            rows.append(
                (
                    str(rate.number),
                    plain(client),
                    plain(f"{one['network']} {one['target']}"),
                    plain(one["upstream"]),
                    lasted(one["age"]),
                    amount(rate.down * 8, "bit/s"),
                    amount(rate.up * 8, "bit/s"),
                    amount(rate.carried),
                )
            )
    return [*lines, *table(rows).split("\n")]


class Top:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._before: dict[str, Any] = {}

    def once(self) -> str:
        """Two looks, a second apart."""
        self._before = self._ask("traffic")
        time.sleep(SECONDS)
        return "\n".join(self._look(BATCH_ROWS))

    def run(self) -> None:
        """Until q, the end of the standard input, or an interrupt."""
        self._before = self._ask("traffic")
        restore = _unbuffered()
        _say(_HIDE + _HOME + _BELOW)
        try:
            while not _key_q(SECONDS):
                rows, columns = _size()
                lines = self._look(max(1, rows - HEAD_ROWS - 1))
                _say(
                    _HOME
                    + "\n".join(line[: columns - 1] + _REST for line in lines[: rows - 1])
                    + _BELOW
                )
        except KeyboardInterrupt:
            pass
        finally:
            _say("\n" + _SHOW)
            restore()

    def _look(self, rows: int) -> list[str]:
        before, now = self._before, self._ask("traffic")
        self._before = now
        fastest = rates(before, now)[:rows]
        shown = self._ask("flows", ids=[rate.number for rate in fastest]) if fastest else []
        return picture(before, now, fastest, {one["id"]: one for one in shown})


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _size() -> tuple[int, int]:
    """Rows and columns; a serial line knows neither."""
    try:
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        columns = rows = 0
    return rows or ROWS, columns or COLUMNS


def _key_q(seconds: float) -> bool:
    """Waits; whether it is to end."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready) and os.read(sys.stdin.fileno(), 64) in (b"", b"q", b"Q", b"\x03", b"\x04")


def _unbuffered() -> Callable[[], None]:
    """Keys come without Enter, where there is a keyboard; gives back what restores it."""
    if not sys.stdin.isatty():
        return lambda: None
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    fresh = termios.tcgetattr(descriptor)
    fresh[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, fresh)
    return lambda: termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
