"""What netproxyctl prints: tables for people, from the answers of the control socket.  Pure."""
from __future__ import annotations

import time
from typing import Any, Sequence

_UPSTREAMS = ("name", "state", "carries", "live", "dialled", "failed", "latency", "last error")

_TUNNELS = ("agent", "from", "since", "rtt", "live", "opened", "sent", "received", "ports")


def status_text(answer: dict[str, Any]) -> str:
    return "\n".join(answer["lines"])


def upstreams_text(answer: Sequence[dict[str, Any]]) -> str:
    """A line for each way out, and below a group those of its members."""
    rows: list[Sequence[str]] = [_UPSTREAMS]
    for one in answer:
        rows.append(_row(one, ""))
        for group in one["groups"]:
            if group["name"] != one["name"]:
                rows.append((f"  {group['name']}", group["balance"], *[""] * 6))
            rows += [_row(member, "    " if group["name"] != one["name"] else "  ") for member in group["members"]]
    return table(rows)


def tunnels_text(answer: dict[str, Any]) -> str:
    """A line for each agent that is connected here, and one for this daemon's own connection to its bridge."""
    rows: list[Sequence[str]] = [_TUNNELS]
    for one in answer["agents"]:
        refused = [f"{port} ({why})" for port, why in one["refused"].items()]
        rows.append((one["name"], one["client"], _since(one["since"]), _rtt(one["rtt"]), str(one["streams"]), str(one["opened"]),
                     str(one["sent"]), str(one["received"]), ", ".join([*one["ports"], *refused, *["exit"] * one["exit"]]) or "-"))
    own = answer["agent"]
    lines = [table(rows)] if answer["agents"] or own is None else []
    if own is not None and own["connected"]:
        ports = ", ".join(f"{port} {outcome}" for port, outcome in own["ports"].items())
        lines.append(f"agent '{own['name']}': connected since {_since(own['since'])}, {_rtt(own['rtt'])}, "
                     f"{own['opened']} opened, {own['idle']} wait; ports: {ports or 'none'}")
    elif own is not None:
        lines.append(f"agent '{own['name']}': not connected, {own['tries']} failures in a row")
    return "\n".join(lines)


def _since(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _rtt(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds else "-"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the last is as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _row(one: dict[str, Any], indent: str) -> Sequence[str]:
    latency = f"{one['latency'] * 1000:.1f} ms" if one["latency"] else "-"
    return (indent + one["name"], one["state"], ",".join(one["carries"]) or "-", str(one["live"]), str(one["dialled"]),
            str(one["failed"]), latency, "".join(char if char.isprintable() else "?" for char in one["error"]))
