"""What outlives every configuration: pools of threads, the parker, the janitor, the resolver, the counters.

Built once by the daemon, started and stopped by it on the main thread.
"""

from __future__ import annotations

import gc
import os
import resource
import socket
from typing import Any, Callable, Iterable, Mapping

from netproxy.access.destinations import Destinations, OwnSockets, Policy
from netproxy.config.schema import AutoConfig, Config, TunnelConfig
from netproxy.dialer.health import HealthChecks
from netproxy.dialer.hop import Services
from netproxy.errors import DialError, ListenError
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.listener.poller import Poller
from netproxy.listener.pool import ThreadPool
from netproxy.listener.serving import Serving
from netproxy.listener.tcp import TcpListener
from netproxy.net.address import is_local
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.syscalls import trim
from netproxy.net.activation import ActivationSockets
from netproxy.net.stream import Stream
from netproxy.observe.flows import Flows
from netproxy.observe.log import Log
from netproxy.observe.metrics import Counters
from netproxy.relay.janitor import Janitor
from netproxy.resolver.resolver import Resolver
from netproxy.router.auto import Verdicts

RESERVED_DESCRIPTORS = 64  # of RLIMIT_NOFILE: listeners, log, lookups
DESCRIPTORS_A_CONNECTION = 3  # client, upstream, and one while a name or a second address is tried
# The queue takes as many new clients at once as there may be sessions; threads enough that one silent proxy holds up few.
DIAL_THREADS, DIAL_QUEUE = 64, 4096
QUERY_THREADS, QUERY_QUEUE = (
    64,
    1024,
)  # of dns listeners, to their servers: apart, so that strangers' names hold up no lookup
CHECK_THREADS, CHECK_QUEUE = (
    8,
    256,
)  # health checks: apart, so that what a dead proxy holds up is not the news of it
NAME_THREADS, NAME_QUEUE = (
    64,
    256,
)  # UDP targets whose names are looked up: apart, so that no dial waits behind them
LOOKUP_THREADS, LOOKUP_QUEUE = 64, 256  # on demand: as many slow names at once delay no other
THREADS_LIMIT = (
    1024  # for connections: what only waits has none, so that these are at work or shaking hands
)
EAGER_THREADS = 4  # for connections; beyond, more threads only help those that wait for their peers
BURST = 16  # threads, flows and the like that have gone before it is worth a look for what they have left
COLLECT_SECONDS = 15.0  # between two such looks: with 10,000 connections one takes 50 ms
STOP_SECONDS = 2.0  # for threads to end once their sockets have been shut down


class MemoryTrimmer:
    """Gives back what a burst has left, once half of it has gone; the janitor looks every second."""

    def __init__(self, held: Callable[[], int]) -> None:
        """`held`: how many things there are that take memory: threads, flows, descriptors that are watched."""
        self._held = held
        self._most = (
            2 * BURST
        )  # since it last gave back; at the start there is what reading the configuration left
        self._rest_until = 0.0

    def expire(self, now: float) -> list[Any]:
        held = self._held()
        self._most = max(self._most, held)
        if self._most - held >= max(BURST, held) and now >= self._rest_until:
            self._most, self._rest_until = held, now + COLLECT_SECONDS
            gc.collect()  # what is left of connections keeps pages that others have gone from
            trim()
        return []


