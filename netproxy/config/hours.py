"""Parses the times of a week as users write them: "mon-fri 08:00-18:00".  Pure."""

from __future__ import annotations

import re

from netproxy.interfaces.flows import WEEK_MINUTES

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
"""In the order of struct_time.tm_wday."""
DAY = 24 * 60
"""Minutes."""
_EXPECTED = '(expected "mon-fri 08:00-18:00", "sat,sun" or "22:00-06:00")'
_TIMES = r"([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})"


def parse_hours(text: str) -> tuple[range, ...]:
    """Return the minutes of the week in "mon-fri 08:00-18:00", counted from Monday 00:00.

    The days or the times may be absent.  Times may pass midnight: the part behind it belongs to
    the day on which it began.  No range passes the end of the week.  Raises ValueError.
    """
    words = text.split()
    times = words.pop() if words and ":" in words[-1] else ""
    days = " ".join(words)
    if not (days or times):
        raise ValueError(f"is empty {_EXPECTED}")
    start, end = _times(times, text) if times else (0, DAY)
    spans: list[range] = []
    for day in _days(days, text) if days else range(len(DAYS)):
        first, stop = day * DAY + start, day * DAY + end
        spans.append(range(first, min(stop, WEEK_MINUTES)))
        if stop > WEEK_MINUTES:
            spans.append(range(stop - WEEK_MINUTES))
    return tuple(spans)


def _days(days: str, text: str) -> list[int]:
    """Return the numbers of "mon-wed,fri", 0 for Monday; a range may pass the end of the week."""
    numbers: list[int] = []
    for part in days.split(","):
        first, dash, last = (word.strip() for word in part.lower().partition("-"))
        if first not in DAYS or (dash and last not in DAYS):
            wrong = first if first not in DAYS else last
            raise ValueError(f"'{text}': '{wrong}' is not a day {_EXPECTED}")
        begin = DAYS.index(first)
        count = (DAYS.index(last) - begin) % len(DAYS) + 1 if dash else 1
        numbers += [(begin + more) % len(DAYS) for more in range(count)]
    return numbers


def _times(times: str, text: str) -> tuple[int, int]:
    """Return the minutes at which "22:00-06:00" begins and ends, the end perhaps a day later."""
    match = re.fullmatch(_TIMES, times, re.ASCII)
    if not match:
        raise ValueError(f"'{text}': '{times}' is not a time of the day {_EXPECTED}")
    begin_hour, begin_minute, end_hour, end_minute = map(int, match.groups())
    start, end = begin_hour * 60 + begin_minute, end_hour * 60 + end_minute
    if max(begin_minute, end_minute) > 59 or start >= DAY or end > DAY:
        raise ValueError(f"'{text}': '{times}' is not a time of the day (00:00 to 24:00)")
    if start == end:
        raise ValueError(f"'{text}' is empty (write 00:00-24:00 for a whole day)")
    return start, end if end > start else end + DAY
