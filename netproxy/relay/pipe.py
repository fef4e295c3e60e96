"""TCP relaying: two directions of one connection, half-close kept, until both have ended.

Reads and writes never wait.  A relay with little to do has no thread: the one that
watches all of them takes its few bytes from side to side.  One that fills buffers
gets a thread of the pool, and gives it back when neither side has had anything for
a moment.  A side that does not read holds at most one buffer, and the other is not
read meanwhile.  A reset on one side is passed on as a reset.

One thread moves both directions: two would cost a wake-up and a stack more for
each connection, and did not move more bytes (tests/bench/README.md has figures).
"""

from __future__ import annotations

import select
import socket
from typing import Callable, NamedTuple

from netproxy.errors import StreamError
from netproxy.interfaces.connections import Wait
from netproxy.net.syscalls import POLL_LIMIT_MS
from netproxy.net.stream import Stream
from netproxy.relay.direction import Direction

PARK_SECONDS = 0.1  # without anything to do before a busy relay gives its thread back
_GONE = select.POLLHUP | select.POLLERR
_FAULTS = (
    OSError,
    ValueError,
    StreamError,
)  # ValueError: the descriptor of a socket that was closed meanwhile


class PipeLimits(NamedTuple):
    idle: float  # seconds without a byte either way
    half_close: float  # the same, once one side has ended
    splice: bool = True  # whether bytes may go from socket to socket within the kernel


class Outcome(NamedTuple):
    sent: int  # bytes, client to upstream
    received: int  # bytes, upstream to client
    ended: str  # "closed", "reset", "client reset", "idle"


def pipe(
    client: Stream,
    upstream: Stream,
    limits: PipeLimits,
    finished: Callable[[Outcome], None],
    begun: Callable[[Relay], None] | None = None,
) -> Wait | None:
    """Moves bytes both ways, unread ones first, closes both streams and tells `finished`, once, how it went.

    A Pause while neither side has anything to say; None when it is over.  Raises nothing but what `finished` raises.
    `begun` is told of the relay before it moves anything.
    """
    relay = Relay(client, upstream, limits, finished)
    if begun is not None:
        begun(relay)
    return relay.begin()


