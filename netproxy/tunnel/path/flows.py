"""The datagrams of work connections, as far as they go by a path.

A PathFlow stands beside the stream of the work connection (datagrams.Beside).  It takes what the
path can carry now, and leaves the rest to the stream; what comes by the path goes to its sink.
If the stream fails the flow goes on without it while the path is up, until the agent attaches
another work connection.  Thread: any.
"""

from __future__ import annotations

import threading

from netproxy.protocol.http.capsule import encode_varint
from netproxy.typed import TYPE_CHECKING, Callable, Protocol, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Arena, Batch, Run


class Carrier(Protocol):
    """The path of a flow."""

    @property
    def holds_flows(self) -> bool:
        """Whether it is up, and flows without a stream get another one."""

    def left_alone(self, flow: PathFlow) -> None:
        """Note that the stream of a flow has failed, and that the flow goes on.  Never blocks."""

    def send(self, arena: Arena, run: Run, prefix: bytes) -> bool:
        """Send datagrams, each behind `prefix`; return False if the path cannot carry them."""

    def note_active(self) -> None:
        """Note that datagrams pass."""


Flow = TypeVar("Flow", bound="PathFlow")

GONE_LIMIT = 64
"""Flows at a time that the other side is told are gone; more are told a moment later."""


class PathFlow:
    """One flow of a path."""

    __slots__ = (
        *("number", "is_addressed", "sink", "gone", "attach", "is_alone", "awaited"),
        *("shortcut", "_path", "_table", "_prefix", "_is_used"),
    )

    def __init__(self, path: Carrier, table: FlowTable, number: int, is_addressed: bool) -> None:
        """`is_addressed`: its datagrams have the addresses of their targets or sources."""
        self.number = number
        self.is_addressed = is_addressed
        self.gone: Callable[[], None] | None = None
        """Called when the other side has ended the flow, of which TCP has not told yet."""
        self.sink: Callable[[Batch], None] | None = None
        """Takes what comes by the path, on the path's thread; never blocks.  None: nothing can
        have been asked for yet, and what comes is dropped."""
        self.attach: Callable[[Stream], bool] | None = None
        """Goes on with another stream in place of the present one; returns False if the flow has
        just ended, and the stream is still the caller's."""
        self.is_alone = False
        """True while the flow has no stream: it has failed."""
        self.awaited = 0
        """Other streams that are dialled: the other side may close the present one before."""
        self.shortcut: PathFlow | None = None
        """Carries what it can on a direct path, before this flow is asked; None without one."""
        self._path = path
        self._table = table
        self._prefix = encode_varint(number)
        self._is_used = False

    def send(self, arena: Arena, run: Run, prefix: bytes) -> bool:
        """Send a run by the path; return False if it must go by the stream."""
        self._is_used = True
        shortcut = self.shortcut
        if shortcut is not None and shortcut.send(arena, run, prefix):
            return True
        return self._path.send(arena, run, self._prefix + prefix)

    def deliver(self, batch: Batch) -> bool:
        """Hand over what has come; the keys of its spans are raw addresses.

        Return False if the flow has no sink.
        """
        sink = self.sink
        if sink is None:
            return False
        self._is_used = True
        sink(batch)
        return True

    def came_by_stream(self) -> None:
        """Note that datagrams have come by the stream: the other side may doubt the path."""
        self._path.note_active()

    def hold(self, has_failed: bool) -> bool:
        """Return whether the flow goes on without its stream, which has ended."""
        if not has_failed and not self.awaited:
            return False
        self.is_alone = True
        # Asked afterwards: a path that goes down at once ends the flows that are alone.
        if not self._path.holds_flows:
            return False
        self._path.left_alone(self)
        return True

    def await_stream(self) -> None:
        """Expect another stream: attached() or forgo() follows."""
        self._table.count_awaited(self, 1)

    def attached(self) -> None:
        """Note that the flow has another stream."""
        self.is_alone = False
        self.forgo()

    def forgo(self) -> None:
        """Expect one stream less."""
        self._table.count_awaited(self, -1)

    def take_used(self) -> bool:
        """Return whether a datagram has passed since the last call."""
        was_used, self._is_used = self._is_used, False
        return was_used

    def end(self) -> None:
        """Have the flow end, and its stream."""
        gone = self.gone
        if gone is not None:
            gone()

    def close(self) -> None:
        """End the flow: its stream has ended.  May be called again."""
        self.sink = self.gone = self.attach = None
        self._table.remove(self)
        shortcut, self.shortcut = self.shortcut, None
        if shortcut is not None:
            shortcut.close()

    @property
    def path(self) -> Carrier:
        """The path that carries the flow."""
        return self._path

    @property
    def closed(self) -> bool:
        """Whether the flow has ended."""
        return self._table.get(self.number) is not self


class FlowTable:
    """The flows of a path, by their numbers."""

    def __init__(self, path: Carrier) -> None:
        self._path = path
        # Guards _next and _told, and `awaited` of the flows.
        self._lock = threading.Lock()
        self._next = 1
        self._flows: dict[int, PathFlow] = {}
        self._told: set[int] = set()
        """Numbers without a flow that the other side was told of lately."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._flows)

    def new(self, is_addressed: bool) -> PathFlow:
        """Return a flow with a number of its own."""
        with self._lock:
            number = self._next
            self._next += 1
        return self.add(number, is_addressed)

    def add(self, number: int, is_addressed: bool) -> PathFlow:
        """Return a flow with a number that the other side has chosen."""
        return self.put(PathFlow(self._path, self, number, is_addressed))

    def put(self, flow: Flow) -> Flow:
        """Take a flow, which ends the one that had its number; return it."""
        before = self._flows.get(flow.number)
        self._flows[flow.number] = flow
        if before is not None:
            before.close()
        return flow

    def get(self, number: int) -> PathFlow | None:
        """Return a flow, None if it is not there."""
        return self._flows.get(number)

    def all(self) -> list[PathFlow]:
        """Return all flows."""
        return list(self._flows.values())

    def remove(self, flow: PathFlow) -> None:
        """Forget a flow."""
        if self._flows.get(flow.number) is flow:
            self._flows.pop(flow.number, None)

    def end(self, number: int) -> None:
        """End a flow that is gone on the other side."""
        if (flow := self._flows.get(number)) is not None:
            flow.end()

    def count_awaited(self, flow: PathFlow, more: int) -> None:
        """Count streams that a flow expects."""
        with self._lock:
            flow.awaited += more

    def end_alone(self) -> None:
        """End the flows without a stream: the path does not carry them any more."""
        for flow in self.all():
            if flow.is_alone:
                flow.end()

    def is_news(self, number: int) -> bool:
        """Return whether the other side is to be told that a flow is not there."""
        with self._lock:
            if number in self._told or len(self._told) >= GONE_LIMIT:
                return False
            self._told.add(number)
            return True

    def forget_told(self) -> None:
        """Tell the other side again of what it goes on to send."""
        with self._lock:
            self._told.clear()
