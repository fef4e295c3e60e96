"""Joins the datagrams of one batch into runs: same key, same length, in order.

A run leaves in one system call if the kernel can cut it.  The order within a flow is always
the order of arrival: a datagram that does not fit the run of its flow sends that run first.
One Runs object serves one batch, on the thread that received it.
"""

from __future__ import annotations

from netproxy.interfaces.datagrams import Run
from netproxy.net.datagram import SEGMENTED_BYTES, SEGMENTS_LIMIT
from netproxy.typed import TYPE_CHECKING, Callable, Generic, Sequence, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Pace

K = TypeVar("K")
"""What identifies a flow: an entry towards targets, a source's header towards clients."""


class Runs(Generic[K]):
    """Collects the runs of one batch."""

    __slots__ = ("_send", "_runs", "_key", "_length", "_append")

    def __init__(self, send: Callable[[K, Run], None]) -> None:
        """Call send(key, run) for each complete run."""
        self._send = send
        self._runs: dict[K, Run] = {}
        # The run that the last datagram was added to, if datagrams of that length may follow.
        self._key: K | None = None
        self._length = -1
        self._append: Callable[[int], None]

    def add(self, key: K, offsets: Sequence[int], length: int, last: int, skip: int = 0) -> None:
        """Add the datagrams of a span, without the first `skip` bytes of each.

        `length` is the bytes of each datagram but the last.  `last` is the bytes of the last
        one, at least `skip`.
        """
        if isinstance(offsets, range):
            self._add_train(key, offsets, length, last, skip)
        elif length == self._length and key is self._key:
            self._append(offsets[0] + skip)
        else:
            self._add_single(key, offsets[0] + skip, length - skip)
            self._length = length

    def _add_single(self, key: K, offset: int, size: int) -> None:
        run = self._runs.get(key)
        if run is not None and run.last == run.length >= size > 0:
            offsets = _extend(run, (offset,), size)
        else:
            if run is not None:
                self._send(key, run)
            offsets = [offset]
            run = self._runs[key] = Run(offsets, size, size)
        if run.length == size:
            self._key, self._append = key, offsets.append
        else:
            # A shorter datagram ends its run.
            self._key = None

    def _add_train(self, key: K, offsets: range, length: int, last: int, skip: int) -> None:
        """Add datagrams that came together.

        They join the run of their flow if one send takes both, else they are a run of their own.
        """
        self._key = None
        offsets = range(offsets.start + skip, offsets.stop + skip, offsets.step)
        size, left = length - skip, last - skip
        run = self._runs.get(key)
        # A train cannot end with an empty datagram, unless all of its datagrams are empty.
        fits = left > 0 or last == length
        if run is not None:
            joins = run.last == run.length == size > 0
            if fits and joins and _is_one_send(len(run.offsets) + len(offsets), size):
                _extend(run, offsets, left)
                return
            self._send(key, run)
        if fits:
            self._runs[key] = Run(offsets, size, left)
        else:
            self._send(key, Run(offsets[:-1], size, size))
            self._runs[key] = Run([offsets[-1]], 0, 0)

    def flush(self) -> None:
        """Send all runs that are left."""
        for key, run in self._runs.items():
            self._send(key, run)
        self._runs.clear()
        self._key = None


def datagrams_within(pace: Pace, moved: int, run: Run) -> int:
    """Return how many datagrams of a run a direction may carry now, having carried `moved` bytes.

    The last of them may exceed what is allowed: the next ones pay for it.
    """
    count, length, allowed = len(run.offsets), max(1, run.length), 0
    while allowed < count:
        room = pace.mark - moved
        if room <= 0 and not (room := pace.renew(moved)):
            break
        part = min(count - allowed, -(-room // length))
        allowed += part
        moved += part * length
    return allowed


def _extend(run: Run, offsets: Sequence[int], last: int) -> list[int]:
    """Add datagrams to a run; return its offsets, a list from now on."""
    extended = run.offsets if isinstance(run.offsets, list) else list(run.offsets)
    extended.extend(offsets)
    run.offsets = extended
    run.last = last
    return extended


def _is_one_send(count: int, length: int) -> bool:
    """Return whether one send takes `count` datagrams.  It makes room for headers itself."""
    return count <= SEGMENTS_LIMIT and count * length <= SEGMENTED_BYTES
