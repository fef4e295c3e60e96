"""What netproxyctl prints: tables for people, from the answers of the control socket.  Pure."""
from __future__ import annotations

from typing import Any, Sequence

_UPSTREAMS = ("name", "state", "carries", "live", "dialled", "failed", "latency", "last error")


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


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the last is as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _row(one: dict[str, Any], indent: str) -> Sequence[str]:
    latency = f"{one['latency'] * 1000:.1f} ms" if one["latency"] else "-"
    return (indent + one["name"], one["state"], ",".join(one["carries"]) or "-", str(one["live"]), str(one["dialled"]),
            str(one["failed"]), latency, "".join(char if char.isprintable() else "?" for char in one["error"]))
