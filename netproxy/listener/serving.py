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
    from netproxy.interfaces.connections import Handshake, Need
    from netproxy.interfaces.services import Counter, Log
    from netproxy.listener.poller import Poller
    from netproxy.listener.pool import ThreadPool
    from netproxy.net.stream import Stream

# Seconds that a pool thread waits for a need before it gives the connection to the poller:
# taking it back costs two changes of threads.
STAY_SECONDS = 0.1


class Connection:
    """A connection that is served.  Subclasses release what they hold in ended()."""

    __slots__ = ("stream", "client", "serving", "handshake", "need", "_wait")

    def __init__(self, stream: Stream, client: Address) -> None:
        self.stream = stream
        self.client = client
        self.serving: Serving
        self.handshake: Handshake | None = None
        self.need: Need | None = None
        # The wait of the need that is still the same.
        self._wait: Wait | None = None

    def ended(self) -> None:
        """Close the stream.  Called once, by the thread that saw the end."""
        self.stream.close()

    # -- WaitOwner

    def wake(self, wait: Wait, ready: bool) -> None:
        """Go on with a wait on a pool thread."""
        self.serving.resume(self, wait, ready)

    def end(self, error: Exception | None) -> None:
        """End the connection; `error` is being handled if it failed."""
        self.serving.end(self, error)

    # -- the handshake

    def start(self) -> Wait | None:
        """Run the handshake from its beginning until it waits.  Never blocks."""
        assert self.handshake is not None
        return self._run(self.handshake.send, None, blocking=False)

    def _step(self, descriptor: int, events: int) -> Wait | None:
        """Go on after an event, on the poller's thread."""
        return self._proceed({descriptor: events}, blocking=False)

    def _resume(self, ready: bool) -> Wait | None:
        """Go on, on a pool thread, after an event or when the time is up."""
        assert self.need is not None and self.handshake is not None
        if not self.stream.open:
            error = StreamError("no thread can be had to go on")
            return self._run(self.handshake.throw, error, blocking=True)
        ready_now = poll_watched(self.need.watched()[0], 0) if ready else {}
        return self._proceed(ready_now, blocking=True)

    def _block(self, ready: bool) -> Wait | None:
        """Satisfy the need on this pool thread, then go on."""
        assert self.need is not None and self.handshake is not None
        try:
            if not self.stream.open:
                raise StreamError("no thread can be had to go on")
            result = self.need.block()
        except NetProxyError as error:
            return self._run(self.handshake.throw, error, blocking=True)
        return self._run(self.handshake.send, result, blocking=True)

    def resume_with(self, result: Any) -> Wait | None:
        """Go on with the result of a need, on a pool thread.  Any: as in _run()."""
        assert self.handshake is not None
        if not self.stream.open:
            error = StreamError("no thread can be had to go on")
            return self._run(self.handshake.throw, error, blocking=True)
        return self._run(self.handshake.send, result, blocking=True)

    def _proceed(self, ready: Ready, blocking: bool) -> Wait | None:
        assert self.need is not None and self.handshake is not None
        try:
            result = self.need.proceed(ready)
        except NetProxyError as error:
            return self._run(self.handshake.throw, error, blocking)
        if result is Progress.PENDING:
            return self._wait_for(self.need) if blocking else self._wait
        return self._run(self.handshake.send, result, blocking)

    def _run(self, resume: Callable[[Any], Need], value: Any, blocking: bool) -> Wait | None:
        """Resume the handshake with a result or an error, until it waits or has ended.

        Any: each need has its own result type.
        """
        assert self.handshake is not None
        try:
            while True:
                need = resume(value)
                try:
                    result = self._begin(need, blocking)
                except NetProxyError as error:
                    resume, value = self.handshake.throw, error
                    continue
                if isinstance(result, Wait):
                    return result
                resume, value = self.handshake.send, result
        except StopIteration as stop:
            self.handshake = self.need = self._wait = None
            wait: Wait | None = stop.value
            return wait

    def _begin(self, need: Need, blocking: bool) -> Any:
        """Return the result of a need, or a Wait for it."""
        self.need = need
        result = need.begin()
        if result is Progress.NEEDS_THREAD:
            return need.block() if blocking else Wait((), None, self._block)
        if result is not Progress.PENDING:
            return result if blocking or need.light else _Continuation(self, result).wait()
        if blocking and not need.light:
            result = self._stay(need)
        return self._wait_for(need) if result is Progress.PENDING else result

    def _wait_for(self, need: Need) -> Wait:
        watched, seconds = need.watched()
        step = self._step if need.light else None
        idle = isinstance(need, Events) and need.idle
        self._wait = Wait(watched, seconds, self._resume, idle, step, fixed=True)
        return self._wait

    @staticmethod
    def _stay(need: Need) -> Any:
        """Wait for a moment on this pool thread."""
        watched, seconds = need.watched()
        ready = poll_watched(
            watched, STAY_SECONDS if seconds is None else min(seconds, STAY_SECONDS)
        )
        return need.proceed(ready) if ready else Progress.PENDING


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
        self._go_on(connection, connection.start)

    def resume(self, connection: Connection, wait: Wait, ready: bool) -> None:
        """Go on with a wait on a pool thread, however many wait there: it was admitted.

        If no thread can be had the connection ends here.
        """

        def work() -> None:
            self._go_on(connection, lambda: wait.resume(ready))

        if self.pool.submit(work, urgent=True):
            return
        self.counter.count("connections_refused", "no thread")
        connection.stream.close()
        # The handler is told that its time is up; what it would wait for next is not waited for.
        self._attempt(connection, lambda: wait.resume(False))

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

    def _go_on(self, connection: Connection, call: Callable[[], Wait | None]) -> None:
        wait = self._attempt(connection, call)
        if wait is None:
            return
        try:
            self._poller.watch(wait, connection)
        except (OSError, ValueError):  # closed meanwhile, or the kernel has no memory
            connection.wake(wait, False)  # on a pool thread: this one may be the one that accepts

    def _attempt(self, connection: Connection, call: Callable[[], Wait | None]) -> Wait | None:
        """Let a connection go on until it waits or has ended."""
        try:
            wait = call()
        except Exception as error:
            self.end(connection, error)
            return None
        if wait is None:
            self.end(connection, None)
        return wait