class Runtime:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.counters = Counters()
        self.flows = Flows(log.finished)
        self.connections = ThreadPool("connection", 1, 0, log, eager=EAGER_THREADS)
        self.poller = Poller(log)
        self._dials = ThreadPool("dial", DIAL_THREADS, DIAL_QUEUE, log)
        self._names = ThreadPool("name", NAME_THREADS, NAME_QUEUE, log)
        self._lookups = ThreadPool("lookup", LOOKUP_THREADS, LOOKUP_QUEUE, log)
        self._queries = ThreadPool("query", QUERY_THREADS, QUERY_QUEUE, log)
        self._checks = ThreadPool("check", CHECK_THREADS, CHECK_QUEUE, log)
        self.resolver = Resolver(self._lookups.submit, self.counters)
        self.activated = ActivationSockets(os.environ)
        self.datagrams = UdpSocketFactory(self.counters, log, activated=self.activated)
        self.services = Services(self._watch, self._dials.submit, self.counters)
        self.dials = self._dials.submit
        self.names = self._names.submit
        self.queries = self._queries.submit
        self.janitor = Janitor(log)
        self.health = HealthChecks(self._checks.submit, log)
        self.verdicts = Verdicts(AutoConfig().remember, AutoConfig().entries)
        self.own = OwnSockets(is_local)
        self.destinations = Destinations(self.own)
        self.serving = Serving(self.connections, self.poller, self.counters, log)

    @property
    def pools(self) -> dict[str, ThreadPool]:
        return {
            "connection": self.connections,
            "dial": self._dials,
            "name": self._names,
            "lookup": self._lookups,
            "check": self._checks,
        }

    def start(self, batching: str) -> None:
        """`batching` as in net.datagram; the janitor begins only with run().  ListenError."""
        self.datagrams = UdpSocketFactory(self.counters, self.log, batching, self.activated)
        _begin("parker", self.poller.start)

    def run(self) -> None:
        """ListenError."""
        self.janitor.register(
            MemoryTrimmer(lambda: self.connections.threads + len(self.flows) + self.poller.watched)
        )
        self.janitor.register(self.health)
        self.janitor.register(self.log)
        _begin("janitor", self.janitor.start)

    def adopt(
        self, policies: Mapping[str, Policy], config: Config, own: Iterable[tuple[str, Address]]
    ) -> None:
        """What a configuration that counts from now on says of where clients may be led."""
        self.destinations.configure(policies)
        self.own.set(own)
        self.verdicts.seconds, self.verdicts.limit = config.auto.remember, config.auto.entries

    def stop(self) -> None:
        """After the listeners, and before what they had admitted has to be gone."""
        self.janitor.stop()
        for pool in (self._dials, self._names, self._lookups, self._queries, self._checks):
            pool.stop(STOP_SECONDS)
        self.activated.close()

    def concrete(self, address: Address) -> Address:
        """To listen on: a name resolved, and the wildcard of a machine without IPv6 made IPv4's.  ListenError."""
        if isinstance(address, ActivationAddress):
            return address
        if address.host == "::" and not _has_ipv6():
            return address._replace(host="0.0.0.0")
        try:
            return self.resolver.resolve(address)[0]
        except DialError as error:
            raise ListenError(f"{address}: {error}") from error

    def listener(self, address: Address) -> TcpListener:
        """ListenError."""
        return TcpListener(
            self.concrete(address),
            self.serving,
            self.activated.take("tcp", address) if isinstance(address, ActivationAddress) else None,
        )

    def _watch(self, stream: Stream, said: Callable[[], None]) -> None:
        """Calls `said` once, on the parker's thread, when something comes on a stream."""
        pause = Wait(((stream.socket, READABLE),), None, lambda ready: None)
        self.poller.watch(pause, lambda pause, ready: said(), lambda error: None)


def _begin(what: str, start: Callable[[], None]) -> None:
    try:
        start()
    except RuntimeError as error:  # can't start new thread
        raise ListenError(f"{what}: {error}") from error


def raise_descriptor_limit() -> None:
    """RLIMIT_NOFILE to what the system allows: nothing here uses select(2), so that more cannot hurt."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # fs.nr_open is below it, or a filter of system calls is in the way: what there is has to do


def room_for(config: Config) -> int:
    """Threads for connections: what the listeners admit, as far as descriptors and reason last."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sum(one.limits.connections * len(one.addresses) for one in config.listeners)
    if config.tunnel != TunnelConfig():
        wanted += THREADS_LIMIT  # agents' ports, and what bridges ask for
    return max(
        1,
        min(
            wanted, THREADS_LIMIT, (descriptors - RESERVED_DESCRIPTORS) // DESCRIPTORS_A_CONNECTION
        ),
    )


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True
