"""The daemon: builds the object graph from a Config, starts, reloads, drains and stops it.

The only module that knows everyone.  Its methods run on the main thread.
"""
from __future__ import annotations

import gc
import resource
import socket
import time
from functools import partial
from typing import Any, Callable, Iterator

from netproxy import report
from netproxy.access.acl import NetworkList
from netproxy.access.limits import Admission
from netproxy.access.users import Users, check_password
from netproxy.config.schema import Config, ListenerConfig, WayConfig
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.health import HealthChecks
from netproxy.dialer.socks5_udp import Services
from netproxy.errors import ConfigError, DialError, ListenError, Reason
from netproxy.handler.factory import ListenerHandler, Surroundings, make_handler, secure
from netproxy.handler.socks5_udp import RelayState, Socks5UdpRelay
from netproxy.interfaces import READABLE, Address, Dialer, Pause
from netproxy.listener.manager import ListenerManager, Wanted
from netproxy.listener.parker import Parker
from netproxy.listener.pool import ThreadPool
from netproxy.listener.tcp import TcpListener
from netproxy.listener.udp import UdpListener
from netproxy.net.batching import Datagrams
from netproxy.net.calls import trim
from netproxy.net.resolve import Resolver
from netproxy.net.stream import Stream
from netproxy.observe.flows import Flows
from netproxy.observe.log import Log
from netproxy.observe.metrics import Counters
from netproxy.relay.association import Associations
from netproxy.relay.capacity import Caps
from netproxy.relay.janitor import Janitor
from netproxy.relay.nat import NatPolicy, NatTable
from netproxy.relay.opening import Workers
from netproxy.router.router import ListenerRouter

RESERVED_DESCRIPTORS = 64   # of RLIMIT_NOFILE: listeners, log, lookups
DESCRIPTORS_A_CONNECTION = 3    # client, upstream, and one while a name or a second address is tried
# The queue takes as many new clients at once as there may be sessions; threads enough that one silent proxy holds up few.
DIAL_THREADS, DIAL_QUEUE = 64, 4096
CHECK_THREADS, CHECK_QUEUE = 8, 256     # health checks: apart, so that what a dead proxy holds up is not the news of it
NAME_THREADS, NAME_QUEUE = 16, 256     # UDP targets whose names are looked up: apart, so that no dial waits behind them
LOOKUP_THREADS, LOOKUP_QUEUE = 8, 256
THREADS_LIMIT = 1024        # for connections: what only waits has none, so that these are at work or shaking hands
EAGER_THREADS = 4           # for connections; beyond, more threads only help those that wait for their peers
COLLECT_SECONDS = 30.0      # between two looks for garbage: with 10,000 connections one takes 50 ms
STOP_STEP = 0.01            # seconds between two looks at whether they have
STOP_SECONDS = 2.0          # for threads to end once their sockets have been shut down


StateKey = tuple[str, Address]      # a listener's name and one of its addresses


class _Thrift:
    """Gives back what a burst has left, once its threads have gone; the janitor looks every second."""

    def __init__(self, pool: ThreadPool) -> None:
        self._pool = pool
        self._collected_at = 0.0
        self._threads = 1       # of the pool when it last looked; at the start there is what reading the configuration left

    def expire(self, now: float) -> list[Any]:
        before, self._threads = self._threads, self._pool.threads
        if self._threads < before:
            if now - self._collected_at >= COLLECT_SECONDS:
                self._collected_at = now
                gc.collect()        # what is left of connections keeps pages that others have gone from
            trim()
        return []


