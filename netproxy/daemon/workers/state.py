"""What the parent of several workers tells of itself.

Thread: any, except configure().
"""

from __future__ import annotations

from netproxy.admin.workers.view import WorkerInfo
from netproxy.config.schema import Config
from netproxy.interfaces.services import DaemonState
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.access.accounts.book import AccountBook
    from netproxy.access.accounts.standing import Standing
    from netproxy.access.accounts.usage import UsageBook
    from netproxy.access.accounts.worker_usage import WorkerUsage
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.workers.processes import Workers
    from netproxy.observe.incidents import Incidents
    from netproxy.observe.metrics import Counters


class ParentState:
    """The parent as admin.workers sees it (admin.workers.view.ParentView)."""

    def __init__(self, runtime: Runtime, workers: Workers) -> None:
        self._runtime = runtime
        self._workers = workers
        self._config = Config(())
        self.state = DaemonState.STARTING

    def configure(self, config: Config) -> None:
        """Note the configuration in force."""
        self._config = config

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self._config

    @property
    def accounts(self) -> AccountBook:
        """The limits in force; the workers count."""
        return self._runtime.accounts

    @property
    def standing(self) -> Standing:
        """Who gets nothing new."""
        return self._runtime.standing

    @property
    def usage(self) -> UsageBook | WorkerUsage:
        """What users have moved."""
        return self._runtime.usage

    @property
    def counters(self) -> Counters:
        """What the parent itself counts."""
        return self._runtime.counters

    @property
    def incidents(self) -> Incidents:
        """The last refusals of the parent itself."""
        return self._runtime.incidents

    def state_folder(self) -> str:
        """Return the folder of state, "" if there is none."""
        return self._runtime.counting.folder()

    def workers(self) -> Sequence[WorkerInfo]:
        """Return the workers by their numbers."""
        return [
            WorkerInfo(worker.index, worker.pid, max(0, worker.restarts), worker.serving)
            for worker in self._workers.all
        ]
