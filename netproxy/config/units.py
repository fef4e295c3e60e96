"""Durations as people write them.  Pure."""

from __future__ import annotations

import re

LONGEST = 3650 * 86400.0  # what system calls take is less than what people can write
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_duration(text: str) -> float:
    """Seconds in "30s", "1h30m", "500ms"; ValueError says what is wrong, a number without unit included."""
    if text == "0":
        return 0.0
    if text.isascii() and text.isdigit():
        raise ValueError(
            f"'{text}' has no unit: write {text}s for seconds or {text}ms for milliseconds"
        )
    total, at = 0.0, 0
    while match := _PART.match(text, at):
        total += float(match[1]) * _SECONDS[match[2]]
        at = match.end()
    if at != len(text) or not text:
        raise ValueError(f"'{text}' is no duration: write it as 500ms, 30s, 5m, 2h, 1d or 1h30m")
    if total > LONGEST:
        raise ValueError(f"'{text}' is longer than ten years")
    return total
