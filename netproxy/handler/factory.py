"""Makes the handlers of each listener from its configuration."""

from __future__ import annotations

import sys
from functools import partial

from netproxy.access.failed_logins import FailedLogins
from netproxy.access.factory import Binds, make_sources
from netproxy.access.login import Login
from netproxy.access.permission import Permission
from netproxy.errors import ConfigError
from netproxy.handler.bind import Binder
from netproxy.handler.outbound import Outbound
from netproxy.handler.socks.associate import Associating
from netproxy.handler.socks.socks4 import Socks4Handler
from netproxy.handler.socks.socks5 import Socks5Handler, Socks5Login
from netproxy.handler.socks.socks5_udp import RelayState, Socks5UdpRelay
from netproxy.handler.sps import ClientProtocol, Gate, LateHandler, SpsHandler, TlsHandshake
from netproxy.handler.datagrams.stream_udp import StreamUdpRelay
from netproxy.interfaces.listeners import AgentPackets, AllowedClients
from netproxy.interfaces.networks import NetworkSet
from netproxy.relay.pipe import PipeLimits
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple

if TYPE_CHECKING:
    from netproxy.access.checks.known_users import KnownUsers
    from netproxy.access.accounts.standing import Standing
    from netproxy.access.backoff import BackOff
    from netproxy.access.checks.passwords import PasswordChecks
    from netproxy.access.external.logins import ExternalLogins
    from netproxy.config.schema import ListenerConfig, TimeoutsConfig, TlsConfig
    from netproxy.handler.announce import Announcer
    from netproxy.handler.http import HttpHandler
    from netproxy.interfaces.accounts import Accounts
    from netproxy.interfaces.connections import Handler
    from netproxy.interfaces.datagrams import Introducer, PacketHandler
    from netproxy.interfaces.fairness import FairSubmit
    from netproxy.interfaces.flows import Observer
    from netproxy.interfaces.routing import DnsCache, DnsSource, NameMemory, Resolver, Router
    from netproxy.interfaces.services import Counter, Log
    from netproxy.handler.sni.factory import SniDependencies
    from netproxy.handler.transparent.tcp import IsOwn
    from netproxy.net.datagram import ArenaPool


class DnsDependencies(NamedTuple):
    """The dependencies of dns listeners alone."""

    source: DnsSource
    cache: DnsCache
    """The cached answers, which all dns listeners share."""
    submit: FairSubmit
    """Runs a task that may block."""
    arenas: ArenaPool
    memory: NameMemory | None = None
    """Remembers what clients were told; None if nothing is remembered."""


class HandlerDependencies(NamedTuple):
    """The dependencies of all handlers of one configuration."""

    router: Router
    users: KnownUsers
    resolver: Resolver
    timeouts: TimeoutsConfig
    splice: bool
    counter: Counter
    observer: Observer
    accounts: Accounts  # counts flows against the limits of users, clients and listeners
    standing: Standing
    """Knows who may begin nothing new."""
    log: Log
    back_off: BackOff  # delays refused logins, and has the penalties
    passwords: PasswordChecks | None = None  # checks hashed passwords, if there are any
    external: ExternalLogins | None = None  # checks logins of users that are not in `users`
    binds: Binds = Binds({}, False)  # where the flows of users leave from
    is_own: IsOwn | None = None  # tells whether an address is a listener
    dns: DnsDependencies | None = None
    bridge: Handler | None = None  # for agents of tunnels
    sni: SniDependencies | None = None  # for sni listeners alone
    paths: AgentPackets | None = None  # for datagrams of agents
    introducer: Introducer | None = None  # for direct paths


class ListenerHandler(NamedTuple):
    """The handlers of one listener."""

    handler: Handler | None
    """For connections; None without TCP."""
    packets: PacketHandler | None
    """For datagrams; None without UDP."""
    udp: Socks5UdpRelay | None
    """The relay of SOCKS5 datagrams among them."""
    permission: Permission | None = None
    """What its clients may do; asked by the handlers for what is new."""
    associating: Associating | None = None
    """Serves UDP ASSOCIATE; None without it."""


