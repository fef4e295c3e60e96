"""Keeps copies of lists that are fetched from elsewhere: one thread for all of them.

A copy is replaced only by a list that is whole, has the right checksum and can be read: whatever
goes wrong, the last good copy stays.  The main thread learns of new copies by take_changed(), and
puts them into force.  Copies outlive the daemon: they are in its folder of state.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time

from netproxy.errors import ConfigError
from netproxy.remote_lists.copies import FRESH
from netproxy.remote_lists.download import PIECE, DownloadError, download
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from ssl import SSLContext

    from netproxy.interfaces.services import Log, RemoteList

RETRY_FIRST = 60.0
"""Seconds until a list is fetched again that could not be had; doubled with each failure."""
DOUBLINGS = 10
STOP_SECONDS = 0.5
"""How long the end waits for the thread: it may be fetching."""

CountEntries = Callable[[str, str], int]
"""Reads a list, of a kind and at a path, and returns its entries.  Raises ConfigError."""


class _Copy:
    """One list, and when it is fetched again."""

    def __init__(self, wanted: RemoteList, now: float) -> None:
        self.wanted = wanted
        self.tag = ""
        self.failures = 0
        self.due = now + _seconds_left(wanted)


class ListKeeper:
    """Fetches the lists of a configuration."""

    def __init__(
        self, count_entries: CountEntries, log: Log, context: SSLContext | None = None
    ) -> None:
        """Begin without lists, and without a thread.  `context` as in download()."""
        self._count_entries = count_entries
        self._log = log
        self._context = context
        # Guards _copies, _changed and _stopped; the thread waits for changes of them.
        self._changes = threading.Condition()
        self._copies: dict[RemoteList, _Copy] = {}
        self._changed = self._stopped = False
        self._thread: threading.Thread | None = None

    def configure(self, lists: Sequence[RemoteList]) -> None:
        """Fetch these lists from now on, and no others.  Thread: main."""
        now, before = time.monotonic(), self._copies
        copies = {wanted: before.get(wanted) or self._new_copy(wanted, now) for wanted in lists}
        with self._changes:
            self._copies = copies
            self._changes.notify()
        if self._thread is None and lists:
            self._thread = threading.Thread(target=self._run, name="lists", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                self._log.error("no thread can be had to fetch lists: reload to try again")

    def _new_copy(self, wanted: RemoteList, now: float) -> _Copy:
        copy = _Copy(wanted, now)
        if wanted.sha256 and copy.due > now and _checksum(wanted.path) != wanted.sha256:
            self._log.warning(
                "list %s: the copy has another checksum than sha256 says", wanted.name
            )
            copy.due = now
        return copy

    def take_changed(self) -> bool:
        """Return whether there are new copies since the last time.  Thread: main."""
        with self._changes:
            changed, self._changed = self._changed, False
        return changed

    def stop(self) -> None:
        """Fetch nothing more.  Thread: main."""
        with self._changes:
            self._stopped = True
            self._changes.notify()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    # -- the thread

    def _run(self) -> None:
        while (copy := self._next()) is not None:
            wanted = copy.wanted
            try:
                is_new = self._fetch(copy)
            except (DownloadError, ConfigError, OSError) as error:
                copy.failures += 1
                seconds = RETRY_FIRST * 2.0 ** min(copy.failures - 1, DOUBLINGS)
                self._log.warning("list %s: the copy stays as it is: %s", wanted.name, error)
            except Exception:
                copy.failures += 1
                seconds = wanted.refresh
                self._log.exception("fetching a list")
            else:
                copy.failures, seconds = 0, wanted.refresh
                with self._changes:
                    self._changed |= is_new
            copy.due = time.monotonic() + min(seconds, wanted.refresh)

    def _next(self) -> _Copy | None:
        """Wait until a list is due, and return it; None at the end."""
        with self._changes:
            while not self._stopped:
                copy = min(self._copies.values(), key=_due, default=None)
                seconds = None if copy is None else copy.due - time.monotonic()
                if copy is not None and copy.due <= time.monotonic():
                    return copy
                self._changes.wait(seconds)
        return None

    def _fetch(self, copy: _Copy) -> bool:
        """Fetch a list; return whether its copy is another one now.

        Raises DownloadError, ConfigError if it cannot be read, OSError if it cannot be kept.
        """
        wanted = copy.wanted
        os.makedirs(os.path.dirname(wanted.path), 0o700, exist_ok=True)
        fresh = wanted.path + FRESH
        # Without a copy, "not modified" would leave nothing: somebody may have removed it.
        tag = copy.tag if os.path.exists(wanted.path) else ""
        fetched = download(wanted.url, fresh, tag, self._context)
        if fetched is None:
            os.utime(wanted.path)
            return False
        try:
            if wanted.sha256 and fetched.sha256 != wanted.sha256:
                raise DownloadError(f"it has another checksum: sha256 {fetched.sha256}")
            entries = self._count_entries(wanted.kind, fresh)
            is_new = not _are_same(fresh, wanted.path)
            if self._copies.get(wanted) is not copy:
                # A reload has removed the list, and its copy, or has changed its checksum.
                os.unlink(fresh)
                return False
            os.replace(fresh, wanted.path)
        except BaseException:
            os.unlink(fresh)
            raise
        copy.tag = fetched.tag
        if is_new:
            self._log.info("list %s: fetched, %d entries", wanted.name, entries)
        return is_new


def _due(copy: _Copy) -> float:
    return copy.due


def _seconds_left(wanted: RemoteList) -> float:
    """Return the seconds until a list is fetched, by the age of the copy of an earlier process."""
    try:
        age = time.time() - os.stat(wanted.path).st_mtime
    except OSError:
        return 0.0
    return max(0.0, wanted.refresh - max(0.0, age))


def _checksum(path: str) -> str:
    """Return the checksum of a file, "" if it cannot be read."""
    checksum = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                checksum.update(piece)
    except OSError:
        return ""
    return checksum.hexdigest()


def _are_same(path: str, other: str) -> bool:
    """Return whether two files have the same content, False if one is missing.  Raises OSError.

    A list may be as large as the memory of a router: only a piece of it is read at a time.
    """
    try:
        with open(path, "rb") as file, open(other, "rb") as other_file:
            while piece := file.read(PIECE):
                if other_file.read(PIECE) != piece:
                    return False
            return not other_file.read(1)
    except FileNotFoundError:
        return False
