"""Gives numbers to names, from which their fake addresses are made.

Each process gives the numbers of its own segment (FakeMemory), so that processes share no lock.
A name keeps its number until the number is needed: then the one goes whose last use is longest
ago.  A number that was asked for or used lately counts for the client that did so last, and stays.
If all do, the client with the most numbers loses one that nobody else uses.  That client cannot
use the number until it must have forgotten it: else it would be led to a server that it does not
want.
A process that takes the place of one that has died learns its names from the memory.
Thread: any; nothing here blocks.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict

from netproxy.interfaces.fairness import FairTable
from netproxy.resolver.client_names.fake_memory import FakeMemory, Use, client_tag

KEPT_SECONDS = 120.0
"""How long a number is in use after it was asked for, or a flow went to it.  Clients keep
addresses longer than their TTL: browsers for a minute."""
AGED_AT_ONCE = 32
"""Numbers that one query looks at because their time is over: no client pays for all others."""
TRIES = 64
"""Numbers that one query looks at for one that may be taken."""


class _Given:
    """A number that was given to a name."""

    __slots__ = ("number", "name", "use", "is_held")

    def __init__(self, number: int, name: str, use: Use) -> None:
        self.number = number
        self.name = name
        self.use = use
        """The last one that is known here; flows may have used the number since."""
        self.is_held = False
        """True if it was in use when it was looked at last, and counts for a client."""


class FakeTable:
    """The numbers of names: those of this process are given here, those of all are found."""

    def __init__(self, memory: FakeMemory, index: int) -> None:
        """`index`: that of the worker, 0 if there is one process."""
        self._memory = memory
        self._index = index
        # Guards this worker's rows of the memory.
        self._use_lock = threading.Lock()
        # Guards all below, and the own segment of the memory.
        self._lock = threading.Lock()
        self._limit = 0
        """Numbers of the own segment that have an address."""
        self._by_name: dict[str, _Given] = {}
        # Numbers that nobody has used lately, by name, least recently used first.
        self._old: OrderedDict[str, _Given] = OrderedDict()
        # All others: by client, and each once with the time to look at it again.
        self._held: FairTable[_Given] = FairTable(memory.segment)
        self._due: list[tuple[float, int, _Given]] = []

    def __len__(self) -> int:
        """Return how many names have a number of this process."""
        return len(self._by_name)

    def become_worker(self, index: int) -> None:
        """Be the worker with this index; call it right after the fork."""
        self._index = index
        self._limit = 0

    def name(self, number: int, host: str, now: float) -> str:
        """Return the name of a number that a flow of a client uses, "" if it has none."""
        client = client_tag(host)
        name = self._memory.name(number)
        if not name or self._memory.has_lost(number, client, now):
            return ""
        with self._use_lock:
            self._memory.note_use(self._index, number, client, now)
        return name

    def name_asked(self, number: int, host: str) -> str:
        """Return the name of a number if the client has asked for it, else "".

        That is no use of the number: else a client could keep all of them from new names.
        """
        name = self._memory.name(number)
        return name if name and self._memory.has_asked(number, client_tag(host)) else ""

    def number(self, name: str, host: str, now: float, count: int) -> int | None:
        """Return a number below `count` for a name that a client asks for.

        Returns None if there is none to be had.  While a client holds as many numbers as are
        free, it gets no further one of these: then one client takes half of them at most.
        """
        memory, client = self._memory, client_tag(host)
        with self._lock:
            limit = min(count // memory.workers, memory.segment)
            if limit != self._limit:
                self._load(limit, now)
            self._age(now)
            given = self._by_name.get(name) or self._give(name, client, now)
            if given is None:
                return None
            self._hold(given, Use(int(now), client))
            memory.note_asked(given.number, client)
            with self._use_lock:
                memory.note_use(self._index, given.number, client, now)
        return given.number

    # -- under the lock

    def _give(self, name: str, client: int, now: float) -> _Given | None:
        """Give a number to a name that has none; None if there is none."""
        memory, count = self._memory, self._memory.given(self._index)
        given = None
        if self._held.held(str(client)) < max(self._limit - count, 0) + len(self._old):
            if count < self._limit:
                given = _Given(count * memory.workers + self._index, "", Use(0, 0))
                memory.set_given(self._index, count + 1)
            else:
                given = self._take_old(now)
        given = given or self._take_held(client, now)
        if given is not None:
            self._by_name.pop(given.name, None)
            given.name, self._by_name[name] = name, given
            memory.set_name(given.number, name)
        return given

    def _take_old(self, now: float) -> _Given | None:
        """Take the number whose last use is longest ago; None if that is too short a time."""
        taken: _Given | None = None
        for _ in range(min(TRIES, len(self._old))):
            given = next(iter(self._old.values()))
            use = self._memory.last_use(given.number)
            if now - use.time < KEPT_SECONDS:
                self._hold(given, use)
                continue
            unchanged, given.use = use == given.use, use
            if taken is None or use < taken.use:
                taken = given
            self._old.move_to_end(given.name)
            if unchanged:
                # All others were used later.
                break
        if taken is not None:
            del self._old[taken.name]
        return taken

    def _take_held(self, client: int, now: float) -> _Given | None:
        """Take a number from the client that holds most, if it holds more than this client will."""
        if self._held.most <= self._held.held(str(client)) + 1:
            return None
        for given in self._held.yielding(TRIES):
            loser = given.use.client
            if self._memory.take(given.number, loser, now, KEPT_SECONDS):
                return given
            # Another client uses it as well: the next search begins with others.
            self._held.remove(str(loser), given)
            self._held.put(str(loser), given)
        return None

    def _age(self, now: float) -> None:
        """Let numbers grow old that nobody has used lately, least recently used first."""
        for _ in range(AGED_AT_ONCE):
            if not self._due or self._due[0][0] > now:
                return
            due, number, given = self._due[0]
            self._held.remove(str(given.use.client), given)
            given.use = self._memory.last_use(number)
            if given.use.time + KEPT_SECONDS > due:
                heapq.heapreplace(self._due, (given.use.time + KEPT_SECONDS, number, given))
                self._held.put(str(given.use.client), given)
            else:
                heapq.heappop(self._due)
                given.is_held, self._old[given.name] = False, given

    def _hold(self, given: _Given, use: Use) -> None:
        """Let a number count for the client that uses it."""
        if given.is_held and given.use == use:
            return
        if given.is_held:
            self._held.remove(str(given.use.client), given)
        else:
            self._old.pop(given.name, None)
            heapq.heappush(self._due, (use.time + KEPT_SECONDS, given.number, given))
        given.use, given.is_held = use, True
        self._held.put(str(use.client), given)

    def _load(self, limit: int, now: float) -> None:
        """Learn the numbers of the own segment from the memory.

        They are those of a process that has died, or of a configuration with another number of
        addresses.  A number whose name was being written is given to nobody.
        """
        memory, count = self._memory, min(self._memory.given(self._index), limit)
        self._limit = limit
        self._by_name, self._old, self._due = {}, OrderedDict(), []
        self._held.clear()
        numbers = [local * memory.workers + self._index for local in range(count)]
        numbers.sort(key=memory.last_use)
        for number in numbers:
            if name := memory.name(number):
                given = self._by_name[name] = _Given(number, name, memory.last_use(number))
                if now - given.use.time < KEPT_SECONDS:
                    self._hold(given, given.use)
                else:
                    self._old[name] = given
