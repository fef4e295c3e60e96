"""The janitor: what it closes, and that no exception ends it."""

from __future__ import annotations

import threading
from typing import Callable, Sequence

import pytest

from netproxy.relay import janitor as janitor_module
from netproxy.relay.janitor import SWITCH_SECONDS, Janitor, switch_interval
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS


class Table:
    def __init__(self, *dead: Callable[[], None]) -> None:
        self.dead = dead
        self.asked: list[float] = []
        self.swept = threading.Event()

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        self.asked.append(now)
        self.swept.set()
        return self.dead


def fail() -> None:
    raise RuntimeError("broken")


class Broken(Table):
    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        raise RuntimeError("broken")


@pytest.fixture
def log() -> Lines:
    return Lines()


def test_sweep_closes_what_has_expired_and_tells_the_time(log: Lines) -> None:
    closed: list[str] = []
    table = Table(lambda: closed.append("a"), lambda: closed.append("b"))
    janitor = Janitor(log)
    janitor.register(table)
    janitor.sweep(12.5)
    assert (table.asked, closed) == ([12.5], ["a", "b"])


def test_unregistered_table_is_not_swept(log: Lines) -> None:
    first, second = Table(), Table()
    janitor = Janitor(log)
    janitor.register(first)
    janitor.register(second)
    janitor.unregister(first)
    janitor.sweep(1.0)
    assert (first.asked, second.asked) == ([], [1.0])


def test_broken_table_does_not_keep_others_from_being_swept(log: Lines) -> None:
    good = Table()
    janitor = Janitor(log)
    janitor.register(Broken())
    janitor.register(good)
    janitor.sweep(1.0)
    assert good.asked
    assert log.of("exception") == ["sweeping a table: broken"]


def test_failing_close_does_not_keep_others_open(log: Lines) -> None:
    """They have left their table already: what is not closed now never is."""
    closed: list[str] = []
    janitor = Janitor(log)
    janitor.register(Table(fail, lambda: closed.append("b")))
    janitor.sweep(1.0)
    assert closed == ["b"]
    assert log.of("exception") == ["closing what has expired: broken"]


def test_tables_may_be_registered_and_unregistered_during_a_sweep(log: Lines) -> None:
    janitor = Janitor(log)
    second = Table()
    first = Table(lambda: janitor.register(second), lambda: janitor.unregister(first))
    janitor.register(first)
    janitor.sweep(1.0)
    janitor.sweep(2.0)
    assert (first.asked, second.asked) == ([1.0], [2.0])


def test_janitor_sweeps_until_it_is_stopped(log: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor_module, "TICK", 0.01)
    broken, good = Broken(), Table()
    janitor = Janitor(log)
    janitor.register(broken)
    janitor.register(good)
    janitor.start()
    assert good.swept.wait(SECONDS)
    janitor.stop()
    assert not janitor.thread.is_alive()


def test_janitor_that_never_started_can_be_stopped(log: Lines) -> None:
    Janitor(log).stop()


def test_switch_interval_is_the_interpreters_own_until_there_are_many_threads() -> None:
    assert switch_interval(1) == switch_interval(40) == SWITCH_SECONDS == 0.005
    assert switch_interval(800) == pytest.approx(0.1)
