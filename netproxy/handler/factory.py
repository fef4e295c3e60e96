"""Handlers from the configuration: one for each listener, both for its connections and its datagrams."""

from __future__ import annotations

from typing import Any, NamedTuple

from netproxy.interfaces.networks import NetworkSet
from netproxy.access.login import Login
from netproxy.access.users import Users
from netproxy.config.schema import ListenerConfig, TimeoutsConfig, TlsConfig
from netproxy.errors import ConfigError
from netproxy.handler.outbound import Connector
from netproxy.handler.forward import TcpForward, UdpForward
from netproxy.handler.http import Forwarder, HttpHandler
from netproxy.handler.socks4 import Socks4Handler
from netproxy.handler.socks5 import Entrance, Socks5Handler
from netproxy.handler.socks5_udp import RelayState, Socks5UdpRelay
from netproxy.handler.sps import Gate, Secure, Speech, SpsHandler
from netproxy.handler.stream_udp import StreamUdpRelay
from netproxy.interfaces.connections import Handler
from netproxy.interfaces.fairness import FairSubmit
from netproxy.interfaces.flows import Observer
from netproxy.interfaces.routing import Resolver, Router
from netproxy.interfaces.services import Counter, Log
from netproxy.handler.bind import Announcement, Announcer, Binder
from netproxy.net.datagram import ArenaPool
from netproxy.relay.pipe import PipeLimits


class NameService(NamedTuple):
    """What answers the clients of dns listeners: `submit` and `arenas` are for what must be asked."""

    source: Any  # handler.dns.DnsSource
    cache: int
    stale: float  # seconds that answers are of use after their TTL
    submit: FairSubmit
    arenas: ArenaPool


class HandlerDependencies(NamedTuple):
    """What every handler of a configuration is built on."""

    router: Router
    users: Users
    resolver: Resolver
    timeouts: TimeoutsConfig
    splice: bool
    counter: Counter
    observer: Observer
    log: Log
    names: NameService | None = None
    bridge: Handler | None = None  # for the agents of tunnels


class ListenerHandler(NamedTuple):
    """`handler` takes connections and datagrams; `udp` is its relay, None without UDP."""

    handler: Any
    udp: Socks5UdpRelay | None


def make_handler(
    config: ListenerConfig, state: RelayState | None, dependencies: HandlerDependencies
) -> ListenerHandler:
    """The handler of a listener; `state` is what its datagrams' sessions live in, None where it can have none."""
    made = _HANDLERS[config.protocol](_Parts(config, state, dependencies))
    if not config.tls and not config.proxy_protocol:
        return made
    clients = NetworkSet(config.clients) if config.clients else None
    handshake = secure(config.tls) if config.tls else None
    return made._replace(
        handler=Gate(
            made.handler,
            NetworkSet(config.proxy_protocol),
            clients,
            handshake,
            dependencies.counter,
        )
    )


def secure(config: TlsConfig) -> Secure:
    """The TLS handshake of a listener's connections; ConfigError where its files cannot be used."""
    from netproxy.net import tls  # late: ssl costs 3 MiB, and few need it

    try:
        context = tls.server_context(config.certificate, config.key, config.client_ca)
    except ValueError as error:
        raise ConfigError(f"tls: {error}", config.place) from error
    return lambda stream: tls.accept(stream, context)


class _Parts:
    """What the handlers of one listener share."""

    def __init__(
        self, config: ListenerConfig, state: RelayState | None, dependencies: HandlerDependencies
    ) -> None:
        self._dependencies = dependencies
        self._name = config.name
        self._secured = config.tls is not None
        timeouts = dependencies.timeouts
        self._idle = timeouts.tcp_idle
        self._login = Login(
            dependencies.users,
            config.auth,
            lambda client, user: dependencies.log.auth_failed(client, user, config.name),
        )
        announcements = [
            Announcement(NetworkSet(one.clients) if one.clients else None, one.address)
            for one in config.announce
        ]
        announcer = Announcer(announcements, dependencies.resolver.resolve)
        self._binder = Binder(announcer, dependencies.counter)
        streams = state and StreamUdpRelay(
            dependencies.router,
            state.table,
            state.arenas,
            dependencies.counter,
            dependencies.observer,
            timeouts.tcp_idle,
        )
        self._streams = streams
        self._connector = Connector(
            dependencies.router,
            PipeLimits(timeouts.tcp_idle, timeouts.half_close, dependencies.splice),
            dependencies.counter,
            dependencies.observer,
            streams,
        )
        self._target: Any = config.target
        self._clients = NetworkSet(config.clients) if config.clients else None
        self._state: Any = state
        self._udp = None
        if state is not None and config.protocol != "http":
            self._udp = Socks5UdpRelay(
                self._name, dependencies.router, state, announcer, dependencies.counter
            )

    def sps(self) -> ListenerHandler:
        agents = (
            {Speech.TUNNEL: self._dependencies.bridge}
            if self._dependencies.bridge and self._secured
            else {}
        )
        return self._told_apart({Speech.HTTP: self._http(), **agents})

    def tunnel(self) -> ListenerHandler:
        return ListenerHandler(self._dependencies.bridge, None)

    def socks5(self) -> ListenerHandler:
        """SOCKS of all versions."""
        return self._told_apart({})

    def _told_apart(self, others: dict[Speech, Any]) -> ListenerHandler:
        socks5 = self._socks5()
        handlers = {Speech.SOCKS4: self._socks4(), Speech.SOCKS5: socks5, **others}
        return ListenerHandler(
            SpsHandler(handlers, socks5, self._dependencies.counter, self._dependencies.log),
            self._udp,
        )

    def http(self) -> ListenerHandler:
        return ListenerHandler(self._http(), None)

    def tcp(self) -> ListenerHandler:
        return ListenerHandler(TcpForward(self._name, self._connector, self._target), None)

    def udp(self) -> ListenerHandler:
        dependencies = self._dependencies
        return ListenerHandler(
            UdpForward(
                self._name,
                dependencies.router,
                self._state.table,
                self._target,
                self._clients,
                dependencies.counter,
            ),
            None,
        )

    def dns(self) -> ListenerHandler:
        names = self._dependencies.names
        assert names is not None  # config.read has seen to it
        from netproxy.handler.dns import DnsHandler  # late: few have such a listener

        return ListenerHandler(
            DnsHandler(
                names.source,
                names.cache,
                names.stale,
                self._clients,
                names.submit,
                names.arenas,
                self._dependencies.counter,
            ),
            None,
        )

    def _socks4(self) -> Socks4Handler:
        return Socks4Handler(self._name, self._connector, self._binder, self._login)

    def _socks5(self) -> Socks5Handler:
        entrance = Entrance(self._login, self._dependencies.counter)
        return Socks5Handler(self._name, self._connector, self._binder, self._udp, entrance)

    def _http(self) -> HttpHandler:
        return HttpHandler(
            self._name,
            self._connector,
            Forwarder(self._connector, self._idle),
            self._login,
            self._dependencies.counter,
            self._streams,
        )


_HANDLERS = {
    "sps": _Parts.sps,
    "socks5": _Parts.socks5,
    "http": _Parts.http,
    "tcp": _Parts.tcp,
    "udp": _Parts.udp,
    "dns": _Parts.dns,
    "tunnel": _Parts.tunnel,
}
