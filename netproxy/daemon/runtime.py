"""What outlives every configuration: thread pools, poller, janitor, resolver and counters.

The daemon makes one Runtime, starts it and stops it, on the main thread.  Listeners,
handlers and dialers of all configurations use it.
"""

from __future__ import annotations

import os
import resource

from netproxy.access.accounts.counting import Counting
from netproxy.access.backoff import LOGIN_SECONDS, BackOff
from netproxy.access.permission import Permissions
from netproxy.config.schema import AutoConfig, Config, TunnelConfig
from netproxy.daemon.process.activation import ActivationSockets
from netproxy.daemon.process.memory import MemoryTrimmer
from netproxy.daemon.reachability import Reachability
from netproxy.dialer.plain.factory import CommandFactory
from netproxy.errors import DialError, ListenError
from netproxy.interfaces.addresses import ActivationAddress, Address, UnixAddress
from netproxy.interfaces.connections import READABLE, Stream, Wait
from netproxy.interfaces.datagrams import PacketDependencies
from netproxy.listener.fair_queue import FairQueue
from netproxy.listener.poller import Poller
from netproxy.listener.pool import ThreadPool
from netproxy.listener.handshake_driver import Serving
from netproxy.listener.tcp import TcpListener
from netproxy.listener.udp import UdpListener
from netproxy.listener.watch import Notification
from netproxy.net.address import has_ipv6
from netproxy.net.local.routes import KernelRoutes
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.observe.flows import Flows
from netproxy.observe.history import History
from netproxy.observe.incidents import Incidents
from netproxy.observe.log import Log
from netproxy.observe.metrics import Counters
from netproxy.observe.refusals import RefusalLog
from netproxy.relay.janitor import Janitor
from netproxy.relay.table.policy import NatDependencies
from netproxy.resolver.client_names.name_tables import NameTables
from netproxy.router.auto import Verdicts
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.access.accounts.usage import UsageBook
    from netproxy.access.accounts.worker_usage import WorkerUsage
    from netproxy.access.checks.lanes import PasswordLanes
    from netproxy.daemon.workers.hand_over import HandOvers
    from netproxy.dialer.health import Check, HealthChecks
    from netproxy.tunnel.elsewhere import OtherWorkers
    from netproxy.interfaces.listeners import GivenSockets

# Descriptors of RLIMIT_NOFILE kept for listeners, log and lookups; and those of a connection:
# client, upstream, and one more while a name or a second address is tried.
RESERVED_DESCRIPTORS, DESCRIPTORS_PER_CONNECTION = 64, 3
# Each pool: its most threads, and how many tasks may wait.
# Dials of UDP sessions: the queue takes as many new clients at once as there may be sessions.
UDP_DIAL_THREADS, UDP_DIAL_QUEUE = 128, 4096
# Dials of the daemon itself: work connections, and associations to be reopened.
DIAL_THREADS, DIAL_QUEUE = 64, 4096
# Queries of dns listeners.  A pool of its own: what strangers ask must not hold up our lookups.
# One client alone has half of its threads, as of every pool that clients share (fair_queue).
QUERY_THREADS, QUERY_QUEUE = 128, 1024
# Health checks.  A pool of its own: a dead proxy must not hold up the check that finds it dead.
CHECK_THREADS, CHECK_QUEUE = 8, 256
# Names of UDP targets.  A pool of its own: no dial waits behind them.
NAME_THREADS, NAME_QUEUE = 128, 256
# Lookups of the resolver.  Threads start on demand: many slow names at once delay no other.
LOOKUP_THREADS, LOOKUP_QUEUE = 128, 256
# Checks of logins by a program or a service: each may be a process; and the queue of each of the
# two lanes for hashed passwords (access.checks.lanes), which have a thread each.
LOGIN_THREADS, LOGIN_QUEUE, PASSWORD_QUEUE = 32, 1024, 256

CONNECTION_THREADS_LIMIT = 1024
"""Threads for connections.  Idle connections have none: these are relaying or shaking hands."""
EAGER_THREADS = 4
"""Connection threads that start at once; more only help if the running ones wait for peers."""
STOP_SECONDS = 2.0
"""How long threads may take to end once their sockets have been shut down."""


