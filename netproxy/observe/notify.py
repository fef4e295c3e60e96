"""What systemd wants to know of a service (sd_notify(3)): one datagram to $NOTIFY_SOCKET.  Nothing without it."""

from __future__ import annotations

import os
import socket
import time


def ready(status: str) -> None:
    _send(f"READY=1\nSTATUS={status}")


def reloading() -> None:
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(seconds: float) -> None:
    """It may take that long, whatever the service manager is used to."""
    _send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")


def status(text: str) -> None:
    _send(f"STATUS={text}")


class Watchdog:
    """Tells the service manager that all is well, twice in the time after which it would believe otherwise."""

    def __init__(self) -> None:
        usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        asked = usec.isdigit() and pid in ("", str(os.getpid()))
        self.seconds = (
            int(usec) / 2e6 if asked else 0.0
        )  # between two pings; 0: nobody waits for any
        self._due = 0.0

    def ping(self, now: float) -> None:
        """`now`: time.monotonic()."""
        if self.seconds and now >= self._due:
            self._due = now + self.seconds
            _send("WATCHDOG=1")


def _send(state: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send(state.encode())
    except OSError:
        pass  # the service manager is gone: that is no reason to stop serving
