"""What the parent's control socket and metrics listener answer with: all workers as one daemon."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from netproxy.admin.accounts import AccountCommands
from netproxy.admin.commands import all_commands
from netproxy.admin.stats.stats import Stats
from netproxy.admin.workers.commands import MergedCommands, spread
from netproxy.typed import TYPE_CHECKING, ContextManager, Mapping

if TYPE_CHECKING:
    from netproxy.admin.commands import StatsSource
    from netproxy.admin.control.client import Command
    from netproxy.admin.control.server import ReloadRequests
    from netproxy.admin.workers.lines import WorkerLines
    from netproxy.admin.workers.reports import Reports
    from netproxy.admin.workers.view import ParentView
    from netproxy.interfaces.services import Counter
    from netproxy.observe.log import Log


PRELOADED = (
    *("hmac", "json"),
    *(
        "netproxy.admin.control.server",
        "netproxy.admin.diagnosis.explain",
        "netproxy.admin.diagnosis.rows",
        "netproxy.admin.web.http_server",
    ),
    *(
        "netproxy.admin.web.site",
        "netproxy.admin.workers.questions",
        "netproxy.admin.workers.report",
    ),
    "netproxy.dialer.plain.rotation",
    # of every worker, which shares their memory with the parent
    *(
        "netproxy.handler.datagrams.stream_service",
        "netproxy.handler.datagrams.uot",
        "netproxy.handler.http",
        "netproxy.handler.http_forward",
    ),
)
"""What threads of the parent and of workers would import late, beside the imports above.

The key of rotation is made when it is imported: all workers must have the same one.
"""


class WorkersContent:
    """The AdminContent of the parent."""

    def __init__(
        self,
        view: ParentView,
        lines: WorkerLines,
        reports: Reports,
        log: Log,
        guard: ContextManager[object],
    ) -> None:
        """`guard` is held while objects are read or changed that workers inherit.

        The parent holds it while it forks.
        """
        self._view = view
        self._lines = lines
        self._reports = reports
        self._log = log
        self._guard = guard

    @property
    def counters(self) -> Counter:
        """The counters of the parent."""
        return self._view.counters

    def stats(self, began: float) -> Stats:
        """Return the statistics of all workers together."""
        return Stats(self._view, self._reports, self._log, began, self._guard)

    def commands(self, source: StatsSource, reloads: ReloadRequests) -> Mapping[str, Command]:
        """Return the commands of the control socket by name."""
        flows = MergedCommands(self._view, self._lines, self._log, self._guard).table()
        return all_commands(flows, self._accounts, self._view, source, reloads)

    def _accounts(self) -> AccountCommands:
        to_workers = partial(spread, self._lines)
        return AccountCommands(self._view, self._log.info, self._guard, to_workers)


def preload() -> None:
    """Import all that the threads of the parent and of workers import late.

    Call it before the first fork: a child of a process in which a thread is just importing would
    have a part of a module.
    """
    for name in PRELOADED:
        import_module(name)
