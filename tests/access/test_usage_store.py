"""The file of usage: what is stored, damaged files, full disks, two processes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Callable, Iterator

import pytest

from netproxy.access.accounts.usage_file import DAMAGED_FILES
from netproxy.access.accounts.usage_store import AMOUNT_LIMIT, Usage, UsageStore
from netproxy.errors import ConfigError
from tests.support.handlers import RecordingLog
from tests.support.usage import DAY, MONTH, PREPARE, ROOT, rows, total_of

ALICE = {"alice": Usage(10, 200)}
NOTHING = Usage(0, 0)


@pytest.fixture
def log() -> RecordingLog:
    return RecordingLog()


@pytest.fixture
def store(tmp_path: Path, log: RecordingLog) -> Iterator[UsageStore]:
    with closing(UsageStore(str(tmp_path), log)) as store:
        yield store


def file_of(folder: Path) -> Path:
    return folder / "usage.sqlite"


def damaged(folder: Path) -> list[Path]:
    """Return the files that were moved aside, without what SQLite keeps beside them."""
    paths = folder.glob("usage.sqlite.corrupt-*")
    return sorted(path for path in paths if not path.name.endswith(("-wal", "-shm")))


class TestAmounts:
    def test_amounts_add_up_by_day_month_and_total(self, store: UsageStore) -> None:
        assert store.add("2026-10-31", "2026-10", ALICE)
        assert store.add("2026-11-28", "2026-11", ALICE)
        assert store.add(DAY, MONTH, {**ALICE, "bob": Usage(1, 0)})
        assert store.add(DAY, MONTH, {"alice": Usage(1, 1)})
        assert store.load(DAY, MONTH) == {
            "alice": (Usage(11, 201), Usage(21, 401), Usage(31, 601)),
            "bob": (Usage(1, 0), Usage(1, 0), Usage(1, 0)),
        }
        assert store.load("2026-12-01", "2026-12")["bob"] == (NOTHING, NOTHING, Usage(1, 0))

    def test_amounts_are_there_after_a_restart(self, tmp_path: Path, log: RecordingLog) -> None:
        for _ in range(2):
            with closing(UsageStore(str(tmp_path), log)) as store:
                assert store.add(DAY, MONTH, ALICE)
        assert total_of(tmp_path) == (20, 400)
        assert log.lines == []

    def test_no_amounts_are_stored_without_a_fault(self, store: UsageStore) -> None:
        assert store.add(DAY, MONTH, {})
        assert store.load(DAY, MONTH) == {}

    @pytest.mark.parametrize("user", ["", "b\u00fcrste", "a\0b", "'; --", "\udc80", "\ud800"])
    def test_any_name_is_kept(self, store: UsageStore, user: str) -> None:
        assert store.add(DAY, MONTH, {user: Usage(1, 2)})
        assert store.load(DAY, MONTH) == {user: (Usage(1, 2),) * 3}

    def test_amounts_never_exceed_64_bits(self, store: UsageStore) -> None:
        for _ in range(3):
            assert store.add(DAY, MONTH, {"alice": Usage(1 << 70, AMOUNT_LIMIT - 1)})
        assert store.load(DAY, MONTH)["alice"][2] == (AMOUNT_LIMIT, AMOUNT_LIMIT)

    def test_closed_store_takes_nothing(self, store: UsageStore) -> None:
        store.close()
        assert not store.add(DAY, MONTH, ALICE)
        with pytest.raises(ConfigError, match="is closed"):
            store.load(DAY, MONTH)


class TestOldPeriods:
    def test_days_older_than_62_and_months_older_than_25_are_deleted(
        self, tmp_path: Path, log: RecordingLog
    ) -> None:
        days = ["2024-09-30", "2024-10-31", "2026-09-27", "2026-09-28", "2026-11-29"]
        with closing(UsageStore(str(tmp_path), log)) as store:
            for day in (*days, "2026-11-30"):
                assert store.add(day, day[:7], ALICE)
        kept = ["", "2024-10", "2026-09", "2026-09-28", "2026-11", "2026-11-29", "2026-11-30"]
        assert sorted(row[0] for row in rows(file_of(tmp_path))) == kept

    def test_clock_that_is_wrong_for_a_moment_deletes_nothing(
        self, tmp_path: Path, log: RecordingLog
    ) -> None:
        with closing(UsageStore(str(tmp_path), log)) as store:
            for day in (DAY, "2099-01-01", "1970-01-01", DAY, "2026-11-30"):
                assert store.add(day, day[:7], ALICE)
            assert store.load(DAY, MONTH)["alice"] == (
                Usage(20, 400),
                Usage(30, 600),
                Usage(50, 1000),
            )


class TestFile:
    def test_only_the_owner_may_read_the_files(self, store: UsageStore, tmp_path: Path) -> None:
        store.add(DAY, MONTH, ALICE)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        assert modes == dict.fromkeys(["usage.lock", "usage.sqlite", "usage.sqlite-wal"], 0o600)

    def test_commits_wait_for_the_disk(self, store: UsageStore) -> None:
        settings = ("journal_mode", "synchronous", "journal_size_limit", "busy_timeout")
        database = store._file.database()
        values = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in settings]
        assert values == ["wal", 2, 1 << 20, 2000]

    def test_write_ahead_log_is_bounded(self, store: UsageStore, tmp_path: Path) -> None:
        users = {f"user {number}": Usage(1, 1) for number in range(2000)}
        for _ in range(20):
            assert store.add(DAY, MONTH, users)
        assert (tmp_path / "usage.sqlite-wal").stat().st_size < 4 << 20

    def test_file_of_a_newer_version_is_refused(self, tmp_path: Path, log: RecordingLog) -> None:
        UsageStore(str(tmp_path), log).close()
        with closing(sqlite3.connect(file_of(tmp_path))) as database:
            database.execute("PRAGMA user_version = 2")
        with pytest.raises(ConfigError) as raised:
            UsageStore(str(tmp_path), log)
        assert str(raised.value) == (
            f"{tmp_path}/usage.sqlite has version 2, and this netproxyd knows 1: "
            "update netproxyd, or move the file away"
        )
        assert not damaged(tmp_path)

    def test_missing_folder_is_refused(self, tmp_path: Path, log: RecordingLog) -> None:
        with pytest.raises(ConfigError, match="/none is not a folder: make it"):
            UsageStore(f"{tmp_path}/none", log)

    def test_folder_that_is_not_writable_is_refused(
        self, tmp_path: Path, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(ConfigError, match="is not writable: give it to the daemon's user"):
            UsageStore(str(tmp_path), log)

    def test_folder_with_the_name_of_the_file_is_refused(
        self, tmp_path: Path, log: RecordingLog
    ) -> None:
        file_of(tmp_path).mkdir()
        with pytest.raises(ConfigError, match="usage.sqlite: Is a directory"):
            UsageStore(str(tmp_path), log)

    def test_second_process_is_refused(self, store: UsageStore, tmp_path: Path) -> None:
        error = (
            f"the folder {tmp_path} is used by another netproxyd: "
            "give each daemon a folder of its own"
        )
        done = subprocess.run(
            [sys.executable, "-c", PREPARE + "UsageStore(sys.argv[1], log)", str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert done.stderr.splitlines()[-1] == f"netproxy.errors.ConfigError: {error}"
        with pytest.raises(ConfigError) as raised:
            UsageStore(str(tmp_path), RecordingLog())
        assert str(raised.value) == error
        assert store.add(DAY, MONTH, ALICE)

    def test_program_that_reads_the_file_is_an_error_and_no_damage(
        self, tmp_path: Path, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        UsageStore(str(tmp_path), log).close()
        settings = ("PRAGMA busy_timeout = 1",)
        monkeypatch.setattr("netproxy.access.accounts.usage_file._FIRST_SETTINGS", settings)
        with closing(sqlite3.connect(file_of(tmp_path), isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            with closing(UsageStore(str(tmp_path), log)) as store:
                assert not store.add(DAY, MONTH, ALICE)
            database.execute("ROLLBACK")
        assert "database is locked" in log.lines[0] and not damaged(tmp_path)


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 64)


def _wrong_header(path: Path) -> None:
    path.write_bytes(b"SQLite format 4\0" + path.read_bytes()[16:])


def _short(path: Path) -> None:
    os.truncate(path, 50)


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def _other_program(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE other (number INTEGER)")


def _damaged_index(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8192 : 8192 + 512] = b"\xff" * 512
    path.write_bytes(content)


DAMAGES = [_garbage, _wrong_header, _short, _truncated, _other_program, _damaged_index]


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__[1:])
    def test_damaged_file_is_moved_aside(
        self, tmp_path: Path, log: RecordingLog, damage: Callable[[Path], None]
    ) -> None:
        """Hazard 146."""
        users = {f"user {number}": Usage(1, 1) for number in range(2000)}
        with closing(UsageStore(str(tmp_path), log)) as store:
            assert store.add(DAY, MONTH, users)
        damage(file_of(tmp_path))
        content = file_of(tmp_path).read_bytes()
        with closing(UsageStore(str(tmp_path), log)) as store:
            assert store.load(DAY, MONTH) == {}
            assert store.add(DAY, MONTH, ALICE)
        (moved,) = damaged(tmp_path)
        assert moved.read_bytes() == content
        (line,) = log.lines
        assert line.startswith(f"{file_of(tmp_path)} is damaged (") and str(moved) in line
        with closing(UsageStore(str(tmp_path), log)) as store:
            assert store.load(DAY, MONTH) == {"alice": (Usage(10, 200),) * 3}

    def test_write_ahead_log_is_moved_with_its_file(
        self, tmp_path: Path, log: RecordingLog
    ) -> None:
        for end in ("", "-wal", "-shm"):
            (tmp_path / f"usage.sqlite{end}").write_bytes(b"x" * 1000)
        UsageStore(str(tmp_path), log).close()
        (moved,) = damaged(tmp_path)
        contents = {Path(f"{moved}{end}").read_bytes() for end in ("", "-wal", "-shm")}
        assert contents == {b"x" * 1000} and len(log.lines) == 1

    def test_damaged_files_do_not_overwrite_each_other(
        self, tmp_path: Path, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("time.strftime", lambda form: "20261129-120000")
        for number in range(DAMAGED_FILES):
            file_of(tmp_path).write_text(f"damaged {number}")
            UsageStore(str(tmp_path), log).close()
        texts = {path.read_text() for path in damaged(tmp_path)}
        assert texts == {f"damaged {number}" for number in range(DAMAGED_FILES)}

    def test_number_of_damaged_files_is_bounded(self, tmp_path: Path, log: RecordingLog) -> None:
        for number in range(20):
            (tmp_path / f"usage.sqlite.corrupt-20250101-0000{number:02}").touch()
        file_of(tmp_path).write_text("damaged")
        UsageStore(str(tmp_path), log).close()
        paths = damaged(tmp_path)
        assert len(paths) == DAMAGED_FILES and paths[-1].read_text() == "damaged"

    @pytest.mark.parametrize("load", [True, False])
    def test_damage_while_the_file_is_open_is_found(
        self, tmp_path: Path, log: RecordingLog, load: bool
    ) -> None:
        """Hazard 146."""
        users = {f"user {number}": Usage(1, 1) for number in range(20000)}
        with closing(UsageStore(str(tmp_path), log)) as store:
            assert store.add(DAY, MONTH, users)
            store._file.database().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            size = file_of(tmp_path).stat().st_size
            with open(file_of(tmp_path), "r+b") as file:
                file.seek(4096)
                file.write(b"\xff" * (size - 4096))
            if load:
                assert store.load(DAY, MONTH) == {}
            assert store.add(DAY, MONTH, {**users, **ALICE})
            assert store.load(DAY, MONTH)["alice"] == (Usage(10, 200),) * 3
        assert len(damaged(tmp_path)) == 1 and len(log.lines) == 1


class TestDisk:
    def test_copy_between_two_commits_opens(
        self, store: UsageStore, tmp_path: Path, log: RecordingLog
    ) -> None:
        """Power fails between two commits: all that is on the disk is what was synced."""
        for number in range(1, 6):
            assert store.add(DAY, MONTH, ALICE)
            copy = tmp_path / f"copy {number}"
            copy.mkdir()
            for path in tmp_path.glob("usage.sqlite*"):
                shutil.copy(path, copy)
            assert total_of(copy) == (10 * number, 200 * number)

    def test_commit_that_power_loss_cut_short_is_left_out(
        self, store: UsageStore, tmp_path: Path
    ) -> None:
        assert store.add(DAY, MONTH, ALICE)
        before = (tmp_path / "usage.sqlite-wal").stat().st_size
        assert store.add(DAY, MONTH, ALICE)
        wal = (tmp_path / "usage.sqlite-wal").read_bytes()
        for cut in (1, 100, len(wal) - before - 1):
            copy = tmp_path / f"copy {cut}"
            copy.mkdir()
            shutil.copy(file_of(tmp_path), copy)
            (copy / "usage.sqlite-wal").write_bytes(wal[:-cut])
            assert total_of(copy) == (10, 200)

    def test_folder_that_disappears_is_noticed(
        self, store: UsageStore, tmp_path: Path, log: RecordingLog
    ) -> None:
        assert store.add(DAY, MONTH, ALICE)
        folder = tmp_path.rename(tmp_path.with_name("elsewhere"))
        assert not store.add(DAY, MONTH, ALICE)
        assert not store.add(DAY, MONTH, ALICE)
        assert log.lines == [
            f"{tmp_path}/usage.sqlite was removed or replaced: opened again",
            "usage of users is not stored, and is kept in memory: "
            f"{tmp_path}/usage.sqlite: {tmp_path} is not a folder: make it, for the daemon's user",
        ]
        tmp_path.mkdir()
        assert store.add(DAY, MONTH, {"alice": Usage(1, 1)})
        assert store.load(DAY, MONTH)["alice"][2] == (1, 1)
        assert total_of(folder) == (10, 200)

    def test_file_that_is_removed_is_begun_anew(self, store: UsageStore, tmp_path: Path) -> None:
        assert store.add(DAY, MONTH, ALICE)
        for path in tmp_path.glob("usage.sqlite*"):
            path.unlink()
        assert store.add(DAY, MONTH, {"alice": Usage(1, 1)})
        store.close()
        assert total_of(tmp_path) == (1, 1)

    def test_write_beyond_a_limit_stores_nothing_and_is_tried_again(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", PREPARE + FULL, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert total_of(tmp_path, "user 7") == (2, 2)

    def test_full_disk_stores_nothing_and_is_tried_again(self, tmp_path: Path) -> None:
        if os.geteuid() != 0 or not shutil.which("unshare"):
            pytest.skip("only root can mount")
        script = 'mount -t tmpfs -o size=700k none "$1" && exec "$2" -c "$3" "$1"'
        command = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable]
        done = subprocess.run(
            [*command, PREPARE + FULL_TMPFS], capture_output=True, text=True, cwd=ROOT, timeout=60
        )
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip("this container does not allow a mount")
        assert (done.returncode, done.stderr) == (0, "")


FULL = """
import resource
users = {f"user {number}": Usage(1, 1) for number in range(3000)}
store = UsageStore(sys.argv[1], log)
assert store.add(DAY, MONTH, users)
resource.setrlimit(resource.RLIMIT_FSIZE, (300000, resource.RLIM_INFINITY))
for _ in range(3):
    assert not store.add(DAY, MONTH, users)
assert store.load(DAY, MONTH)["user 7"] == (Usage(1, 1),) * 3
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert store.add(DAY, MONTH, users)
assert store.load(DAY, MONTH)["user 7"] == (Usage(2, 2),) * 3
assert len(log.lines) == 1, log.lines
store.close()
"""
FULL_TMPFS = """
import os
users = {f"user {number}": Usage(1, 1) for number in range(200)}
store = UsageStore(sys.argv[1], log)
assert store.add(DAY, MONTH, users)
with open(os.path.join(sys.argv[1], "filler"), "wb", 0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
added = 1
while store.add(DAY, MONTH, users):
    added += 1
assert not store.add(DAY, MONTH, users)
assert store.load(DAY, MONTH)["user 7"] == (Usage(added, added),) * 3
os.unlink(os.path.join(sys.argv[1], "filler"))
assert store.add(DAY, MONTH, users)
assert store.load(DAY, MONTH)["user 7"] == (Usage(added + 1, added + 1),) * 3
assert len(log.lines) == 1, log.lines
store.close()
"""
