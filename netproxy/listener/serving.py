"""Drives connections: a pool thread while they work, none while they only wait.

A connection begins with a handshake, a generator that yields needs.  It runs on the
thread that accepted it, then on the poller's thread whenever a need is satisfied there.
A need that may block, or that is not light, is a pool thread's.  What the handshake
returns, a Wait, goes on in the same way.  The origin of a connection does not matter:
a listener accepted it, or it was dialled.  A fault ends one connection with one record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

from netproxy.errors import NetProxyError, StreamError
from netproxy.interfaces.connections import Events, Progress, Ready, Wait
from netproxy.net.stream import poll_watched

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Need, Stream
    from netproxy.interfaces.services import Counter, Log
    from netproxy.listener.poller import Poller
    from netproxy.listener.pool import ThreadPool

# Seconds that a pool thread waits for a need before it gives the connection to the poller:
# taking it back costs two changes of threads.
STAY_SECONDS = 0.1


class Connection:
    """A connection that is served, and the driver of its handshake.

    Subclasses release what they hold in ended().  One thread at a time.
    """

    __slots__ = ("stream", "client", "serving", "handshake", "_need", "_wait", "_deadline")

    def __init__(self, stream: Stream, client: Address) -> None:
        self.stream = stream
        self.client = client
        self.serving: Serving
        self.handshake: Handshake
        # What the handshake waits for, and the wait for it.
        self._need: Need
        self._wait: Wait | None = None
        # The stream's deadline when that wait was made.
        self._deadline: float | None = None

    def ended(self) -> None:
        """Close the stream.  Called once, by the thread that saw the end."""
        self.stream.close()

    # -- WaitOwner

    def wake(self, wait: Wait, ready: bool) -> None:
        """Go on with a wait on a pool thread."""
        self.serving.resume(self, wait, ready)

    def unwatched(self, wait: Wait, error: Exception) -> None:
        """Go on with a wait that cannot be watched, as if its time were up."""
        self.serving.resume_unwatched(self, wait, error)

    def end(self, error: Exception | None) -> None:
        """End the connection; `error` is being handled if it failed."""
        self.serving.end(self, error)

    # -- the handshake

    def run(self, resume: Callable[[Any], Need], value: Any, blocking: bool) -> Wait | None:
        """Resume the handshake with a result or an error, until it waits or has ended.

        `resume` is its send or its throw.  `blocking`: this thread may block.
        Any: each need has its own result type.
        """
        handshake, stream = self.handshake, self.stream
        try:
            while True:
                need = resume(value)
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
            del self.handshake, self._need  # their memory is free from now on
            self._wait = None
            wait: Wait | None = stop.value
            return wait

    def _wait_for_bytes(self, blocking: bool) -> Wait:
        stream = self.stream
        self._need = stream
        wait = self._wait
        # On the poller's thread the wait for the same stream goes on, with its deadline.
        if wait is None or blocking or self._deadline != stream.deadline:
            watched, seconds = stream.watched()
            wait = Wait(watched, seconds, self._resume, False, self._step, fixed=True)
            self._wait, self._deadline = wait, stream.deadline
        return wait

    def _begin(self, need: Need, blocking: bool) -> Any:
        """Return the result of a need, or a Wait for it."""
        self._need = need
        result = need.begin()
        if result is Progress.NEEDS_THREAD:
            return need.block() if blocking else Wait((), None, self._block)
        if result is not Progress.PENDING:
            return result if blocking or need.light else _Continuation(self, result).wait()
        if blocking and not need.light:
            watched, seconds = need.watched()
            stay = STAY_SECONDS if seconds is None else min(seconds, STAY_SECONDS)
            ready = poll_watched(watched, stay)
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
        """Go on after an event, on the poller's thread."""
        try:
            result = self._need.proceed({descriptor: events})
        except NetProxyError as error:
            return self.run(self.handshake.throw, error, False)
        if result is Progress.PENDING:
            return self._wait
        return self.run(self.handshake.send, result, False)

    def _resume(self, ready: bool) -> Wait | None:
        """Go on, on a pool thread, after an event or when the time is up."""
        try:
            self._check_open()
            events: Ready = poll_watched(self._need.watched()[0], 0) if ready else {}
            result = self._need.proceed(events)
        except NetProxyError as error:
            return self.run(self.handshake.throw, error, True)
        if result is Progress.PENDING:
            return self._wait_for(self._need)
        return self.run(self.handshake.send, result, True)

    def _block(self, ready: bool) -> Wait | None:
        """Satisfy the need on this pool thread, then go on."""
        try:
            self._check_open()
            result = self._need.block()
        except NetProxyError as error:
            return self.run(self.handshake.throw, error, True)
        return self.run(self.handshake.send, result, True)

    def resume_with(self, result: Any) -> Wait | None:
        """Go on with the result of a need, on a pool thread.  Any: as in run()."""
        try:
            self._check_open()
        except StreamError as error:
            return self.run(self.handshake.throw, error, True)
        return self.run(self.handshake.send, result, True)

    def _check_open(self) -> None:
        """Raise StreamError if the stream was closed because no thread could be had."""
        if not self.stream.open:
            raise StreamError("no thread can be had to go on")


