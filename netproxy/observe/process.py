"""What the kernel knows about this process: processor time, memory and descriptors."""

from __future__ import annotations

import os
import resource
import threading

from netproxy.typed import NamedTuple


class ProcessUse(NamedTuple):
    """What one process uses, or several together.  0: the kernel does not tell."""

    cpu: float = 0.0
    """Seconds of processor time."""
    memory: int = 0
    """Resident bytes."""
    share: int = 0
    """Bytes, where memory that several processes share counts for each of them in part; 0 if
    nobody has asked for it."""
    threads: int = 0
    max_descriptors: int = 0
    descriptors: int = 0


def process_use(with_share: bool = False) -> ProcessUse:
    """Return what this process uses; `with_share`: its share of memory, too."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    memory = resident_memory()
    return ProcessUse(
        usage.ru_utime + usage.ru_stime,
        memory,
        (_memory_share() or memory) if with_share else 0,
        threading.active_count(),
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        _descriptors(),
    )


def resident_memory() -> int:
    """Return the bytes of memory in use, 0 if the kernel does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _memory_share() -> int:
    try:
        with open("/proc/self/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        # Without CONFIG_PROC_PAGE_MONITOR, or a filter forbids it.
        pass
    return 0


def _descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