class Daemon:
    def __init__(self, log: Log) -> None:
        self._log = log
        self.counters = Counters()
        self.flows = Flows(log.finished)
        self._connections = ThreadPool("connection", 1, 0, log, eager=EAGER_THREADS)
        self._parker = Parker(log)
        self._dials = ThreadPool("dial", DIAL_THREADS, DIAL_QUEUE, log)
        self._names = ThreadPool("name", NAME_THREADS, NAME_QUEUE, log)
        self._lookups = ThreadPool("lookup", LOOKUP_THREADS, LOOKUP_QUEUE, log)
        self._resolver = Resolver(self._lookups.submit, self.counters)
        self._datagrams = Datagrams(self.counters, log)
        self._services = Services(self._watch, self._dials.submit, self.counters)
        self._janitor = Janitor(log)
        self._checks = ThreadPool("check", CHECK_THREADS, CHECK_QUEUE, log)
        self._health = HealthChecks(self._checks.submit, log)
        self._manager = ListenerManager({
            "tcp": lambda address: TcpListener(self._concrete(address), self._connections, self._parker, self.counters, log),
            "udp": lambda address: UdpListener(self._concrete(address), self._datagrams, self.counters, log)})
        self._dialers: DialerFactory | None = None
        self._dial_seconds = 0.0
        self._named_ways: dict[str, WayConfig] = {}
        self._control: Any = None           # observe.control.ControlServer
        self.way_out = ""           # of what has no upstream of its own, for one line of a log
        self._states: dict[StateKey, RelayState] = {}       # of each listening address with UDP
        self._admissions: dict[str, Admission] = {}         # by listener's name
        self._retired: list[TcpListener] = []               # stopped, with connections that may still live
        self._tags = iter(range(1, 1 << 62))

    # -- life

    def start(self, config: Config) -> None:
        """Listens and serves; ConfigError or ListenError, and then nothing is left open."""
        self._datagrams = Datagrams(self.counters, self._log, config.batching)
        self._parker.start()
        self._with_control(config)
        self._janitor.register(_Thrift(self._connections))
        self._janitor.register(self._health)
        self._janitor.start()

    def reload(self, config: Config) -> None:
        """The new configuration for whatever comes from now on; on ConfigError or ListenError nothing has changed."""
        self._with_control(config)

    def stop_accepting(self) -> None:
        """No new connections; those that live, and their datagrams, go on."""
        self._retired += self._manager.stop(("tcp",))
        self._parker.release_expendable()

    def stop(self) -> None:
        """Ends everything that lives."""
        self.stop_accepting()
        for listener in self._retired:
            listener.abort()
        for state in self._states.values():
            state.table.close()
        if self._control is not None:
            self._control.stop()
        deadline = time.monotonic() + STOP_SECONDS
        while self.live and time.monotonic() < deadline:
            time.sleep(STOP_STEP)       # what was parked wakes up to end
        self._parker.stop()
        self._connections.stop(STOP_SECONDS)
        self._manager.stop()
        self._janitor.stop()
        for pool in (self._dials, self._names, self._lookups, self._checks):
            pool.stop(STOP_SECONDS)

    # -- what it is like

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        tcp = [listener for listener in self._manager.listeners if listener.network == "tcp"]
        return sum(listener.live for listener in tcp + self._retired)

    def dead_thread(self) -> str:
        """The name of a thread that must live but does not, "" while all is well."""
        control = [self._control.thread] if self._control is not None else []
        for thread in [self._janitor.thread, self._parker.thread, *control, *(listener.thread for listener in self._manager.listeners)]:
            if not thread.is_alive():
                return thread.name
        return ""

    def summary(self) -> str:
        """What listens, for one line of a log."""
        return ", ".join(f"{listener.network} {listener.address}" for listener in self._manager.listeners) or "nothing"

    def status(self) -> Iterator[str]:
        """For the log, a line each."""
        yield (f"connections={self.live} parked={len(self._parker)} threads={self._connections.threads} "
               f"listeners: {self.summary()}")
        for (name, address), state in self._states.items():
            yield (f"udp {name} {address}: associations={len(state.associations)} sessions={len(state.table)} "
                   f"entries={len(state.table.entries)}")
        for name, reason, value in self.counters.items():
            yield f"{name}{{{reason}}}={value}"

    def describe(self, config: Config) -> list[str]:
        """What would listen, and what each way out can carry; ConfigError.  Opens nothing."""
        dialers = DialerFactory(self._resolver, self._datagrams, config.timeouts.connect, self._services)
        self._surroundings(config, dialers)
        for one in config.listeners:
            if one.tls:
                secure(one.tls)
        return report.plan(config, dialers)

    # -- building

    def _with_control(self, config: Config) -> None:
        """Applies a configuration together with its control socket: both or neither."""
        kept = self._control if self._control is not None and self._control.path == config.control else None
        commands = {"status": lambda request: {"lines": list(self.status())},
                    "upstreams": lambda request: report.upstreams(self._made_dialers(), self._named_ways)}
        fresh = kept
        if config.control and not kept:
            from netproxy.observe.control import ControlServer      # late: many have none
            fresh = ControlServer(config.control, commands, self._log)
        try:
            self._apply(config)
        except BaseException:
            if fresh is not None and fresh is not kept:
                fresh.stop()
            raise
        if self._control is not None and self._control is not kept:
            self._control.stop()
        self._control = fresh
        if fresh is not None and fresh is not kept:
            fresh.start()

    def _made_dialers(self) -> DialerFactory:
        assert self._dialers is not None        # it has started
        return self._dialers

    def _apply(self, config: Config) -> None:
        dialers = self._dialers
        if dialers is None or self._dial_seconds != config.timeouts.connect:
            dialers = DialerFactory(self._resolver, self._datagrams, config.timeouts.connect, self._services)
        adopt = dialers.renewal(_ways(config))      # of what is there already; the rest is read as it is made
        around = self._surroundings(config, dialers)
        states: dict[StateKey, RelayState] = {}
        wanted = [one for listener in config.listeners for address in listener.addresses
                  for one in self._wanted(listener, address, states, around)]
        before_udp = [listener for listener in self._manager.listeners if listener.network == "udp"]
        before = self._connections.limit
        self._connections.limit = max(before, _room_for(config))
        try:
            gone = self._manager.replace(wanted)
        except ListenError:
            self._connections.limit = before
            raise
        adopt()
        self._connections.limit = _room_for(config)
        self._dialers, self._dial_seconds = dialers, config.timeouts.connect
        self.way_out = config.default.text
        self._named_ways = {} if config.default.name else {"default": config.default}
        self._named_ways.update(config.upstreams)
        dialers.forget_all_but(_ways(config))
        self._health.checks = [check for group in dialers.groups() for check in group.checks]
        user_sessions = {name: user.sessions for name, user in config.users.items() if user.sessions}
        for listener in config.listeners:
            for address in listener.addresses:
                if (listener.name, address) in states:
                    states[listener.name, address].table.set_policy(_policy(listener, user_sessions))
        fresh = [listener for listener in self._manager.listeners if listener.network == "udp" and listener not in before_udp]
        self._retire(gone, fresh, states)
        for text in report.udp_warnings(config, dialers):
            self._log.warning("%s", text)

    def _retire(self, gone: list[Any], fresh: list[Any], states: dict[StateKey, RelayState]) -> None:
        for listener in gone:
            if listener.network == "udp":
                self._janitor.forget(listener)
        for listener in fresh:
            self._janitor.register(listener)
        self._retired = [listener for listener in self._retired if listener.live]
        self._retired += [listener for listener in gone if listener.network == "tcp" and listener.live]
        for key, state in self._states.items():
            if states.get(key) is not state:
                self._janitor.forget(state.table)
                state.table.close()
        for key, state in states.items():
            if self._states.get(key) is not state:
                self._janitor.register(state.table)
        self._states = states

    def _surroundings(self, config: Config, dialers: DialerFactory) -> Surroundings:
        for name, user in config.users.items():
            try:
                check_password(user.password)
            except ValueError as error:
                raise ConfigError(f"users.{name}.password: {error}", user.place) from error
        users = Users({name: user.password for name, user in config.users.items()})
        by_listener: dict[str, Dialer] = {
            one.name: dialers.way(one.upstream) for one in config.listeners if one.upstream}
        for way in config.upstreams.values():       # those in use only, but what is wrong with any is found now
            dialers.way(way)
        router = ListenerRouter(dialers.way(config.default), by_listener)
        return Surroundings(router, users, self._resolver, config.timeouts, config.splice, self.counters, self.flows, self._log)

    def _wanted(self, config: ListenerConfig, address: Address, states: dict[StateKey, RelayState],
                around: Surroundings) -> Iterator[Wanted]:
        """The sockets of one listening address; the packet side first, so that it is there before the first ASSOCIATE."""
        state = None
        if "udp" in config.network:
            state = states[config.name, address] = self._state(address, config)
        made = make_handler(config, state, around)
        group = f"{config.name} {address}"
        if config.protocol != "http" and "udp" in config.network and (made.udp is None or config.udp.relay_port == "shared"):
            yield Wanted("udp", address, group, partial(_equip_udp, made))
        elif made.udp is not None:
            made.udp.open_port = partial(self._open_port, _ports(config.udp.relay_port))
        if "tcp" in config.network:
            yield Wanted("tcp", address, group, partial(self._equip_tcp, made, config, around.timeouts.handshake))

    def _equip_tcp(self, made: ListenerHandler, config: ListenerConfig, handshake: float, listener: TcpListener) -> None:
        """One admission for all addresses of a listener; a reload does not forget who is in."""
        # who comes in by a proxy is looked at once it has said for whom it speaks
        limits = (NetworkList(config.clients + config.proxy_protocol) if config.clients else None,
                  config.limits.connections, config.limits.connections_per_client or 1)
        admission = self._admissions.get(config.name)
        if admission is None:
            admission = self._admissions[config.name] = Admission(*limits)
        admission.configure(*limits)
        listener.equip(made.handler, admission, handshake)

    def _state(self, address: Address, config: ListenerConfig) -> RelayState:
        """What lives on an address, kept over a reload."""
        state = self._states.get((config.name, address))
        if state is None:
            arenas, workers = self._datagrams.arenas(), Workers(self._dials.submit, self._names.submit)
            table = NatTable(_policy(config, {}), arenas, workers, self.counters, self.flows, self._log)
            return RelayState(Associations(), table, arenas)
        return state

    def _open_port(self, ports: range, relay: Socks5UdpRelay, host: str) -> UdpListener:
        """A relay socket of one association's own, on the address its control connection came to."""
        tag = b"%d" % next(self._tags)
        start = next(self._tags) % len(ports)       # one after the other, so that a port just freed rests
        for at in range(len(ports)):
            try:
                address = Address(host, ports[(start + at) % len(ports)])
                listener = UdpListener(address, self._datagrams, self.counters, self._log, tag)
            except ListenError:
                continue
            listener.handler = relay
            listener.start()
            return listener
        raise DialError(Reason.GENERAL, "no relay port is free")

    def _watch(self, stream: Stream, said: Callable[[], None]) -> None:
        """Calls `said` once, on the parker's thread, when something comes on a stream."""
        pause = Pause(((stream.socket, READABLE),), None, lambda ready: None)
        self._parker.park(pause, lambda pause, ready: said(), lambda: None)

    def _concrete(self, address: Address) -> Address:
        """A name resolved, and the wildcard of a machine without IPv6 made IPv4's."""
        if address.host == "::" and not _has_ipv6():
            return address._replace(host="0.0.0.0")
        try:
            return self._resolver.resolve(address)[0]
        except DialError as error:
            raise ListenError(f"{address}: {error}") from error


