"""Dials work connections for flows of datagrams that need another one, on the agent.

A flow needs another one when its own has failed, or when the agent has connected again.  Dials run
on the dial pool; the agent's thread repeats what has failed.  Thread: any.
"""

from __future__ import annotations

import threading
from functools import partial

from netproxy.errors import NetProxyError
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.services import Log
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.pool import Submit

DIALLING_LIMIT = 8
"""Dials at once: new streams need the dial pool, too."""

FlowDialer = Callable[[int, int], "Stream | None"]
"""Returns a work connection that the bridge has attached to a flow, given its path and number;
None if the bridge has no such flow.  Raises NetProxyError."""


class FlowAttacher:
    """Attaches work connections to flows."""

    def __init__(self, dial: FlowDialer, submit: Submit, log: Log) -> None:
        """`submit` runs a dial on the dial pool."""
        self._dial = dial
        self._submit = submit
        self._log = log
        # Guards all below.
        self._lock = threading.Lock()
        self._waiting: dict[PathFlow, int] = {}
        """With the number of the path."""
        self._dialling: set[PathFlow] = set()
        self._closed = False

    def add(self, path: int, flow: PathFlow) -> None:
        """Attach another work connection to a flow; fill() must follow."""
        with self._lock:
            if not self._closed and flow not in self._waiting and flow not in self._dialling:
                flow.await_stream()
                self._waiting[flow] = path

    def fill(self) -> None:
        """Dial for the flows that wait.  Never blocks."""
        while (taken := self._take()) is not None:
            if not self._submit(partial(self._attach, *taken)):
                self._put_back(*taken)
                return

    def _take(self) -> tuple[PathFlow, int] | None:
        with self._lock:
            if self._closed or not self._waiting or len(self._dialling) >= DIALLING_LIMIT:
                return None
            flow, path = self._waiting.popitem()
            self._dialling.add(flow)
            return flow, path

    def _put_back(self, flow: PathFlow, path: int) -> None:
        with self._lock:
            self._dialling.discard(flow)
            if not self._closed:
                self._waiting[flow] = path

    def _attach(self, flow: PathFlow, path: int) -> None:
        """Dial for one flow.  Thread: dial pool."""
        attach = flow.attach
        try:
            stream = self._dial(path, flow.number) if attach is not None else None
        except NetProxyError as error:
            # Repeated when the agent's thread looks again.
            self._put_back(flow, path)
            if not self._closed:
                said = "tunnel: cannot dial a work connection for datagrams: %s"
                self._log.limited(("tunnel attach", str(error)), said, error)
            return
        except BaseException:
            self._put_back(flow, path)
            raise
        with self._lock:
            self._dialling.discard(flow)
        if stream is None:
            flow.forgo()
            if flow.is_alone:
                flow.end()
        elif attach is None or not attach(stream):
            stream.close()
        self.fill()

    def close(self) -> None:
        """Dial no more."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
