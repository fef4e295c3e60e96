"""The parent of several workers: reads, checks, binds, forks; it serves no client itself.

It has the methods of daemon.daemon.Daemon that daemon.main calls.  It keeps all sockets open,
forks a successor for each worker that dies, and owns the control socket, the metrics listener
and the file of what users have moved.  A reload has two phases: all workers bind what is new,
then all put it into force, or none does.

Thread: main.  Other threads, which answer netproxyctl and the metrics, use the parts of the
runtime under `guard`.  It is held while a worker is forked: so no child inherits a lock that is
held, or something that is half changed.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time

from netproxy.access.factory import PreparedCounts
from netproxy.admin.servers import Admin
from netproxy.admin.workers.content import WorkersContent, preload
from netproxy.admin.workers.lines import WorkerLine, WorkerLines
from netproxy.admin.workers.reports import Reports
from netproxy.daemon.build import build
from netproxy.daemon.runtime import Runtime, start_thread
from netproxy.daemon.workers.agents import AgentsOfOthers
from netproxy.daemon.workers.groups import GroupBinder, SocketGroup, group_specs, with_ports
from netproxy.daemon.workers.hand_over import HandOvers
from netproxy.daemon.workers.housekeeping import CollectedUsage, GuardedTables, Heartbeat
from netproxy.daemon.workers.orders import ANSWER_SECONDS, WorkerOrders, key_of, keys_of
from netproxy.daemon.workers.processes import WorkerEnds, WorkerProcess, Workers
from netproxy.daemon.workers.registry import AgentRegistry
from netproxy.daemon.workers.sockets import WorkerSockets
from netproxy.daemon.workers.state import ParentState
from netproxy.daemon.workers.worker import Worker, worker_config
from netproxy.errors import ConfigError, ListenError
from netproxy.interfaces.services import DaemonState
from netproxy.listener.manager import ListenerManager
from netproxy.relay.janitor import Janitor
from netproxy.typed import TYPE_CHECKING, Callable, Iterator, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import Config
    from netproxy.daemon.plan import Plan
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.services import PreparedChange
    from netproxy.observe.log import Log

REMEDY = " (raise LimitNOFILE and TasksMax of the service, or lower `workers`)"
FORK_PAUSE = 1.0  # seconds after a fork that failed


class Parent:
    """A running netproxyd with several workers, except its signals and its exit status."""

    def __init__(self, log: Log, count: int) -> None:
        """Run `count` workers, at least 2.  Raises OSError."""
        self._log = log
        self._guard = guard = threading.Lock()
        self.runtime = runtime = Runtime(log, workers=count)
        self._workers = Workers(count, self._be_worker, guard, log)
        self._workers.kept = self._kept
        self._orders = WorkerOrders(self._workers, self._replace_dead, log)
        self._agents = AgentRegistry(count)
        runtime.hand_overs = HandOvers(self._workers.outboxes)
        runtime.agents_elsewhere = AgentsOfOthers(runtime.hand_overs, self._agents)
        binder = GroupBinder(count, runtime.given, runtime.concrete)
        self._groups: ListenerManager[SocketGroup] = ListenerManager(
            {"tcp": binder.tcp, "udp": binder.udp}
        )
        self._state = state = ParentState(runtime, self._workers)
        self._lines = WorkerLines()
        self._workers.on_fork = self._use_line
        self._reports = Reports(state, self._lines, log, guard)
        self._admin = Admin(WorkersContent(state, self._lines, self._reports, log, guard), log)
        counting = runtime.counting
        self._heartbeat = Heartbeat(state, self._lines, self._reports, counting, guard)
        tables = (CollectedUsage(counting), runtime.refusals)
        self._janitor = Janitor(log)  # not the runtime's, which the workers inherit
        self._janitor.register(GuardedTables(guard, tables))
        self._janitor.register(self._heartbeat)
        self._janitor.register(counting.book)  # without the guard: it waits for the disk
        self._janitor.register(log)
        self._plan: Plan
        self._own: Sequence[tuple[str, Address]] = ()  # sockets that no client may be led to

    # -- life

    def start(self, config: Config) -> None:
        """Listen and serve.  Call stop() if it fails, too.

        Raises ConfigError or ListenError.
        """
        preload()
        self.runtime.choose_batching(config.batching)
        try:
            self._workers.open()
            self._apply(config)
        except OSError as error:
            raise ListenError(f"cannot start the workers: {error.strerror}{REMEDY}") from error
        for worker in self._workers.all:
            self._orders.await_start(worker)
        start_thread("janitor", self._janitor.start)
        self._state.state = DaemonState.SERVING

    def _use_line(self, worker: WorkerProcess) -> None:
        """Ask a worker that was forked just now."""
        self._lines.replace(WorkerLine(worker.index, worker.questions))

    def look(self) -> str:
        """Replace workers that have died; return the name of a dead thread, "" if all is well."""
        for worker in self._workers.running:
            while self._workers.hear(worker, 0) is not None:
                pass
        self._replace_dead()
        threads = [self._janitor.thread, *self._admin.threads]
        return next((thread.name for thread in threads if not thread.is_alive()), "")

    def _replace_dead(self) -> None:
        """Replace workers that have died, if it is time to; end those that never began to serve."""
        now = time.monotonic()
        for worker in self._workers.running:
            if not worker.serving and now - worker.started > ANSWER_SECONDS:
                self._log.error("worker %d does not begin to serve: killed", worker.index)
                os.kill(worker.pid, signal.SIGKILL)
        self._bury()
        if self._state.state != DaemonState.DRAINING:
            for worker in self._workers.all:
                if not worker.pid and worker.due <= now:
                    self._replace(worker)

    def _bury(self) -> None:
        """Note which workers have died."""
        for worker in self._workers.reap(time.monotonic()):
            with self._guard:
                self.runtime.counting.clear_gauges(worker.index)
            self._agents.clear(worker.index)
            if self._state.state != DaemonState.DRAINING:
                self._log.error("worker %d has died (%s)", worker.index, worker.ended)

    def _replace(self, worker: WorkerProcess) -> None:
        try:
            self._workers.fork(worker)
        except OSError as error:
            worker.due = time.monotonic() + FORK_PAUSE
            text = "cannot start worker %d again: %s" + REMEDY
            self._log.limited(("fork", worker.index), text, worker.index, error.strerror)
            return
        self._log.warning("worker %d is started again (pid %d)", worker.index, worker.pid)

    @property
    def look_seconds(self) -> float:
        """Until look() should be called again, at the latest; 0 or less: now."""
        due = [worker.due for worker in self._workers.all if not worker.pid]
        return min(due, default=math.inf) - time.monotonic()

    def _kept(self, index: int) -> Iterator[int]:
        """Yield the descriptors of a worker's sockets."""
        for _, group in self._groups.pairs:
            sock = group.sockets[index]
            if sock is not None:
                yield sock.fileno()

    def _be_worker(self, ends: WorkerEnds) -> int:
        sockets = WorkerSockets()
        for spec, group in self._groups.pairs:
            sockets.add(key_of(spec, group), group.sockets[ends.number])
        self._agents.use_index(ends.number)
        return Worker(self.runtime, sockets, ends).run(self._plan, self._own)

    # -- reloads

    def reload(self, config: Config) -> None:
        """Apply another configuration to everything that is new from now on.

        Raises ConfigError or ListenError, and then nothing has changed.
        """
        if self._heartbeat.silent:
            silent = ", ".join(map(str, self._heartbeat.silent))
            raise ConfigError(
                f"worker {silent} does not answer (netproxyctl status has its process)"
            )
        if config.workers != len(self._workers.all):
            message = "workers: a change from %d to %d needs a restart"
            self._log.warning(message, len(self._workers.all), config.workers)
        try:
            self._apply(config)
        except OSError as error:
            raise ConfigError(f"cannot reload: {error.strerror}{REMEDY}") from error

    def _apply(self, config: Config) -> None:
        """Bind, build and put a configuration into force, in all workers or in none.

        The first one forks the workers.  Raises ConfigError or ListenError.
        """
        warnings = build(config, self.runtime, None).warnings  # its errors come before sockets'
        before = list(self._groups.pairs)
        groups = self._groups.bind(list(group_specs(config)))
        fresh = keys_of(groups.pairs, groups.fresh)
        changes: list[PreparedChange] = []
        try:
            plan = self._build(with_ports(config, groups.pairs))
            counting = self.runtime.counting
            servers = self._admin.bind(config)
            changes.append(servers)
            changes.append(PreparedCounts(config, counting, os.environ, self._log))
            self._orders.prepare(plan.config, servers.sockets, fresh)
        except BaseException:
            self._orders.settle("discard", fresh)
            for change in reversed(changes):
                change.discard()
            groups.discard()
            raise
        self._orders.settle("commit", keys_of(before, groups.gone))
        groups.commit()
        with self._guard:
            for change in changes:
                change.commit()
            assert counting.collector is not None
            counting.collector.collect()  # publishes the quotas that are used up
        self._plan, self._own = plan, servers.sockets
        self._state.configure(config)
        for warning in warnings:
            self._log.warning("%s", warning)
        for worker in self._workers.all:
            if worker.is_new:
                self._workers.fork(worker)

    def _build(self, config: Config) -> Plan:
        """Return the plan of a configuration for the workers.  Raises ConfigError."""
        return build(worker_config(config), self.runtime, None)._replace(warnings=())

    def stop_accepting(self) -> None:
        """Accept no new connections; running ones and their datagrams go on."""
        if self._state.state == DaemonState.DRAINING:
            return
        self._state.state = DaemonState.DRAINING
        self._orders.drain()
        # The UDP sockets stay: a group with a socket less would lead clients to other workers.
        self._groups.stop(("tcp",))

    def stop(self) -> None:
        """End everything."""
        self.stop_accepting()
        self._orders.stop()
        self._bury()
        self._admin.stop()
        self._janitor.stop()
        self._lines.close()
        self.runtime.counting.use_store(None)  # collects first
        self._groups.stop()
        self._workers.close()
        self.runtime.given.close()

    # -- what it is doing

    def reopen_log(self) -> None:
        """Begin a new access file, in all processes: the old one was renamed."""
        self._log.reopen()
        self._orders.reopen()

    def begin_reload(self) -> Callable[[list[str]], None]:
        """Begin a reload; return what must be told its errors, an empty list for success."""
        return self._admin.begin_reload()

    @property
    def answers(self) -> bool:
        """True if all workers have answered lately."""
        return not self._heartbeat.silent

    def status(self) -> Iterator[str]:
        """Yield the status for the log, line by line."""
        now = self._reports.read()
        yield (
            f"connections={now.connections} parked={now.parked} "
            f"workers={len(self._workers.running)} "
            f"threads={now.pools['connection'].threads} listeners: {self.summary()}"
        )
        # The lines of single workers, without their totals.
        yield from (line for line in now.lines if "connections=" not in line and "{" not in line)
        for (name, reason), value in sorted(now.counters.items()):
            yield f"{name}{{{reason}}}={value}"

    @property
    def live(self) -> int:
        """The connections that have not ended; while it drains, those there were at its begin."""
        self._bury()
        return sum(worker.live for worker in self._workers.running)

    @property
    def default_upstream(self) -> str:
        """The upstream of whatever has none of its own, and the workers, for a log line."""
        return f"{self._plan.config.default.text}, {len(self._workers.all)} workers"

    def summary(self) -> str:
        """Return what is listening, for a log line."""
        groups = self._groups.listeners
        return ", ".join(f"{group.network} {group.address}" for group in groups) or "nothing"
