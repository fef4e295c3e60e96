"""Serves until a signal ends the daemon: the main thread's loop.

The main thread waits for signals with sigtimedwait, so that nothing is interrupted.
SIGHUP reloads the file; running connections continue, and a file with errors changes nothing.
SIGTERM and SIGINT stop accepting and let running connections finish, for at most `timeouts.drain`;
a second one stops at once.  SIGUSR1 writes the status to the log, SIGUSR2 opens the access file
anew.  Lists that were fetched are put into force here as well.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial

from netproxy.errors import NetProxyError
from netproxy.observe import notify
from netproxy.typed import TYPE_CHECKING, Callable, TypeVar

if TYPE_CHECKING:
    from types import FrameType

    from netproxy.config.schema import Config
    from netproxy.daemon.daemon import Daemon
    from netproxy.daemon.workers.parent import Parent
    from netproxy.observe.log import Log
    from netproxy.remote_lists.keeper import ListKeeper

T = TypeVar("T")

FINE, INTERNAL = 0, 70
"""Exit statuses of sysexits(3)."""
FAULT = "internal error (the log has it)"
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
SIGNALS = STOP_SIGNALS | {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD}
LOOK_SECONDS = 2.0
"""Between two looks whether all threads are alive, and whether a list was fetched."""
DRAIN_STEP = 0.1
"""Seconds between two looks whether all connections have ended."""
END_SECONDS = 15.0
"""How long the service manager is asked to wait for what comes after the drain."""
NO_RELOAD = "the daemon is draining"
STOPS = "the daemon was told to stop before the configuration was read"


def hold_signals() -> None:
    """Block the signals, which threads inherit: the main thread alone gets them, by waiting.

    A thread that a preloaded library has begun before takes a signal while the main thread does
    not wait: without a handler it would end the daemon.  Its own system calls go on, those that
    can (signal(7)).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS - {signal.SIGCHLD}:
        signal.signal(number, _keep)
        signal.siginterrupt(number, False)


def _keep(number: int, frame: FrameType | None) -> None:
    """Have the main thread, which runs this, find a signal when it waits the next time."""
    signal.pthread_kill(threading.get_ident(), number)


def next_signal(seconds: float) -> signal.struct_siginfo | None:
    """Return a signal that came within `seconds`, None if none did.

    Of several a reload comes last: those that never end must not keep the others waiting.
    """
    pending = signal.sigpending()
    for first in (STOP_SIGNALS, SIGNALS - {signal.SIGHUP}):
        if first & pending:
            return signal.sigtimedwait(first, 0)
    return signal.sigtimedwait(SIGNALS, seconds)


