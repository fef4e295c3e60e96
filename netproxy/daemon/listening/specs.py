"""What the listener manager is to bind for a plan, and what each listener gets then."""

from __future__ import annotations

from netproxy.handler.factory import make_handler
from netproxy.errors import for_all
from netproxy.interfaces.addresses import ActivationAddress, UnixAddress
from netproxy.interfaces.listeners import AllowedClients
from netproxy.listener.manager import ListenerSpec
from netproxy.net.socket_options import check_transparent, set_transparent
from netproxy.typed import TYPE_CHECKING, Iterator, Mapping

if TYPE_CHECKING:
    from netproxy.access.limits import Admission
    from netproxy.config.schema import Config, ListenerConfig, SniRouteConfig
    from netproxy.daemon.runtime import Runtime
    from netproxy.daemon.listening.announcements import Announcements
    from netproxy.daemon.listening.udp_relays import Key, UdpRelays
    from netproxy.dialer.factory import DialerFactory
    from netproxy.handler.factory import HandlerDependencies, ListenerHandler
    from netproxy.handler.sni.factory import SniDependencies
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.routing import Router
    from netproxy.listener.tcp import TcpListener
    from netproxy.listener.udp import UdpListener
    from netproxy.router.router import RuleRouter


class TcpSpec(ListenerSpec):
    """The TCP listener of one address."""

    def __init__(
        self,
        config: ListenerConfig,
        address: Address,
        handlers: ListenerHandler,
        admission: Admission,
        handshake: float,
    ) -> None:
        """`admission`: of all addresses of the listener.  `handshake`: seconds for a handshake."""
        super().__init__("tcp", address, f"{config.name} {address}")
        self._name = config.name
        self._handlers = handlers
        self.associating = handlers.associating
        """Serves its UDP ASSOCIATE requests; None without them."""
        self._admission = admission
        self._handshake = handshake
        self._handshakes = config.limits.handshakes
        self._is_tproxy = config.protocol == "tproxy"
        self._socket_file = config.socket_file

    def attach(self, listener: TcpListener) -> None:
        """Refuse a listener that needs a capability which the process lacks."""
        if self._is_tproxy:
            check_transparent(self.network, listener.address)

    def configure(self, listener: TcpListener) -> None:
        """Give a listener its handler and limits."""
        if self._is_tproxy:
            set_transparent(listener.socket, True)
        listener.name = self._name
        listener.leaves_waiting = isinstance(self.address, ActivationAddress)
        handler = self._handlers.handler
        assert handler is not None  # config.read has seen to it that the protocol has connections
        if isinstance(self.address, UnixAddress):
            from netproxy.listener.sockets.unix import (
                FileAccess,
                UnixListener,
            )  # late: few have one

            assert isinstance(listener, UnixListener)
            listener.allow(FileAccess(*self._socket_file))
        listener.configure(handler, self._admission, self._handshake, self._handshakes)


class UdpSpec(ListenerSpec):
    """The UDP listener of one address."""

    def __init__(self, config: ListenerConfig, address: Address, handlers: ListenerHandler) -> None:
        super().__init__("udp", address, f"{config.name} {address}")
        self._name = config.name
        self._is_tproxy = config.protocol == "tproxy"
        # The size of packets to agents is what passes unfragmented.
        self._is_measured = config.protocol == "tunnel"
        self._handlers = handlers

    def attach(self, listener: UdpListener) -> None:
        """Tell the relay its socket: the TCP listener of the address may accept before commit()."""
        if self._is_tproxy:
            check_transparent(self.network, listener.address)
        if self._handlers.udp is not None:
            self._handlers.udp.shared = listener.local

    def configure(self, listener: UdpListener) -> None:
        """Give a listener its handler."""
        listener.report_targets(self._is_tproxy)
        listener.allow_fragments(not self._is_measured)
        listener.name = self._name
        packets = self._handlers.packets
        assert packets is not None  # config.read has seen to it that the protocol has datagrams
        listener.handler = packets


class RouteRouters:
    """Makes the routers of the routes of sni listeners that have their own upstream."""

    def __init__(self, router: RuleRouter, dialers: DialerFactory) -> None:
        self._router = router
        self._dialers = dialers

    def of(self, route: SniRouteConfig) -> Router:
        """Return the router of a route.  Raises ConfigError if a file cannot be used."""
        assert route.via is not None
        return self._router.through(route.path, self._dialers.dialer(route.via))


def make_handlers(
    config: Config,
    relays: UdpRelays,
    announcements: Announcements,
    dependencies: HandlerDependencies,
    routers: RouteRouters,
) -> dict[Key, ListenerHandler]:
    """Return the handlers by listener and address.

    Those of sni listeners are made last: their routes lead to the others.  `routers`: of routes
    with their own upstream.  Raises ConfigError.
    """
    made: dict[Key, ListenerHandler] = {}

    def make(listener: ListenerConfig) -> None:
        for address in listener.addresses:
            key = listener.name, address
            announcer = announcements.announcer(listener, address, dependencies.resolver)
            made[key] = make_handler(listener, relays.states.get(key), announcer, dependencies)
            announcements.attach(made[key].udp, listener.name, address)

    for_all(make, [listener for listener in config.listeners if not listener.routes])
    if leading := [listener for listener in config.listeners if listener.routes]:
        sni = _sni_dependencies(config, made, routers)
        dependencies = dependencies._replace(sni=sni)
        for_all(make, leading)
    return made


def _sni_dependencies(
    config: Config, made: Mapping[Key, ListenerHandler], routers: RouteRouters
) -> SniDependencies:
    # late: few configurations have an sni listener
    from netproxy.handler.sni.factory import LedTo, SniDependencies
    from netproxy.router.port_routes.factory import make_port_routes

    led_to = {}
    for listener in config.listeners:
        first = made.get((listener.name, listener.addresses[0]))
        if first is not None and first.handler is not None:
            clients = AllowedClients(*listener.clients, listener.proxy_protocol)
            led_to[listener.name] = LedTo(first.handler, clients)
    return SniDependencies(make_port_routes, routers.of, led_to)


def listener_specs(
    config: Config,
    runtime: Runtime,
    relays: UdpRelays,
    handlers: Mapping[Key, ListenerHandler],
    admissions: Mapping[str, Admission],
) -> Iterator[ListenerSpec]:
    """Yield the listeners; of one address UDP first, so that it is there for ASSOCIATE."""
    for listener in config.listeners:
        for address in listener.addresses:
            of_address = handlers[listener.name, address]
            hand_overs, associating = runtime.hand_overs, of_address.associating
            if hand_overs is not None and associating is not None:
                associating.owners = hand_overs.associations(listener.name, address)
            relay = of_address.udp
            if relay is not None and listener.udp.relay_port != "shared":
                relay.open_port = relays.ports(listener.udp.relay_port).open
            elif "udp" in listener.network and listener.protocol != "http":
                yield UdpSpec(listener, address, of_address)
            if "tcp" in listener.network:
                admission = admissions[listener.name]
                yield TcpSpec(listener, address, of_address, admission, config.timeouts.handshake)