class _Continuation:
    """A result that a pool thread resumes the handshake with: what follows is not light."""

    __slots__ = ("_connection", "_result")

    def __init__(self, connection: Connection, result: Any) -> None:
        self._connection = connection
        self._result = result

    def wait(self) -> Wait:
        return Wait((), None, self._resume)

    def _resume(self, ready: bool) -> Wait | None:
        return self._connection.resume_with(self._result)


class Serving:
    """Drives all connections of the daemon.  Thread: any."""

    def __init__(self, pool: ThreadPool, poller: Poller, counter: Counter, log: Log) -> None:
        self.pool = pool
        self._poller = poller
        self.counter = counter
        self.log = log

    def begin(self, connection: Connection, handshake: Handshake) -> None:
        """Serve a connection, beginning on this thread.  Never blocks."""
        connection.serving = self
        connection.handshake = handshake
        self.counter.count("connections", "accepted")
        try:
            wait = connection.run(handshake.send, None, False)
        except Exception as error:
            self.end(connection, error)
            return
        if wait is None:
            self.end(connection, None)
            return
        try:
            self._poller.watch(wait, connection)
        except (OSError, ValueError) as error:  # the kernel has no memory, or closed meanwhile
            self.resume_unwatched(connection, wait, error)

    def resume_unwatched(self, connection: Connection, wait: Wait, error: Exception) -> None:
        """Go on, as if the time were up, with a wait that cannot be watched."""
        if connection.stream.open:
            self.counter.count("connections", "not watched")
            self.log.limited("not watched", "connections cannot be watched: %s", error)
        self.resume(connection, wait, False)

    def resume(self, connection: Connection, wait: Wait, ready: bool) -> None:
        """Go on with a wait on a pool thread, however many wait there: it was admitted.

        If no thread can be had the connection ends here.
        """
        if self.pool.submit(lambda: self._go_on(connection, wait, ready), urgent=True):
            return
        self.counter.count("connections_refused", "no thread")
        connection.stream.close()
        # The handler is told that its time is up; what it would wait for next is not waited for.
        self._attempt(connection, wait, False)

    def end(self, connection: Connection, error: Exception | None) -> None:
        """End a connection; `error` is being handled if it failed."""
        if isinstance(error, StreamError):
            self.counter.count("connections", "broken off")
        elif isinstance(error, NetProxyError):
            self.counter.count("connections", "bad protocol")
            self.log.debug("%s: %s", connection.client, error)
        elif error is not None:
            self.counter.count("connections", "internal error")
            self.log.exception(f"serving {connection.client}")
        connection.ended()

    def _go_on(self, connection: Connection, wait: Wait, ready: bool) -> None:
        """Go on with a wait, on a pool thread, and watch for what it returns."""
        following = self._attempt(connection, wait, ready)
        if following is None:
            return
        try:
            self._poller.watch(following, connection)
        except (OSError, ValueError) as error:  # the kernel has no memory, or closed meanwhile
            self.resume_unwatched(connection, following, error)

    def _attempt(self, connection: Connection, wait: Wait, ready: bool) -> Wait | None:
        try:
            following = wait.resume(ready)
        except Exception as error:
            self.end(connection, error)
            return None
        if following is None:
            self.end(connection, None)
        return following
