"""The daemon: applies a configuration, reloads it, drains what lives and stops.

The only module that knows everyone; what outlives a configuration is machinery's and
relays'.  Its methods run on the main thread.
"""
from __future__ import annotations

import time
from functools import partial
from typing import Any, Iterator

from netproxy import report
from netproxy.access.acl import NetworkList
from netproxy.access.limits import Admission
from netproxy.access.users import Users, check_password
from netproxy.config.schema import Config, ListenerConfig, TunnelConfig, WayConfig
from netproxy.dialer.direct import Reach
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import ConfigError, ListenError
from netproxy.handler.factory import ListenerHandler, Surroundings, make_handler, secure
from netproxy.interfaces import Address, Dialer
from netproxy.listener.manager import ListenerManager, Wanted
from netproxy.listener.tcp import TcpListener
from netproxy.listener.udp import UdpListener
from netproxy.machinery import STOP_SECONDS, Machinery, room_for
from netproxy.observe.log import Log
from netproxy.relays import Relays, States
from netproxy.router.router import RuleRouter

STOP_STEP = 0.01            # seconds between two looks at whether all connections have ended


class Daemon:
    def __init__(self, log: Log) -> None:
        self._log = log
        self._machinery = machinery = Machinery(log)
        self.counters = machinery.counters
        self._relays = Relays(machinery)
        self._manager = ListenerManager({
            "tcp": lambda address: TcpListener(machinery.concrete(address), machinery.serving),
            "udp": lambda address: UdpListener(machinery.concrete(address), machinery.datagrams, self.counters, log)})
        self._dialers: DialerFactory | None = None
        self._dial_seconds = 0.0
        self._named_ways: dict[str, WayConfig] = {}
        self._control: Any = None           # observe.control.ControlServer
        self.way_out = ""           # of what has no upstream of its own, for one line of a log
        self._tunnels: Any = None           # tunnels.Tunnels, once a configuration has one
        self._admissions: dict[str, Admission] = {}         # by listener's name
        self._retired: list[TcpListener] = []               # stopped, with connections that may still live

    # -- life

    def start(self, config: Config) -> None:
        """Listens and serves; ConfigError or ListenError, and then nothing is left open."""
        self._machinery.start(config.batching)
        self._with_control(config)
        self._machinery.run()

    def reload(self, config: Config) -> None:
        """The new configuration for whatever comes from now on; on ConfigError or ListenError nothing has changed."""
        self._with_control(config)

    def stop_accepting(self) -> None:
        """No new connections; those that live, and their datagrams, go on."""
        self._retired += self._manager.stop(("tcp",))
        if self._tunnels is not None:
            self._tunnels.stop_accepting()
        self._machinery.parker.release_expendable()

    def stop(self) -> None:
        """Ends everything that lives."""
        self.stop_accepting()
        for listener in self._retired:
            listener.abort()
        if self._tunnels is not None:
            self._tunnels.stop()
        self._relays.close()
        if self._control is not None:
            self._control.stop()
        deadline = time.monotonic() + STOP_SECONDS
        while self.live and time.monotonic() < deadline:
            time.sleep(STOP_STEP)       # what was parked wakes up to end
        self._machinery.parker.stop()
        self._machinery.connections.stop(STOP_SECONDS)
        self._manager.stop()
        self._machinery.stop()

    # -- what it is like

    @property
    def live(self) -> int:
        """Connections that have not ended."""
        tcp = [listener for listener in self._manager.listeners if listener.network == "tcp"]
        return sum(listener.live for listener in tcp + self._retired) + (self._tunnels.live if self._tunnels is not None else 0)

    def dead_thread(self) -> str:
        """The name of a thread that must live but does not, "" while all is well."""
        control = [self._control.thread] if self._control is not None else []
        for thread in [self._machinery.janitor.thread, self._machinery.parker.thread, *control, *(listener.thread for listener in self._manager.listeners)]:
            if not thread.is_alive():
                return thread.name
        return self._tunnels.dead_thread() if self._tunnels is not None else ""

    def summary(self) -> str:
        """What listens, for one line of a log."""
        return ", ".join(f"{listener.network} {listener.address}" for listener in self._manager.listeners) or "nothing"

    def status(self) -> Iterator[str]:
        """For the log, a line each."""
        yield (f"connections={self.live} parked={len(self._machinery.parker)} threads={self._machinery.connections.threads} "
               f"listeners: {self.summary()}")
        yield from self._relays.status()
        if self._tunnels is not None:
            yield from self._tunnels.summary()
        for name, reason, value in self.counters.items():
            yield f"{name}{{{reason}}}={value}"

    def describe(self, config: Config) -> list[str]:
        """What would listen, and what each way out can carry; ConfigError.  Opens nothing."""
        self._trust(config)
        dialers = self._factory(config)
        self._surroundings(config, dialers)
        for one in config.listeners:
            if one.tls:
                secure(one.tls)
        return report.plan(config, dialers)

    # -- building

    def _factory(self, config: Config) -> DialerFactory:
        machinery = self._machinery
        reach = Reach(machinery.resolver, machinery.destinations)
        return DialerFactory(reach, machinery.datagrams, config.timeouts.connect, machinery.services,
                             tunnel=lambda agent, seconds: self._tunnels.dialer(agent, seconds))

    def _trust(self, config: Config) -> Any:
        """What the agent's connections to its bridge are secured by; ConfigError.  Makes tunnels possible where one is configured."""
        tunnel = config.tunnel
        if tunnel == TunnelConfig() and self._tunnels is None:
            return None
        from netproxy.tunnels import Tunnels, read_trust    # late: most daemons have none
        if self._tunnels is None:
            self._tunnels = Tunnels(self._machinery)
        return read_trust(tunnel.agent.tls, tunnel.agent.bridge.host) if tunnel.agent else None

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
        trust = self._trust(config)
        dialers = self._dialers
        if dialers is None or self._dial_seconds != config.timeouts.connect:
            dialers = self._factory(config)
        adopt = dialers.renewal(_ways(config))      # of what is there already; the rest is read as it is made
        around = self._surroundings(config, dialers)
        states: States = {}
        wanted = [one for listener in config.listeners for address in listener.addresses
                  for one in self._wanted(listener, address, states, around)]
        before_udp = [listener for listener in self._manager.listeners if listener.network == "udp"]
        before = self._machinery.connections.limit
        self._machinery.connections.limit = max(before, room_for(config))
        try:
            gone = self._manager.replace(wanted)
        except ListenError:
            self._machinery.connections.limit = before
            raise
        adopt()
        self._machinery.connections.limit = room_for(config)
        self._dialers, self._dial_seconds = dialers, config.timeouts.connect
        self.way_out = config.default.text
        self._named_ways = {} if config.default.name else {"default": config.default}
        self._named_ways.update(config.upstreams)
        dialers.forget_all_but(_ways(config))
        self._machinery.health.checks = [check for group in dialers.groups() for check in group.checks]
        fresh = [listener for listener in self._manager.listeners if listener.network == "udp" and listener not in before_udp]
        self._retire(gone, fresh)
        self._relays.adopt(states, config)
        if self._tunnels is not None:
            self._tunnels.adopt(config, around, dialers, trust)
        for text in report.udp_warnings(config, dialers):
            self._log.warning("%s", text)

    def _retire(self, gone: list[Any], fresh: list[Any]) -> None:
        for listener in gone:
            if listener.network == "udp":
                self._machinery.janitor.forget(listener)
        for listener in fresh:
            self._machinery.janitor.register(listener)
        self._retired = [listener for listener in self._retired if listener.live]
        self._retired += [listener for listener in gone if listener.network == "tcp" and listener.live]

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
        router = RuleRouter([], dialers.way(config.default), by_listener, self._machinery.resolver,
                            self._machinery.destinations)
        return Surroundings(router, users, self._machinery.resolver, config.timeouts, config.splice, self.counters, self._log, self._log,
                            self._tunnels.bridge if config.tunnel.bridge else None)

    def _wanted(self, config: ListenerConfig, address: Address, states: States,
                around: Surroundings) -> Iterator[Wanted]:
        """The sockets of one listening address; the packet side first, so that it is there before the first ASSOCIATE."""
        state = None
        if "udp" in config.network:
            state = states[config.name, address] = self._relays.state(address, config)
        made = make_handler(config, state, around)
        group = f"{config.name} {address}"
        if config.protocol != "http" and "udp" in config.network and (made.udp is None or config.udp.relay_port == "shared"):
            yield Wanted("udp", address, group, partial(_equip_udp, made))
        elif made.udp is not None:
            made.udp.open_port = partial(self._relays.open_port, _ports(config.udp.relay_port))
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


def _ways(config: Config) -> list[WayConfig]:
    return [config.default, *config.upstreams.values(), *(one.upstream for one in config.listeners if one.upstream),
            *([config.tunnel.agent.upstream] if config.tunnel.agent else [])]


def _equip_udp(made: ListenerHandler, listener: UdpListener) -> None:
    if made.udp is not None:
        made.udp.shared = listener.local
    listener.handler = made.handler


def _ports(relay_port: str) -> range:
    if relay_port == "any":
        return range(1)     # 0: the kernel chooses
    first, _, last = relay_port.partition("-")
    return range(int(first), int(last) + 1)
