"""Provides tasks for a thread pool that block until the test lets them go."""

from __future__ import annotations

import threading

from tests.support.sockets import SECONDS


class Gate:
    """A task that any number of threads may run. Each call blocks until let_go()."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._changed = threading.Condition()
        self.running = 0

    def __call__(self) -> None:
        with self._changed:
            self.running += 1
            self._changed.notify_all()
        self._open.wait(SECONDS)

    def wait_for(self, number: int, seconds: float = SECONDS) -> None:
        """Wait until `number` calls have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.running >= number, seconds), (
                f"{self.running} run"
            )

    def let_go(self) -> None:
        """Let all calls return, those to come included."""
        self._open.set()
