"""What a worker process does: it serves as a daemon on given sockets, and obeys its parent.

The parent's orders come on the main thread, which blocks all signals.  A worker whose parent
has died ends at once.
"""

from __future__ import annotations

import pickle

from netproxy.access.accounts.worker_usage import WorkerUsage
from netproxy.admin.workers.questions import serve_questions
from netproxy.admin.workers.report import begin_in_child, worker_commands
from netproxy.config.schema import LogConfig, MetricsConfig, PacConfig
from netproxy.daemon.daemon import Daemon, PreparedReload
from netproxy.daemon.listening.notices import AddressNotices
from netproxy.daemon.workers.agents import AGENT, AGENT_STREAM, AgentTaker, StreamTaker
from netproxy.daemon.workers.messages import (
    ASSOCIATION,
    Message,
    MessageError,
    read_file,
    receive,
    send,
)
from netproxy.daemon.workers.housekeeping import NAMES
from netproxy.daemon.workers.inbox import AssociationTaker, Inbox
from netproxy.daemon.workers.notices import (
    ANSWER,
    CLEARED,
    FAILED_LOGIN,
    GUESSED,
    OWN_PORT,
    OWN_PORT_CLOSED,
    OWN_PORTS_WANTED,
    RIGHT_LOGIN,
    FailedLogins,
    OwnPorts,
    RightLogins,
)
from netproxy.daemon.workers.processes import INTERNAL
from netproxy.errors import ConfigError, ListenError, NetProxyError
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.admin.control.client import CommandRequest
    from netproxy.config.schema import Config
    from netproxy.daemon.plan import Plan
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.workers.inbox import Taker
    from netproxy.daemon.workers.processes import WorkerEnds
    from netproxy.daemon.workers.sockets import WorkerSockets
    from netproxy.interfaces.addresses import Address

    OwnSocketList = Sequence[tuple[str, Address]]

LOOK_SECONDS = 2.0
"""Between two looks whether all threads are alive."""
DRAIN_STEP = 0.1
"""Seconds between two looks whether all connections have ended."""
NO_DESCRIPTOR = "worker %d has no descriptor left for the sockets"
FINE, CANNOT_LISTEN, CONFIGURATION = 0, 69, 78
"""Exit statuses of sysexits(3)."""


