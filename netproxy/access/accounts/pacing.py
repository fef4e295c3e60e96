"""Rates: divides the bytes per second of a limit fairly among the flows that are under it.

A flow carries bytes until it reaches its mark; then it asks for a lease.  Time is divided into
turns.  In each turn the flows that had to wait in the turn before get equal shares of what the
limit allows.  A flow that gets nothing waits for the next turn (TCP) or drops (UDP).  So the
path of a byte only compares two numbers, and no flow has a thread or a timer of its own.

Thread: any; the caller of Share and Bucket holds the lock of Accounts.  LeasedPace takes it.
"""

from __future__ import annotations

import threading
import time
from typing import Sequence

from netproxy.access.accounts.ledger import Slot
from netproxy.interfaces.accounts import UNLIMITED

TURN_SECONDS = 0.04
"""The shortest turn: a flow that waits wakes up at most 25 times a second."""
SHARE_BYTES = 24576
"""A turn is so long that each flow that waits gets so much, within the limits below: each wake-up
costs some 50 microseconds, however little the flow may carry then."""
LONG_TURN_SECONDS = 0.12
"""The longest turn for the sake of SHARE_BYTES: a flow that waits is delayed by so much."""
LONGEST_TURN_SECONDS = 1.0
"""For rates so low that a turn allows less than LEASE_LEAST."""
LEASE_LEAST = 2048
"""Bytes: a smaller lease costs more system calls than it moves.  A datagram fits in."""
TURN_PART = 0.75
"""A turn takes at most this part of the burst's time: what a late turn allows more is not lost."""
BURST_SECONDS, BURST_LEAST = 0.25, 65536
"""The burst of a limit that names none, in seconds of its rate, and the least one in bytes."""
_EXPECT = -1
"""The mark of a direction whose limits have changed: it counts from what it has moved by then."""


class Level:
    """What a limit allows at the moment: grows with time, shrinks with what was used."""

    __slots__ = ("rate", "burst", "amount", "_counted", "_at")

    def __init__(self, rate: float, burst: float, total: int, now: float) -> None:
        """`rate` is a second's; `total` is what was used before `now`, in monotonic seconds."""
        self.rate, self.burst = rate, burst
        self.amount = burst
        self._counted = total
        self._at = now

    def update(self, total: int, now: float) -> float:
        """Return the amount; `total` is what all processes have used so far."""
        grown = self.amount + self.rate * (now - self._at) - (total - self._counted)
        self.amount = min(self.burst, grown)
        self._counted, self._at = total, now
        return self.amount


def default_burst(rate: int) -> int:
    """Return the burst of a rate that has no burst of its own, in bytes."""
    return max(BURST_LEAST, int(rate * BURST_SECONDS))


