"""Opens the SQLite file of usage_store: settings, schema, the lock, and damaged files.

A damaged file is moved aside and a new one is begun.  A file lock keeps a second process out.
Imports sqlite3, which costs memory: import this module late.  Not thread-safe: UsageStore has
the lock.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from contextlib import suppress

from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.services import Log

FILE, LOCK_FILE = "usage.sqlite", "usage.lock"
SIDE_FILES = ("-wal", "-shm")
"""What SQLite keeps beside a file, by the end of the name."""
VERSION = 1
"""Of the schema, in the header of the file."""
BUSY_MILLISECONDS = 2000
"""How long another program that reads the file is waited for."""
WAL_PAGES, WAL_BYTES = 256, 1 << 20
"""The write-ahead log is copied into the file from 256 pages of 4 KiB on, and cut to 1 MiB."""
CACHE_KIB = 512
"""Memory of SQLite's page cache: the rows of an interval are few and stand together."""
DAMAGED_FILES = 8
"""Damaged files that are kept: a disk that fails must not fill up with them."""

_FIRST_SETTINGS = (
    # Without shared memory: no -shm file, and no reader that makes the write-ahead log grow.
    "PRAGMA locking_mode = EXCLUSIVE",
    f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}",
    f"PRAGMA cache_size = -{CACHE_KIB}",
)
# They change the file, which must be one of ours.
_SETTINGS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    f"PRAGMA wal_autocheckpoint = {WAL_PAGES}",
    f"PRAGMA journal_size_limit = {WAL_BYTES}",
)
# `period` is "2026-11-29", "2026-11" or "" for the total.  `user` is a blob of UTF-8: names
# that are not valid Unicode are kept as well.
_SCHEMA = """
CREATE TABLE usage (
    period TEXT NOT NULL, user BLOB NOT NULL, up INTEGER NOT NULL, down INTEGER NOT NULL,
    PRIMARY KEY (period, user)
) WITHOUT ROWID
"""


class DamagedError(Exception):
    """The file is not a database of netproxyd, or a part of it is damaged."""


class UsageFile:
    """The open file `usage.sqlite` of a folder."""

    def __init__(self, folder: str, log: Log) -> None:
        """Name the folder; open() opens the file."""
        self.path = os.path.join(folder, FILE)
        self._folder = folder
        self._log = log
        self._database: sqlite3.Connection | None = None
        self._inode = (0, 0)
        """The device and the inode number of the open file."""
        self._lock_descriptor = -1

    def database(self) -> sqlite3.Connection:
        """Return the connection; open the file if it is not open.  Raises ConfigError."""
        if self._database is not None and not self._is_in_place():
            # What is written to a file without a name would be lost.
            self._log.warning("%s was removed or replaced: opened again", self.path)
            self.close()
        if self._database is None:
            self.open()
        assert self._database is not None
        return self._database

    def open(self) -> None:
        """Open the file, make it if it is not there, replace it if it is damaged.

        Raises ConfigError if that fails, or if another process uses the folder.
        """
        check_folder(self._folder)
        try:
            self._take_lock()
            try:
                self._open()
            except DamagedError as error:
                self._move_aside(str(error))
                self._open()
        except (sqlite3.Error, OSError, DamagedError) as error:
            self.close()
            text = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"cannot use {self.path}: {text}") from error
        except ConfigError:
            self.close()
            raise

    def replace(self, damage: str) -> None:
        """Move the damaged file aside and open a new one.  Raises ConfigError."""
        try:
            self._move_aside(damage)
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot move {self.path}: {error.strerror}") from error
        self.open()

    def close(self) -> None:
        """Close the file; another process may open it from now on."""
        self._close_database()
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1

    def _is_in_place(self) -> bool:
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    # -- opening

    def _take_lock(self) -> None:
        if self._lock_descriptor < 0:
            path = os.path.join(self._folder, LOCK_FILE)
            self._lock_descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "is used by another netproxyd: give each daemon a folder of its own"
            raise ConfigError(f"the folder {self._folder} {message}") from None

    def _open(self) -> None:
        """Raises DamagedError, sqlite3.Error, OSError or ConfigError."""
        # SQLite gives its side files the mode of the file.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        status = os.fstat(descriptor)
        os.close(descriptor)
        self._inode = (status.st_dev, status.st_ino)
        _sync_folder(self._folder)
        # Without isolation_level the module sqlite3 begins no transactions by itself.
        self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            for setting in _FIRST_SETTINGS:
                self._database.execute(setting)
            is_new = self._is_new(self._database)
            for setting in _SETTINGS:
                self._database.execute(setting)
            if is_new:
                _make_schema(self._database)
            findings = self._database.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.Error as error:
            if is_damage(error):
                raise DamagedError(str(error)) from error
            raise
        if findings != "ok":
            # The lines before the last one name the table.
            raise DamagedError(findings.splitlines()[-1])

    def _is_new(self, database: sqlite3.Connection) -> bool:
        """Return whether a file is empty.  Raises DamagedError or ConfigError if not ours."""
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version > VERSION:
            what = f"has version {version}, and this netproxyd knows {VERSION}"
            raise ConfigError(f"{self.path} {what}: update netproxyd, or move the file away")
        if (version == VERSION) != bool(tables):
            raise DamagedError("not a file of netproxyd")
        return not tables

    def _close_database(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    # -- damaged files

    def _move_aside(self, damage: str) -> None:
        aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
        name, number = aside, 1
        while os.path.lexists(name):
            number += 1
            name = f"{aside}-{number}"
        # The file is the last: if the move is cut short, the file is still damaged, and is
        # moved at the next start.
        for end in (*SIDE_FILES, ""):
            with suppress(FileNotFoundError):
                os.rename(self.path + end, name + end)
        # Not earlier: SQLite removes the write-ahead log of a file that it closes, by its name.
        self._close_database()
        _sync_folder(self._folder)
        message = "%s is damaged (%s): moved to %s, usage of users is counted from 0"
        self._log.error(message, self.path, damage, name)
        self._delete_oldest()

    def _delete_oldest(self) -> None:
        """Delete the damaged files that are more than DAMAGED_FILES."""
        names = [name for name in os.listdir(self._folder) if name.startswith(f"{FILE}.corrupt-")]
        files = sorted(name for name in names if not name.endswith(SIDE_FILES))
        for name in files[:-DAMAGED_FILES]:
            for end in ("", *SIDE_FILES):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._folder, name + end))


def check_folder(folder: str) -> None:
    """Raise ConfigError if the file cannot be kept in a folder."""
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} is not a folder: make it, for the daemon's user")
    if not os.access(folder, os.W_OK | os.X_OK):
        message = "is not writable: give it to the daemon's user with chown"
        raise ConfigError(f"the folder {folder} {message}")


def _make_schema(database: sqlite3.Connection) -> None:
    """Make the table in an empty file, wholly or not at all."""
    database.execute("BEGIN IMMEDIATE")
    database.execute(_SCHEMA)
    database.execute(f"PRAGMA user_version = {VERSION}")
    database.execute("COMMIT")


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether SQLite has found the file damaged: SQLITE_CORRUPT or SQLITE_NOTADB.

    Other errors, such as a full disk, have subclasses of DatabaseError.  Python 3.10 does not
    tell the code.
    """
    return type(error) is sqlite3.DatabaseError


def _sync_folder(folder: str) -> None:
    """Make the names in a folder survive power loss.  Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
