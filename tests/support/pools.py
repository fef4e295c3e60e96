"""Tasks for a thread pool that run until the test releases them."""

from __future__ import annotations

import threading


class Gate:
    """A task, submitted as often as wanted, that runs until release() is called."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._changed = threading.Condition()
        self.running = 0

    def __call__(self) -> None:
        with self._changed:
            self.running += 1
            self._changed.notify_all()
        self._open.wait(10)

    def wait_for(self, number: int, seconds: float = 5.0) -> None:
        """Wait until `number` tasks run."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: self.running >= number, seconds)
            assert in_time, f"{self.running} run"

    def release(self) -> None:
        """End all tasks."""
        self._open.set()
