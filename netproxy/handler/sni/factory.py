"""Makes the handler of an sni listener from its configuration."""

from __future__ import annotations

from netproxy.handler.sni.handler import PlacedRoute, SniHandler, ToListener, ToTarget
from netproxy.interfaces.listeners import AllowedClients
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.config.schema import ListenerConfig, SniRouteConfig
    from netproxy.handler.outbound import Outbound
    from netproxy.handler.sni.handler import RouteEnd
    from netproxy.interfaces.connections import Handler
    from netproxy.interfaces.flows import PortRoutes
    from netproxy.interfaces.routing import Router


class LedTo(NamedTuple):
    """A listener that a route may lead to."""

    handler: Handler
    """With its PROXY header, its TLS and its login; that of the listener's first address."""
    clients: AllowedClients


class SniDependencies(NamedTuple):
    """The dependencies of sni listeners alone."""

    conditions: Callable[[Sequence[SniRouteConfig]], PortRoutes]
    """Compiles the conditions of routes.  Raises ConfigError."""
    router: Callable[[SniRouteConfig], Router]
    """Returns the router of a route with an upstream of its own."""
    listeners: Mapping[str, LedTo]
    """The other listeners, by name."""


def make_sni(
    config: ListenerConfig,
    dependencies: SniDependencies,
    outbound: Outbound,
    permission: Permission,
) -> SniHandler:
    """Return the handler of a listener.  Raises ConfigError for a wrong pattern."""
    counter = outbound.counter

    def end(route: SniRouteConfig) -> RouteEnd:
        if route.target is not None:
            via = outbound.through(dependencies.router(route)) if route.via else outbound
            return ToTarget(route.target, via, permission, route.send_proxy)
        handler, clients = dependencies.listeners[route.listener]
        return ToListener(route.listener, handler, clients, counter)

    routes = dependencies.conditions(config.routes)
    placed = [PlacedRoute(route.path, end(route)) for route in config.routes]
    return SniHandler(config.name, routes, placed, counter)
