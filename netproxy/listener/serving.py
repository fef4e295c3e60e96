"""Connections under way: each has a thread of a bounded pool while it works, and none while it only waits.

Where a connection came from does not matter: a listener accepted it, or it was dialled
to serve whoever is at its other end.  A fault of one is one log record and ends it alone.
"""

from __future__ import annotations

from typing import Any, Callable

from netproxy.errors import NetProxyError, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.services import Counter, Log
from netproxy.listener.poller import Poller
from netproxy.listener.pool import ThreadPool
from netproxy.net.stream import GoOn, Stream


class Connection:
    """`ended(connection)` is called once, by whichever thread saw its end; it closes the stream."""

    __slots__ = ("stream", "client", "ended")

    def __init__(self, stream: Stream, client: Address, ended: Callable[[Any], None]) -> None:
        self.stream = stream
        self.client = client
        self.ended = ended


class Serving:
    def __init__(self, pool: ThreadPool, poller: Poller, counter: Counter, log: Log) -> None:
        self.pool = pool
        self._parker = poller
        self.counter = counter
        self.log = log

    def begin(self, connection: Connection, go_on: GoOn, attempt: GoOn | None = None) -> bool:
        """On a thread of the pool, however many wait: it was admitted.  False, and it has ended, where none can be had.

        `attempt`, which never waits, goes before: on this thread, and without the pool for as long as it gives pauses
        with steps.
        """
        if attempt is not None:
            self._begin(connection, attempt)
            return True
        # there was room a moment ago: if it has been taken meanwhile the connection waits, it is accepted after all
        if self.pool.submit(lambda: self._begin(connection, go_on), urgent=True):
            return True
        self.counter.count("connections_refused", "no thread")
        connection.ended(connection)
        return False

    def _begin(self, connection: Connection, go_on: GoOn) -> None:
        self.counter.count("connections", "accepted")
        self._run(connection, go_on)

    def _run(self, connection: Connection, go_on: GoOn) -> None:
        pause = self._attempt(connection, go_on)
        if pause is not None:
            self._attempt(connection, lambda: self._park(connection, pause))

    def _attempt(self, connection: Connection, go_on: GoOn) -> Wait | None:
        """Lets a connection go on until it ends or pauses."""
        try:
            pause = go_on()
        except Exception as error:
            self._end(connection, error)
            return None
        if pause is None:
            self._end(connection, None)
        return pause

    def _end(self, connection: Connection, error: Exception | None) -> None:
        """`error`, where it has failed, is being handled."""
        if isinstance(error, StreamError):
            self.counter.count("connections", "broken off")
        elif isinstance(error, NetProxyError):
            self.counter.count("connections", "bad protocol")
            self.log.debug("%s: %s", connection.client, error)
        elif error is not None:
            self.counter.count("connections", "internal error")
            self.log.exception(f"serving {connection.client}")
        connection.ended(connection)

    def _park(self, connection: Connection, pause: Wait) -> Wait | None:
        def wake(pause: Wait, ready: bool) -> None:
            if not self.pool.submit(
                lambda: self._run(connection, lambda: pause.resume(ready)), urgent=True
            ):
                connection.stream.close()  # the pool has stopped, or has no thread at all: it ends here and now
                self._attempt(connection, lambda: _give_up(pause))

        try:
            self._parker.watch(pause, wake, lambda error: self._end(connection, error))
        except (OSError, ValueError):  # closed meanwhile, or the kernel has no room
            wake(pause, False)  # not here: whoever accepts must not wait for it
        return pause


def _give_up(pause: Wait) -> None:
    """It is told that its time is up; what it would wait for next is not waited for."""
    pause.resume(False)
