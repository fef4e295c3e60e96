"""TCP relaying: both directions of one connection, half-close kept, until both have ended.

Reads and writes never wait.  A relay with little to do has no thread: the poller's thread
moves its few bytes.  A relay that fills buffers gets a thread of the pool, and returns it
when neither side has had anything for a moment.  If a side does not read, at most one buffer
is held for it, and the other side is not read meanwhile.  A reset is passed on as a reset.

One thread moves both directions: two would cost one more wake-up and stack for each
connection, and did not move more bytes (tests/bench/README.md has figures).
"""

from __future__ import annotations

import select
import socket

from netproxy.errors import StreamError
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.sockets import LayeredSocket
from netproxy.net.syscalls import BUFFER, POLL_LIMIT_MS, ROOM
from netproxy.relay.direction import Direction, has_hung_up
from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Account
    from netproxy.interfaces.connections import Stream

STAY_SECONDS = 0.1
"""A busy relay without anything to do for this long returns its thread."""
FIRST_SECONDS = 0.02
"""The same for an encrypted relay to which nothing has come yet."""
# Both sides may be read, and little comes: the state in which most bytes are moved.
_OPEN = (False, False, False, True, True)
# ValueError: the descriptor of a socket that was closed meanwhile.
_FAULTS = (OSError, ValueError, StreamError)


class PipeLimits(NamedTuple):
    """How long a relay may be idle, and how it may move bytes."""

    idle: float
    """Seconds without a byte in either direction."""
    half_close: float
    """The same, once one side has ended."""
    splice: bool = True
    """True if bytes may go from socket to socket within the kernel."""


class Outcome(NamedTuple):
    """How a relay went."""

    sent: int
    """Bytes, client to upstream."""
    received: int
    """Bytes, upstream to client."""
    ended: str
    """ "closed", "reset", "client reset" or "idle"."""


class RelayOwner(Protocol):
    """What a relay reports its end to."""

    def relay_ended(self, outcome: Outcome) -> None:
        """Note its outcome, once.  Both streams are closed.  Thread: the one that met the end."""


