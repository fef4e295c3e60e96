"""Single values as users write them: durations, numbers, sizes, rates, networks, ports, sockets.

Pure functions.  A ValueError says what is wrong in the words of the configuration's errors.
"""

from __future__ import annotations

import re

from netproxy.interfaces.addresses import SOCKET_PATH_LIMIT, UNIX_PREFIX, UnixAddress

LONGEST_DURATION = 3650 * 86400.0
"""Seconds.  System calls accept less than users can write."""
WHOLE_LIMIT = 1 << 31
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0}
SIZE_LIMIT = 1 << 60
"""Bytes, and bytes per second: sums of many stay within 64 bits."""
_SCALES = {
    "": 1,
    **{"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    **{"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?((?:[KMGT]i|[kKMGT])?)(B)")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?((?:[KMGT]i|[kKMGT])?)(bit|B)/s")
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


def parse_whole_limit(text: str) -> int | None:
    """Return a whole number from 1 to 2**31 - 1, None for "0", which is no limit.

    Raises ValueError for anything else.
    """
    if text == "0":
        return None
    try:
        return parse_whole(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a whole number (0 is no limit)") from None


def parse_network(text: str) -> str:
    """Return "tcp" or "udp".  Raises ValueError for anything else."""
    if text not in ("tcp", "udp"):
        raise ValueError(f"'{text}' is neither tcp nor udp")
    return text


def parse_rate(text: str) -> int | None:
    """Return the bytes per second of "20Mbit/s" or "5MB/s", None for "0", which is no limit.

    Raises ValueError for anything else.
    """
    if text == "0":
        return None
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a rate (expected 20Mbit/s, 512kbit/s or 5MB/s)")
    bits = match[3] == "bit"
    rate = float(match[1]) * _SCALES[match[2]] / (8 if bits else 1)
    if not 1 <= rate < SIZE_LIMIT:
        hint = "write 0 for no limit" if rate < 1 else "write a lower rate"
        raise ValueError(f"'{text}' is not a rate that can be kept: {hint}")
    return int(rate)


def parse_size(text: str) -> int | None:
    """Return the bytes of "64KiB" or "2GB", None for "0", which is no limit.

    Raises ValueError for anything else.
    """
    if text == "0":
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a size (expected 64KiB, 1MiB or 2GB)")
    size = float(match[1]) * _SCALES[match[2]]
    if not 1 <= size < SIZE_LIMIT:
        hint = "write 0 for no limit" if size < 1 else "write a smaller size"
        raise ValueError(f"'{text}' is not a size that can be kept: {hint}")
    return int(size)


def parse_frequency(text: str) -> float | None:
    """Return the events per second of "20/s" or "30/m", None for "0", which is no limit.

    Raises ValueError for anything else.
    """
    if text == "0":
        return None
    count, _, unit = text.partition("/")
    if unit not in _PERIODS or not (count.isascii() and count.isdigit()):
        raise ValueError(f"'{text}' is not a number for a time (expected 20/s, 30/m or 100/h)")
    if not 0 < int(count) < WHOLE_LIMIT:
        raise ValueError(f"'{text}' is not above 0: write 0 for no limit")
    return int(count) / _PERIODS[unit]


def parse_relay_port(text: str) -> str:
    """Return "shared", "any", or a range of ports "FIRST-LAST".  Raises ValueError."""
    if text in ("shared", "any"):
        return text
    first, _, last = text.partition("-")
    if (
        text.isascii()
        and first.isdigit()
        and last.isdigit()
        and 0 < int(first) <= int(last) < 65536
    ):
        return text
    raise ValueError(f"'{text}' is not shared, any or a range of ports FIRST-LAST")


def parse_unix(text: str) -> UnixAddress:
    """Return the address of "unix:/path", or of "unix:@name" without a file.

    Raises ValueError.  The message does not repeat the text.
    """
    path = text.removeprefix(UNIX_PREFIX)
    is_long = len(path.encode()) > SOCKET_PATH_LIMIT
    if path[:1] not in ("/", "@") or len(path) < 2 or path.endswith("/") or "\0" in path or is_long:
        limit = f"at most {SOCKET_PATH_LIMIT} bytes"
        raise ValueError(f"what follows 'unix:' is not the path of a socket ({limit})")
    return UnixAddress.of(path)
