"""The daemon: starts, reloads, drains and stops over a plan, and tells what it is doing.

daemon.build makes a Plan of each configuration; daemon.plan puts it into force, all or nothing.
The runtime has what all plans share.  Methods that only read are called by the threads of the
control socket and of the metrics listener, all others by the main thread.
"""

from __future__ import annotations

import math
import time

from netproxy.admin.content import DaemonContent
from netproxy.admin.servers import Admin
from netproxy.config.schema import Config
from netproxy.daemon.build import build
from netproxy.daemon.runtime import STOP_SECONDS, Runtime
from netproxy.daemon.listening.specs import TcpSpec
from netproxy.errors import ConfigError
from netproxy.interfaces.services import DaemonState
from netproxy.listener.manager import ListenerManager
from netproxy.listener.tcp import TcpListener
from netproxy.listener.udp import UdpListener
from netproxy.observe.log import Log
from netproxy.typed import TYPE_CHECKING, Callable, Iterator, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.daemon.listening.udp_relays import Key
    from netproxy.daemon.plan import BoundPlan, Plan
    from netproxy.daemon.questions import PlanQuestions
    from netproxy.daemon.tunnels.tunnels import Tunnels
    from netproxy.handler.factory import HandlerDependencies
    from netproxy.interfaces.answers import DirectRow, ListenerRow, UpstreamRow
    from netproxy.public_address.listening import ListeningAddress

STOP_STEP = 0.01  # seconds between two looks whether all connections have ended


class PreparedReload:
    """A configuration whose sockets are bound: a PreparedChange."""

    def __init__(self, daemon: Daemon, bound: BoundPlan) -> None:
        self._daemon, self._bound = daemon, bound

    def commit(self) -> None:
        """Put it into force.  Cannot fail."""
        self._daemon.commit(self._bound)

    def discard(self) -> None:
        """Undo what was prepared."""
        self._bound.discard()


