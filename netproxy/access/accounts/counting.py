"""What a daemon counts of its users, clients and listeners, in one process or in several.

With one process there are the usage, the standing and the accounts.  With several, `workers` of
them and a parent, the tables of the ledgers are shared; the parent makes them before it forks.
The parent collects what users move in the workers, and alone stores it.  A worker calls
become_worker(); when it has died, the parent calls clear_gauges().
"""

from __future__ import annotations

import time

from netproxy.access.accounts.book import AccountBook
from netproxy.access.accounts.ledger import Ledger
from netproxy.access.accounts.standing import Standing
from netproxy.access.accounts.usage import UsageBook
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.typed import Collection

    from netproxy.access.accounts.collector import Collector
    from netproxy.access.accounts.gauges import ListenerCounts, SessionGauge, SharedConnections
    from netproxy.access.accounts.usage_store import UsageStore
    from netproxy.access.accounts.worker_usage import WorkerUsage


class Counting:
    """The counts of this process and, with several workers, those of the others."""

    def __init__(self, workers: int = 1) -> None:
        """Make the tables.  With several workers this process is the parent."""
        processes = workers + 1 if workers > 1 else 1
        self._ledger = Ledger(processes)
        self.book = UsageBook(None)
        """What users have moved: in this process if there is one, in all workers if this is their
        parent; without use in a worker."""
        self.usage: UsageBook | WorkerUsage = self.book
        self.store: UsageStore | None = None
        """Where the usage is stored."""
        self.standing = Standing(self.usage)
        self.accounts = AccountBook(self.usage, self.standing, self._ledger)
        self.listeners: ListenerCounts | None = None
        """None if there is one process: a listener counts by itself."""
        self.collector: Collector | None = None
        """In the parent of several workers."""
        self.is_worker = False
        """True in a worker, which stores nothing."""
        if workers > 1:
            # late: few daemons have several workers
            from netproxy.access.accounts.collector import Collector
            from netproxy.access.accounts.gauges import ListenerCounts

            self._ledger.use_table(workers)
            self.listeners = ListenerCounts(processes)
            self.listeners.ledger.use_table(workers)
            self.collector = Collector(self._ledger, self.book, self.standing)

    def become_worker(self, index: int) -> None:
        """Be the worker with this index from now on; call it in the child, right after the fork.

        The process must end with os._exit(): the store's connection to SQLite is the parent's,
        and to close it here would damage the file.
        """
        from netproxy.access.accounts.worker_usage import WorkerUsage  # late: as above

        assert self.listeners is not None
        self.listeners.ledger.use_table(index)
        self._of_parent, self.store = self.store, None
        self.usage = self.standing.usage = usage = WorkerUsage(self._ledger)
        self.accounts.become_worker(index, usage)
        self.collector, self.is_worker = None, True

    def clear_gauges(self, index: int) -> None:
        """Count the flows, connections and sessions of a worker as ended: it has died."""
        assert self.listeners is not None
        self._ledger.clear_gauges(index)
        self.listeners.ledger.clear_gauges(index)

    def reserve(self, users: Collection[str]) -> None:
        """Count these users, those of a configuration, by their names."""
        self.usage.reserve(users)
        if self.collector is not None:
            self.collector.configure(users)

    def connections(self, listener: str) -> SharedConnections | None:
        """Return what counts a listener's connections in all processes, None for this one alone."""
        return self.listeners.connections(listener) if self.listeners is not None else None

    def sessions(self, table: str) -> SessionGauge | None:
        """Return what counts a table's sessions in all processes, None for this one alone."""
        return self.listeners.sessions(table) if self.listeners is not None else None

    def folder(self) -> str:
        """Return the folder of state, "" if there is none.  Thread: any."""
        store = self.store
        return "" if store is None else store.folder

    def use_store(self, store: UsageStore | None) -> None:
        """Keep what users have moved in another store; None: in memory alone.

        The store before has everything that was moved until now.
        """
        before = self.store
        if store is before:
            return
        if self.collector is not None:
            self.collector.collect()
        self.book.save(time.monotonic())
        self.book.set_store(store)
        self.store = store
        # Loads what the store has: quotas count from now on.
        self.book.save(time.monotonic())
        if before is not None:
            before.close()
