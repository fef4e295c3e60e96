"""Drives connections: a pool thread while they work, none while they only wait.

A connection begins with a handshake, a generator that yields needs.  It runs on the
thread that accepted it, then on the poller's thread whenever a need is satisfied there.
A need that may block, or that is not light, is a pool thread's.  What the handshake
returns, a Wait, goes on in the same way.  A connection was accepted by a listener, or
dialled.  A fault ends one connection with one record.
"""

from __future__ import annotations

from functools import partial
import time
from select import POLLIN

from netproxy.errors import NetProxyError, StreamError
from netproxy.interfaces.connections import Events, Progress, Wait
from netproxy.listener.endings import note_fault, refuse
from netproxy.net.stream import poll_watched, wait_for
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Need, NeedResult, Ready, Stream
    from netproxy.interfaces.services import Counter, Log
    from netproxy.listener.poller import Poller
    from netproxy.listener.pool import ThreadPool

# Seconds that a pool thread waits for a need before the poller does: two changes of threads more.
STAY_SECONDS = 0.1
# Needs that a handshake may still have, which all fail, when no thread can be had for it.
GIVE_UP_LIMIT = 16


class Connection:
    """A connection that is served, and the driver of its handshake.

    Subclasses release what they hold in ended().  One thread at a time.
    """

    __slots__ = (
        *("stream", "client", "serving", "handshake", "need", "counted", "refused"),
        *("_wait", "_deadline"),
    )

    def __init__(self, stream: Stream, client: Address) -> None:
        self.stream = stream
        self.client = client
        self.counted = ""  # the client that its unfinished handshake counts for, if any
        self.refused = ""  # why the daemon ends it, if its end must not count as the client's
        self.serving: Serving
        self.handshake: Handshake
        self.need: Need | None = None  # what the handshake waits for; None when it has ended
        # The wait for it, and the stream's deadline then; None if it is for another need.
        self._wait: Wait | None = None
        self._deadline: float | None = None

    def listener_name(self) -> str:
        """Return the name of the listener that accepted the connection, for records."""
        return ""

    def ended(self) -> None:
        """Close the stream.  Called once, by the thread that saw the end."""
        self.stream.close()

    def left_handshake(self) -> None:
        """Count the handshake out.  Does nothing here: only accepted connections are counted."""

    # -- WaitOwner

    def wake(self, wait: Wait, ready: bool) -> None:
        """Go on with a wait on a pool thread."""
        self.serving.resume(self, wait, ready)

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        """Go on with a wait that the poller cannot watch, on a pool thread."""
        self.serving.resume_unwatched(self, wait, error)

    def end(self, error: Exception | None) -> None:
        """End the connection; `error` is being handled if it failed."""
        self.serving.end(self, error)

    # -- the handshake

    def run(
        self, resume: Callable[[NeedResult], Need], value: NeedResult, blocking: bool
    ) -> Wait | None:
        """Resume the handshake with a result or an error, until it waits or has ended.

        `resume` is its send or its throw.  `blocking`: this thread may block.
        """
        handshake, stream = self.handshake, self.stream
        try:
            while True:
                need = resume(value)
                if self.counted and not stream.handshaking:
                    self.left_handshake()
                # A light stream only asks for bytes when all of them are used up.
                if need is stream and stream.light:
                    return self._wait_for_bytes(blocking)
                try:
                    result = self._begin(need, blocking)
                except NetProxyError as error:
                    resume, value = handshake.throw, error
                    continue
                if isinstance(result, Wait):
                    return result
                resume, value = handshake.send, result
        except StopIteration as stop:
            if self.counted and not stream.handshaking:
                self.left_handshake()
            del self.handshake  # its memory is free from now on
            self.need = self._wait = None
            return stop.value  # type: ignore[no-any-return]  # what a handshake returns

    def _wait_for_bytes(self, blocking: bool) -> Wait:
        stream = self.stream
        self.need = stream
        wait, deadline = self._wait, stream.deadline
        # On the poller's thread the wait for the same stream goes on, with its deadline.
        if wait is None or blocking or deadline is None or self._deadline != deadline:
            if deadline is None:
                seconds = stream.watched()[1]
            else:
                seconds = max(0.0, deadline - time.monotonic())
            watched = ((stream.socket, POLLIN),)
            wait = Wait(watched, seconds, self._resume, False, self._step, fixed=True)
            self._wait, self._deadline = wait, deadline
        return wait

    def _begin(self, need: Need, blocking: bool) -> NeedResult | Wait:
        """Return the result of a need, or a Wait for it."""
        self.need = need
        result = need.begin()
        if result is Progress.NEEDS_THREAD:
            return need.block() if blocking else Wait((), None, self._block)
        if result is not Progress.PENDING:
            light = blocking or need.light
            return result if light else Wait((), None, partial(self._resume_with, result))
        if blocking and not need.light:
            watched, seconds = need.watched()
            if seconds is None or seconds >= STAY_SECONDS:  # else it is a pause
                ready = poll_watched(watched, STAY_SECONDS)
                result = need.proceed(ready) if ready else Progress.PENDING
        return self._wait_for(need) if result is Progress.PENDING else result

    def _wait_for(self, need: Need) -> Wait:
        watched, seconds = need.watched()
        step = self._step if need.light else None
        idle = isinstance(need, Events) and need.idle
        self._wait = Wait(watched, seconds, self._resume, idle, step, fixed=True)
        self._deadline = None
        return self._wait

    def _step(self, descriptor: int, events: int) -> Wait | None:
        """Go on after an event, on the poller's thread; it may be a descriptor's last owner's."""
        need = self.need
        assert need is not None
        ready: Ready = {descriptor: events}
        try:
            if isinstance(need, Events):  # other needs bear the event of another
                ready = poll_watched(need.watched()[0], 0)
            result = need.proceed(ready) if ready else Progress.PENDING
        except NetProxyError as error:
            return self.run(self.handshake.throw, error, False)
        if result is Progress.PENDING:
            return self._wait
        return self.run(self.handshake.send, result, False)

    def _resume(self, ready: bool) -> Wait | None:
        """Go on, on a pool thread, after an event or when the time is up."""
        need = self.need
        assert need is not None
        try:
            events = poll_watched(need.watched()[0], 0) if ready else {}
            # An event may have been about the last owner of the descriptor.
            result = need.proceed(events) if events or not ready else Progress.PENDING
        except NetProxyError as error:
            return self.run(self.handshake.throw, error, True)
        if result is Progress.PENDING:
            return self._wait_for(need)
        return self.run(self.handshake.send, result, True)

    def _resume_with(self, result: NeedResult, ready: bool) -> Wait | None:
        """Go on, on a pool thread, with the result of a need."""
        return self.run(self.handshake.send, result, True)

    def _block(self, ready: bool) -> Wait | None:
        """Satisfy the need on this pool thread, then go on."""
        assert self.need is not None
        return self._go_on_after(self.need.block)

    def block_unwatched(self, ready: bool) -> Wait | None:
        """Wait for the need on this pool thread, because the poller cannot watch it."""
        assert self.need is not None
        return self._go_on_after(partial(wait_for, self.need))

    def _go_on_after(self, block: Callable[[], NeedResult]) -> Wait | None:
        """Go on, on this pool thread, with the result of a call that blocks."""
        try:
            result = block()
        except NetProxyError as error:
            return self.run(self.handshake.throw, error, True)
        return self.run(self.handshake.send, result, True)

    # -- the end

    def close_handshake(self) -> None:
        """Close the handshake, so that what it holds is released now.  Does not block."""
        self.handshake.close()
        del self.handshake
        self.need = self._wait = None

    def give_up(self, wait: Wait) -> None:
        """Close the stream, fail all needs; raises what the handshake raises."""
        self.stream.close()
        if self.need is None:
            # What it would wait for next is not waited for.
            wait.resume(False)
            return
        error = StreamError("no thread can be had to go on")
        try:
            for _ in range(GIVE_UP_LIMIT):
                self.handshake.throw(error)
        except (StopIteration, StreamError):
            pass


