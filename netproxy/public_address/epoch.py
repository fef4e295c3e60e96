"""Finds out that a router has lost its port mappings, by the clock that it tells.  Pure."""

from __future__ import annotations

SLACK = 2.0
"""Seconds that the clocks may differ by, because both tell whole seconds (RFC 6887 section 8.5)."""


class Epoch:
    """The clock of one router.  RFC 6887 section 8.5, RFC 6886 section 3.6."""

    def __init__(self) -> None:
        self._told: tuple[float, float] | None = None
        """The router's seconds, and our own at that moment."""

    def note(self, seconds: float, now: float, tolerance: float) -> bool:
        """Note what a router has told at `now`; return whether it has lost its mappings since.

        `tolerance`: the part by which its clock may be faster or slower than ours.
        """
        before, self._told = self._told, (seconds, now)
        if before is None:
            return False
        passed, theirs = now - before[1], seconds - before[0]
        is_slow = theirs + SLACK < passed - passed * tolerance
        is_fast = passed + SLACK < theirs - theirs * tolerance
        return theirs < -1 or is_slow or is_fast

    def forget(self) -> None:
        """Forget the clock: the router is another one."""
        self._told = None
