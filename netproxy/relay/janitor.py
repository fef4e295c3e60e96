"""The thread that ends what has been idle for too long.

Once a second it asks each registered table what has expired, and closes that outside all
locks.  Tables are told the time, so that tests need no sleep.  It also fits the interpreter's
switch interval to the number of threads.
"""

from __future__ import annotations

import sys
import threading
import time

from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.services import Expirable, Log

TICK = 1.0
"""Seconds between two sweeps: the coarsest at which a session that has nothing left to wait
for still seems to end at once."""
SWITCH_SECONDS = 0.005
"""The switch interval of few threads, which is the interpreter's own."""
SWITCH_SECONDS_PER_THREAD = 125e-6
"""Each thread that waits for the interpreter's lock wakes up once in a switch interval, and asks
its holder to give it up.  With 800 busy sessions and 5 ms these wake-ups took both processors,
and no datagram passed; with 0.1 s all passed, for half of the processor time."""


class Janitor:
    """Sweeps the registered tables.  Methods may be called on any thread."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # Guards _tables.
        self._lock = threading.Lock()
        self._tables: list[Expirable] = []
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="janitor", daemon=True)

    def register(self, table: Expirable) -> None:
        """Sweep a table from now on."""
        with self._lock:
            self._tables.append(table)

    def unregister(self, table: Expirable) -> None:
        """Sweep a table no more.  Raises ValueError if it is not registered."""
        with self._lock:
            self._tables.remove(table)

    def start(self) -> None:
        """Start the thread.  Raises RuntimeError if there is none to be had."""
        # A thread that was made before a fork counts as ended in the child.
        self.thread = threading.Thread(target=self._run, name="janitor", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for its end."""
        self._stopped.set()
        if self.thread.is_alive():
            self.thread.join()

    def sweep(self, now: float) -> None:
        """Close what has expired by `now` (monotonic seconds).

        An exception of one table or of one close is logged and does not affect the others.
        """
        with self._lock:
            tables = list(self._tables)
        for table in tables:
            try:
                closes = table.expire(now)
            except Exception:
                self._log.exception("sweeping a table")
                continue
            for close in closes:
                self._close(close)

    def _close(self, close: Callable[[], None]) -> None:
        try:
            close()
        except Exception:
            self._log.exception("closing what has expired")

    def _run(self) -> None:
        while not self._stopped.wait(TICK):
            sys.setswitchinterval(switch_interval(threading.active_count()))
            self.sweep(time.monotonic())


def switch_interval(threads: int) -> float:
    """Return the seconds after which a thread asks for the interpreter's lock."""
    return max(SWITCH_SECONDS, SWITCH_SECONDS_PER_THREAD * threads)