class Bucket:
    """A limit of bytes per second, in one direction, and the flows under it."""

    __slots__ = (
        *("key", "slot", "_level", "_word", "_period", "_longest"),
        *("_turned", "_number", "_left", "_share", "_waiting", "_chosen"),
    )

    def __init__(self, key: str, slot: Slot, word: int, rate: int, burst: int) -> None:
        """`key` names the limit.  `word` of `slot` counts the leases."""
        self.key = key
        self.slot = slot
        self._word = word
        now = time.monotonic()
        self._level = Level(rate, burst, slot.sum(word), now)
        self._turned = now - LONGEST_TURN_SECONDS
        self._number = 0
        # What is left of this turn, and the share of each flow in it.
        self._left = self._share = 0.0
        # The shares that got nothing, with the turn in which that was; the first waits longest.
        self._waiting: dict[Share, int] = {}
        # Those that may have a lease in this turn, if there is not enough for all; None for all.
        self._chosen: frozenset[Share] | None = None
        self.configure(rate, burst)

    def configure(self, rate: int, burst: int) -> None:
        """Apply another rate and burst, in bytes."""
        self._level.rate, self._level.burst = rate, max(burst, LEASE_LEAST)
        self._longest = min(LONG_TURN_SECONDS, TURN_PART * burst / rate)
        self._set_period(1)

    def _set_period(self, flows: int) -> None:
        """Choose how long a turn takes in which so many flows wait."""
        rate = self._level.rate
        wanted = max(TURN_SECONDS, min(flows * SHARE_BYTES / rate, self._longest))
        self._period = min(max(wanted, LEASE_LEAST / rate), LONGEST_TURN_SECONDS)

    def available(self, share: Share, now: float) -> int:
        """Return the bytes that a share may lease now; note that it waits if there are none."""
        if now >= self._turned + self._period:
            self._turn(now)
        if share.turn != self._number:
            share.turn, share.before, share.taken = self._number, share.taken, 0
        amount = int(min(self._left, self._share - share.taken))
        if amount < LEASE_LEAST or not (self._chosen is None or share in self._chosen):
            self._waiting[share] = self._number
            return 0
        # A flow that has used little keeps little that others may need.
        lease = max(SHARE_BYTES, share.before)
        return lease if amount - lease >= LEASE_LEAST else amount

    def take(self, share: Share, amount: int) -> None:
        """Lease bytes to a share, or take them back if `amount` is negative."""
        share.taken += amount
        self._left -= amount
        self.slot.add(self._word, amount)

    def is_full(self, now: float) -> bool:
        """Return whether nothing of the limit is used."""
        return self._level.update(self.slot.sum(self._word), now) >= self._level.burst

    def next_turn(self) -> float:
        """Return when the next turn begins, in monotonic seconds."""
        return self._turned + self._period

    def leave(self, share: Share) -> None:
        """Forget a share."""
        self._waiting.pop(share, None)

    def _turn(self, now: float) -> None:
        before = self._number
        for share in [share for share, turn in self._waiting.items() if turn < before]:
            del self._waiting[share]
        self._number, self._turned = before + 1, now
        self._left = self._level.update(self.slot.sum(self._word), now)
        waiting = max(1, len(self._waiting))
        self._share, self._chosen = self._left / waiting, None
        self._set_period(waiting)
        if self._share < LEASE_LEAST and self._left >= LEASE_LEAST:
            served = list(self._waiting)[: int(self._left // LEASE_LEAST)]
            for share in served:
                self._waiting[share] = self._waiting.pop(share)
            self._chosen, self._share = frozenset(served), LEASE_LEAST


class Share:
    """One flow's part of a bucket."""

    __slots__ = ("bucket", "turn", "taken", "before")

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.turn = 0
        """The last turn in which it came for more."""
        self.taken = self.before = 0
        """Bytes leased in that turn, and in the one before in which it came."""


class LeasedPace:
    """How many bytes one direction of a flow may carry (interfaces.accounts.Pace)."""

    __slots__ = ("mark", "_lock", "_shares", "_until", "_blocked")

    def __init__(self, lock: threading.Lock) -> None:
        """`lock` guards the buckets; there are none before configure()."""
        self._lock = lock
        self._shares: tuple[Share, ...] = ()
        self.mark = UNLIMITED
        self._until = 0.0
        self._blocked = ""

    def renew(self, moved: int) -> int:
        """Return how many bytes may be carried now, 0 if none."""
        now = time.monotonic()
        if now < self._until:
            # Without the lock: datagrams may come far beyond the rate.
            return 0
        with self._lock:
            if self.mark == _EXPECT:
                self.mark = moved
            if self._shares and moved >= self.mark:
                self.mark += self._lease(now)
            return max(0, self.mark - moved)

    def delay(self) -> float:
        """Return the seconds after which renew() may return more."""
        return max(0.001, self._until - time.monotonic())

    def decided(self) -> str:
        """Return the key of the limit that has refused more."""
        return self._blocked

    # -- the caller holds the lock

    def configure(self, buckets: Sequence[Bucket]) -> None:
        """Be under these buckets from now on, some of which may be the same."""
        if [share.bucket for share in self._shares] == list(buckets):
            return
        for share in self._shares:
            share.bucket.leave(share)
        self._shares = tuple(map(Share, buckets))
        self._until = 0.0
        self.mark = _EXPECT if buckets else UNLIMITED

    def close(self, moved: int) -> None:
        """Return what was leased and not used; `moved`: the count at the end."""
        unused = self.mark - moved
        for share in self._shares:
            if unused > 0:
                share.bucket.take(share, -unused)
            share.bucket.leave(share)
        self._shares, self.mark = (), UNLIMITED

    def _lease(self, now: float) -> int:
        lease, shares = UNLIMITED, self._shares
        for share in shares:
            available = share.bucket.available(share, now)
            if not available:
                self._until, self._blocked = share.bucket.next_turn(), share.bucket.key
            lease = min(lease, available)
        if lease:
            for share in shares:
                share.bucket.take(share, lease)
        return lease
