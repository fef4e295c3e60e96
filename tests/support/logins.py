"""Logins that are under way, and what stands in for the pools and records around them."""

from __future__ import annotations

from typing import Any

from netproxy.interfaces.connections import Events
from netproxy.interfaces.fairness import ClientTask
from netproxy.interfaces.services import Counter
from netproxy.net.stream import poll_watched
from tests.support.sockets import SECONDS


class Tasks:
    """A FairSubmit that keeps tasks until they are run."""

    def __init__(self) -> None:
        self.waiting: list[ClientTask] = []

    def __call__(self, task: ClientTask, /) -> None:
        self.waiting.append(task)

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0).run()


class Running:
    """A login that is under way."""

    def __init__(self, steps: Any) -> None:
        self.steps, self.ended, self.result = steps, False, None
        self.need: Any = None
        self.send(None)

    def send(self, value: Any) -> None:
        try:
            self.need = self.steps.send(value)
        except StopIteration as stop:
            self.ended, self.result = True, stop.value

    def go_on(self) -> Any:
        """Resume after an event; return the result."""
        if not self.ended:
            assert isinstance(self.need, Events)
            self.send(poll_watched(self.need.watched()[0], SECONDS))
        assert self.ended
        return self.result

    def wait(self, seconds: float) -> Any:
        """Wait for the check; return the result."""
        assert poll_watched(self.need.watched()[0], seconds)
        return self.go_on()


class Recorder:
    """A LoginObserver that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def refused(self, client: str, user: str) -> None:
        self.told.append((client, user))

    def unavailable(self, client: str, user: str, why: str) -> None:
        self.told.append((client, user, why))

    def penalised(self, client: str, user: str) -> None:
        self.told.append((client, user, "penalty"))


class FailureCounts:
    """A LoginObserver that counts wrong logins as that of a listener does."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    def refused(self, client: str, user: str) -> None:
        self._counter.count("authentication", "refused")

    def unavailable(self, client: str, user: str, why: str) -> None:
        """Count nothing."""

    def penalised(self, client: str, user: str) -> None:
        """Count nothing."""
