"""What netproxyctl test prints: the steps with their times, and the reason of a failure.  Pure."""

from __future__ import annotations

from netproxy.ctl.why import verdict_lines
from netproxy.observe.escaping import escape
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.answers import TestAnswer


def steps_text(answer: TestAnswer) -> str:
    """Return a line for each step; times are milliseconds since the beginning."""
    lines = [
        f"{row['at'] * 1000:9.1f} ms  {row['step']:<10}  {row['text']}" for row in answer["steps"]
    ]
    failure, total = answer["failure"], f"{answer['seconds'] * 1000:9.1f} ms  "
    if failure is None:
        lines.append(f"{total}fine")
    else:
        lines += [f"{total}failed", *verdict_lines(failure)]
    return "\n".join(map(escape, lines))
