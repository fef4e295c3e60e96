"""Runs handshakes, and their waits, on one thread, as listener.handshake_driver does."""

from __future__ import annotations

import select

from netproxy.interfaces.connections import Events, Handshake, Wait
from netproxy.net.stream import satisfy


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


def run_until_events(handshake: Handshake) -> Events:
    """Drive a handshake until it waits for events; return that need."""
    need = next(handshake)
    while not isinstance(need, Events):
        need = handshake.send(satisfy(need))
    return need