def make_handler(
    config: ListenerConfig,
    state: RelayState | None,
    announcer: Announcer,
    dependencies: HandlerDependencies,
) -> ListenerHandler:
    """Make the handlers of a listener, for one of its addresses.

    `state` has the sessions of its datagrams; None without UDP.
    Raises ConfigError if a file of its TLS cannot be used.
    """
    parts = _ListenerParts(config, state, announcer, dependencies)
    handlers = _HANDLERS[config.protocol](parts)._replace(
        permission=parts.permission, associating=parts.associating
    )
    if handlers.handler is None or not (config.tls or config.proxy_protocol):
        return handlers
    gate = Gate(
        handlers.handler,
        NetworkSet(config.proxy_protocol),
        AllowedClients(*config.clients),
        make_tls_handshake(config.tls) if config.tls else None,
        dependencies.counter,
        config.name,
    )
    return handlers._replace(handler=gate)


def make_tls_handshake(config: TlsConfig) -> TlsHandshake:
    """Make the TLS handshake of a listener.  Raises ConfigError if a file cannot be used."""
    from netproxy.net import tls  # late: ssl costs 3 MiB, and few listeners need it

    try:
        context = tls.server_context(config.certificate, config.key, config.client_ca)
    except ValueError as error:
        raise ConfigError(f"tls: {error}", config.place) from error
    return partial(tls.accept, context=context)


