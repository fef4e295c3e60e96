"""Keeps what users have moved in one SQLite file, `usage.sqlite` in the folder of `state`.

Everything that add() has stored survives kill -9 and power loss (usage_file).
Imports sqlite3, which costs memory: import this module late.

Threads: any, but one at a time uses the file, which a lock ensures.  Every method waits for
the disk: never call one while another lock is held.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import suppress

from netproxy.access.accounts.usage import Usage as Usage
from netproxy.access.accounts.usage_file import DamagedError, UsageFile, is_damage
from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log

AMOUNT_LIMIT = (1 << 62) - 1
"""Bytes: the sum of two amounts is still a 64-bit integer, which SQLite needs."""

_ADD = f"""
INSERT INTO usage VALUES (?, ?, ?, ?) ON CONFLICT (period, user) DO UPDATE SET
    up = min(up + excluded.up, {AMOUNT_LIMIT}), down = min(down + excluded.down, {AMOUNT_LIMIT})
"""
# The age counts from the last day before the new one: a clock that is wrong for a moment
# deletes nothing.
_DELETE_OLD = """
WITH last (day) AS (SELECT max(period) FROM usage WHERE length(period) = 10 AND period < ?)
DELETE FROM usage WHERE
    length(period) = 10 AND period < (SELECT date(day, '-62 days') FROM last)
    OR length(period) = 7
    AND period < (SELECT strftime('%Y-%m', substr(day, 1, 7) || '-01', '-25 months') FROM last)
"""


class UsageStore:
    """Keeps what users have moved in one SQLite file.

    Days older than 62 and months older than 25 are deleted when a new day is stored.
    """

    def __init__(self, folder: str, log: Log) -> None:
        """Open the file, and make it if it is not there.

        Raises ConfigError if the folder or the file cannot be used, or if another process
        uses it.
        """
        self.folder = folder
        self._log = log
        # Guards _file, _closed and what is in the file.
        self._lock = threading.Lock()
        self._file = UsageFile(folder, log)
        self._closed = False
        self._file.open()

    def load(self, day: str, month: str) -> dict[str, tuple[Usage, Usage, Usage]]:
        """Return by user what was moved on that day, in that month, and in total.

        Raises ConfigError if the file cannot be read.
        """
        index = {day: 0, month: 1, "": 2}
        loaded: dict[str, list[Usage]] = {}
        with self._lock:
            rows = self._rows(tuple(index))
        for period, user, up, down in rows:
            usages = loaded.setdefault(user.decode("utf-8", "surrogatepass"), [Usage(0, 0)] * 3)
            usages[index[period]] = Usage(up, down)
        return {user: (usages[0], usages[1], usages[2]) for user, usages in loaded.items()}

    def add(self, day: str, month: str, moved: Mapping[str, Usage]) -> bool:
        """Add amounts to that day, that month and the total; return whether they are stored.

        All of them are stored or none.  Raises nothing: a failure is logged once a minute.
        """
        rows = [
            (period, _encode(user), min(usage.up, AMOUNT_LIMIT), min(usage.down, AMOUNT_LIMIT))
            for period in (day, month, "")
            for user, usage in moved.items()
        ]
        with self._lock:
            if self._closed:
                return False
            try:
                try:
                    self._add(day, rows)
                except DamagedError as error:
                    self._file.replace(str(error))
                    self._add(day, rows)
            except (sqlite3.Error, ConfigError, DamagedError, MemoryError) as error:
                message = "usage of users is not stored, and is kept in memory: %s: %s"
                self._log.limited(("usage", "add"), message, self._file.path, error)
                return False
        return True

    def close(self) -> None:
        """Close the file.  add() stores nothing from now on."""
        with self._lock:
            self._closed = True
            self._file.close()

    # -- below, the caller holds the lock

    def _rows(self, periods: tuple[str, ...]) -> list[tuple[str, bytes, int, int]]:
        if self._closed:
            raise ConfigError(f"{self._file.path} is closed")
        try:
            query = "SELECT period, user, up, down FROM usage WHERE period IN (?, ?, ?)"
            return self._file.database().execute(query, periods).fetchall()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise ConfigError(f"cannot read {self._file.path}: {error}") from error
            self._file.replace(str(error))
        return []

    def _add(self, day: str, rows: list[tuple[str, bytes, int, int]]) -> None:
        """Raises DamagedError, sqlite3.Error or ConfigError."""
        database = self._file.database()
        try:
            database.execute("BEGIN IMMEDIATE")
            known = database.execute("SELECT 1 FROM usage WHERE period = ? LIMIT 1", (day,))
            if known.fetchone() is None:
                database.execute(_DELETE_OLD, (day,))
            database.executemany(_ADD, rows)
            database.execute("COMMIT")
        except sqlite3.Error as error:
            if is_damage(error):
                raise DamagedError(str(error)) from error
            raise
        finally:
            if database.in_transaction:
                with suppress(sqlite3.Error):
                    database.execute("ROLLBACK")


def _encode(user: str) -> bytes:
    return user.encode("utf-8", "surrogatepass")