class Daemon:
    """A running netproxyd, except its signals and its exit status (daemon.main)."""

    def __init__(self, log: Log, runtime: Runtime | None = None) -> None:
        """`runtime`: of a worker, whose parent has made it; None for a new one."""
        self._runtime = runtime = runtime or Runtime(log)
        self.counters, self.flows, self.pools = runtime.counters, runtime.flows, runtime.pools
        self.verdicts, self.history = runtime.verdicts, runtime.history
        self.refusals, self.incidents = runtime.refusals, runtime.incidents
        self.accounts, self.standing, self.usage = runtime.accounts, runtime.standing, runtime.usage
        self.state = DaemonState.STARTING
        self._manager: ListenerManager[TcpListener | UdpListener] = ListenerManager(
            {"tcp": runtime.tcp_listener, "udp": runtime.udp_listener}
        )
        self._admin = Admin(DaemonContent(self, log), log)
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
        self._runtime.choose_batching(config.batching)
        self.start_plan(build(config, self._runtime, None))

    def start_plan(self, plan: Plan) -> None:
        """Listen and serve as start() does, with a plan for this daemon's runtime."""
        self._batching = plan.config.batching
        self._runtime.start()
        self._commit(plan.bind(self._manager, self._admin))
        self._runtime.run()
        self.state = DaemonState.SERVING

    def reload(self, config: Config) -> None:
        """Apply another configuration to everything that is new from now on.

        Raises ConfigError or ListenError, and then nothing has changed.
        """
        self.prepare(config).commit()
        if config.workers != 1:
            message = "workers: a change from 1 to %d needs a restart"
            self._runtime.log.warning(message, config.workers)

    def prepare(self, config: Config) -> PreparedReload:
        """Bind and start what a configuration adds.  Raises ConfigError, ListenError."""
        try:
            plan = build(config, self._runtime, self._plan)
            if config.end_on_removal:
                __import__("netproxy.access.removals")  # late: few want it, but commit() needs it
            return PreparedReload(self, plan.bind(self._manager, self._admin))
        except OSError as error:  # no descriptor or no memory is left, for a module too
            raise ConfigError(f"cannot reload: {error.strerror}") from error

    def commit(self, bound: BoundPlan) -> None:
        """Put a configuration into force."""
        self._commit(bound)
        batching = bound.plan.config.batching
        if batching != self._batching:  # the arenas of all sockets are of one level
            message = "udp.batching: a change from %s to %s needs a restart"
            self._runtime.log.warning(message, self._batching, batching)

    def begin_reload(self) -> Callable[[list[str]], None]:
        """Begin a reload; return what must be told its errors, an empty list for success.

        Clients of the control socket that have asked for a reload until now are answered then.
        """
        return self._admin.begin_reload()

    def stop_accepting(self, for_all: bool = False) -> None:
        """Accept no new connections, `for_all` that hold the sockets; running ones go on."""
        self.state = DaemonState.DRAINING
        for one in self._tcp_listeners():
            one.ends_socket = for_all
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
        plan.announcements.stop()
        self._admin.stop()
        deadline = time.monotonic() + STOP_SECONDS  # for idle connections to wake up and end
        while self.live and time.monotonic() < deadline:
            time.sleep(STOP_STEP)
        runtime.poller.stop()
        runtime.connections.stop(STOP_SECONDS)
        self._manager.stop()
        if plan.dependencies.external is not None:
            plan.dependencies.external.stop()
        runtime.stop()
        plan.close()

    def _commit(self, bound: BoundPlan) -> None:
        plan, gone = bound.plan, bound.commit(self._plan)
        self._plan = plan
        self.incidents.note_reload()
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

        connections = [client for one in self._tcp_listeners() for client in one.connections()]
        users, external = plan.dependencies.users, plan.dependencies.external
        ended = end_removed(users, self.flows.live(), connections, external)
        if any(ended):
            reason = "ended because a user was removed or a password changed"
            self._runtime.log.info("%s: flows=%d connections=%d", reason, *ended)

    # -- what it is doing

    @property
    def live(self) -> int:
        """The connections that have not ended."""
        return sum(one.live for one in self._tcp_listeners()) + self._plan.tunnels.live

    @property
    def connections(self) -> int:
        """The connections that have not ended, without those that another worker counts."""
        return sum(one.counted for one in self._tcp_listeners()) + self._plan.tunnels.live

    @property
    def parked(self) -> int:
        """The waits of connections that hold no thread."""
        return len(self._runtime.poller)

    def _tcp_listeners(self) -> list[TcpListener]:
        """Return the TCP listeners, and those that were stopped but have connections."""
        listeners = self._manager.listeners
        return [item for item in listeners if isinstance(item, TcpListener)] + self._retired

    @property
    def default_upstream(self) -> str:
        """The upstream of whatever has none of its own, for a log line."""
        return self._plan.config.default.text

    @property
    def config(self) -> Config:
        """The running configuration."""
        return self._plan.config

    @property
    def tcp_pairs(self) -> list[tuple[TcpSpec, TcpListener]]:
        """The running TCP listeners with their specs."""
        return [
            (spec, running)
            for spec, running in self._manager.pairs
            if isinstance(spec, TcpSpec) and isinstance(running, TcpListener)
        ]

    def found_addresses(self) -> Mapping[Key, ListeningAddress]:
        """Return the listening addresses that announce what is found."""
        return self._plan.announcements.found

    @property
    def dependencies(self) -> HandlerDependencies:
        """What the handlers of the running configuration use."""
        return self._plan.dependencies

    def current_tunnels(self) -> Tunnels | None:
        """Return the tunnels of the running configuration, None if there are none."""
        return self._plan.tunnels.current

    def dead_thread(self) -> str:
        """Return the name of a thread that must live and does not, "" if all is well."""
        listeners = [listener.thread for listener in self._manager.listeners]
        runtime = self._runtime
        threads = runtime.janitor.thread, runtime.poller.thread, *self._admin.threads
        dead = [thread.name for thread in (*threads, *listeners) if not thread.is_alive()]
        return dead[0] if dead else self._plan.tunnels.dead_thread()

    look = dead_thread
    """What the main thread calls now and then."""
    look_seconds = math.inf
    """Until look() should be called again, at the latest; a limit of the caller's own counts."""
    answers = True  # whether all that serves has answered lately

    def reopen_log(self) -> None:
        """Begin a new access file: the old one was renamed."""
        self._runtime.log.reopen()

    def summary(self) -> str:
        """Return what is listening, for a log line."""
        listeners = self._manager.listeners
        return ", ".join(f"{one.network} {one.address}" for one in listeners) or "nothing"

    def status(self) -> Iterator[str]:
        """Yield the status for the log, line by line."""
        yield (
            f"connections={self.connections} parked={self.parked} "
            f"threads={self._runtime.connections.threads} listeners: {self.summary()}"
        )
        yield from (*self._plan.relays.status(), *self._plan.tunnels.summary())
        for name, reason, value in self.counters.items():
            yield f"{name}{{{reason}}}={value}"

    def listening(self) -> list[ListenerRow]:
        """Return the listeners with their statistics."""
        from netproxy.admin.diagnosis import rows  # late: few daemons are ever asked

        found = self._plan.announcements.rows()
        return rows.listening(self._manager.listeners, self._plan.admissions, found)

    def upstreams(self) -> list[UpstreamRow]:
        """Return the upstreams with their statistics."""
        from netproxy.admin.diagnosis import rows  # late, as above

        return rows.upstreams(self._plan.dialers, self._plan.named_upstreams())

    def direct_paths(self) -> Sequence[DirectRow]:
        """Return the direct paths of the tunnels."""
        return self._plan.tunnels.direct_paths()

    def tunnels(self) -> Mapping[str, object]:
        """Return the agents that are connected, and the state of the daemon's own agent."""
        return self._plan.tunnels.describe()

    @property
    def questions(self) -> PlanQuestions:
        """The questions about the running configuration."""
        from netproxy.daemon.questions import PlanQuestions  # late, as above

        return PlanQuestions(self._plan)

    def explain(self, flow: str) -> list[str]:
        """Return what the running configuration would do with a flow, as lines."""
        return self.questions.explain(flow)
