"""Single values as users write them: durations, whole numbers, networks.

Pure functions.  A ValueError says what is wrong in the words of the configuration's errors.
"""

from __future__ import annotations

import re

LONGEST_DURATION = 3650 * 86400.0
"""Seconds.  System calls accept less than users can write."""
WHOLE_LIMIT = 1 << 31
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")


def parse_duration(text: str) -> float:
    """Return the seconds of "30s", "1h30m", "500ms" or "0".

    Raises ValueError for anything else, including a number without unit.
    """
    if text == "0":
        return 0.0
    if text.isascii() and text.isdigit():
        raise ValueError(
            f"'{text}' has no unit: write {text}s for seconds or {text}ms for milliseconds"
        )
    seconds, end = 0.0, 0
    while match := _PART.match(text, end):
        seconds += float(match[1]) * _UNITS[match[2]]
        end = match.end()
    if end != len(text) or not text:
        raise ValueError(f"'{text}' is not a duration (expected 500ms, 30s, 5m, 2h, 1d or 1h30m)")
    if seconds > LONGEST_DURATION:
        raise ValueError(f"'{text}' is longer than ten years")
    return seconds


def parse_whole(text: str) -> int:
    """Return a whole number from 1 to 2**31 - 1.  Raises ValueError for anything else."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < WHOLE_LIMIT):
        raise ValueError(f"'{text}' is not a whole number above 0")
    return int(text)


def parse_network(text: str) -> str:
    """Return "tcp" or "udp".  Raises ValueError for anything else."""
    if text not in ("tcp", "udp"):
        raise ValueError(f"'{text}' is neither tcp nor udp")
    return text
