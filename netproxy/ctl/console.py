"""What netproxyctl prints: tables for people, from the answers of the control socket.  Pure."""

from __future__ import annotations

import time
from typing import Any, Sequence

_UPSTREAMS = ("name", "state", "carries", "live", "dialled", "failed", "latency", "last error")
_FLOWS = (
    "id",
    "listener",
    "client",
    "user",
    "target",
    "way out",
    "age",
    "idle",
    "to target",
    "to client",
)
_SESSIONS = (*_FLOWS, "datagrams")
_DESCENDING = ("age", "idle", "sent", "received", "bytes")

_TUNNELS = ("agent", "from", "since", "rtt", "live", "opened", "sent", "received", "ports")


def status_text(answer: dict[str, Any]) -> str:
    """What it is and what it does, then listeners, then the lines of its log."""
    reloaded = "" if answer["reloaded"]["fine"] else "; the last reload failed, see the log"
    head = [
        f"netproxyd {answer['version']} is {answer['state']}, up {lasted(answer['uptime'])}, process {answer['pid']}{reloaded}",
        f"{answer['connections']} connections, {answer['sessions']} UDP sessions, {answer['threads']} threads, "
        f"{amount(answer['memory'])} of memory, log level {answer['log']}",
    ]
    rows = [
        ("listener", "network", "address", "live", "accepted"),
        *(
            (one["name"], one["network"], one["address"], str(one["live"]), str(one["accepted"]))
            for one in answer["listeners"]
        ),
    ]
    return "\n".join([*head, "", table(rows), "", *answer["lines"]])


def upstreams_text(answer: Sequence[dict[str, Any]]) -> str:
    """A line for each way out, and below a group those of its members."""
    rows: list[Sequence[str]] = [_UPSTREAMS]
    for one in answer:
        rows.append(_row(one, ""))
        for group in one["groups"]:
            if group["name"] != one["name"]:
                rows.append((f"  {group['name']}", group["balance"], *[""] * 6))
            rows += [
                _row(member, "    " if group["name"] != one["name"] else "  ")
                for member in group["members"]
            ]
    return table(rows)


def tunnels_text(answer: dict[str, Any]) -> str:
    """A line for each agent that is connected here, and one for this daemon's own connection to its bridge."""
    rows: list[Sequence[str]] = [_TUNNELS]
    for one in answer["agents"]:
        refused = [f"{port} ({why})" for port, why in one["refused"].items()]
        rows.append(
            (
                one["name"],
                one["client"],
                _since(one["since"]),
                _rtt(one["rtt"]),
                str(one["streams"]),
                str(one["opened"]),
                str(one["sent"]),
                str(one["received"]),
                ", ".join([*one["ports"], *refused, *["exit"] * one["exit"]]) or "-",
            )
        )
    own = answer["agent"]
    lines = [table(rows)] if answer["agents"] or own is None else []
    if own is not None and own["connected"]:
        ports = ", ".join(f"{port} {outcome}" for port, outcome in own["ports"].items())
        lines.append(
            f"agent '{own['name']}': connected since {_since(own['since'])}, {_rtt(own['rtt'])}, "
            f"{own['opened']} opened, {own['idle']} wait; ports: {ports or 'none'}"
        )
    elif own is not None:
        lines.append(f"agent '{own['name']}': not connected, {own['tries']} failures in a row")
    return "\n".join(lines)


def _since(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _rtt(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds else "-"


def flows_text(answer: Sequence[dict[str, Any]], sessions: bool) -> str:
    rows: list[Sequence[str]] = [_SESSIONS if sessions else _FLOWS]
    for one in answer:
        row = (
            str(one["id"]),
            plain(one["listener"]),
            one["client"],
            plain(one["user"] or "-"),
            plain(one["target"]),
            plain(one["upstream"]),
            lasted(one["age"]),
            lasted(one["idle"]),
            amount(one["sent"]),
            amount(one["received"]),
        )
        rows.append(
            (*row, f"{one['datagrams_sent']}/{one['datagrams_received']}") if sessions else row
        )
    return table(rows)


def verdicts_text(answer: Sequence[dict[str, Any]]) -> str:
    return table(
        [
            ("target", "upstream", "for"),
            *((plain(one["target"]), one["upstream"], lasted(one["seconds"])) for one in answer),
        ]
    )


def arranged(answer: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Sorted; figures begin with the greatest."""
    key = (lambda one: one["sent"] + one["received"]) if by == "bytes" else lambda one: one[by]
    return sorted(answer, key=key, reverse=by in _DESCENDING)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the last is as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def plain(text: str) -> str:
    """Fit for a terminal, whoever chose it."""
    return "".join(char if char.isprintable() else "?" for char in text)


def amount(value: float, unit: str = "B") -> str:
    """1234 B as 1.2 kB."""
    steps = ["", "k", "M", "G", "T", "P"]
    step = 0
    while value >= 999.5 and step < len(steps) - 1:
        value /= 1000
        step += 1
    return (
        f"{value:.1f} {steps[step]}{unit}"
        if step and value < 99.95
        else f"{value:.0f} {steps[step]}{unit}"
    )


def lasted(seconds: float) -> str:
    """3661 as 1h1m."""
    parts = [("d", 86400), ("h", 3600), ("m", 60), ("s", 1)]
    for at, (unit, size) in enumerate(parts):
        if seconds >= size:
            rest = int(seconds % size // parts[at + 1][1]) if at + 1 < len(parts) else 0
            return f"{int(seconds // size)}{unit}" + (f"{rest}{parts[at + 1][0]}" if rest else "")
    return "0s"


def _row(one: dict[str, Any], indent: str) -> Sequence[str]:
    latency = f"{one['latency'] * 1000:.1f} ms" if one["latency"] else "-"
    return (
        indent + one["name"],
        one["state"],
        ",".join(one["carries"]) or "-",
        str(one["live"]),
        str(one["dialled"]),
        str(one["failed"]),
        latency,
        plain(one["error"]),
    )
