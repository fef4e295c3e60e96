"""Runs the waits of a connection to their end, as listener.serving and the poller do."""

from __future__ import annotations

import select

from netproxy.interfaces.connections import Wait


def run_to_end(wait: Wait | None) -> None:
    """Resume a wait, and those that follow it, on this thread until the connection has ended."""
    while wait is not None:
        ready = True
        if wait.watched:
            poll = select.poll()
            for sock, events in wait.watched:
                poll.register(sock, events)
            seconds = wait.seconds
            ready = bool(poll.poll(None if seconds is None else min(seconds * 1000, 1e6)))
        wait = wait.resume(ready)
