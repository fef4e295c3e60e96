"""The commands of the control socket.

Each method answers one command of netproxyctl, on the thread of the client that asks.  What
only the main thread may do is handed to it by a signal to this process.  With workers, the
parent has the same commands, except that admin.workers answers those about flows.
"""

from __future__ import annotations

import os
import signal
import threading

from netproxy.admin.control.client import ActAfterAnswer, CommandError
from netproxy.interfaces.services import DaemonState
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.admin.accounts import AccountCommands
    from netproxy.admin.control.client import Command, CommandRequest
    from netproxy.admin.control.server import ReloadRequests
    from netproxy.admin.stats.stats import Stats
    from netproxy.admin.view import AccountsView
    from netproxy.interfaces.answers import ClientsAnswer, JsonObject, KnownAnswer
    from netproxy.interfaces.answers import StatusAnswer
    from netproxy.interfaces.answers import TrafficAnswer, UpstreamRow, UsersAnswer

ACCOUNT_COMMANDS = ("limit", "ban", "unban")
"""The commands of admin.accounts."""


class StatsSource(Protocol):
    """Makes the statistics when somebody first asks for them: they cost memory."""

    @property
    def stats(self) -> Stats:
        """The statistics."""


def all_commands(
    flows: Mapping[str, Command],
    accounts: Callable[[], AccountCommands],
    state: AccountsView,
    source: StatsSource,
    reloads: ReloadRequests,
) -> Mapping[str, Command]:
    """Return the commands of the control socket by name.

    `flows` are those of FlowCommands, `accounts` makes those about limits and bans.
    """
    return {
        **StatsCommands(source).table(),
        **flows,
        **AccountsOnDemand(accounts).table(),
        **ServiceCommands(state, source, reloads).table(),
    }


class AccountsOnDemand:
    """The commands about limits and bans, made when they are first needed."""

    def __init__(self, make: Callable[[], AccountCommands]) -> None:
        self._make = make
        # Guards _commands.
        self._lock = threading.Lock()
        self._commands: AccountCommands | None = None

    def table(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return dict.fromkeys(ACCOUNT_COMMANDS, self._answer)

    def _answer(self, request: CommandRequest) -> object:
        with self._lock:
            if self._commands is None:
                self._commands = self._make()
        return self._commands.table()[str(request["command"])](request)


class StatsCommands:
    """Answers with statistics."""

    def __init__(self, source: StatsSource) -> None:
        self._source = source

    def table(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return {
            "status": self.status,
            "upstreams": self.upstreams,
            "traffic": self.traffic,
            "users": self.users,
            "clients": self.clients,
        }

    def status(self, request: CommandRequest) -> StatusAnswer:
        """Return the state, listeners and counters."""
        return self._source.stats.status()

    def upstreams(self, request: CommandRequest) -> Sequence[UpstreamRow]:
        """Return the upstreams with their statistics."""
        return self._source.stats.upstreams()

    def traffic(self, request: CommandRequest) -> TrafficAnswer:
        """Return totals, and the bytes of each flow."""
        return self._source.stats.traffic()

    def users(self, request: CommandRequest) -> UsersAnswer:
        """Return what users use and have moved."""
        return self._source.stats.users()

    def clients(self, request: CommandRequest) -> ClientsAnswer:
        """Return what clients use."""
        return self._source.stats.clients()


class ServiceCommands:
    """Answers requests about the whole daemon.

    The main thread reloads and drains: a signal to this process tells it.
    """

    def __init__(self, state: AccountsView, source: StatsSource, reloads: ReloadRequests) -> None:
        self._state = state
        self._source = source
        self._reloads = reloads

    def table(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return {"known": self.known, "reload": self.reload, "drain": self.drain}

    def known(self, request: CommandRequest) -> KnownAnswer:
        """Return the names of the running configuration."""
        from netproxy.admin import listing  # late: few daemons are ever asked

        return listing.known(self._state.config)

    def reload(self, request: CommandRequest) -> JsonObject:
        """Reload, and wait until that is done."""
        if self._state.state != DaemonState.SERVING:
            raise CommandError(f"the daemon is {self._state.state}")
        self._reloads.request()
        return {"reloaded": True}

    def drain(self, request: CommandRequest) -> ActAfterAnswer:
        """Drain and stop.

        The answer goes first: with nothing to wait for, the daemon ends at once.  A daemon that
        drains refuses, because a second signal would stop it at once.
        """
        if self._state.state == DaemonState.DRAINING:
            raise CommandError("the daemon is draining")
        return ActAfterAnswer({"connections": self._source.stats.connections()}, _signal_drain)


def signal_reload() -> None:
    """Make the main thread reload."""
    os.kill(os.getpid(), signal.SIGHUP)


def _signal_drain() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
