"""What the poller keeps for each wait: the owner, the descriptors, the deadline.  Does no I/O."""

from __future__ import annotations

import heapq
import itertools
import threading
import time

from netproxy.typed import TYPE_CHECKING, Callable, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Descriptor, Wait

NEVER = float("inf")
"""The deadline of a wait without a limit."""


class WaitOwner(Protocol):
    """What a wait belongs to.  Called on the thread that calls watch(), or the poller's.

    No method may block.
    """

    def wake(self, wait: Wait, ready: bool) -> None:
        """Go on elsewhere, once; `ready` is False if the time is up."""

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        """Go on elsewhere with the wait that a step has returned: the kernel cannot watch it."""

    def end(self, error: Exception | None) -> None:
        """Note that a step returned nothing to wait for, or raised `error`."""


class Watch:
    """One owner's wait, with its descriptors and deadline."""

    __slots__ = ("wait", "descriptors", "deadline", "owner")

    def __init__(self, wait: Wait, owner: WaitOwner) -> None:
        self.owner = owner
        self.wait: Wait
        # What is watched: by number, the descriptor and its events.  Replaced as a whole: another
        # thread may look.
        self.descriptors: dict[int, tuple[Descriptor, int]] = {}
        self.follow(wait)
        self.deadline = NEVER if wait.seconds is None else time.monotonic() + wait.seconds

    def follow(self, wait: Wait) -> dict[int, tuple[Descriptor, int]]:
        """Take another wait; return the descriptors of the one before."""
        watched = {}
        for entry in wait.watched:
            watched[entry[0].fileno()] = entry
        before, self.descriptors, self.wait = self.descriptors, watched, wait
        return before


class Deadlines:
    """Watches in the order of their deadlines.  Thread: any.

    A watch that gets another deadline is added again; the place of its earlier one is skipped.
    """

    def __init__(self) -> None:
        # Guards _heap and first.
        self._lock = threading.Lock()
        # The number keeps two watches with one deadline from being compared.
        self._heap: list[tuple[float, int, Watch]] = []
        self._numbers = itertools.count()
        self.first = NEVER
        """The earliest deadline, which may be one to skip; NEVER if there is none.  Read without
        the lock."""

    def add(self, watch: Watch) -> bool:
        """Add a watch with its deadline; return whether this is the earliest one now."""
        with self._lock:
            heapq.heappush(self._heap, (watch.deadline, next(self._numbers), watch))
            self.first = self._heap[0][0]
            return self._heap[0][2] is watch

    def take(self, now: float) -> list[Watch]:
        """Remove and return the watches whose deadline has come by `now` (monotonic)."""
        late = []
        with self._lock:
            while self._heap and self._heap[0][0] <= now:
                deadline, _, watch = heapq.heappop(self._heap)
                if watch.deadline == deadline:
                    late.append(watch)
            self.first = self._heap[0][0] if self._heap else NEVER
        return late


class Notification:
    """A wait that calls `notify` when its event comes, and ends there."""

    __slots__ = ("_notify",)

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    def wake(self, wait: Wait, ready: bool) -> None:
        """Call `notify`."""
        self._notify()

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        """Do nothing: the wait has no step that could return another one."""

    def end(self, error: Exception | None) -> None:
        """Do nothing: only waits with a step end this way."""

    def resume(self, ready: bool) -> None:
        """Do nothing: wake() has told all there is."""
