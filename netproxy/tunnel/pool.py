"""Work connections of one agent's session that wait to be opened: so many are dialled ahead, more where the bridge asks.

Dials run on the dial pool, wherever they were asked for.  What failed is tried again
when the agent's thread next looks.  Any thread.
"""

from __future__ import annotations

import threading
from typing import Any, Callable

from netproxy.errors import NetProxyError
from netproxy.interfaces.services import Log
from netproxy.net.stream import Stream

WAITING = 4  # that always wait
KEPT_LIMIT = 32  # that do once they have not been enough, until nobody has needed them for a while
EXTRA_LIMIT = 256  # more of them, where the bridge has openings for them
DIALLING_LIMIT = 16  # at once: others have dials to make, too

Submit = Callable[[Callable[[], None]], bool]


class WorkPool:
    def __init__(
        self,
        dial: Callable[[], Stream],
        submit: Submit,
        serve: Callable[[Stream, WorkPool], None],
        log: Log,
    ) -> None:
        """`dial` gives a welcome connection; NetProxyError.  `serve` takes it over, and tells what comes of it."""
        self._dial = dial
        self._submit = submit
        self._serve = serve
        self._log = log
        self._lock = threading.Lock()  # guards all below
        self._waiting: set[Stream] = set()
        self._dialling = 0
        self._kept = WAITING  # that are to wait
        self._extra = 0  # openings of the bridge's that wait for a connection
        self._opened = 0
        self.ended = False

    def fill(self) -> None:
        """Dials what is missing."""
        while True:
            with self._lock:
                if (
                    self.ended
                    or self._dialling >= DIALLING_LIMIT
                    or len(self._waiting) + self._dialling >= self._kept + self._extra
                ):
                    return
                self._dialling += 1
            if not self._submit(self._add):
                with self._lock:
                    self._dialling -= 1
                return

    def want(self, number: int) -> None:
        """The bridge asks for more."""
        with self._lock:
            self._extra = min(EXTRA_LIMIT, self._extra + number)
        self.fill()

    def _add(self) -> None:
        """On a thread of the dial pool."""
        stream = None
        try:
            stream = self._dial()
        except NetProxyError as error:
            if not self.ended:
                self._log.limited(
                    ("tunnel work", str(error)), "tunnel: no work connection: %s", error
                )
        finally:
            with self._lock:
                self._dialling -= 1
                late = self.ended
                if stream is not None and not late:
                    self._waiting.add(stream)
        if stream is None:
            return
        if late:
            stream.close()
            return
        self._serve(stream, self)
        self.fill()

    def opened(self, stream: Stream) -> None:
        """It does not wait any more: another takes its place."""
        with self._lock:
            self._waiting.discard(stream)
            if self._extra:
                self._extra -= 1
                self._kept = min(KEPT_LIMIT, self._kept + 1)
            self._opened += 1
        self.fill()

    def closed(self, stream: Stream) -> None:
        with self._lock:
            self._waiting.discard(stream)

    def spare(self, stream: Stream) -> bool:
        """Whether one that has waited for long may go, and then it is none of ours any more."""
        with self._lock:
            if len(self._waiting) <= WAITING and not self.ended:
                return False
            self._extra = max(0, self._extra - 1)
            self._kept = max(WAITING, self._kept - 1)
            self._waiting.discard(stream)
            return True

    def end(self) -> None:
        """Those that wait are closed; those that were opened go on."""
        with self._lock:
            self.ended = True
            waiting = list(self._waiting)
        for stream in waiting:
            stream.shutdown()

    def describe(self) -> dict[str, Any]:
        with self._lock:
            return {"idle": len(self._waiting), "opened": self._opened}
