"""Runs a connection's waits to their end, as a listener and the poller do."""

from __future__ import annotations

import select

from netproxy.interfaces.connections import Wait


def run_to_end(wait: Wait | None) -> None:
    while wait is not None:
        poll = select.poll()
        for sock, events in wait.watched:
            poll.register(sock, events)
        seconds = wait.seconds
        wait = wait.resume(bool(poll.poll(None if seconds is None else min(seconds * 1000, 1e6))))
