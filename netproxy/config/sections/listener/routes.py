"""Reads the routes of an sni listener, and checks the listeners that they lead to.

Patterns of names stay text: router.factory parses them, and reports errors with the route's
place.  Loaded only if there is a route.
"""

from __future__ import annotations

from netproxy.config.schema import HopConfig, ListenerConfig, Place, SniRouteConfig, UpstreamConfig
from netproxy.config.sections.hops import PROXY_HEADERS
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.tree.hints import EDITS_LIMIT, suggestion
from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.url import parse_target
from netproxy.interfaces.addresses import Address, UnixAddress, pack_ip
from netproxy.interfaces.networks import is_loopback
from netproxy.typed import Iterator, Mapping, Sequence

PROTOCOLS = ("tls", "http", "socks4", "socks5", "tunnel")
"""What the first byte tells: handler.sps.ClientProtocol."""
LED_TO = ("sps", "socks5", "http", "tcp", "tunnel")
"""Protocols of listeners that a route can lead to."""
WITH_UDP_PORT = ("sps", "socks5")
ROUTES_LIMIT = 1000
"""Routes of a listener.  Every connection is compared with each."""
ALPN_LIMIT = 255
"""Bytes of a protocol's name: RFC 7301 section 3.1."""
CONDITIONS = ("sni", "alpn", "host", "protocol")


def read_routes(
    section: MapReader, protocol: str, upstreams: UpstreamReader
) -> tuple[SniRouteConfig, ...]:
    """Take the routes of a listener with this protocol; report what has no meaning with them."""
    nodes = section.items("routes") if section.has("routes") else []
    if protocol != "sni":
        section.add_error("routes", f"has no meaning for the protocol {protocol}: only sni has it")
        return ()
    if not nodes:
        section.add_error("routes", "names no route")
    if len(nodes) > ROUTES_LIMIT:
        section.add_error("routes", f"more than {ROUTES_LIMIT} routes")
        return ()
    if section.has("tls"):
        message = "an sni listener passes TLS on: write tls at the listener that a route leads to"
        section.add_error("tls", message)
    routes: list[SniRouteConfig] = []
    default = ""
    for index, node in enumerate(nodes):
        route = _route(node, f"{section.path}.routes[{index}]", section.problems, upstreams)
        if default and not section.problems.is_unread(default):
            message = f"can never match: {default}, which has no condition, takes the rest"
            section.problems.add(f"{route.path}: {message}", route.place)
        elif isinstance(node.value, dict) and not any(key in node.value for key in CONDITIONS):
            default = route.path
        routes.append(route)
    return tuple(routes)


def _route(node: Node, path: str, problems: Problems, upstreams: UpstreamReader) -> SniRouteConfig:
    section = MapReader(node, path, problems)
    # An empty list would match nothing, or everything: it is a mistake.
    for key in filter(section.is_empty_list, CONDITIONS):
        section.add_error(key, "is an empty list")
    given = frozenset(filter(section.has, (*CONDITIONS, "target", "via", "listener")))
    via = section.take("via")
    route = SniRouteConfig(
        sni=section.values("sni", _word),
        alpn=section.values("alpn", _alpn),
        host=section.values("host", _word),
        protocol=section.values("protocol", _protocol),
        target=section.read("target", parse_target, None),
        via=upstreams.read(via, f"{path}.via") if via is not None else None,
        send_proxy=section.choice("send_proxy", PROXY_HEADERS, ""),
        listener=section.text("listener"),
        path=path,
        place=Place(node.place),
        listener_place=Place(section.place_of("listener")),
    )
    section.finish()
    for key, message in _misfits(route, given):
        section.add_error(key, message)
    service = _service(route.via)
    return route if service is None else route._replace(target=service)


def _service(via: UpstreamConfig | None) -> Address | None:
    """Return the agent and the port if an upstream is a service of an agent, else None."""
    if via is None or len(via.steps) != 1:
        return None
    step = via.steps[0]
    if not isinstance(step, HopConfig) or step.scheme != "tunnel" or not step.server.port:
        return None
    return step.server