class Worker:
    """A worker process.  Thread: main."""

    def __init__(self, runtime: Runtime, sockets: WorkerSockets, ends: WorkerEnds) -> None:
        """`runtime` is inherited from the parent, and serves on `sockets`."""
        self._runtime = runtime
        self._log = runtime.log
        self._sockets = sockets
        self._ends = ends
        runtime.given = sockets
        runtime.become_worker(ends.number)
        assert runtime.hand_overs is not None
        runtime.hand_overs.use_index(ends.number)
        self._daemon = Daemon(runtime.log, runtime)
        begin_in_child(self._daemon, ends.number, ends.workers, ends.restarts)
        self._own_ports = OwnPorts(runtime.hand_overs, runtime.own, runtime.log)
        runtime.own.announce = self._own_ports.announce
        self._failed_logins = FailedLogins(runtime.hand_overs, runtime.back_off, runtime.counters)
        self._right_logins = RightLogins(runtime.hand_overs, self._daemon, runtime.accounts)
        runtime.hand_overs.granted = self._right_logins.granted
        self._addresses = AddressNotices(runtime.hand_overs, self._daemon)
        self._hand_overs = runtime.hand_overs
        self._inbox = Inbox(ends.inbox, self._takers(), runtime.counters, runtime.log)
        self._failed_logins.inbox = self._inbox
        runtime.back_off.others = self._failed_logins
        self._prepared: PreparedReload | None = None
        self._draining = False
        self._has_lost_sockets = False
        # Name the addresses that are closed with the next commit or discard.
        self._gone: list[Message] = []
        # That of the order which is followed; its answer has it as well.
        self._number: object = None
        # Of the configuration that is prepared.
        self._own: OwnSocketList = ()
        self._log_config = LogConfig()
        # Take the registrations of the parent's sockets back.
        self._removals: list[Callable[[], None]] = []

    def _takers(self) -> Mapping[str, Taker]:
        """Return what takes messages of other workers, by their kind."""
        daemon, runtime, ports = self._daemon, self._runtime, self._own_ports
        return {
            ASSOCIATION: AssociationTaker(daemon, self._right_logins, runtime.counters),
            AGENT: AgentTaker(daemon.current_tunnels, runtime),
            AGENT_STREAM: StreamTaker(daemon.current_tunnels, runtime, self._hand_overs.joints),
            OWN_PORT: ports.take_opened,
            OWN_PORT_CLOSED: ports.take_closed,
            OWN_PORTS_WANTED: ports.take_wanted,
            FAILED_LOGIN: self._failed_logins.take_failure,
            GUESSED: self._failed_logins.take_guess,
            CLEARED: self._failed_logins.take_success,
            RIGHT_LOGIN: self._right_logins.take,
            **self._addresses.takers(),
            ANSWER: self._right_logins.take_answer,
        }

    def run(self, plan: Plan, own: OwnSocketList) -> int:
        """Serve until the parent says otherwise; return the exit status.

        `own`: sockets of the parent that no client may be led to.
        """
        try:
            self._keep_from(own)
            self._own_ports.begin()
            self._daemon.start_plan(plan._replace(config=self._own_part(plan.config)))
            self._right_logins.follow()
            self._inbox.start()
            self._addresses.begin()
            commands = worker_commands(self._daemon, self._log)
            serve_questions(self._ends.questions, {**commands, NAMES: self._user_names}, self._log)
        except (ConfigError, ListenError, RuntimeError) as error:
            self._say("failed", error=str(error), listen=not isinstance(error, ConfigError))
            self._daemon.stop()
            return CONFIGURATION if isinstance(error, ConfigError) else CANNOT_LISTEN
        self._say("serving")
        try:
            status = self._obey()
        except (EOFError, MessageError, ConnectionError):
            # Its sockets must be free at once for the next daemon.
            self._log.error("worker %d: the parent has died", self._ends.number)
            return INTERNAL
        self._hand_overs.leave()
        self._daemon.stop()
        self._inbox.stop()
        return status

    def _user_names(self, request: CommandRequest) -> list[str]:
        """Return users who are not configured, after so many.  Thread: that of the questions."""
        usage = self._runtime.usage
        assert isinstance(usage, WorkerUsage)
        return usage.names(int(str(request["after"])))

    def _obey(self) -> int:
        """Obey orders until one ends the worker.  Raises EOFError, MessageError."""
        while True:
            seconds = DRAIN_STEP if self._draining else LOOK_SECONDS
            order = receive(self._ends.orders, seconds)
            if dead := self._dead_thread():
                self._log.error("worker %d: the thread '%s' has died", self._ends.number, dead)
                return INTERNAL
            if self._draining and not self._serves:
                return FINE
            if order is None:
                continue
            if order.kind == "stop":
                return FINE
            self._follow(order)

    @property
    def _serves(self) -> bool:
        """True if it has connections, or relays some for another worker."""
        return self._daemon.live > len(self._hand_overs.given) or bool(self._hand_overs.joints)

    def _dead_thread(self) -> str:
        if not self._inbox.thread.is_alive():
            return self._inbox.thread.name
        return self._daemon.dead_thread()

    def _follow(self, order: Message) -> None:
        self._number = order.fields.get("number")
        if order.kind == "sockets":
            self._take_sockets(order)
        elif order.kind == "prepare":
            self._prepare(order)
        elif order.kind == "commit":
            self._commit()
        elif order.kind == "discard":
            self._discard()
        elif order.kind == "gone":
            self._gone.append(order)
        elif order.kind == "reopen":
            self._log.reopen()
        elif order.kind == "drain":
            self._draining = True
            self._daemon.stop_accepting(for_all=True)
            self._sockets.close()
            self._say("draining", live=self._daemon.connections)

    # -- reloads

    def _take_sockets(self, order: Message) -> None:
        """Keep the sockets that the next configuration adds."""
        if not order.is_whole:
            self._has_lost_sockets = True
            return
        keys = order.fields["keys"]
        assert isinstance(keys, list)
        sockets = iter(order.sockets())
        for network, address, is_given in keys:
            self._sockets.add((network, address), next(sockets) if is_given else None)

    def _prepare(self, order: Message) -> None:
        try:
            content = read_file(order.descriptors[0]) if order.is_whole else b""
        except OSError as error:
            self._say("refused", error=f"cannot reload: {error.strerror}", listen=False)
            return
        if self._has_lost_sockets or not order.is_whole:
            self._say("refused", error=NO_DESCRIPTOR % self._ends.number, listen=True)
            return
        # From our own parent.
        config: Config
        own: OwnSocketList
        config, own = pickle.loads(content)
        try:
            self._prepared = self._daemon.prepare(self._own_part(config))
        except NetProxyError as error:
            self._say("refused", error=str(error), listen=isinstance(error, ListenError))
        else:
            self._own, self._log_config = own, config.log
            self._say("ready")

    def _keep_from(self, own: OwnSocketList) -> None:
        """Keep clients from sockets of the parent."""
        before, registry = self._removals, self._runtime.own
        self._removals = [registry.register(network, address) for network, address in own]
        for remove in before:
            remove()

    def _own_part(self, config: Config) -> Config:
        """Return a configuration without what the first worker alone does.

        The daemon's own agent has one connection to its bridge.
        """
        if not self._ends.number:
            return config
        return config._replace(tunnel=config.tunnel._replace(agent=None))

    def _commit(self) -> None:
        if self._prepared is not None:
            self._prepared.commit()
            self._prepared = None
            self._log.configure(*self._log_config)
            self._right_logins.follow()
            self._addresses.begin()
        self._keep_from(self._own)
        self._forget()
        self._say("committed")

    def _discard(self) -> None:
        if self._prepared is not None:
            self._prepared.discard()
            self._prepared = None
        self._forget()
        self._say("discarded")

    def _forget(self) -> None:
        """Close the sockets of addresses that are not served any more."""
        self._has_lost_sockets = False
        for order in self._gone:
            keys = order.fields["keys"]
            assert isinstance(keys, list)
            for network, address in keys:
                self._sockets.remove((network, address))
        self._gone.clear()

    def _say(self, kind: str, **fields: object) -> None:
        send(self._ends.orders, Message({"kind": kind, "number": self._number, **fields}))


def worker_config(config: Config) -> Config:
    """Return the configuration of a worker: what the parent owns is left out."""
    return config._replace(control="", metrics=MetricsConfig(), pac=PacConfig())
