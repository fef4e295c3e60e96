"""One flow's part of the limits of its user, its client and its listener.

Thread: AccountBook calls the methods in the second half under its lock.
"""

from __future__ import annotations

import threading

from netproxy.access.accounts.ledger import CONNECTIONS, DOWN, OPENED, SESSIONS, UP
from netproxy.access.accounts.pacing import LeasedPace
from netproxy.access.accounts.subject import Subject
from netproxy.interfaces.accounts import UNLIMITED
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow, LiveFlow


class FlowAccount:
    """One flow's part of its subjects (interfaces.accounts.Account)."""

    __slots__ = ("up", "down", "flow", "live", "_close", "_word", "subjects", "_sent", "_received")

    def __init__(
        self, flow: Flow, lock: threading.Lock, close: Callable[[FlowAccount], None]
    ) -> None:
        """`lock` is that of the AccountBook, whose `close` counts the flow out."""
        self.flow = flow
        self._close = close
        self._word = CONNECTIONS if flow.network == "tcp" else SESSIONS
        self.subjects: Sequence[Subject] = ()
        self.up, self.down = LeasedPace(lock), LeasedPace(lock)
        self.live: LiveFlow | None = None
        # What has been added to the ledger so far.
        self._sent = self._received = 0

    def attach(self, live: LiveFlow) -> None:
        """Note the flow, which runs from now on."""
        self.live = live

    def close(self) -> None:
        """Count the flow out."""
        self._close(self)

    # -- under the lock of the AccountBook

    def enter(self, subjects: Sequence[Subject], is_new: bool = False) -> Sequence[Subject]:
        """Count the flow for these subjects alone; return those that it no longer counts for.

        `is_new`: count it as opened as well.
        """
        for subject in subjects:
            if self not in subject.accounts:
                subject.accounts[self] = None
                subject.slot.enter(self._word, is_new)
        before, self.subjects = self.subjects, subjects
        if not before:
            return ()
        left = [subject for subject in before if subject not in subjects]
        for subject in left:
            del subject.accounts[self]
            subject.slot.leave(self._word)
        return left

    def exceeded(self, is_new: bool) -> str:
        """Return the key of a limit that is exceeded with this flow, "" if none.

        For several processes, see Subject.exceeded().  The caller lets the flow leave.
        """
        network, subjects = self.flow.network, self.subjects
        for subject in subjects:
            if key := subject.exceeded(network, is_new):
                for counted in subjects:
                    counted.slot.add(OPENED, -is_new)
                return key
        return ""

    def settle(self) -> tuple[int, int]:
        """Add to the ledger what has been moved since the last time; return it."""
        if self.live is None:
            return 0, 0
        traffic = self.live.traffic()
        sent, received = traffic.sent - self._sent, traffic.received - self._received
        if sent or received:
            self._sent, self._received = traffic.sent, traffic.received
            for subject in self.subjects:
                subject.slot.add(UP, sent)
                subject.slot.add(DOWN, received)
        return sent, received

    def configure(self) -> None:
        """Follow the rates of the subjects."""
        is_new = self.live is None
        self.up.configure([subject.up for subject in self.subjects if subject.up], is_new)
        self.down.configure([subject.down for subject in self.subjects if subject.down], is_new)

    def leave(self) -> Sequence[Subject]:
        """Count the flow out; return the subjects that it had."""
        left, self.subjects, self.live = self.subjects, (), None
        # Few flows are under a rate, and a call costs more than a comparison.
        if self.up.mark != UNLIMITED:
            self.up.close(self._sent)
        if self.down.mark != UNLIMITED:
            self.down.close(self._received)
        for subject in left:
            del subject.accounts[self]
            subject.slot.leave(self._word)
        return left
