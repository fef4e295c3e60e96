"""The first route whose conditions hold is chosen, by protocol, name and ALPN."""

from __future__ import annotations

import pytest

from netproxy.config.schema import SniRouteConfig
from netproxy.interfaces.flows import FirstBytes
from netproxy.router.port_routes.factory import make_port_routes, unreachable_routes

ROUTES = (
    SniRouteConfig(sni=("a.test",), alpn=("acme-tls/1",)),
    SniRouteConfig(sni=("a.test", ".b.test")),
    SniRouteConfig(sni=("*.c.test",), protocol=("tls", "http")),
    SniRouteConfig(host=("w.test",)),
    SniRouteConfig(protocol=("socks5", "tunnel")),
    SniRouteConfig(alpn=("h2", "h3")),
    SniRouteConfig(sni=("regex:.*",)),
    SniRouteConfig(protocol=("tls",)),
)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (FirstBytes("tls", "a.test", ("h2", "acme-tls/1")), 0),
        (FirstBytes("tls", "a.test", ("h2",)), 1),
        (FirstBytes("tls", "b.test"), 1),
        (FirstBytes("tls", "x.b.test"), 1),
        (FirstBytes("tls", "xb.test", ("h2",)), 5),
        (FirstBytes("tls", "x.c.test"), 2),
        (FirstBytes("http", "x.c.test"), None),
        (FirstBytes("tls", "c.test"), 6),
        (FirstBytes("http", "w.test"), 3),
        (FirstBytes("tls", "w.test"), 6),
        (FirstBytes("http", "a.test"), None),
        (FirstBytes("socks5"), 4),
        (FirstBytes("tunnel"), 4),
        (FirstBytes("socks4"), None),
        (FirstBytes("unknown"), None),
        (FirstBytes("tls", "", ("http/1.1", "h3")), 5),
        (FirstBytes("tls"), 7),
    ],
)
def test_first_route_that_matches_is_chosen(seen: FirstBytes, expected: int | None) -> None:
    assert make_port_routes(ROUTES).choose(seen) == expected


def test_route_without_conditions_takes_everything() -> None:
    routes = make_port_routes((*ROUTES, SniRouteConfig()))
    for protocol in ("tls", "http", "socks4", "unknown"):
        assert routes.choose(FirstBytes(protocol)) in (7, 8)


def test_routes_behind_a_wider_one_are_found() -> None:
    routes = (
        SniRouteConfig(sni=("*.test",), path="wide"),
        SniRouteConfig(sni=("a.test",), path="name"),
        SniRouteConfig(host=("a.test",), path="host"),
        SniRouteConfig(alpn=("h2",), path="alpn"),
        SniRouteConfig(alpn=("h2",), sni=("a.example",), path="both"),
        SniRouteConfig(protocol=("tls", "http"), path="protocol"),
        SniRouteConfig(protocol=("http",), path="narrow"),
        SniRouteConfig(path="default"),
    )
    found = [(route.path, earlier.path) for route, earlier in unreachable_routes(routes)]
    assert found == [("name", "wide"), ("both", "alpn"), ("narrow", "protocol")]
