"""What users have moved: days and months, clocks that jump, saving that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Iterator, Mapping, cast

import pytest

from netproxy.access.accounts import usage as usage_module
from netproxy.access.accounts.usage import DAYS_LIMIT, OTHERS, SAVE_SECONDS, Usage, UsageBook
from netproxy.access.accounts.usage_store import UsageStore
from netproxy.errors import ConfigError
from tests.support.handlers import RecordingLog
from tests.support.sockets import SECONDS
from tests.support.usage import ROOT

DAY = 86400.0
NOTHING = (Usage(0, 0),) * 3


class Clock:
    """A clock that a test sets, by the local time."""

    def __init__(self, text: str) -> None:
        self.set(text)

    def __call__(self) -> float:
        return self.now

    def set(self, text: str) -> None:
        self.now = time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


class FakeStore:
    """A store in memory that can fail, and that can be held while it stores."""

    def __init__(self) -> None:
        self.works = True
        self.added: list[tuple[str, str, dict[str, Usage]]] = []
        self.entered = threading.Event()
        self.proceed = threading.Event()
        self.proceed.set()

    def load(self, day: str, month: str) -> dict[str, tuple[Usage, Usage, Usage]]:
        if not self.works:
            raise ConfigError("cannot be read")
        return {}

    def add(self, day: str, month: str, moved: Mapping[str, Usage]) -> bool:
        self.entered.set()
        self.proceed.wait(SECONDS)
        if self.works:
            self.added.append((day, month, dict(moved)))
        return self.works

    def as_store(self) -> UsageStore:
        return cast(UsageStore, self)

    def total(self, user: str) -> Usage:
        usages = [moved[user] for _, _, moved in self.added if user in moved]
        return Usage(sum(usage.up for usage in usages), sum(usage.down for usage in usages))


@pytest.fixture
def clock() -> Clock:
    return Clock("2026-11-29 12:00:00")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[UsageStore]:
    with closing(UsageStore(str(tmp_path), RecordingLog())) as store:
        yield store


def ups(book: UsageBook, user: str = "alice") -> tuple[int, ...]:
    """Return the bytes of a user towards targets: today, this month, in total."""
    return tuple(usage.up for usage in book.of(user))


class TestPeriods:
    def test_amounts_add_up_in_both_directions(self, clock: Clock) -> None:
        book = UsageBook(None, clock)
        book.moved("alice", 1, 20)
        book.moved("alice", 2, 30)
        book.moved("bob", 7, 0)
        assert book.of("alice") == (Usage(3, 50),) * 3
        assert (book.of("bob")[0], book.of("eve")) == (Usage(7, 0), NOTHING)

    @pytest.mark.parametrize("saved", [True, False])
    def test_day_begins_at_midnight(self, clock: Clock, store: UsageStore, saved: bool) -> None:
        book = UsageBook(store if saved else None, clock)
        clock.set("2026-11-28 23:59:59")
        book.moved("alice", 1, 0)
        book.save(0)
        clock.set("2026-11-29 00:00:00")
        assert ups(book) == (0, 1, 1)
        book.moved("alice", 2, 0)
        book.save(0)
        assert ups(book) == (2, 3, 3)

    @pytest.mark.parametrize("saved", [True, False])
    def test_month_begins_at_midnight(self, clock: Clock, store: UsageStore, saved: bool) -> None:
        book = UsageBook(store if saved else None, clock)
        clock.set("2026-12-31 23:59:59")
        book.moved("alice", 1, 0)
        book.save(0)
        clock.set("2027-01-01 00:00:00")
        assert ups(book) == (0, 0, 1)
        book.moved("alice", 2, 0)
        book.save(0)
        assert ups(book) == (2, 2, 3)

    def test_amounts_of_yesterday_are_stored_as_yesterdays(
        self, clock: Clock, store: UsageStore
    ) -> None:
        book = UsageBook(store, clock)
        clock.set("2026-11-30 23:59:59")
        book.moved("alice", 1, 0)
        clock.set("2026-12-01 00:00:01")
        book.moved("alice", 2, 0)
        book.save(0)
        assert store.load("2026-11-30", "2026-11")["alice"][:2] == (Usage(1, 0),) * 2
        assert store.load("2026-12-01", "2026-12")["alice"] == (
            Usage(2, 0),
            Usage(2, 0),
            Usage(3, 0),
        )

    @pytest.mark.parametrize("saved", [True, False])
    @pytest.mark.parametrize("other", ["2026-11-28", "2026-10-31", "2027-03-01"])
    def test_clock_that_jumps_and_returns_changes_no_amount(
        self, clock: Clock, store: UsageStore, saved: bool, other: str
    ) -> None:
        """Hazard 148."""
        book = UsageBook(store if saved else None, clock)
        book.moved("alice", 1, 0)
        book.save(0)
        book.moved("alice", 10, 0)
        clock.set(f"{other} 12:00:00")
        assert ups(book)[2] == 11
        book.moved("alice", 100, 0)
        book.save(0)
        assert ups(book) == (100, 111 if other[:7] == "2026-11" else 100, 111)
        clock.set("2026-11-29 12:00:01")
        book.save(0)
        assert ups(book) == (11, 111 if other[:7] == "2026-11" else 11, 111)
        if saved:
            assert UsageBook(store, clock).of("alice") == book.of("alice")

    @pytest.mark.parametrize("zone", ["Europe/Berlin", "Asia/Beirut", "Asia/Kathmandu"])
    def test_days_end_at_midnight_when_clocks_change(self, zone: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", CLOCK_CHANGES],
            env={**os.environ, "TZ": zone},
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")


# Every quarter of an hour moves a byte, through the days on which the clocks change.
CLOCK_CHANGES = """
import time
from netproxy.access.accounts.usage import UsageBook

