"""The daemon as this room sees it: what commands, statistics and the status page read."""

from __future__ import annotations

from netproxy.interfaces.services import DaemonState
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.access.accounts.book import AccountBook
    from netproxy.access.accounts.standing import Standing
    from netproxy.access.accounts.usage import UsageBook
    from netproxy.access.accounts.worker_usage import WorkerUsage
    from netproxy.admin.diagnosis.dial_test import Paths
    from netproxy.config.schema import Config
    from netproxy.interfaces.answers import DirectRow, JsonObject, ListenerRow, UpstreamRow
    from netproxy.observe.flows import Flows
    from netproxy.observe.history import History
    from netproxy.observe.incidents import Incidents
    from netproxy.observe.metrics import Counters
    from netproxy.observe.refusals import RefusalLog
    from netproxy.router.auto import Verdicts


class PoolView(Protocol):
    """A thread pool, as far as statistics need it."""

    @property
    def threads(self) -> int:
        """The number of its threads."""

    @property
    def busy(self) -> int:
        """The number of tasks that run or wait."""


class AccountsView(Protocol):
    """The state of a daemon, and its users and clients.  Thread: any."""

    @property
    def state(self) -> DaemonState:
        """Whether it serves."""

    @property
    def accounts(self) -> AccountBook:
        """What users and clients use."""

    @property
    def standing(self) -> Standing:
        """Who gets nothing new."""

    @property
    def usage(self) -> UsageBook | WorkerUsage:
        """What users have moved."""

    @property
    def config(self) -> Config:
        """The running configuration."""


class Questions(Protocol):
    """Answers about a configuration.  Thread: any; may block."""

    def explain(self, flow: str) -> Iterable[str]:
        """Return lines that tell what would happen to a flow.  Raises FlowError."""

    def probe_nat(self, upstream: str, servers: object) -> JsonObject:
        """Ask STUN servers through an upstream.  Raises NetProxyError."""

    def paths(self) -> Paths:
        """Return what a test of a target uses."""


class DaemonView(AccountsView, Protocol):
    """The daemon, as far as this room needs it.  Thread: any."""

    @property
    def counters(self) -> Counters:
        """Its counters."""

    @property
    def flows(self) -> Flows:
        """Its running flows."""

    @property
    def history(self) -> History:
        """What flows have moved in the last day."""

    @property
    def incidents(self) -> Incidents:
        """The last refusals and failures."""

    @property
    def refusals(self) -> RefusalLog:
        """Writes the records of refusals."""

    @property
    def pools(self) -> Mapping[str, PoolView]:
        """Its thread pools by name."""

    @property
    def verdicts(self) -> Verdicts:
        """What `via: auto` has found out."""

    @property
    def connections(self) -> int:
        """The number of client connections."""

    @property
    def parked(self) -> int:
        """The number of waits of connections that hold no thread."""

    def listening(self) -> Sequence[ListenerRow]:
        """Return its listeners."""

    def upstreams(self) -> Sequence[UpstreamRow]:
        """Return its upstreams."""

    def tunnels(self) -> Mapping[str, object]:
        """Return a TunnelsAnswer."""

    def direct_paths(self) -> Sequence[DirectRow]:
        """Return its direct paths, as the bridge or as one of the two sides."""

    def status(self) -> Iterable[str]:
        """Return lines for the log."""

    @property
    def questions(self) -> Questions:
        """The questions about its running configuration."""
