"""The daemon as this room sees it: what commands, statistics and the status page read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Collection, Iterable, Mapping, Protocol, Sequence

from netproxy.interfaces.services import DaemonState

if TYPE_CHECKING:
    from netproxy.access.accounts.book import AccountBook
    from netproxy.access.accounts.standing import Standing
    from netproxy.access.accounts.usage import UsageBook
    from netproxy.interfaces.answers import ListenerRow, UpstreamRow
    from netproxy.observe.flows import Flows
    from netproxy.observe.history import History
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


class DaemonView(Protocol):
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
    def refusals(self) -> RefusalLog:
        """The last refusals."""

    @property
    def pools(self) -> Mapping[str, PoolView]:
        """Its thread pools by name."""

    @property
    def accounts(self) -> AccountBook:
        """What users and clients use."""

    @property
    def standing(self) -> Standing:
        """Who gets nothing new."""

    @property
    def usage(self) -> UsageBook:
        """What users have moved."""

    @property
    def user_names(self) -> Collection[str]:
        """The users of the running configuration."""

    @property
    def has_any_user(self) -> bool:
        """True if a user that is not configured may log in."""

    @property
    def metrics_users(self) -> bool:
        """True if metrics name users."""

    @property
    def verdicts(self) -> Verdicts:
        """What `via: auto` has found out."""

    @property
    def state(self) -> DaemonState:
        """Whether it serves."""

    @property
    def live(self) -> int:
        """The number of client connections."""

    def listening(self) -> Sequence[ListenerRow]:
        """Return its listeners."""

    def upstreams(self) -> Sequence[UpstreamRow]:
        """Return its upstreams."""

    def tunnels(self) -> Mapping[str, object]:
        """Return a TunnelsAnswer."""

    def status(self) -> Iterable[str]:
        """Return lines for the log."""

    def explain(self, flow: str) -> Iterable[str]:
        """Return lines that tell what would happen to a flow.  Raises FlowError."""