time.tzset()
now = 0
book = UsageBook(None, lambda: now)
for month, day in (3, 28), (10, 24):
    begin = int(time.mktime((2026, month, day, 12, 0, 0, 0, 0, -1)))
    for now in range(begin, begin + 3 * 86400, 900):
        book.moved("alice", 1, 0)
        date = time.localtime(now)[:3]
        first = now
        while first - 900 >= begin and time.localtime(first - 900)[:3] == date:
            first -= 900
        expected = (now - first) // 900 + 1
        assert book.of("alice")[0].up == expected, (date, expected, book.of("alice"))
assert book.of("alice")[2].up == 2 * 3 * 96
"""


class TestSaving:
    def test_amounts_are_there_after_a_restart(self, clock: Clock, store: UsageStore) -> None:
        book = UsageBook(store, clock)
        book.moved("alice", 1, 2)
        book.save(0)
        book.save(10)
        again = UsageBook(store, clock)
        assert again.of("alice") == book.of("alice") == (Usage(1, 2),) * 3

    def test_nothing_is_stored_twice(self, clock: Clock) -> None:
        store = FakeStore()
        book = UsageBook(store.as_store(), clock)
        book.moved("alice", 1, 2)
        for now in range(3):
            book.save(now)
        assert store.added == [("2026-11-29", "2026-11", {"alice": Usage(1, 2)})]

    def test_amounts_that_are_not_stored_are_stored_later(self, clock: Clock) -> None:
        store = FakeStore()
        book = UsageBook(store.as_store(), clock)
        store.works = False
        book.moved("alice", 1, 2)
        book.save(0)
        book.moved("alice", 10, 20)
        book.save(10)
        assert book.of("alice") == (Usage(11, 22),) * 3
        store.works = True
        book.save(20)
        assert store.added == [("2026-11-29", "2026-11", {"alice": Usage(11, 22)})]
        assert book.of("alice") == (Usage(11, 22),) * 3

    def test_nobody_waits_for_the_disk(self, clock: Clock) -> None:
        store = FakeStore()
        book = UsageBook(store.as_store(), clock)
        book.moved("alice", 1, 0)
        store.proceed.clear()
        thread = threading.Thread(target=book.save, args=(0,), name="test-save")
        thread.start()
        assert store.entered.wait(SECONDS)
        book.moved("alice", 2, 0)
        clock.now += DAY
        book.moved("alice", 4, 0)
        assert ups(book) == (4, 7, 7)
        store.proceed.set()
        thread.join()
        assert ups(book) == (4, 7, 7)
        book.save(10)
        assert [moved["alice"].up for _, _, moved in store.added] == [1, 2, 4]
        assert ups(book) == (4, 7, 7)

    def test_threads_lose_no_byte(self, clock: Clock, store: UsageStore) -> None:
        book = UsageBook(store, clock)

        def move() -> None:
            for _ in range(2000):
                book.moved("alice", 1, 2)

        threads = [threading.Thread(target=move, name=f"test-move-{n}") for n in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            book.save(0)
            clock.now += DAY / 4
        book.save(0)
        assert book.of("alice")[2] == (8000, 16000)
        assert UsageBook(store, clock).of("alice") == book.of("alice")

    def test_save_is_due_at_an_interval(self, clock: Clock) -> None:
        store = FakeStore()
        book = UsageBook(store.as_store(), clock)
        book.moved("alice", 1, 0)
        for call in book.expire(1000.0):
            call()
        assert store.total("alice") == (1, 0)
        assert not book.expire(1000.0 + SAVE_SECONDS - 1)
        assert book.expire(1000.0 + SAVE_SECONDS)

    def test_days_that_cannot_be_stored_are_few_and_complete(self, clock: Clock) -> None:
        store = FakeStore()
        book = UsageBook(store.as_store(), clock)
        store.works = False
        for _ in range(100):
            book.moved("alice", 1, 0)
            book.save(0)
            clock.now += DAY
        assert ups(book)[2] == 100 and ups(book)[0] == 0
        store.works = True
        book.save(0)
        assert len(store.added) <= DAYS_LIMIT and store.total("alice") == (100, 0)
        by_month: dict[str, int] = {}
        for _, month, moved in store.added:
            by_month[month] = by_month.get(month, 0) + moved["alice"].up
        assert by_month == {"2026-11": 2, "2026-12": 31, "2027-01": 31, "2027-02": 28, "2027-03": 8}

    def test_store_that_cannot_be_read_is_an_error_at_the_start(self, clock: Clock) -> None:
        store = FakeStore()
        store.works = False
        with pytest.raises(ConfigError):
            UsageBook(store.as_store(), clock)


class TestReload:
    def test_amounts_stay_when_a_store_comes(self, clock: Clock, store: UsageStore) -> None:
        store.add("2026-11-01", "2026-11", {"alice": Usage(100, 0)})
        book = UsageBook(None, clock)
        book.moved("alice", 1, 0)
        book.set_store(store)
        assert ups(book) == (1, 1, 1)
        book.save(0)
        assert ups(book) == (1, 101, 101)
        assert UsageBook(store, clock).of("alice") == book.of("alice")

    def test_amounts_stay_when_the_store_goes(self, clock: Clock, store: UsageStore) -> None:
        book = UsageBook(store, clock)
        book.moved("alice", 1, 0)
        book.save(0)
        book.set_store(None)
        book.moved("alice", 2, 0)
        book.save(10)
        assert ups(book) == (3, 3, 3)

    def test_same_store_is_not_counted_twice(self, clock: Clock, store: UsageStore) -> None:
        book = UsageBook(store, clock)
        book.moved("alice", 1, 0)
        book.save(0)
        for other in (store, None, store):
            book.set_store(other)
            book.save(10)
        assert ups(book) == (1, 1, 1)

    def test_store_that_cannot_be_read_is_read_later(self, clock: Clock) -> None:
        store = FakeStore()
        store.works = False
        book = UsageBook(None, clock)
        book.moved("alice", 1, 0)
        book.set_store(store.as_store())
        book.save(0)
        store.works = True
        book.save(10)
        assert store.total("alice") == (1, 0) and ups(book) == (1, 1, 1)


class TestLimit:
    def test_users_beyond_the_limit_are_counted_together(
        self, clock: Clock, store: UsageStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(usage_module, "USERS_LIMIT", 3)
        book = UsageBook(store, clock)
        for user in ("alice", "bob", "carol", "dave", "eve", "alice"):
            book.moved(user, 1, 0)
        book.save(0)
        assert [ups(book, user)[0] for user in ("alice", "bob", "carol", "dave")] == [2, 1, 1, 0]
        stored = store.load("2026-11-29", "2026-11")
        assert sorted(stored) == [OTHERS, "alice", "bob", "carol"]
        assert stored[OTHERS][0] == (2, 0)
        again = UsageBook(store, clock)
        assert ups(again, "carol") == (1, 1, 1)
        again.moved("frank", 1, 0)
        again.save(0)
        assert len(store.load("2026-11-29", "2026-11")) == 4

    def test_users_of_the_configuration_count_whatever_names_come_first(
        self, clock: Clock, store: UsageStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        earlier = UsageBook(store, clock)
        for user in ("adam", "abel", "zoe", "yann"):
            earlier.moved(user, 5, 0)
        earlier.save(0)
        monkeypatch.setattr(usage_module, "USERS_LIMIT", 2)
        book = UsageBook(None, clock)
        for user in ("guess 1", "guess 2", "guess 3"):
            book.moved(user, 1, 0)
        book.reserve(["zoe"])
        book.set_store(store)
        book.moved("zoe", 1, 0)
        book.save(0)
        assert ups(book, "zoe") == (6, 6, 6)
        assert ups(book, "guess 3") == ups(book, "adam") == (0, 0, 0)
        book.reserve(["zoe", "yann"])  # a reload, when there is no room any more
        book.moved("yann", 1, 0)
        book.save(10)
        assert ups(book, "zoe") == ups(book, "yann") == (6, 6, 6)
