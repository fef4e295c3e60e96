"""The one thread that ends what has been idle for too long.

Once a second it asks every registered table what died and closes that outside
all locks.  Tables are told the time, so that tests need no sleep.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable

from netproxy.interfaces.services import Expirable, Log

TICK = 1.0  # seconds: the coarsest that still ends an association's sessions "at once" for a person


class Janitor:
    def __init__(self, log: Log) -> None:
        self._log = log
        self._lock = threading.Lock()  # guards _tables
        self._tables: list[Expirable] = []
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="janitor", daemon=True)

    def register(self, table: Expirable) -> None:
        with self._lock:
            self._tables.append(table)

    def forget(self, table: Expirable) -> None:
        with self._lock:
            self._tables.remove(table)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self.thread.is_alive():
            self.thread.join()

    def sweep(self, now: float) -> None:
        with self._lock:
            tables = list(self._tables)
        for table in tables:
            for close in self._guarded(lambda: table.expire(now)) or ():
                self._guarded(close)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """One fault must not keep the others from being evicted and closed."""
        try:
            return call()
        except Exception:
            self._log.exception("sweeping a table")
            return None

    def _run(self) -> None:
        while not self._stopped.wait(TICK):
            self.sweep(time.monotonic())
