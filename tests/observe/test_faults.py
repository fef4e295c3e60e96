"""What the interpreter would print on standard error goes to the log."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Iterator

import pytest

from netproxy.observe import faults


class RecordingLog:
    def __init__(self) -> None:
        self.faults: list[str] = []

    def fault(self, doing: str, error: BaseException | None) -> None:
        self.faults.append(f"{doing}: {error!r}")

    later = lambda self, text: self.faults.append(text)  # noqa: E731


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingLog]:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    log = RecordingLog()
    faults.report_to(log)  # type: ignore[arg-type]
    yield log


def test_exception_that_ends_a_thread_is_logged(
    log: RecordingLog, capfd: pytest.CaptureFixture[str]
) -> None:
    """Hazard 133: a thread that waits to print its end has not ended."""

    def fail() -> None:
        raise ValueError("gone")

    thread = threading.Thread(target=fail, name="test-poller")
    thread.start()
    thread.join()
    assert log.faults == ["running the thread 'test-poller': ValueError('gone')"]
    assert capfd.readouterr().err == ""


def test_thread_that_exits_is_not_logged(log: RecordingLog) -> None:
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    assert not log.faults


def test_exception_that_nobody_can_handle_is_postponed_to_the_janitor(
    log: RecordingLog, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("gone")

    broken: object = Broken()
    del broken
    gc.collect()
    assert log.faults == ["internal error while ending a function: ValueError: gone"]
    assert capfd.readouterr().err == ""
