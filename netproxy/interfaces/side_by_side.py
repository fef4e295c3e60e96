"""Runs two computations side by side on one connection.

An HTTP exchange sends a body up while the answer comes down, and has to see its client
leave while the origin is silent: one waits for one socket, the other for another.  Both
are generators that yield needs; here they become one, whose need is for either.
"""

from __future__ import annotations

import select
import time

from netproxy.errors import NetProxyError
from netproxy.interfaces.connections import Progress
from netproxy.typed import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Descriptor, Need, NeedResult, Ready, Steps, Watched

T = TypeVar("T")

# Events that poll(2) reports whether they are asked for or not.
_ALWAYS = select.POLLERR | select.POLLHUP | select.POLLNVAL


def side_by_side(main: Steps[T], other: Steps[None]) -> Steps[T]:
    """Run `other` beside `main`; return what `main` returns.

    An exception of either ends both.  `other` is closed when `main` has returned.  Neither
    may yield a need that blocks: both begin on the caller's thread.
    """
    first, second = sides = _Side(main), _Side(other)
    try:
        for side in sides:
            side.start()
        while not first.finished:
            yield _Either(first, None if second.finished else second)
        value: T = first.value
        return value
    finally:
        for side in sides:
            side.close()


class _Side:
    """One of the two, and the need that it waits for."""

    def __init__(self, steps: Steps[object]) -> None:
        self._steps = steps
        self._need: Need
        self.finished = False
        self.value: NeedResult = None
        # Monotonic seconds.
        self.deadline = float("inf")

    def start(self) -> None:
        self._run(None, None)

    def close(self) -> None:
        self._steps.close()

    def watched(self) -> Watched:
        return self._need.watched()[0]

    def proceed(self, ready: Ready) -> None:
        """Go on after events; `ready` is empty if the time is up."""
        try:
            result = self._need.proceed(ready)
        except NetProxyError as error:
            self._run(None, error)
            return
        if result is not Progress.PENDING:
            self._run(result, None)

    def _run(self, result: NeedResult, error: NetProxyError | None) -> None:
        """Resume the steps until a need is pending or they have returned."""
        try:
            while True:
                need = self._steps.throw(error) if error else self._steps.send(result)
                error = None
                try:
                    result = need.begin()
                except NetProxyError as raised:
                    error = raised
                    continue
                if isinstance(result, Progress):
                    assert result is Progress.PENDING
                    self._wait_for(need)
                    return
        except StopIteration as stop:
            self.finished = True
            self.value = stop.value

    def _wait_for(self, need: Need) -> None:
        self._need = need
        _, seconds = need.watched()
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds


class _Either:
    """The need for an event of one side.  It lets the sides go on itself and has no result."""

    light = False

    def __init__(self, main: _Side, other: _Side | None) -> None:
        """`other`: None if it has finished."""
        self._main = main
        self._sides = [main] if other is None else [main, other]

    def begin(self) -> Progress:
        return Progress.PENDING

    def watched(self) -> tuple[Watched, float | None]:
        watched: dict[int, tuple[Descriptor, int]] = {}
        for side in self._sides:
            for descriptor, events in side.watched():
                number = descriptor.fileno()
                _, others = watched.get(number, (descriptor, 0))
                watched[number] = descriptor, events | others
        deadline = min(side.deadline for side in self._sides)
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        return tuple(watched.values()), left

    def proceed(self, ready: Ready) -> None:
        now = time.monotonic()
        for side in self._sides:
            if self._main.finished:
                return  # the other ends with it
            own = _own_events(side.watched(), ready)
            if own or side.deadline <= now:
                side.proceed(own)

    def block(self) -> None:
        raise AssertionError


def _own_events(watched: Watched, ready: Ready) -> Ready:
    """Return the events that one side asked for: the other may watch the same descriptor."""
    own = {}
    for descriptor, wanted in watched:
        number = descriptor.fileno()
        events = ready.get(number, 0) & (wanted | _ALWAYS)
        if events:
            own[number] = events
    return own