def _misfits(route: SniRouteConfig, given: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield keys of a route that do not go together, each with what is wrong."""
    of_tls = next((key for key in ("sni", "alpn") if key in given), "")
    if of_tls and "host" in given:
        yield "host", f"is for HTTP, and {of_tls} for TLS: write two routes"
    if of_tls and route.protocol and "tls" not in route.protocol:
        yield "protocol", f"{of_tls} can only match tls"
    if "host" in given and route.protocol and "http" not in route.protocol:
        yield "protocol", "host can only match http"
    if "listener" in given:
        for key in ("target", "via", "send_proxy"):
            if key in given or (key == "send_proxy" and route.send_proxy):
                yield key, "has no meaning with listener, which says where its flows go"
    elif _service(route.via) is not None:
        if "target" in given:
            yield "target", "has no meaning with a service of an agent, which is the target"
    elif isinstance(route.target, UnixAddress) and "via" in given:
        yield "via", "has no meaning: this machine itself connects to a UNIX socket"
    elif "target" not in given:
        yield "target", "is missing: a route has a target, or the name of a listener"


def _word(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def _alpn(text: str) -> str:
    """Return the name of an application protocol.  Raises ValueError."""
    if not text or len(text.encode()) > ALPN_LIMIT or not text.isascii():
        raise ValueError(f"'{text}' is not the name of a protocol (such as h2 or http/1.1)")
    return text


def _protocol(text: str) -> str:
    if text not in PROTOCOLS:
        hint = suggestion(text, PROTOCOLS, EDITS_LIMIT)
        raise ValueError(f"'{text}' is not one of {', '.join(PROTOCOLS)}{hint}")
    return text


# -- the listeners that routes lead to


def check_routes(listeners: Sequence[ListenerConfig], are_all: bool, problems: Problems) -> None:
    """Report routes to listeners that are not there, or cannot serve what comes.

    Unless `are_all`, there are others, which have errors.
    """
    by_name = {listener.name: listener for listener in listeners}
    for listener in listeners:
        for route in listener.routes:
            report = _Report(route, problems)
            if not route.listener:
                _check_target(route, listener, listeners, report)
            elif not are_all and route.listener not in by_name:
                continue
            elif error := _unusable(route.listener, listener, by_name):
                report.error(error)
            else:
                _check_leading(listener, route, by_name[route.listener], report)


class _Report:
    """Reports what is wrong with a route."""

    def __init__(self, route: SniRouteConfig, problems: Problems) -> None:
        self._route, self._problems = route, problems

    def error(self, message: str) -> None:
        """Add an error about the key `listener`."""
        self._problems.add(f"{self._route.path}.listener: {message}", self._route.listener_place)

    def warn(self, message: str) -> None:
        """Add a warning about the route."""
        self._problems.warn(f"{self._route.path}: {message}", self._route.place)


def _unusable(name: str, own: ListenerConfig, by_name: Mapping[str, ListenerConfig]) -> str:
    """Return why no route of a listener can lead to another one, "" if it can."""
    if name == own.name:
        return f"'{name}' is this listener itself"
    if name not in by_name:
        hint = suggestion(name, tuple(by_name))
        return f"there is no listener '{name}'{hint}"
    protocol = by_name[name].protocol
    if protocol == "sni":
        return f"'{name}' is an sni listener as well: add its routes here"
    if protocol not in LED_TO:
        return f"'{name}' has the protocol {protocol}: a route leads to {', '.join(LED_TO)}"
    return ""


def _check_leading(
    own: ListenerConfig, route: SniRouteConfig, other: ListenerConfig, report: _Report
) -> None:
    """Report a route to a listener that would serve everybody, or cannot serve what comes."""
    is_proxy = other.protocol in ("sps", "socks5", "http")
    # Hazard 80: on loopback the other listener needs neither.
    has_guard = other.auth == "required" or other.allow_open or _names_networks(other)
    if is_proxy and not has_guard and not own.is_local and not _names_networks(own):
        report.error(
            f"would let everybody use the proxy '{other.name}': "
            "set auth, clients or allow_open: true there"
        )
    comes, name = route.protocols, f"'{other.name}'"
    if other.tls is None and other.protocol != "tcp" and comes == ("tls",):
        report.warn(f"TLS comes here, but listener {name} has no tls")
    if other.tls is not None and comes and "tls" not in comes:
        report.warn(f"listener {name} has tls, but what comes here is {', '.join(comes)}")
    on_loopback = all(is_loopback(address.host) for address in other.addresses)
    has_shared_port = other.protocol in WITH_UDP_PORT and other.udp.relay_port == "shared"
    if has_shared_port and "udp" in other.network and on_loopback and not own.is_local:
        report.warn(
            f"the UDP port of {name} is on loopback, so that clients of other machines cannot "
            "use UDP ASSOCIATE: listen on another address there, or set network: [tcp]"
        )


def _names_networks(listener: ListenerConfig) -> bool:
    return bool(listener.clients.allow.networks)


def _check_target(
    route: SniRouteConfig, own: ListenerConfig, listeners: Sequence[ListenerConfig], report: _Report
) -> None:
    """Warn of a target that is a port of this daemon: it would be refused as a loop."""
    target = route.target
    if target is None or route.via is not None or own.upstream is not None:
        return
    for other in listeners:
        if "tcp" in other.network and any(_is_at(target, here) for here in other.addresses):
            report.warn(
                f"the target {target} is listener '{other.name}' of this daemon, where no client "
                f"is led to: write listener: {other.name}"
            )


def _is_at(target: Address, address: Address) -> bool:
    """Return whether a target is a listening address, as far as both tell."""
    if isinstance(address, UnixAddress) or target.port != address.port:
        return False
    packed = pack_ip(address.host)
    is_unspecified = packed is not None and not any(packed)
    return target.host == address.host or (is_unspecified and is_loopback(target.host))
