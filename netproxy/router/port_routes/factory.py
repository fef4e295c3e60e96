"""Compiles the conditions of the routes of an sni listener, and compares them.

Loaded only if there is such a listener.
"""

from __future__ import annotations

from netproxy.config.schema import SniRouteConfig
from netproxy.errors import ConfigError, for_all
from netproxy.router import coverage
from netproxy.router.coverage import Scope, ValueSet
from netproxy.router.matchers import DomainSet
from netproxy.router.patterns import parse_domain
from netproxy.router.port_routes.conditions import ConditionRoutes, PortConditions
from netproxy.typed import Iterator, Sequence


def make_port_routes(routes: Sequence[SniRouteConfig]) -> ConditionRoutes:
    """Compile the conditions of routes.  Raises ConfigError for a wrong pattern."""
    return ConditionRoutes(for_all(_conditions, routes))


def _conditions(route: SniRouteConfig) -> PortConditions:
    names = _names(route, "sni", route.sni)
    hosts = _names(route, "host", route.host)
    return PortConditions(frozenset(route.protocols), names, frozenset(route.alpn), hosts)


def _names(route: SniRouteConfig, key: str, patterns: Sequence[str]) -> DomainSet | None:
    """Return the names of a condition, None if it is not given.  Raises ConfigError."""
    try:
        return DomainSet(patterns) if patterns else None
    except ValueError as error:
        raise ConfigError(f"{route.path}.{key}: {error}", route.place) from error


def unreachable_routes(
    routes: Sequence[SniRouteConfig],
) -> Iterator[tuple[SniRouteConfig, SniRouteConfig]]:
    """Yield each route that can never match, with the earlier one that takes its connections.

    The patterns have been compiled before.
    """
    return coverage.unreachable((route, Scope(_values(route), {})) for route in routes)


def _values(route: SniRouteConfig) -> dict[str, ValueSet]:
    values: dict[str, ValueSet] = {}
    if route.protocols:
        values["protocol"] = coverage.Words(route.protocols)
    for key, patterns in (("sni", route.sni), ("host", route.host)):
        if patterns:
            values[key] = coverage.Names(map(parse_domain, patterns), ())
    if route.alpn:
        values["alpn"] = coverage.Words(route.alpn)
    return values
