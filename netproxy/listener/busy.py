"""Accepts the connections of a busy listener on the poller's thread.

A listener's own thread accepts as long as connections are rare.  Many of them would wake that
thread each time, only to contend with the poller's for the interpreter's lock.  So a busy
listener lends its socket to the poller, until no connection has come for a moment, accept(2)
fails or the listener stops.
"""

from __future__ import annotations

import threading
import time

from netproxy.interfaces.connections import Wait
from netproxy.net.socket_options import LOOK_SECONDS
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Watched
    from netproxy.listener.poller import Poller

BUSY_ACCEPTS, BUSY_SECONDS = 64, 0.25
"""A listener that accepts so many connections in this time is busy."""
QUIET_SECONDS = 0.5
"""A socket without a connection for so long goes back to its listener."""
BATCH = 16
"""Connections accepted in a row before other events have their turn."""


class BusyAccept:
    """Lends a listening socket to the poller.  A WaitOwner."""

    def __init__(self, poller: Poller, accept: Callable[[], bool]) -> None:
        """`accept()` serves a connection if one waits.

        It returns False if none waits.  It raises OSError if the socket has to go back.
        """
        self._poller = poller
        self._accept = accept
        self._is_back = threading.Event()
        self.is_lent = False
        """True while the poller accepts."""
        self._wait: Wait
        # Connections of the listener's thread since then, in monotonic seconds.
        self._accepted, self._since = 0, 0.0

    # -- the listener's thread

    def count(self) -> bool:
        """Count a connection that the listener's thread has accepted; return whether it is busy."""
        self._accepted += 1
        if self._accepted < BUSY_ACCEPTS:
            return False
        now = time.monotonic()
        is_busy = now - self._since < BUSY_SECONDS
        self._accepted, self._since = 0, now
        return is_busy

    def lend(self, watched: Watched) -> None:
        """Have the poller accept the connections of a socket; wait until it is back.

        `watched`: the socket, and what tells that the listener stops.
        """
        self._is_back.clear()
        self.is_lent = True
        self._poller.accepting.add(self)
        self._wait = Wait(watched, QUIET_SECONDS, self.resume, False, self._step)
        try:
            self._poller.watch(self._wait, self)
            while not self._is_back.wait(LOOK_SECONDS):
                if not self._poller.thread.is_alive():
                    break  # the daemon ends
        except (OSError, ValueError):  # closed meanwhile, or the kernel has no memory
            pass
        self.is_lent = False
        self._poller.accepting.discard(self)

    # -- the poller's thread

    def _step(self, descriptor: int, events: int) -> Wait | None:
        """Accept what waits; return a wait that ends the loan if that fails."""
        try:
            for _ in range(BATCH):
                if not self._accept():
                    break
        except OSError:
            return Wait((), None, self.resume)
        return self._wait

    def wake(self, wait: Wait, ready: bool) -> None:
        """Give the socket back."""
        self._is_back.set()

    def cannot_watch(self, wait: Wait, error: Exception) -> None:
        """Give the socket back."""
        self._is_back.set()

    def end(self, error: Exception | None) -> None:
        """Give the socket back."""
        self._is_back.set()

    def resume(self, ready: bool) -> None:
        """Do nothing: wake() has told all there is."""
