"""Runs what may pause to its end, as a listener and its parker do."""

from __future__ import annotations

import select

from netproxy.interfaces.connections import Wait


def run_to_end(pause: Wait | None) -> None:
    while pause is not None:
        poll = select.poll()
        for sock, events in pause.watched:
            poll.register(sock, events)
        seconds = pause.seconds
        pause = pause.resume(bool(poll.poll(None if seconds is None else min(seconds * 1000, 1e6))))
