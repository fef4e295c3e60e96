"""Finds how large the packets of a path may be (RFC 8899), by packets that are answered or not.

Tries one size of a ladder after the other, upwards, until one is not answered.  While large
packets leave, the size in use is tried as well: a route that has become narrower is noticed.
Pure: the owner passes the time, in monotonic seconds, and guards it.
"""

from __future__ import annotations

from netproxy.protocol.tunnels.path import BASE_PACKET

LADDER = (1232, 1372, 1392, 1412, 1432, 1444, 1452, 1464, 1472)
"""Bytes of UDP payload that fit links which exist: IPv6's least, then WireGuard, GRE, PPPoE and
Ethernet, for IPv6 and IPv4."""
SMALL_PACKET = 600
"""Bytes of packets that pass everywhere: what passes above them tells something of a size."""

TRIES = 3
"""Packets of one size that are not answered before the size counts as too large."""

ANSWER_SECONDS = 1.0
"""Until a packet counts as not answered."""

VERIFY_SECONDS = 2.0
"""Between two tries of the size in use, while large packets leave."""

AGAIN_SECONDS = 600.0
"""Until larger sizes are tried again (RFC 8899 section 5.1.1: PMTU_RAISE_TIMER)."""


class MtuSearch:
    """The largest packet known to pass, and what to try next."""

    __slots__ = ("size", "due", "is_blocked", "limit", "_ceiling", "_again", "_trying", "_tries")

    def __init__(self, limit: int = LADDER[-1]) -> None:
        """`limit`: bytes of the largest packet worth a try."""
        self.limit = limit
        self.restart(0.0)

    def restart(self, now: float) -> None:
        """Begin anew: the path may lead elsewhere now."""
        self.size = BASE_PACKET
        """Bytes of the largest packet that has passed."""
        self.due = now
        """Time at which tick() is to be called."""
        self.is_blocked = False
        """True if BASE_PACKET has been tried in vain."""
        self._ceiling = self.limit
        # When larger sizes than the ceiling are tried again.
        self._again = 0.0
        # The size that is tried, 0 for none; and how many packets of it have left.
        self._trying = self._tries = 0

    def tick(self, now: float, is_large: bool) -> int:
        """Return the bytes of a packet to be sent, 0 for none.

        `is_large`: packets above SMALL_PACKET have left since the last call.
        """
        if now < self.due:
            return 0
        if self._tries >= TRIES:
            self._give_up(now)
        if now >= self._again:
            self._ceiling = self.limit
        if not self._trying:
            self._trying = self._next(is_large)
        if not self._trying:
            self.due = now + VERIFY_SECONDS
            return 0
        self._tries += 1
        self.due = now + ANSWER_SECONDS
        return self._trying

    def answered(self, size: int, now: float) -> None:
        """Note that a packet of `size` bytes has passed."""
        if self.size < size <= self._ceiling:
            self.size = size
        if size == self._trying:
            self._trying = self._tries = 0
            self.due = now if self._step() else now + VERIFY_SECONDS

    @property
    def is_searching(self) -> bool:
        """Whether sizes are tried even if no datagrams pass."""
        return bool(self._trying or self._step())

    def _step(self) -> int:
        """Return the next larger size worth a try, 0 for none."""
        return next((step for step in LADDER if self.size < step <= self._ceiling), 0)

    def _next(self, is_large: bool) -> int:
        return self._step() or (self.size if is_large else 0)

    def _give_up(self, now: float) -> None:
        """Do without the size that was not answered."""
        if self._trying == self.size:
            # The size in use: the route is narrower than before.
            self.is_blocked = self.size == BASE_PACKET
            self.size = BASE_PACKET
        self._ceiling, self._again = self._trying - 1, now + AGAIN_SECONDS
        self._trying = self._tries = 0