class _ListenerParts:
    """The parts that the handlers of one listener share.  One method for each protocol."""

    def __init__(
        self,
        config: ListenerConfig,
        state: RelayState | None,
        announcer: Announcer,
        dependencies: HandlerDependencies,
    ) -> None:
        self._config = config
        self._dependencies = dependencies
        self._state = state
        self._clients = AllowedClients(*config.clients)
        timeouts, counter = dependencies.timeouts, dependencies.counter
        failed = FailedLogins(config.name, counter, dependencies.log)
        self._login = Login(
            dependencies.users,
            config.auth,
            failed,
            dependencies.back_off,
            config.name,
            dependencies.external,
            dependencies.passwords,
        )
        self.permission = Permission(
            config.name, self._login, self._clients, counter, dependencies.standing
        )
        self.permission.sources = make_sources(config, dependencies.binds)
        self._binder = Binder(announcer, counter)
        self._streams: StreamUdpRelay | None = None
        self._udp: Socks5UdpRelay | None = None
        self.associating: Associating | None = None
        router, observer = dependencies.router, dependencies.observer
        if state is not None:
            parts = router, state.table, state.arenas, counter, observer, timeouts.tcp_idle
            self._streams = StreamUdpRelay(*parts, self.permission)
            self._streams.announcer = announcer
            self._streams.introducer = dependencies.introducer
            if config.protocol not in ("http", "tproxy"):
                self._udp = Socks5UdpRelay(self.permission, router, state, announcer, counter)
                self.associating = Associating(self._udp, counter)
        limits = PipeLimits(timeouts.tcp_idle, timeouts.half_close, dependencies.splice)
        accounts = dependencies.accounts
        self._outbound = Outbound(router, limits, counter, observer, accounts, self._streams)
        routed = (self._outbound, self._streams, self._udp)
        self.permission.set_routed([part for part in routed if part is not None])

    def sps(self) -> ListenerHandler:
        """Make the handlers of all client protocols on one port."""
        handlers = self._socks_handlers()
        loaded = "netproxy.handler.http_forward" in sys.modules
        handlers[ClientProtocol.HTTP] = (
            self._http_handler() if loaded else LateHandler(self._http_handler)
        )
        bridge = self._dependencies.bridge
        if bridge is not None and self._config.tls is not None:
            handlers[ClientProtocol.TUNNEL] = bridge
        return self._by_first_byte(handlers)

    def socks5(self) -> ListenerHandler:
        """Make the handlers of SOCKS4, SOCKS4a and SOCKS5."""
        return self._by_first_byte(self._socks_handlers())

    def http(self) -> ListenerHandler:
        """Make the handler of HTTP, which answers an unknown protocol with an error as well."""
        handler = self._http_handler()
        handlers = {ClientProtocol.HTTP: handler, ClientProtocol.UNKNOWN: handler}
        counter = self._dependencies.counter
        by_first_byte = SpsHandler(handlers, None, counter, self._config.name)
        return ListenerHandler(by_first_byte, None, None)

    def tunnel(self) -> ListenerHandler:
        """Return the handler for agents of tunnels."""
        paths = self._dependencies.paths
        packets = None if paths is None else paths.packets_from(self._clients)
        return ListenerHandler(self._dependencies.bridge, packets, None)

    def tcp(self) -> ListenerHandler:
        """Make the handler of a fixed target, TCP."""
        from netproxy.handler.transparent.factory import make_forward  # late: few need it

        forward = make_forward(self._config, self._outbound, self.permission)
        return ListenerHandler(forward, None, None)

    def sni(self) -> ListenerHandler:
        """Make the handler that leads connections to targets and to other listeners."""
        from netproxy.handler.sni.factory import make_sni  # late: as in tcp()

        sni = self._dependencies.sni
        assert sni is not None  # daemon.specs has set it
        handler = make_sni(self._config, sni, self._outbound, self.permission)
        return ListenerHandler(handler, None, None)

    def udp(self) -> ListenerHandler:
        """Make the handler of a fixed target, UDP."""
        from netproxy.handler.transparent.factory import make_udp_forward  # late: as in tcp()

        parts = (self._state, self._dependencies, self.permission)
        return ListenerHandler(None, make_udp_forward(self._config, *parts), None)

    def transparent(self) -> ListenerHandler:
        """Make the handlers of what rules REDIRECT or TPROXY of the kernel lead here."""
        from netproxy.handler.transparent.factory import make_transparent  # late: as in tcp()

        parts = (self._state, self._dependencies, self._outbound, self.permission)
        return ListenerHandler(*make_transparent(self._config, *parts), None)

    def dns(self) -> ListenerHandler:
        """Make the handler of DNS queries."""
        from netproxy.handler.dns.factory import make_dns  # late: as in tcp()

        dns = self._dependencies.dns
        assert dns is not None  # config.read has seen to it
        handler = make_dns(dns, self._clients, self._dependencies.counter, self.permission)
        return ListenerHandler(handler, handler, None)

    def _socks_handlers(self) -> dict[ClientProtocol, Handler]:
        name, outbound, binder = self._config.name, self._outbound, self._binder
        login = Socks5Login(self.permission)
        return {
            ClientProtocol.SOCKS4: Socks4Handler(name, outbound, binder, self.permission),
            ClientProtocol.SOCKS5: Socks5Handler(name, outbound, binder, self.associating, login),
        }

    def _by_first_byte(self, handlers: dict[ClientProtocol, Handler]) -> ListenerHandler:
        counter = self._dependencies.counter
        handler = SpsHandler(handlers, self._udp, counter, self._config.name)
        return ListenerHandler(handler, handler, self._udp)

    def _http_handler(self) -> HttpHandler:
        from netproxy.handler.http import HttpHandler  # late: clients may all speak SOCKS
        from netproxy.handler.http_forward import Forwarder

        return HttpHandler(
            self._config.name,
            self._outbound,
            Forwarder(self._outbound, self._dependencies.timeouts.tcp_idle),
            self.permission,
            self._dependencies.counter,
            self._streams,
        )


_HANDLERS: dict[str, Callable[[_ListenerParts], ListenerHandler]] = {
    "sps": _ListenerParts.sps,
    "socks5": _ListenerParts.socks5,
    "http": _ListenerParts.http,
    "tcp": _ListenerParts.tcp,
    "udp": _ListenerParts.udp,
    "dns": _ListenerParts.dns,
    "tunnel": _ListenerParts.tunnel,
    "redirect": _ListenerParts.transparent,
    "tproxy": _ListenerParts.transparent,
    "sni": _ListenerParts.sni,
}