class Served:
    """A daemon that serves, with its configuration.  Thread: main."""

    def __init__(
        self,
        daemon: Daemon | Parent,
        config: Config,
        read: Callable[[Callable[[], None]], Config],
        log: Log,
    ) -> None:
        """`read(watch)` reads the configuration again.  It raises NetProxyError.

        It calls `watch()` while that takes time.
        """
        self._daemon = daemon
        self._config = config
        self._read = read
        self._log = log
        self._lists: ListKeeper | None = None
        self._watchdog = notify.Watchdog()

    @property
    def text(self) -> str:
        """What is served, for a log line."""
        agent = self._config.tunnel.agent
        role = f", agent '{agent.name}' of {agent.bridge}" if agent is not None else ""
        return f"{self._daemon.summary()}{role}, upstream {self._daemon.default_upstream}"

    def run(self) -> int:
        """Obey signals until one ends the daemon, or a thread that must live has died.

        Returns the exit status.
        """
        daemon, watchdog = self._daemon, self._watchdog
        self._keep_lists()
        while True:
            seconds = min(LOOK_SECONDS, watchdog.seconds or LOOK_SECONDS, daemon.look_seconds)
            received = next_signal(max(0.0, seconds))
            if received is not None and received.si_signo in STOP_SIGNALS:
                self._drain(self._config.timeouts.drain)
                return FINE
            dead = self._attempt("looking for dead threads and workers", daemon.look)
            if dead:
                self._log.error("the thread '%s' has died", dead)
                daemon.stop()
                return INTERNAL
            # A watchdog is told nothing if the look has failed.
            if dead is not None and daemon.answers:
                watchdog.ping(time.monotonic())
            if self._lists is not None and self._lists.take_changed():
                self._renew_lists()
            if received is None or received.si_signo == signal.SIGCHLD:
                continue
            if received.si_signo == signal.SIGHUP:
                self._reload()
            else:
                self._attempt("obeying a signal", partial(self._obey, received))

    def _attempt(self, doing: str, call: Callable[[], T]) -> T | None:
        """Return what a call returns, None if it fails: that ends nothing of what is served."""
        try:
            return call()
        except Exception:
            self._log.exception(doing)
            return None

    def _obey(self, received: signal.struct_siginfo) -> bool:
        """Obey a signal that changes nothing of what is served; return False for any other."""
        if received.si_signo == signal.SIGUSR1:
            self._log.answers(self._daemon.status())
        elif received.si_signo == signal.SIGUSR2:
            self._daemon.reopen_log()
        return received.si_signo in (signal.SIGUSR1, signal.SIGUSR2)

    # -- reloads

    def _reload(self) -> None:
        """Read the file again and put it into force."""
        notify.reloading()
        ended = self._daemon.begin_reload()
        errors = self._apply()
        for line in errors:
            self._log.error("not reloaded: %s", line)
        if not errors:
            self._log.info("reloaded; serves %s", self.text)
            self._attempt("keeping lists", self._keep_lists)
        ended(errors)
        outcome = "not reloaded, " if errors else ""
        notify.ready(f"{outcome}serves {self._daemon.summary()}")

    def _apply(self) -> list[str]:
        """Put what the file says into force; return the errors, with which nothing has changed."""
        try:
            fresh = self._read(self._watch)
        except NetProxyError as error:
            return str(error).split("\n")
        except Exception:
            self._log.exception("reading the configuration")
            return [FAULT]
        try:
            self._daemon.reload(fresh)
        except NetProxyError as error:
            return str(error).split("\n")
        self._config = fresh
        self._log.configure(*fresh.log)
        return []

    def _watch(self) -> None:
        """Do what cannot wait until the file is read.  Raises NetProxyError at a stop signal."""
        if self._daemon.answers:
            self._watchdog.ping(time.monotonic())
        if STOP_SIGNALS & signal.sigpending():
            raise NetProxyError(STOPS)

    def _keep_lists(self) -> None:
        """Have the lists of the configuration fetched, and no others; copies of others go."""
        folder, lists = self._config.lists_folder, self._config.lists
        if folder and os.path.isdir(folder):
            from netproxy.remote_lists.copies import remove_unused  # late: few have copies

            remove_unused(folder, lists, self._log)
        if self._lists is None:
            if not lists:
                return
            # late: few configurations have such lists
            from netproxy.daemon.checks.lists import count_entries
            from netproxy.remote_lists.keeper import ListKeeper

            self._lists = ListKeeper(count_entries, self._log)
        self._lists.configure(lists)

    def _renew_lists(self) -> None:
        """Put fetched lists into force.  The file is not read: it may be half edited."""
        try:
            self._daemon.reload(self._config)
        except NetProxyError as error:
            self._log.error("fetched lists are not used: %s", error)
        else:
            self._log.info("fetched lists are in force")

    # -- the end

    def _drain(self, seconds: float) -> None:
        """Stop: running connections may finish, for `seconds` or until a second stop signal."""
        daemon = self._daemon
        notify.stopping(seconds + END_SECONDS)
        if self._lists is not None:
            self._lists.stop()
        daemon.stop_accepting()
        deadline = time.monotonic() + seconds
        if daemon.live:
            self._log.info("stopping: %d connections may finish within %g s", daemon.live, seconds)
            notify.status(f"stopping: connections may finish within {seconds:g} s")
        while daemon.live and time.monotonic() < deadline:
            received = signal.sigtimedwait(SIGNALS, DRAIN_STEP)
            if received is not None and received.si_signo in STOP_SIGNALS:
                break
            self._obey_while_draining(received)
        else:
            if left := daemon.live:
                self._log.info("stopping: %d connections are cut after %g s", left, seconds)
        # Signals that came with the end, at most one of each: more cannot put the end off.
        for _ in SIGNALS:
            self._obey_while_draining(signal.sigtimedwait(SIGNALS, 0))
        daemon.stop()
        self._log.info("stopped")

    def _obey_while_draining(self, received: signal.struct_siginfo | None) -> None:
        if received is None:
            return
        obeyed = self._attempt("obeying a signal", partial(self._obey, received))
        if obeyed is False and received.si_signo == signal.SIGHUP:
            self._log.error("not reloaded: %s", NO_RELOAD)
            # A client of the control socket may have asked for the reload before the drain.
            self._daemon.begin_reload()([NO_RELOAD])