class Relay:
    """One under way; whoever began it may ask it what it has moved."""

    __slots__ = (
        "_client",
        "_upstream",
        "_limits",
        "_finished",
        "_up",
        "_down",
        "_near",
        "_pause",
        "_state",
        "_light",
    )

    def __init__(
        self,
        client: Stream,
        upstream: Stream,
        limits: PipeLimits,
        finished: Callable[[Outcome], None],
    ) -> None:
        self._client = client
        self._upstream = upstream
        self._limits = limits
        self._finished = finished
        self._up: Direction | None = None  # set by begin()
        self._down: Direction | None = None
        self._near = -1  # the client's descriptor
        self._pause: Wait | None = None  # the last, which serves again while nothing is different
        self._state: tuple = ()
        self._light = client.plain and upstream.plain  # what is encrypted takes a thread's time

    def traffic(self) -> tuple[int, int]:
        """Bytes so far, client to upstream and back.  From any thread."""
        up, down = self._up, self._down
        return up.traffic if up else 0, down.traffic if down else 0

    def begin(self) -> Wait | None:
        try:
            near, client_unread = self._client.detach()
            far, upstream_unread = self._upstream.detach()
            self._near = near.fileno()
            splice = self._limits.splice and self._light
            self._up = Direction(near, far, client_unread, splice)
            self._down = Direction(far, near, upstream_unread, splice)
            for direction in (self._up, self._down):
                direction.flush()
                if not self._light and not direction.pending:
                    direction.move()  # what has been deciphered already no socket tells of
        except _FAULTS:
            return self._end("reset")
        return self._end("closed") if self._up.done and self._down.done else self._wait()

    def _resume(self, ready: bool) -> Wait | None:
        """On a thread of the relay's own: until it ends or there is nothing to do for a moment."""
        try:
            ended = self._work() if ready else "idle"
        except _FAULTS:
            ended = "reset"
        return self._end(ended) if ended else self._wait()

    def _step(self, descriptor: int, events: int) -> Wait | None:
        """On the thread that watches all relays: one side has something, or takes something again."""
        reads, writes = (
            (self._up, self._down) if descriptor == self._near else (self._down, self._up)
        )
        try:
            if writes.pending:
                writes.flush()
            if not (reads.pending or reads.ended):
                reads.move()
            elif events & _GONE and not writes.done and _gone(reads.source):
                return self._end("reset")  # nothing can reach it any more
        except _FAULTS:
            return self._end("reset")
        return self._end("closed") if reads.done and writes.done else self._wait()

    def _work(self) -> str:
        """How it ended; "" where it only waits."""
        poll = select.poll()
        watched: dict[int, int] = {}
        while True:
            interests = {sock.fileno(): events for sock, events in self._interests()}
            if interests != watched:
                for descriptor in watched.keys() - interests.keys():
                    poll.unregister(descriptor)
                for descriptor, events in interests.items():
                    poll.register(descriptor, events)
                watched = interests
            patience = self._patience()
            ready = dict(poll.poll(min(patience, PARK_SECONDS) * 1000))
            if not ready:
                for direction in (self._up, self._down):
                    direction.rest()
                return "idle" if patience <= PARK_SECONDS else ""
            ended = self._move(ready)
            if ended:
                return ended

    def _move(self, ready: dict[int, int]) -> str:
        """What can be moved now that `ready` are the events of descriptors; how it ended, "" where it goes on."""
        up, down = self._up, self._down
        for direction in (up, down):
            target = ready.get(direction.target.fileno(), 0)
            source = ready.get(direction.source.fileno(), 0)
            if target & _GONE and not (direction.done or source or direction.pending):
                return "reset"  # nothing can reach it any more
            if direction.pending and target:
                direction.flush()
            if source and not direction.pending and not direction.ended:
                direction.move()
        return "closed" if up.done and down.done else ""

    def _interests(self) -> list[tuple[socket.socket, int]]:
        """What to wait for; a side that nothing can be done with now is not watched, or its hang-up would wake us for ever."""
        interests = []
        for direction, other in ((self._up, self._down), (self._down, self._up)):
            reads = select.POLLIN if not direction.ended and not direction.pending else 0
            events = reads | (select.POLLOUT if other.pending else 0)
            if (
                events or not other.done
            ):  # a side that may still be written to is watched for its being gone
                interests.append((direction.source, events))
        return interests

    def _patience(self) -> float:
        """Seconds that nothing may happen."""
        ended = self._up.ended or self._down.ended
        return min(self._limits.half_close if ended else self._limits.idle, POLL_LIMIT_MS / 1000)

    def _wait(self) -> Wait:
        up, down = self._up, self._down
        busy = up.busy or down.busy
        state = (busy, up.ended, down.ended, not up.pending, not down.pending)
        if state != self._state:
            self._state = state
            step = self._step if self._light and not busy else None
            self._pause = Wait(self._interests(), self._patience(), self._resume, False, step)
        return self._pause

    def _end(self, ended: str) -> None:
        self._pause = None  # which holds this relay: so that its memory is free now, not when cycles are looked for
        if ended == "closed":
            self._client.close()
            self._upstream.close()
        else:
            ended = self._who_reset() if ended == "reset" else ended
            self._client.reset()
            self._upstream.reset()
        traffic = [0, 0]
        for at, direction in enumerate((self._up, self._down)):
            if direction is not None:
                traffic[at] = direction.traffic
                direction.close()
        finished, self._finished = self._finished, None  # it may hold who holds this relay
        finished(Outcome(*traffic, ended))

    def _who_reset(self) -> str:
        """Told apart, since what a client does says nothing of its target."""
        if self._up is None or self._down is None:
            return "reset"
        try:
            return (
                "client reset"
                if _gone(self._up.source) and not _gone(self._down.source)
                else "reset"
            )
        except _FAULTS:
            return "reset"


def _gone(sock: socket.socket) -> bool:
    """Whether it is so now: an event may be about a descriptor's last owner."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & _GONE for _, events in poll.poll(0))
