"""What systemd wants to know of a service (sd_notify(3)): one datagram to $NOTIFY_SOCKET.  Nothing without it."""
from __future__ import annotations

import os
import socket
import time


def ready(status: str) -> None:
    _send(f"READY=1\nSTATUS={status}")


def reloading() -> None:
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    _send("STOPPING=1")


def _send(state: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send(state.encode())
    except OSError:
        pass        # the service manager is gone: that is no reason to stop serving
