"""Tells systemd about the state of the service: sd_notify(3).

Sends one datagram to $NOTIFY_SOCKET for each message, and nothing if that is not set.  A
service manager that does not listen is no error; one that does not read costs its message,
not the daemon's signals.  Runs on the main thread.
"""

from __future__ import annotations

import os
import socket
import time

from netproxy.observe.escaping import escape

SECONDS = 1.0
"""How long the service manager's queue may be full before a message is given up."""


def ready(status: str) -> None:
    """Report that the service is up, or that a reload is done; `status` is for people."""
    _send(f"READY=1\nSTATUS={escape(status)}")


def reloading() -> None:
    """Report that a reload begins; ready() ends it."""
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(seconds: float) -> None:
    """Report that the service stops, and ask for up to `seconds` for it."""
    _send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")


def status(text: str) -> None:
    """Set the status line that systemctl shows."""
    _send(f"STATUS={escape(text)}")


class Watchdog:
    """Tells the service manager that the daemon works, twice in each watchdog timeout."""

    seconds: float
    """Between two pings; 0 if the service manager does not ask for any."""

    def __init__(self) -> None:
        usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        enabled = usec.isdigit() and pid in ("", str(os.getpid()))
        self.seconds = int(usec) / 2e6 if enabled else 0.0
        self._due = 0.0

    def ping(self, now: float) -> None:
        """Send a ping if one is due; `now` is in monotonic seconds."""
        if self.seconds and now >= self._due:
            self._due = now + self.seconds
            _send("WATCHDOG=1")


def _send(state: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(SECONDS)
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send(state.encode())
    except OSError:
        # The service manager is gone or reads nothing: no reason to stop serving.
        pass