class Serving:
    """Drives all connections of the daemon.  Thread: any."""

    def __init__(self, pool: ThreadPool, poller: Poller, counter: Counter, log: Log) -> None:
        self.pool, self.poller, self.counter, self.log = pool, poller, counter, log

    def begin(self, connection: Connection, handshake: Handshake, sent: bool = False) -> None:
        """Begin a connection on this thread; `sent`: bytes may have come.  Never blocks."""
        connection.serving = self
        connection.handshake = handshake
        try:
            wait = connection.run(handshake.send, None, False)
            if sent and wait is not None and wait.step is not None:
                wait = wait.step(connection.stream.socket.fileno(), POLLIN)
        except Exception as error:
            self.end(connection, error)
            return
        self._follow(connection, wait)

    def resume(self, connection: Connection, wait: Wait, ready: bool) -> None:
        """Go on on a pool thread, however many wait there; without one the connection ends."""
        task = partial(self._go_on, connection, wait, ready)
        if self.pool.submit(task, urgent=True, client=connection.client.host):
            return
        refuse(connection, ("connections_refused", "no thread"), self.counter)
        try:
            connection.give_up(wait)
        except Exception as error:
            self.end(connection, error)
        else:
            self.end(connection, None)

    def resume_unwatched(self, connection: Connection, wait: Wait, error: Exception) -> None:
        """Let a handshake wait on a pool thread; tell anything else that its time is up."""
        if connection.stream.open:
            self.counter.count("connections", "not watched")
            self.log.limited("not watched", "connections cannot be watched: %s", error)
        if connection.need is not None:
            wait = Wait((), None, connection.block_unwatched)
        self.resume(connection, wait, False)

    def end(self, connection: Connection, error: Exception | None) -> None:
        """End a connection; `error` is being handled if it failed."""
        if error is not None:
            note_fault(connection, error, self.counter, self.log)
        try:
            if connection.need is not None:
                connection.close_handshake()
        finally:
            connection.ended()

    def _go_on(self, connection: Connection, wait: Wait, ready: bool) -> None:
        """Go on with a wait, on this pool thread, and watch for what it returns."""
        try:
            following = wait.resume(ready)
            # Such a wait asks for a pool thread, as this one is.
            while following is not None and not following.watched and following.seconds is None:
                following = following.resume(True)
        except Exception as error:
            self.end(connection, error)
            return
        self._follow(connection, following)

    def _follow(self, connection: Connection, wait: Wait | None) -> None:
        """Watch for what a connection waits for; end it if that is nothing."""
        if wait is None:
            self.end(connection, None)
            return
        try:
            self.poller.watch(wait, connection)
        except (OSError, ValueError) as error:  # closed meanwhile, or the kernel has no memory
            self.resume_unwatched(connection, wait, error)
