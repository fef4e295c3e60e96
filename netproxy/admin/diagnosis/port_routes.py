"""Says which route of an sni listener a flow takes.  Pure."""

from __future__ import annotations

from netproxy.admin.listing import conditions_text, led_to
from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.flows import FirstBytes, Flow, SeenName
from netproxy.router.port_routes.factory import make_port_routes
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.config.schema import ListenerConfig, UpstreamConfig

HTTP_PORT = 80


class LedFlow(NamedTuple):
    """A flow to the target of a route."""

    flow: Flow
    via: UpstreamConfig | None
    """The upstream of the route; None if the rules decide."""
    place: str
    """The route: "listeners[0].routes[2]"."""


def explained(flow: Flow, listener: ListenerConfig) -> tuple[str, LedFlow | None]:
    """Return a line about the route of a flow, and the flow to its target.

    The flow's target is what the client asks for: in a ClientHello without ALPN, or at port 80
    in an HTTP request.  None if there is no route, or if it leads to another listener.
    """
    target = flow.target
    name = "" if pack_ip(target.host) is not None else target.host
    protocol = "http" if target.port == HTTP_PORT else "tls"
    asked = f"{protocol} for {name or 'no name'}"
    index = make_port_routes(listener.routes).choose(FirstBytes(protocol, name))
    if index is None:
        return f"refused: no route matches {asked}", None
    route = listener.routes[index]
    text = f"route: {route.path} ({conditions_text(route)}) takes {asked}, {led_to(route)}"
    if route.target is None:
        return text, None
    seen = SeenName(name, protocol) if name else None
    return text, LedFlow(flow._replace(target=route.target, seen=seen), route.via, route.path)
