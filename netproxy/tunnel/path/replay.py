"""Remembers which packets of a connection ID have come, so that no packet counts twice.

The window of RFC 4303 section 3.4.3 and WireGuard.  Pure; the owner guards it.
"""

from __future__ import annotations

WINDOW = 2048
"""Packets behind the newest one that may still come: at 1 Gbit/s in packets of 1200 bytes, those
of 20 ms."""
_ALL = (1 << WINDOW) - 1


class ReplayWindow:
    """Which of the last WINDOW counters have been seen."""

    __slots__ = ("newest", "_seen")

    def __init__(self) -> None:
        self.newest = -1
        """The highest counter that was seen; -1 before the first."""
        # Bit n: newest - n was seen.
        self._seen = 0

    def is_new(self, counter: int) -> bool:
        """Return False for a counter that was seen, or is too old to tell."""
        behind = self.newest - counter
        return behind < 0 or (behind < WINDOW and not self._seen >> behind & 1)

    def note(self, counter: int) -> bool:
        """Remember a counter that is_new(), of a packet that is authentic.

        Return whether it is the newest.
        """
        ahead = counter - self.newest
        if ahead <= 0:
            self._seen |= 1 << -ahead
            return False
        self._seen = (self._seen << ahead & _ALL | 1) if ahead < WINDOW else 1
        self.newest = counter
        return True