class Relay:
    """A client and an upstream between which bytes move, until both have ended.

    Call begin() once.
    """

    __slots__ = (
        *("_client", "_upstream", "_limits", "_owner", "_up", "_down", "_near"),
        *("_wait", "_state", "_plain"),
    )

    def __init__(
        self,
        client: Stream,
        upstream: Stream,
        limits: PipeLimits,
        owner: RelayOwner,
        account: Account,
    ) -> None:
        """`account` says how much each direction may carry."""
        self._client = client
        self._upstream = upstream
        self._limits = limits
        self._owner: RelayOwner | None = owner
        # What is encrypted takes a thread's time.
        self._plain = client.plain and upstream.plain
        splice = limits.splice and self._plain
        read_size = BUFFER if self._plain else ROOM
        near, far = client.socket, upstream.socket
        near_layer = near if isinstance(near, LayeredSocket) else None
        far_layer = far if isinstance(far, LayeredSocket) else None
        self._up = Direction(near, far, account.up, splice, near_layer, read_size)
        self._down = Direction(far, near, account.down, splice, far_layer, read_size)
        self._up.hang_up, self._down.hang_up = client.hang_up, upstream.hang_up
        self._near = -1  # the client's descriptor
        # The last wait, and what it was made from: it serves again while that is the same.
        # _OPEN itself stands for its equal.
        self._wait: Wait | None = None
        self._state: tuple[bool, ...] = ()

    def bytes_moved(self) -> tuple[int, int]:
        """Return the bytes so far, client to upstream and upstream to client.  Thread: any."""
        return self._up.bytes_moved, self._down.bytes_moved

    def begin(self) -> Wait | None:
        """Move what is there, unread bytes first.  Takes both sockets out of their streams.

        Returns what the relay waits for while neither side has anything, None if it has ended.
        Raises nothing but what the owner raises.
        """
        try:
            near, self._up.pending = self._client.detach()
            _, self._down.pending = self._upstream.detach()
            self._near = near.fileno()
            for direction in (self._up, self._down):
                if direction.pending:
                    direction.flush()
                if not self._plain and not direction.pending:
                    # No socket tells of bytes that were deciphered before.
                    direction.move()
        except _FAULTS:
            return self._end("reset")
        if self._up.done and self._down.done:
            return self._end("closed")
        # What is encrypted needs a thread for its first bytes, which mostly come soon.
        return self._next_wait() if self._plain else Wait((), None, self._resume_first)

    def _resume_first(self, ready: bool) -> Wait | None:
        """Go on for the first time, on a thread of the relay's own."""
        return self._resume(ready, FIRST_SECONDS)

    def _resume(self, ready: bool, stay: float = STAY_SECONDS) -> Wait | None:
        """Go on, on a thread of the relay's own, until there is nothing to do for a moment.

        `stay` is the first such moment, in seconds.
        """
        try:
            ended = self._work(stay) if self._move_paused() or ready else "idle"
        except _FAULTS:
            ended = "reset"
        return self._end(ended) if ended else self._next_wait()

    def _step(self, descriptor: int, events: int) -> Wait | None:
        """Go on, on the poller's thread: one side has something, or takes something again.

        Without a descriptor, the time of a pause is over.
        """
        is_client = descriptor == self._near
        reads, writes = (self._up, self._down) if is_client else (self._down, self._up)
        try:
            if not events:
                self._move_paused()
            else:
                if writes.pending:
                    writes.flush()
                if not (reads.pending or reads.ended or reads.paused):
                    reads.move()
                    changed = reads.pending or reads.ended or reads.paused or reads.busy
                    if self._state is _OPEN and not changed:
                        return self._wait
                elif events & reads.hang_up and not writes.done and has_hung_up(reads.source):
                    # Nothing can reach that side any more.
                    return self._end("reset")
        except _FAULTS:
            return self._end("reset")
        return self._end("closed") if reads.done and writes.done else self._next_wait()

    def _move_paused(self) -> bool:
        """Go on with the directions that were paused; return whether there were any."""
        paused = [direction for direction in (self._up, self._down) if direction.paused]
        for direction in paused:
            direction.move()
        return bool(paused)

    def _work(self, stay: float) -> str:
        """Move bytes; return how the relay ended, "" if it only waits."""
        poll = select.poll()
        watched: dict[int, int] = {}
        up, down = self._up, self._down
        while not (up.done and down.done):
            interests = {sock.fileno(): events for sock, events in self._interests()}
            if interests != watched:
                for descriptor in watched.keys() - interests.keys():
                    poll.unregister(descriptor)
                for descriptor, events in interests.items():
                    poll.register(descriptor, events)
                watched = interests
            limit = self._idle_limit()
            # A pause needs no thread, unless there is nothing to watch meanwhile.
            is_paused = up.paused or down.paused
            ready = dict(poll.poll(0 if is_paused and watched else min(limit, stay) * 1000))
            if not ready and is_paused:
                return ""
            if not ready:
                up.rest()
                down.rest()
                return "idle" if limit <= stay else ""
            stay = STAY_SECONDS
            ended = self._move(ready)
            if ended:
                return ended
        return "closed"

    def _move(self, ready: dict[int, int]) -> str:
        """Move what can be moved; return how the relay ended, "" if it goes on.

        `ready` has the events by descriptor.
        """
        up, down = self._up, self._down
        for direction, other in ((up, down), (down, up)):
            target = ready.get(direction.target.fileno(), 0)
            source = ready.get(direction.source.fileno(), 0)
            if target & other.hang_up and not (direction.done or source or direction.pending):
                # Nothing can reach the target any more.
                return "reset"
            if direction.pending and target:
                direction.flush()
            if source and not (direction.pending or direction.ended or direction.paused):
                direction.move()
        return "closed" if up.done and down.done else ""

    def _interests(self) -> list[tuple[socket.socket, int]]:
        """Return what to watch.

        A side with which nothing can be done now is not watched: its hang-up would wake the
        thread again and again.  A side that may still be written to is watched for a hang-up.
        """
        interests = []
        for direction, other in ((self._up, self._down), (self._down, self._up)):
            blocked = direction.ended or direction.pending or direction.paused
            reads = 0 if blocked else select.POLLIN
            events = reads | (select.POLLOUT if other.pending else 0)
            if events or (direction.hang_up and not other.done):
                interests.append((direction.source, events))
        return interests

    def _idle_limit(self) -> float:
        """Return the seconds in which nothing may happen."""
        ended = self._up.ended or self._down.ended
        return min(self._limits.half_close if ended else self._limits.idle, POLL_LIMIT_MS / 1000)

    def _next_wait(self) -> Wait:
        up, down = self._up, self._down
        if up.paused or down.paused:
            return self._pause()
        # Before the first wait nothing has been moved.
        busy = self._wait is not None and (up.busy or down.busy)
        state = (busy, up.ended, down.ended, not up.pending, not down.pending)
        wait = self._wait
        if wait is None or state != self._state:
            self._state = _OPEN if state == _OPEN else state
            if self._plain:  # TLS announces its end itself
                up.last, down.last = down.done, up.done
            step = self._step if self._plain and not busy else None
            wait = Wait(self._interests(), self._idle_limit(), self._resume, False, step)
            self._wait = wait
        return wait

    def _pause(self) -> Wait:
        """Return the wait while a direction may carry nothing more for a moment."""
        self._wait, self._state = None, ()
        paused = [direction for direction in (self._up, self._down) if direction.paused]
        seconds = min(direction.pace.delay() for direction in paused)
        busy = self._up.busy or self._down.busy
        step = self._step if self._plain and not busy else None
        return Wait(self._interests(), seconds, self._resume, False, step, True, True)

    def _end(self, ended: str) -> Wait | None:
        """End the relay; return None, because nothing is waited for any more."""
        # The wait holds this relay: without it the memory is free now, not when the garbage
        # collector finds the cycle.  The owner may hold the relay as well.
        self._wait = None
        owner, self._owner = self._owner, None
        if ended == "closed":
            self._client.close()
            self._upstream.close()
        else:
            ended = self._which_reset() if ended == "reset" else ended
            self._client.reset()
            self._upstream.reset()
        for direction in (self._up, self._down):
            direction.close()
        if owner is not None:
            owner.relay_ended(Outcome(*self.bytes_moved(), ended))
        return None

    def _which_reset(self) -> str:
        """Tell a reset of the client apart: what a client does says nothing of its target."""
        try:
            if has_hung_up(self._up.source) and not has_hung_up(self._down.source):
                return "client reset"
        except _FAULTS:
            pass
        return "reset"
