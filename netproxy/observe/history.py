"""The history of the last day: bytes and flows, a sample every five minutes.

Expirable: the janitor takes the samples, and keeps them in the folder of state over restarts.  The
status page reads them on its thread.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from functools import partial

from netproxy.typed import TYPE_CHECKING, Callable, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import HistoryRow
    from netproxy.observe.flows import Carried

SAMPLE_SECONDS = 300.0
SAMPLES = 288
"""A day of samples, 24 bytes each."""
FILE = "history.json"
_FIELDS = 3


class CarriedSource(Protocol):
    """Knows what flows have carried: the flows of a process, or of all workers.  Thread: any."""

    def carried(self) -> Carried:
        """Return the sums.  No number of bytes is ever less than before."""


class History:
    """Remembers what flows have moved in each period of the last day."""

    def __init__(self, flows: CarriedSource, folder: Callable[[], str] = str) -> None:
        """`folder()` returns where the samples are kept, "" for nowhere."""
        self._flows = flows
        self._folder = folder
        # Of the janitor's thread: whether a file of an earlier process was looked for.
        self._loaded = False
        # Guards everything below.
        self._lock = threading.Lock()
        # Of each period: bytes up, bytes down, and the flows that were running at its end.
        self._values = array("Q")
        self._up = self._down = 0
        self._due = 0.0
        """When the next sample is taken, monotonic seconds; 0 before the first period."""

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Take a sample if a period has ended at `now` (monotonic seconds); nothing expires."""
        if now < self._due:
            return ()
        folder = self._folder()
        if folder and not self._loaded:
            self._loaded = True
            self._load(folder)
        up, down, live = self._flows.carried()
        with self._lock:
            if self._due:
                self._values.extend((up - self._up, down - self._down, live))
                del self._values[: -SAMPLES * _FIELDS]
            self._up, self._down = up, down
            late = now - self._due
            # A machine that was busy for longer than a period skips samples.
            self._due = now + SAMPLE_SECONDS - (late if late < SAMPLE_SECONDS else 0.0)
        return [partial(self._save, folder)] if folder and self._values else ()

    def row(self) -> HistoryRow:
        """Return the samples, the oldest first."""
        with self._lock:
            values = self._values.tolist()
        samples = [values[at : at + _FIELDS] for at in range(0, len(values), _FIELDS)]
        return {"seconds": SAMPLE_SECONDS, "samples": samples}

    # -- the file: an object with the time of the last sample and all values; the janitor's thread

    def _save(self, folder: str) -> None:
        """Write the samples; a file that cannot be written is left as it is."""
        import json  # late: many daemons keep nothing

        with self._lock:
            values = self._values.tolist()
        path = os.path.join(folder, FILE)
        try:
            with open(f"{path}.new", "w", encoding="ascii") as file:
                json.dump({"at": time.time(), "values": values}, file)
            os.replace(f"{path}.new", path)
        except OSError:
            pass  # the usage of users is in the same folder, and its error is logged

    def _load(self, folder: str) -> None:
        """Put the samples of an earlier process before those of this one.

        Nothing has moved in the periods between.  A damaged file is no history.
        """
        import json  # late: as above

        try:
            with open(os.path.join(folder, FILE), encoding="ascii") as file:
                content = json.load(file)
            values = array("Q", content["values"])
            missed = int((time.time() - content["at"]) / SAMPLE_SECONDS)
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return
        if len(values) % _FIELDS or missed < 0:
            return
        values.extend([0] * (_FIELDS * min(missed, SAMPLES)))
        with self._lock:
            self._values = values + self._values
            del self._values[: -SAMPLES * _FIELDS]