class Runtime:
    """The parts that all configurations share; start() before they are used, stop() last."""

    def __init__(self, log: Log, workers: int = 1) -> None:
        """Make the parts; with several workers those of their parent, which start none of them.

        Each worker inherits them by fork and calls become_worker() before start().
        """
        self.log, self.incidents = log, Incidents(step=workers + 1)
        self.refusals = RefusalLog(log, self.incidents)
        self.counters = Counters(self.refusals.note, self.refusals.leaves_out)
        log.counter, log.incidents = self.counters, self.incidents
        self.back_off = BackOff(LOGIN_SECONDS)
        self.flows = Flows(log.finished, self.incidents)
        self.counting = Counting(workers)
        self.history = History(self.flows, self.counting.folder)
        self.standing, self.accounts = self.counting.standing, self.counting.accounts
        self.connections = ThreadPool("connection", 1, 0, log, eager=EAGER_THREADS)
        self.poller = Poller(log)
        self._dials = ThreadPool("dial", DIAL_THREADS, DIAL_QUEUE, log)
        udp_dials = ThreadPool("udp-dial", UDP_DIAL_THREADS, 0, log)
        self._udp_dials = FairQueue(udp_dials, UDP_DIAL_QUEUE)
        self._names = FairQueue(ThreadPool("name", NAME_THREADS, 0, log), NAME_QUEUE)
        self._lookups = FairQueue(ThreadPool("lookup", LOOKUP_THREADS, 0, log), LOOKUP_QUEUE)
        self._queries = FairQueue(ThreadPool("query", QUERY_THREADS, 0, log), QUERY_QUEUE)
        self.checks = ThreadPool("check", CHECK_THREADS, CHECK_QUEUE, log)
        self.logins = FairQueue(ThreadPool("login", LOGIN_THREADS, 0, log), LOGIN_QUEUE)
        self.clean = FairQueue(ThreadPool("password", 1, 0, log), PASSWORD_QUEUE)
        self.suspect = FairQueue(ThreadPool("suspect", 1, 0, log), PASSWORD_QUEUE)
        self.login_key = os.urandom(32)  # of digests of logins; the same in all workers
        self.passwords: PasswordLanes | None = None  # made with the first hashed password
        self.routes = KernelRoutes(log)
        self.reachability = Reachability(self._lookups.submit, self.counters, self.routes)
        self.resolver, self.own = self.reachability.resolver, self.reachability.own
        self.names = NameTables(workers)  # before any fork: all workers share them
        self.given: GivenSockets = ActivationSockets(os.environ)
        self.hand_overs: HandOvers | None = None  # of workers alone
        self.agents_elsewhere: OtherWorkers | None = None  # as above
        self.datagrams = UdpSocketFactory(self.counters, log)
        self.packet_dependencies = PacketDependencies(
            self._watch, self._dials.submit, self.counters
        )
        self.dials, self.queries = self._dials.submit, self._queries.submit
        self.permissions = Permissions()
        self.janitor = Janitor(log)
        self.commands = CommandFactory(log, self.janitor.register)
        # Made with the first check: many configurations have none.
        self._health: HealthChecks | None = None
        self.verdicts = Verdicts(AutoConfig().remember, AutoConfig().entries)
        self.serving = Serving(self.connections, self.poller, self.counters, log)

    def become_worker(self, index: int) -> None:
        """Be the worker with this index: call it in the child, right after the fork.

        The process must end with os._exit(), see Counting.become_worker().
        """
        self.counting.become_worker(index)
        self.names.become_worker(index)
        # The parent may have looked names up, with threads that are not here.
        for pool in self.pools.values():
            pool.begin_in_child()

    @property
    def usage(self) -> UsageBook | WorkerUsage:
        """What users have moved; a worker does not know it."""
        return self.counting.usage

    def nat_dependencies(self) -> NatDependencies:
        """Return what a NAT table needs."""
        arenas, dials, names = self.datagrams.arenas, self._udp_dials.submit, self._names.submit
        observing = self.counters, self.flows, self.accounts, self.log
        return NatDependencies(arenas, dials, names, *observing, self.names.renew_fake)

    @property
    def pools(self) -> dict[str, ThreadPool | FairQueue]:
        """The thread pools by name, for statistics."""
        return {
            "connection": self.connections,
            "dial": self._dials,
            "udp_dial": self._udp_dials,
            "name": self._names,
            "lookup": self._lookups,
            "query": self._queries,
            "check": self.checks,
            "login": self.logins,
            "password": self.clean,
            "suspect": self.suspect,
        }

    def separate_reachability(self) -> Reachability:
        """Return a Reachability for a plan that is only asked; its lookups are not counted."""
        return Reachability(self._lookups.submit, Counters(), self.routes)

    def choose_batching(self, batching: str) -> None:
        """Choose how datagrams are sent and received, as in net.datagram; before build()."""
        self.datagrams = UdpSocketFactory(self.counters, self.log, batching)

    def start(self) -> None:
        """Start what connections need.

        The janitor starts with run().  Raises ListenError if a thread cannot be had.
        """
        self.routes.open()
        start_thread("poller", self.poller.start)

    def run(self) -> None:
        """Start the janitor.  Raises ListenError if its thread cannot be had."""
        trimmer = MemoryTrimmer(self._things_in_memory, self.datagrams.arenas.release)
        for expirable in (trimmer, self.log, self.refusals, self.accounts):
            self.janitor.register(expirable)
        if not self.counting.is_worker:
            self.janitor.register(self.counting.book)
        self.janitor.register(self.history)
        start_thread("janitor", self.janitor.start)

    @property
    def health_checks(self) -> Sequence[Check]:
        """The health checks of the configuration in force."""
        return self._health.checks if self._health is not None else ()

    def check_health(self, checks: Sequence[Check]) -> None:
        """Make the health checks of a new configuration from now on."""
        if self._health is None:
            if not checks:
                return
            from netproxy.dialer.health import HealthChecks  # late: see __init__()

            self._health = HealthChecks(self.checks.submit, self.log)
            self.janitor.register(self._health)
        self._health.checks = checks

    def stop(self) -> None:
        """Stop the janitor and the pools except that of connections; after the listeners."""
        self.janitor.stop()
        self.commands.stop()
        self.accounts.settle()
        self.counting.use_store(None)
        for pool in self.pools.values():
            if pool is not self.connections:
                pool.stop(STOP_SECONDS)
        self.given.close()
        self.routes.close()

    def concrete(self, address: Address) -> Address:
        """Return the address to bind for a configured one.

        A name is looked up; on a machine without IPv6 [::] becomes 0.0.0.0.
        Raises ListenError if the name is not found.
        """
        if isinstance(address, (ActivationAddress, UnixAddress)):
            return address
        if address.host == "::" and not has_ipv6():
            return address._replace(host="0.0.0.0")
        try:
            return self.resolver.resolve(address)[0]
        except DialError as error:
            raise ListenError(f"{address}: {error}") from error

    def tcp_listener(self, address: Address) -> TcpListener:
        """Return a bound TCP listener.  Raises ListenError."""
        given = self.given.take("tcp", address)
        if isinstance(address, UnixAddress):
            from netproxy.listener.sockets.unix import UnixListener  # late: few have one

            return UnixListener(address, self.serving, given)
        return TcpListener(self.concrete(address), self.serving, given)

    def udp_listener(self, address: Address) -> UdpListener:
        """Return a bound UDP listener.  Raises ListenError."""
        given = self.given.take("udp", address)
        address = self.concrete(address)
        return UdpListener(address, self.datagrams, self.counters, self.log, given=given)

    def _things_in_memory(self) -> int:
        return self.connections.threads + len(self.flows) + self.poller.watched

    def _watch(self, stream: Stream, notify: Callable[[], None]) -> None:
        """Call `notify` once, on the poller's thread, when something comes on a stream."""
        notification = Notification(notify)
        wait = Wait(((stream.socket, READABLE),), None, notification.resume)
        self.poller.watch(wait, notification)


def start_thread(name: str, start: Callable[[], None]) -> None:
    """Start a thread.  Raises ListenError if it cannot be had."""
    try:
        start()
    except (RuntimeError, OSError) as error:  # can't start new thread, or no descriptor
        raise ListenError(f"{name}: {error}") from error


def raise_descriptor_limit() -> None:
    """Raise RLIMIT_NOFILE to the hard limit; nothing here uses select(2), which would break."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        # The limit of the system (fs.nr_open) is lower, or a filter forbids the system call.
        pass


def connection_threads(config: Config) -> int:
    """Return how many threads connections may have, at least 1.

    As many as the listeners admit connections, but no more than descriptors allow, nor than
    CONNECTION_THREADS_LIMIT.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    admitted = sum(
        listener.limits.connections * len(listener.addresses) for listener in config.listeners
    )
    if config.tunnel != TunnelConfig():
        # The ports of agents, and what bridges ask for.
        admitted += CONNECTION_THREADS_LIMIT
    allowed = (descriptors - RESERVED_DESCRIPTORS) // DESCRIPTORS_PER_CONNECTION
    return max(1, min(admitted, CONNECTION_THREADS_LIMIT, allowed))
