"""The daemon: starts, reloads, drains and stops over a plan, and tells what it is doing.

daemon.build makes a Plan of each configuration; daemon.plan puts it into force, all or
nothing.  What all plans share is the runtime's.  Methods run on the main thread, except
those that only read: the control socket's and the metrics listener's threads call them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Callable, Collection, Iterator, Mapping

from netproxy.admin.servers import Admin
from netproxy.config.schema import Config
from netproxy.daemon.build import build
from netproxy.daemon.runtime import STOP_SECONDS, Runtime
from netproxy.interfaces.services import DaemonState
from netproxy.listener.manager import ListenerManager
from netproxy.listener.tcp import TcpListener
from netproxy.listener.udp import UdpListener
from netproxy.observe.log import Log

if TYPE_CHECKING:
    from netproxy.daemon.plan import Plan
    from netproxy.interfaces.answers import ListenerRow, UpstreamRow

STOP_STEP = 0.01
"""Seconds between two looks whether all connections have ended."""


class Daemon:
    """A running netproxyd, except its signals and its exit status (daemon.main)."""

    def __init__(self, log: Log) -> None:
        self._runtime = runtime = Runtime(log)
        self.counters, self.flows, self.pools = runtime.counters, runtime.flows, runtime.pools
        self.verdicts, self.history = runtime.verdicts, runtime.history
        self.refusals = runtime.refusals
        self.accounts, self.standing, self.usage = runtime.accounts, runtime.standing, runtime.usage
        self.state = DaemonState.STARTING
        self._manager: ListenerManager[TcpListener | UdpListener] = ListenerManager(
            {"tcp": runtime.tcp_listener, "udp": runtime.udp_listener}
        )
        self._admin = Admin(self, log)
        # The running plan, replaced whole; until start() one that has nothing.
        self._plan: Plan = build(Config(()), runtime, None)
        self._batching = Config(()).batching
        """As configured at the start: what a reload cannot change."""
        # Stopped, with connections that may still be running.
        self._retired: list[TcpListener] = []

    # -- life

    def start(self, config: Config) -> None:
        """Listen and serve.  Call stop() if it fails, too.

        Raises ConfigError, or ListenError if a socket cannot be bound or no thread can be had.
        """
        self._batching = config.batching
        self._runtime.start(config.batching)
        self._apply(build(config, self._runtime, None))
        self._runtime.run()
        self.state = DaemonState.SERVING

    def reload(self, config: Config) -> None:
        """Apply another configuration to everything that is new from now on.

        Raises ConfigError or ListenError, and then nothing has changed.
        """
        self._apply(build(config, self._runtime, self._plan))
        if config.batching != self._batching:
            # The arenas of all sockets are of one level.
            message = "udp.batching: a change from %s to %s needs a restart"
            self._runtime.log.warning(message, self._batching, config.batching)

    def begin_reload(self) -> Callable[[list[str]], None]:
        """Begin a reload; return what must be told its errors, an empty list for success.

        Clients of the control socket that have asked for a reload until now are answered then.
        """
        return self._admin.begin_reload()

    def stop_accepting(self) -> None:
        """Accept no new connections; running ones and their datagrams go on."""
        self.state = DaemonState.DRAINING
        self._retire(self._manager.stop(("tcp",)))
        self._plan.tunnels.stop_accepting()
        self._runtime.poller.release_idle()

    def stop(self) -> None:
        """End everything."""
        plan, runtime = self._plan, self._runtime
        self.stop_accepting()
        for listener in self._retired:
            listener.abort()
        plan.tunnels.stop()
        plan.relays.close()
        self._admin.stop()
        # Idle connections wake up to end.
        deadline = time.monotonic() + STOP_SECONDS
        while self.live and time.monotonic() < deadline:
            time.sleep(STOP_STEP)
        runtime.poller.stop()
        runtime.connections.stop(STOP_SECONDS)
        self._manager.stop()
        if plan.dependencies.external is not None:
            plan.dependencies.external.stop()
        runtime.stop()
        plan.close()

    def _apply(self, plan: Plan) -> None:
        bound = plan.bind(self._manager, self._admin)
        gone = bound.commit(self._plan)
        self._plan = plan
        self._retire(gone)
        if plan.config.end_on_removal:
            self._end_removed(plan)

    def _retire(self, stopped: list[TcpListener | UdpListener]) -> None:
        """Remember listeners whose connections are still running, forget those that have none."""
        tcp = [listener for listener in stopped if isinstance(listener, TcpListener)]
        self._retired = [listener for listener in self._retired + tcp if listener.live]

    def _end_removed(self, plan: Plan) -> None:
        """End what users have open who were removed, or whose password was changed."""
        from netproxy.access.removals import end_removed  # late: few configurations want it

        listeners = self._tcp_listeners()
        connections = [
            connection for listener in listeners for connection in listener.connections()
        ]
        ended = end_removed(
            plan.dependencies.users, self.flows.live(), connections, plan.dependencies.external
        )
        if any(ended):
            reason = "ended because a user was removed or a password changed"
            self._runtime.log.info("%s: flows=%d connections=%d", reason, *ended)

    # -- what it is doing

    @property
    def live(self) -> int:
        """The connections that have not ended."""
        return sum(one.live for one in self._tcp_listeners()) + self._plan.tunnels.live

    def _tcp_listeners(self) -> list[TcpListener]:
        """Return the TCP listeners, and those that were stopped but have connections."""
        listening = [one for one in self._manager.listeners if isinstance(one, TcpListener)]
        return listening + self._retired

    @property
    def default_upstream(self) -> str:
        """The upstream of whatever has none of its own, for a log line."""
        return self._plan.config.default.text

    @property
    def user_names(self) -> Collection[str]:
        """The users of the running configuration."""
        return self._plan.config.users.keys()

    @property
    def has_any_user(self) -> bool:
        """True if a user that is not configured may log in: users are checked elsewhere."""
        config = self._plan.config
        return not config.users or config.auth.is_set

    @property
    def metrics_users(self) -> bool:
        """True if metrics name users."""
        return self._plan.config.metrics_users

    def dead_thread(self) -> str:
        """Return the name of a thread that must live and does not, "" if all is well."""
        listeners = [listener.thread for listener in self._manager.listeners]
        runtime = self._runtime
        for thread in (
            runtime.janitor.thread,
            runtime.poller.thread,
            *self._admin.threads,
            *listeners,
        ):
            if not thread.is_alive():
                return thread.name
        return self._plan.tunnels.dead_thread()

    def summary(self) -> str:
        """Return what is listening, for a log line."""
        addresses = [f"{one.network} {one.address}" for one in self._manager.listeners]
        return ", ".join(addresses) or "nothing"

    def status(self) -> Iterator[str]:
        """Yield the status for the log, line by line."""
        runtime = self._runtime
        yield (
            f"connections={self.live} parked={len(runtime.poller)} "
            f"threads={runtime.connections.threads} listeners: {self.summary()}"
        )
        yield from self._plan.relays.status()
        yield from self._plan.tunnels.summary()
        for name, reason, value in self.counters.items():
            yield f"{name}{{{reason}}}={value}"

    def listening(self) -> list[ListenerRow]:
        """Return the listeners with their statistics."""
        from netproxy.admin import explain  # late: few daemons are ever asked

        return explain.listening(self._manager.listeners, self._plan.admissions)

    def upstreams(self) -> list[UpstreamRow]:
        """Return the upstreams with their statistics."""
        from netproxy.admin import explain  # late, as above

        return explain.upstreams(self._plan.dialers, self._plan.named_upstreams())

    def tunnels(self) -> Mapping[str, object]:
        """Return the agents that are connected, and the state of the daemon's own agent."""
        return self._plan.tunnels.describe()

    def explain(self, flow: str) -> list[str]:
        """Return what the running configuration would do with a flow, as lines.

        May wait for a name lookup.  Raises FlowError.
        """
        return self._plan.explain(flow)
