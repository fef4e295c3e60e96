"""The parent as this room sees it: what the merged answers read, beside the workers' reports."""

from __future__ import annotations

from netproxy.admin.view import AccountsView
from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.services import DaemonState
    from netproxy.observe.incidents import Incidents
    from netproxy.observe.metrics import Counters


class WorkerInfo(NamedTuple):
    """What the parent knows of a worker."""

    number: int
    """From 0."""
    pid: int
    """0 while there is no process: its successor starts after a pause."""
    restarts: int
    """Successors that were started in this place."""
    ready: bool
    """True once this process serves."""


class ParentView(AccountsView, Protocol):
    """The parent, as far as this room needs it.  Thread: any.

    Its users, accounts and bans are those that a successor inherits at the fork.
    """

    @property
    def state(self) -> DaemonState:
        """Whether the workers serve."""

    @property
    def counters(self) -> Counters:
        """What the parent itself counts."""

    @property
    def incidents(self) -> Incidents:
        """The last refusals of the parent itself."""

    def state_folder(self) -> str:
        """Return the folder of state, "" if there is none."""

    def workers(self) -> Sequence[WorkerInfo]:
        """Return the workers by their numbers."""
