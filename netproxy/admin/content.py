"""What the control socket and the listeners for HTTP answer with.

It is made when it is first needed, because it costs memory that most daemons never need.
"""

from __future__ import annotations

import threading

from netproxy.typed import TYPE_CHECKING, Mapping, Protocol

if TYPE_CHECKING:
    from netproxy.admin.accounts import AccountCommands
    from netproxy.admin.commands import StatsSource
    from netproxy.admin.control.client import Command
    from netproxy.admin.control.server import ReloadRequests
    from netproxy.admin.stats.stats import Stats
    from netproxy.admin.view import DaemonView
    from netproxy.interfaces.services import Counter
    from netproxy.observe.log import Log


class AdminContent(Protocol):
    """What the servers answer with; made when it is first needed, because it costs memory."""

    @property
    def counters(self) -> Counter:
        """Counts wrong tokens."""

    def stats(self, began: float) -> Stats:
        """Return the statistics; `began`: when the daemon started, in monotonic seconds."""

    def commands(self, source: StatsSource, reloads: ReloadRequests) -> Mapping[str, Command]:
        """Return the commands of the control socket by name."""


class DaemonContent:
    """The AdminContent of a daemon of one process."""

    def __init__(self, daemon: DaemonView, log: Log) -> None:
        self._daemon = daemon
        self._log = log
        # Held while users, clients and bans are looked up or changed.
        self._guard = threading.Lock()

    @property
    def counters(self) -> Counter:
        """The counters of the daemon."""
        return self._daemon.counters

    def stats(self, began: float) -> Stats:
        """Return the statistics."""
        # Imported late: many daemons are never asked.
        from netproxy.admin.stats.snapshot import OwnSnapshots
        from netproxy.admin.stats.stats import Stats

        source = OwnSnapshots(self._daemon, self._log)
        return Stats(self._daemon, source, self._log, began, self._guard)

    def commands(self, source: StatsSource, reloads: ReloadRequests) -> Mapping[str, Command]:
        """Return the commands of the control socket by name."""
        # Imported late, as above.
        from netproxy.admin.commands import all_commands
        from netproxy.admin.flow_commands import FlowCommands

        flows = FlowCommands(self._daemon, self._log).table()
        return all_commands(flows, self._accounts, self._daemon, source, reloads)

    def _accounts(self) -> AccountCommands:
        # Imported late: few daemons are ever asked.
        from netproxy.admin.accounts import AccountCommands

        return AccountCommands(self._daemon, self._log.info, self._guard)