def raise_descriptor_limit() -> None:
    """RLIMIT_NOFILE to what the system allows: nothing here uses select(2), so that more cannot hurt."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ways(config: Config) -> list[WayConfig]:
    return [config.default, *config.upstreams.values(), *(one.upstream for one in config.listeners if one.upstream)]


def _policy(config: ListenerConfig, user_sessions: dict[str, int]) -> NatPolicy:
    udp = config.udp
    return NatPolicy(Caps(udp.max_sessions, udp.max_sessions_per_client or 1, user_sessions), udp.idle_timeout,
                     udp.mapping == "symmetric", udp.filtering)


def _room_for(config: Config) -> int:
    """Threads for connections: what the listeners admit, as far as descriptors and reason last."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sum(one.limits.connections * len(one.addresses) for one in config.listeners)
    return max(1, min(wanted, THREADS_LIMIT, (descriptors - RESERVED_DESCRIPTORS) // DESCRIPTORS_A_CONNECTION))


def _equip_udp(made: ListenerHandler, listener: UdpListener) -> None:
    if made.udp is not None:
        made.udp.shared = listener.local
    listener.handler = made.handler


def _ports(relay_port: str) -> range:
    if relay_port == "any":
        return range(1)     # 0: the kernel chooses
    first, _, last = relay_port.partition("-")
    return range(int(first), int(last) + 1)


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True
