"""The thread that keeps the paths of one side alive: it calls their tick() when it is due."""

from __future__ import annotations

import math
import threading
import time

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log
    from netproxy.tunnel.path.path import Path

PAUSE = 0.05
"""Seconds between two looks at all paths: those of a thousand agents are looked at together."""

JOIN_SECONDS = 2.0
"""How long stop() waits for the thread."""


class PathKeeper:
    """Ticks paths.  Thread: any, but for _run()."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # Guards _due and _thread.
        self._lock = threading.Lock()
        self._due: dict[Path, float] = {}
        """Monotonic seconds."""
        self._thread: threading.Thread | None = None
        self._wakened = threading.Event()
        self._stopped = False

    def add(self, path: Path) -> None:
        """Tick a path from now on.  Raises RuntimeError if no thread can be had."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="tunnel-keeper", daemon=True)
                thread.start()
                self._thread = thread
            self._due[path] = -math.inf
        self._wakened.set()

    def remove(self, path: Path) -> None:
        """Tick a path no more."""
        with self._lock:
            self._due.pop(path, None)

    def wake(self) -> None:
        """Look at all paths at once.  Never blocks."""
        self._wakened.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._wakened.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        seconds: float | None = 0.0
        while not self._stopped:
            woken = self._wakened.wait(seconds)
            self._wakened.clear()
            now = time.monotonic()
            with self._lock:
                paths = [path for path, due in self._due.items() if woken or due <= now]
            for path in paths:
                self._tick(path, now)
            with self._lock:
                due = min(self._due.values(), default=math.inf)
            # Wakened or not: no more looks than one in PAUSE.
            seconds = None if due == math.inf else max(PAUSE, due - time.monotonic())

    def _tick(self, path: Path, now: float) -> None:
        try:
            due = path.tick(now)
        except Exception:
            self._log.exception("keeping a path of a tunnel")
            due = now + 1.0
        with self._lock:
            if path in self._due:
                self._due[path] = due
