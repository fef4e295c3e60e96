"""The main thread while another process reads the configuration."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable

import pytest

from netproxy.config.schema import Config
from netproxy.daemon import main
from netproxy.daemon.process import signals
from netproxy.daemon.process.reading import ReadingFailed
from netproxy.daemon.process.signals import Served
from netproxy.errors import NetProxyError
from netproxy.observe.log import Log
from tests.support.sockets import SECONDS


def read_nothing(watch: Callable[[], None]) -> Config:
    return Config(())


def test_watchdog_is_told_while_the_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 181.  A daemon of which a worker does not answer tells nothing."""
    said: list[str] = []
    monkeypatch.setenv("WATCHDOG_USEC", "2")
    monkeypatch.setattr(signals.notify, "_send", said.append)
    for answers in (True, False):
        daemon: Any = SimpleNamespace(answers=answers)
        Served(daemon, Config(()), read_nothing, Log("error"))._watch()
        assert said == ["WATCHDOG=1"]


def test_stop_signal_ends_the_reading() -> None:
    """Hazard 181.  The signal stays, and the main thread obeys it."""
    daemon: Any = SimpleNamespace(answers=False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        with pytest.raises(NetProxyError, match="told to stop"):
            Served(daemon, Config(()), read_nothing, Log("error"))._watch()
        received = signal.sigtimedwait({signal.SIGTERM}, 0)
        assert received is not None and received.si_signo == signal.SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# A thread begins before the signals are blocked; each of them comes while the main thread works.
# The thread waits in the C library, which unlike Python does not begin again by itself.
EARLY_THREAD = """
import ctypes, os, signal, sys, threading
from netproxy.daemon.process.signals import SIGNALS, hold_signals

reader, writer = os.pipe()
buffer, counts = ctypes.create_string_buffer(1), []
library = ctypes.CDLL(None)
thread = threading.Thread(target=lambda: counts.append(library.read(reader, buffer, 1)))
thread.start()
hold_signals()
kept = SIGNALS - {signal.SIGCHLD}  # which only tells the main thread to look sooner
for number in kept:
    os.kill(os.getpid(), number)
found = set()
while found != kept:
    # A signal may reach the other thread while this one waits: then it is found the next time.
    received = signal.sigtimedwait(kept, 0.1)
    found |= {received.si_signo} if received else set()
os.write(writer, b"!")
thread.join()
print(counts, buffer.value)
"""


def test_threads_of_libraries_take_no_signal_away() -> None:
    """Hazard 142.  libfiu's thread begins before the daemon."""
    command = [sys.executable, "-c", EARLY_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1] b'!'\n", "")


def test_reload_comes_after_all_other_signals() -> None:
    """Hazard 142.  The kernel would take SIGHUP first, and again and again."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            signal.pthread_kill(threading.get_ident(), number)
        received = [signals.next_signal(0) for _ in range(4)]
        numbers = [one.si_signo for one in received if one is not None]
        assert numbers == [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Failing:
    """A daemon with one call that fails, and what a reload of it has told."""

    def __init__(self, failing: str) -> None:
        self.told: list[list[str]] = []
        self.calls: list[str] = []
        daemon: Any = SimpleNamespace(
            answers=True,
            look_seconds=0.0,
            live=0,
            default_upstream="",
            begin_reload=lambda: self.told.append,
        )
        for name in ("look", "reload", "status", "summary", "stop_accepting", "stop"):
            setattr(daemon, name, partial(self._call, name, name == failing))
        self.daemon = daemon

    def _call(self, name: str, fails: bool, *arguments: object) -> str:
        self.calls.append(name)
        if fails:
            raise OSError(errno.ENOMEM, "no memory")
        return ""


def give(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Let the main thread receive signals, one at each look, and then none."""
    left = iter(numbers)

    def wait(signals: object, seconds: float) -> object:
        number = next(left, None)
        return number and SimpleNamespace(si_signo=number)

    monkeypatch.setattr(signals.signal, "sigtimedwait", wait)


def fail_to_read(watch: Callable[[], None]) -> Config:
    raise OSError(errno.ENOMEM, "no memory")


@pytest.mark.parametrize(
    "failing, read, told",
    [
        ("look", read_nothing, [[]]),
        ("status", read_nothing, [[]]),
        ("", fail_to_read, [[signals.FAULT]]),
    ],
)
def test_main_thread_outlives_calls_that_fail(
    failing: str,
    read: Callable[[Callable[[], None]], Config],
    told: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Hazard 181.  Who has asked for the reload is told."""
    daemon = Failing(failing)
    give(monkeypatch, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM)
    log = Log("error")
    try:
        assert Served(daemon.daemon, Config(()), read, log).run() == 0
    finally:
        log.close()
    assert "internal error while " in capfd.readouterr().err
    assert daemon.told == told and daemon.calls[-1] == "stop"


def test_status_that_fails_does_not_keep_the_daemon_from_ending(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    daemon = Failing("status")
    give(monkeypatch, signal.SIGTERM, signal.SIGUSR1)
    log = Log("error")
    try:
        assert Served(daemon.daemon, Config(()), read_nothing, log).run() == 0
    finally:
        log.close()
    assert daemon.calls[-1] == "stop"


def test_failed_commit_ends_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 181.  Half a configuration would be in force: the service manager starts it anew."""
    daemon = Failing("reload")
    give(monkeypatch, signal.SIGHUP)
    log = Log("error")
    try:
        with pytest.raises(OSError):
            Served(daemon.daemon, Config(()), read_nothing, log).run()
    finally:
        log.close()


def test_start_without_an_answer_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hazard 181.  The service manager does not start a daemon again after status 78."""

    def fail(*options: object, **more: object) -> Config:
        raise ReadingFailed("a.yaml: cannot be read")

    monkeypatch.setattr(main, "configure_apart", fail)
    options: Any = SimpleNamespace(explain=None, check=False)
    assert main.run(options) == 70
    assert capsys.readouterr().err == "a.yaml: cannot be read\n"
