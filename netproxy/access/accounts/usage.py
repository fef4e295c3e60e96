"""Counts what users have moved: today, this month, in total; saves it at an interval.

A day and a month are those of the system's time zone.  What is not saved yet is kept by its
day, so that neither midnight nor a clock that is set back loses bytes or counts them twice.
The file is usage_store's.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from itertools import pairwise

from netproxy.errors import ConfigError
from netproxy.typed import (
    TYPE_CHECKING,
    Callable,
    Collection,
    Mapping,
    NamedTuple,
    Sequence,
    TypeVar,
)

if TYPE_CHECKING:
    from netproxy.access.accounts.usage_store import UsageStore

SAVE_SECONDS = 10.0
"""Between two times of saving: what kill -9 can cost at most."""
USERS_LIMIT = 65536
"""Names, of some 400 bytes each: an external check of logins may accept any name.  Those of the
configuration always have room."""
OTHERS = "\0"
"""Stands for all users beyond USERS_LIMIT; no user has this name."""
DAYS_LIMIT = 8
"""Days with unsaved amounts.  There are more than two only if saving fails for days."""
QUARTER = 900
"""Seconds: every time zone has its midnight, and changes its offset, at a quarter of an hour."""


class Usage(NamedTuple):
    """Bytes that a user has moved."""

    up: int
    """Client to target."""
    down: int


Quotas = Sequence[int | None]
"""Bytes of a day, of a month and in total, both directions together.  None: no limit."""
_NOTHING = Usage(0, 0)
_Sums = TypeVar("_Sums")


class _Date(NamedTuple):
    day: str
    """ "2026-11-29"."""
    month: str
    """ "2026-11"."""


_Amounts = dict[str, list[int]]
"""By user: bytes up and down.  Lists, because moved() changes them for every transfer."""


class UsageBook:
    """Counts what users have moved.  Methods may be called on any thread."""

    def __init__(self, store: UsageStore | None, clock: Callable[[], float] = time.time) -> None:
        """Load what `store` has; None to keep everything in memory.

        `clock` returns seconds since the epoch.  Raises ConfigError if the store cannot be read.
        """
        self._clock = clock
        # Serializes save(), which alone waits for it; held while the store waits for the disk.
        self._saving = threading.Lock()
        self._saved_at = 0.0
        """When save() was called last, monotonic seconds."""
        # Guards everything below.
        self._lock = threading.Lock()
        self._store = store
        self._must_load = False
        """True if the store may have more of today, this month or the total than _stored."""
        self._quarter = -1
        """The quarter of an hour for which _today is right, counted from the epoch."""
        self._today = _Date("", "")
        self._names: set[str] = set()
        self._stored: tuple[_Amounts, _Amounts, _Amounts] = ({}, {}, {})
        """What is in a store: today, this month, in total."""
        self._unsaved: dict[_Date, _Amounts] = {}
        self._current: _Amounts = {}
        """Those of _unsaved that are of today."""
        self._turn()
        if store is not None:
            self._take(store.load(*self._today))
            self._must_load = False

    def moved(self, user: str, up: int, down: int) -> None:
        """Add bytes that a user has moved now."""
        with self._lock:
            self._turn()
            amounts = self._current.get(user)
            if amounts is None:
                _add(self._current, self._admit(user), up, down)
            else:
                amounts[0] += up
                amounts[1] += down

    def reserve(self, users: Collection[str]) -> None:
        """Count these users, those of the configuration, whatever other names there are.

        Call it before set_store(): a store may have more names than there is room for.
        """
        with self._lock:
            had_room = len(self._names) < USERS_LIMIT
            if not (had_room or self._names.issuperset(users)):
                # What the store has of them was left out.
                self._must_load = True
            self._names.update(users)

    def of(self, user: str) -> tuple[Usage, Usage, Usage]:
        """Return what a user has moved today, this month and in total, unsaved amounts included.

        A user beyond USERS_LIMIT has moved nothing.
        """
        with self._lock:
            self._turn()
            return self._of(user)

    def used_up(self, user: str, quotas: Quotas) -> bool:
        """Return whether a quota of a user is used up (interfaces.accounts.UserUsage)."""
        for quota, usage in zip(quotas, self.of(user), strict=True):
            if quota is not None and usage.up + usage.down >= quota:
                return True
        return False

    def left(self, quotas: Mapping[str, Quotas]) -> dict[str, int]:
        """Return how many bytes users have left until the first of their quotas is used up."""
        with self._lock:
            self._turn()
            return {user: _left(limits, self._of(user)) for user, limits in quotas.items()}

    def set_store(self, store: UsageStore | None) -> None:
        """Save to another store from now on; what was counted before stays.

        The next save() loads what the new store has.  If both have counted the same period,
        the larger amount counts.
        """
        with self._lock:
            if store is not self._store:
                self._store = store
                self._must_load = True

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Return a call of save() every SAVE_SECONDS (interfaces.services.Expirable)."""
        return (partial(self.save, now),) if self.is_due(now) else ()

    def is_due(self, now: float) -> bool:
        """Return whether it is time to save; `now`: monotonic seconds."""
        return now - self._saved_at >= SAVE_SECONDS

    def save(self, now: float) -> None:
        """Store what is not saved yet; what cannot be stored is kept.

        `now`: monotonic seconds.  Thread: the janitor, and main when the daemon stops.  Waits
        for the disk, but no other method waits meanwhile.
        """
        with self._saving:
            self._saved_at = now
            with self._lock:
                self._turn()
                store, today, must_load = self._store, self._today, self._must_load
                batches = [
                    (date, {user: Usage(*usage) for user, usage in amounts.items()})
                    for date, amounts in self._unsaved.items()
                ]
            if store is None:
                batches = []
            for date, amounts in batches:
                if store is None or amounts and not store.add(date.day, date.month, amounts):
                    break
                self._settle(date, amounts)
            if store is not None and must_load:
                self._load(store, today)
            with self._lock:
                self._merge_days()

    # -- parts of save(); the caller holds _saving

    def _settle(self, date: _Date, saved: Mapping[str, Usage]) -> None:
        """Count amounts of a day as stored."""
        with self._lock:
            unsaved = self._unsaved[date]
            periods = self._periods(date, *self._stored)
            for user, usage in saved.items():
                left = unsaved[user]
                left[0] -= usage.up
                left[1] -= usage.down
                if not any(left):
                    del unsaved[user]
                for amounts in periods:
                    _add(amounts, user, *usage)
            if not unsaved and date != self._today:
                del self._unsaved[date]

    def _load(self, store: UsageStore, today: _Date) -> None:
        try:
            loaded = store.load(*today)
        except ConfigError:
            # The next save() tries again.
            return
        with self._lock:
            if self._today == today and self._store is store:
                self._must_load = False
                self._take(loaded)

    # -- below, the caller holds _lock

    def _of(self, user: str) -> tuple[Usage, Usage, Usage]:
        """Return what a user has moved, see of()."""
        day, month, total = (list(stored.get(user, _NOTHING)) for stored in self._stored)
        for date, amounts in self._unsaved.items():
            up, down = amounts.get(user, _NOTHING)
            for sums in self._periods(date, day, month, total):
                sums[0] += up
                sums[1] += down
        return Usage(*day), Usage(*month), Usage(*total)

    def _turn(self) -> None:
        """Begin a new day if the clock says so."""
        now = self._clock()
        quarter = int(now // QUARTER)
        if quarter == self._quarter:
            return
        self._quarter = quarter
        local = time.localtime(now)
        today = _Date(time.strftime("%Y-%m-%d", local), time.strftime("%Y-%m", local))
        if today == self._today:
            return
        self._stored[0].clear()
        if today.month != self._today.month:
            self._stored[1].clear()
        self._today = today
        self._current = self._unsaved.setdefault(today, {})
        # A clock that was set back returns to a day that the store knows.
        self._must_load = True

    def _take(self, loaded: Mapping[str, tuple[Usage, Usage, Usage]]) -> None:
        """Take over what a store has."""
        for user, usages in loaded.items():
            if self._admit(user) != user:
                continue
            for stored, usage in zip(self._stored, usages, strict=True):
                up, down = stored.get(user, _NOTHING)
                if usage != _NOTHING:
                    stored[user] = [max(up, usage.up), max(down, usage.down)]

    def _periods(self, date: _Date, day: _Sums, month: _Sums, total: _Sums) -> list[_Sums]:
        """Return the sums, of today, this month and in total, to which bytes of a date belong."""
        if date == self._today:
            return [day, month, total]
        return [month, total] if date.month == self._today.month else [total]

    def _admit(self, user: str) -> str:
        """Return the name under which a user counts; the first to come have room, see reserve()."""
        if user in self._names or user == OTHERS:
            return user
        if len(self._names) >= USERS_LIMIT:
            return OTHERS
        self._names.add(user)
        return user

    def _merge_days(self) -> None:
        """Put unsaved amounts of past days together, first within a month, until they are few."""
        while len(self._unsaved) > DAYS_LIMIT:
            past = sorted(date for date in self._unsaved if date != self._today)
            pairs = list(pairwise(past))
            same_month = (pair for pair in pairs if pair[0].month == pair[1].month)
            earlier, later = next(same_month, pairs[0])
            for user, (up, down) in self._unsaved.pop(earlier).items():
                _add(self._unsaved[later], user, up, down)


def _add(amounts: _Amounts, user: str, up: int, down: int) -> None:
    known = amounts.setdefault(user, [0, 0])
    known[0] += up
    known[1] += down


def _left(quotas: Quotas, usages: Sequence[Usage]) -> int:
    """Return the bytes until the first quota is used up, of which there is one."""
    pairs = zip(quotas, usages, strict=True)
    return min(quota - usage.up - usage.down for quota, usage in pairs if quota is not None)
