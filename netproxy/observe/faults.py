"""Sends to the log what the interpreter would print on standard error by itself.

Printing waits for the reader of standard error.  A thread that waits there for ever has not
ended, so nobody would notice that it does nothing any more.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import partial

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.observe.log import Log


def open_standard_descriptors() -> None:
    """Open those of descriptors 0 to 2 that are closed.

    Otherwise the next socket would get the number 2, and the log would be written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def report_to(log: Log) -> None:
    """Have `log` tell the exceptions that end threads, and those that nobody can handle."""
    threading.excepthook = partial(_thread_failed, log)
    sys.unraisablehook = partial(_not_raised, log)


def _thread_failed(log: Log, failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread else "?"
    if failure.exc_type is not SystemExit:
        log.fault(f"running the thread '{name}'", failure.exc_value)


def _not_raised(log: Log, failure: sys.UnraisableHookArgs) -> None:
    # It may come from a garbage collection within the log itself.
    kind, owner = failure.exc_type.__name__, type(failure.object).__name__
    log.later(f"internal error while ending a {owner}: {kind}: {failure.exc_value}")
