"""The flows of direct paths: each carries the datagrams of one request, which has one target.

A flow is beside the relayed one, and leaves to that what the direct path cannot carry now.  The
client begins; the agent answers directly once a packet of the flow has come directly.  So neither
side sends what the other side cannot take yet.  Thread: any.
"""

from __future__ import annotations

import math
import time

from netproxy.interfaces.datagrams import Batch
from netproxy.tunnel.path.flows import PathFlow
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import Arena, Run
    from netproxy.tunnel.path.path import Path

RELAYED_SECONDS = 20.0
"""A run of the client goes by the relay so often: the bridge, its NAT and the NATs before it then
know that the flow is in use, and its session does not end as idle."""

PAUSE_SECONDS, PAUSE_LIMIT = 1.0, 60.0
"""Datagrams go by the relay for so long after the other side has said that it has no such flow: it
may be about to be told of the flow.  Twice as long each time, up to the limit: a datagram is lost
each time."""


class ClientFlow(PathFlow):
    """The client's side: beside the stream to the bridge."""

    __slots__ = ("_relays_at", "_direct_from", "_pause")

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(path, path.flows, number, False)
        self._relays_at = time.monotonic() + RELAYED_SECONDS
        self._direct_from, self._pause = 0.0, PAUSE_SECONDS

    def send(self, arena: Arena, run: Run, prefix: bytes) -> bool:
        """Send a run directly; return False if it must go by the relay."""
        now = time.monotonic()
        if now < self._direct_from:
            return False
        if now >= self._relays_at:
            self._relays_at = now + RELAYED_SECONDS
            return False
        return super().send(arena, run, prefix)

    def deliver(self, batch: Batch) -> bool:
        """Hand over what has come."""
        self._pause = PAUSE_SECONDS
        return super().deliver(batch)

    def end(self) -> None:
        """Go by the relay for a while: the request itself has not ended."""
        self._direct_from = max(self._direct_from, time.monotonic() + self._pause)
        self._pause = min(PAUSE_LIMIT, 2 * self._pause)

    def close(self) -> None:
        """Go by the relay from now on.  May be called again."""
        self._direct_from = math.inf
        super().close()


class AgentFlow(PathFlow):
    """The agent's side: a shortcut of the flow that the bridge relays."""

    __slots__ = ("_relayed", "_target", "_is_begun")

    def __init__(self, path: Path, number: int, relayed: PathFlow, target: bytes) -> None:
        """`target`: raw, as the bridge writes it before each datagram of the relayed flow."""
        super().__init__(path, path.flows, number, False)
        self._relayed = relayed
        self._target = target
        self._is_begun = False

    def send(self, arena: Arena, run: Run, prefix: bytes) -> bool:
        """Send replies of the target directly; return False if they must be relayed.

        The bridge decides about replies of others.
        """
        if not self._is_begun or prefix != self._target:
            return False
        return super().send(arena, run, b"")

    def deliver(self, batch: Batch) -> bool:
        """Hand over what has come, as if the bridge had relayed it to the one target."""
        self._is_begun = True
        target = self._target
        spans = [(offsets, length, last, target) for offsets, length, last, _ in batch.spans]
        return self._relayed.deliver(Batch(batch.arena, spans))

    def end(self) -> None:
        """Go by the relay until the client sends directly again."""
        self._is_begun = False

    def close(self) -> None:
        """Go by the relay from now on.  May be called again."""
        self._is_begun = False
        super().close()
