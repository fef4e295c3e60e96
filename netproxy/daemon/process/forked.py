"""What a process that was forked from the daemon does first.  Thread: main."""

from __future__ import annotations

import gc
import os
import resource

from netproxy.net import syscalls


def leave_parent(kept: set[int]) -> None:
    """Give up what belongs to the parent, and end when it ends.

    `kept`: the descriptors that stay open, beside the three standard ones.
    """
    # What the parent has left for its collector holds descriptors that are closed here: the
    # collector would close them a second time, when their numbers belong to other files.
    gc.freeze()
    syscalls.die_with_parent()
    close_others({0, 1, 2, *kept})


def close_others(kept: set[int]) -> None:
    """Close all descriptors of this process except those in `kept`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 0
    for descriptor in (*sorted(kept), limit):
        # An empty range would close everything.
        if low < descriptor:
            os.closerange(low, descriptor)
        low = descriptor + 1
    for descriptor in _open_beyond(limit):
        if descriptor not in kept:
            os.closerange(descriptor, descriptor + 1)


def _open_beyond(limit: int) -> list[int]:
    """Return the descriptors from a limit on: it may have been lowered while they were open."""
    try:
        return [number for number in map(int, os.listdir("/proc/self/fd")) if number >= limit]
    except OSError:
        return []  # without /proc
