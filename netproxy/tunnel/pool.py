"""Keeps idle work connections of one agent, dialled ahead so that the bridge can use them at once.

A few are always kept idle, more if the bridge asks for more, and those whose streams have ended if
they may be used again.  What is not needed for a while is closed.  Dials run on the dial pool; the
agent's thread repeats a failed one the next time it looks.  Any thread.
"""

from __future__ import annotations

import threading

from netproxy.errors import NetProxyError
from netproxy.typed import TYPE_CHECKING, Callable, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.answers import DirectRow
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.services import Log
    from netproxy.tunnel.path.agent import AgentPaths

IDLE_FEWEST = 4
"""Idle connections that are always kept."""

IDLE_MOST = 32
"""Idle connections that are kept while the bridge has recently needed more than there were.

So many are also kept of those whose streams have ended.
"""

WANTED_LIMIT = 256
"""Connections that the bridge asks for beyond these."""

DIALLING_LIMIT = 16
"""Dials at once: the dial pool has other work, too."""

Submit = Callable[[Callable[[], None]], bool]
"""Runs a call on a pool's thread; returns False if the pool is full."""


class WorkHandler(Protocol):
    """Handles work connections that were dialled."""

    def serve(self, stream: Stream, pool: WorkPool) -> None:
        """Take a work connection over after its handshake.

        Tells the pool when the connection is opened or has ended.
        """


class WorkPool:
    """The idle work connections of one session with the bridge, and how many it should keep."""

    def __init__(
        self, dial: Callable[[], Stream], submit: Submit, handler: WorkHandler, log: Log
    ) -> None:
        """Start empty: fill() dials.

        `dial` returns a connection after its handshake and raises NetProxyError; `submit` runs
        it on the dial pool.
        """
        self._dial = dial
        self._submit = submit
        self._handler = handler
        self._log = log
        self.paths: AgentPaths | None = None
        """Carry datagrams beside the connections; None if the agent has none.  Set at once."""
        # Guards all below.
        self._lock = threading.Lock()
        self._idle: set[Stream] = set()
        self._current: set[Stream] = set()
        """Connections that were dialled since renew()."""
        self._renewed = 0
        """Calls of renew()."""
        self._dialling = 0
        self._keep = IDLE_FEWEST
        """Connections to keep idle."""
        self._wanted = 0
        """Dials of the bridge that wait for a connection."""
        self._opened = 0
        self.ended = False

    def fill(self) -> None:
        """Dial the connections that are missing."""
        while self._reserve_dial():
            if not self._submit(self._add):
                with self._lock:
                    self._dialling -= 1
                return

    def _reserve_dial(self) -> bool:
        """Count one more dial; return False if none is needed or allowed."""
        with self._lock:
            missing = self._keep + self._wanted - len(self._idle) - self._dialling
            if self.ended or self._dialling >= DIALLING_LIMIT or missing <= 0:
                return False
            self._dialling += 1
            return True

    def want(self, number: int) -> None:
        """Dial `number` more connections, which the bridge asks for."""
        with self._lock:
            self._wanted = min(WANTED_LIMIT, self._wanted + number)
        self.fill()

    def _add(self) -> None:
        """Dial one connection.  Thread: dial pool."""
        stream, renewed = None, self._renewed
        try:
            stream = self._dial()
        except NetProxyError as error:
            if not self.ended:
                self._log.limited(
                    ("tunnel work", str(error)), "tunnel: cannot dial a work connection: %s", error
                )
        finally:
            # Also after an error of our own: its dial must not stay counted.
            with self._lock:
                self._dialling -= 1
                # Streams may have ended meanwhile, whose connections are idle again.
                is_full = len(self._idle) >= IDLE_MOST and not self._wanted
                is_unneeded = self.ended or is_full
                if stream is not None and not is_unneeded:
                    self._idle.add(stream)
                    if renewed == self._renewed:
                        self._current.add(stream)
        if stream is None:
            return
        if is_unneeded:
            stream.close()
            return
        self._handler.serve(stream, self)
        self.fill()

    def opened(self, stream: Stream) -> None:
        """Replace a connection that the bridge has opened."""
        with self._lock:
            self._idle.discard(stream)
            if self._wanted:
                self._wanted -= 1
                self._keep = min(IDLE_MOST, self._keep + 1)
            self._opened += 1
        self.fill()

    def take_back(self, stream: Stream) -> bool:
        """Return whether a connection whose stream has ended is kept; then it is idle again."""
        with self._lock:
            is_full = len(self._idle) >= IDLE_MOST
            if self.ended or is_full or stream not in self._current:
                return False
            self._idle.add(stream)
            return True

    def renew(self) -> None:
        """Take no connection back that was dialled before: the bridge is to be verified anew."""
        with self._lock:
            self._renewed += 1
            self._current.clear()

    def closed(self, stream: Stream) -> None:
        """Forget a connection that has ended."""
        with self._lock:
            self._idle.discard(stream)
            self._current.discard(stream)

    def release(self, stream: Stream) -> bool:
        """Return whether a connection that was idle for long is no longer needed.

        If so, the pool has forgotten it.
        """
        with self._lock:
            if len(self._idle) <= IDLE_FEWEST and not self.ended:
                return False
            self._wanted = max(0, self._wanted - 1)
            self._keep = max(IDLE_FEWEST, self._keep - 1)
            self._idle.discard(stream)
            return True

    def end(self) -> None:
        """Shut idle connections down; opened ones continue."""
        with self._lock:
            self.ended = True
            idle = list(self._idle)
        for stream in idle:
            stream.shutdown()

    def describe_direct(self) -> list[DirectRow]:
        """Return the direct paths beside the connections, for netproxyctl."""
        direct = self.paths.direct if self.paths is not None else None
        return direct.describe() if direct is not None else []

    def describe(self) -> dict[str, object]:
        """Return the state for netproxyctl."""
        with self._lock:
            return {"idle": len(self._idle), "opened": self._opened}
