"""The routes of sni listeners: values, what does not fit, and the listeners that they lead to."""

from __future__ import annotations

import pytest

from netproxy.access.factory import make_policies
from netproxy.config.schema import Config, SniRouteConfig
from netproxy.config.used import used_upstreams
from netproxy.daemon.build import build
from netproxy.daemon.questions import PlanQuestions
from netproxy.daemon.runtime import Runtime
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import Address
from tests.config.reading import errors, read
from tests.support.handlers import RecordingLog
from tests.support.relays import configuration, described

pytest.importorskip("yaml")

TARGET = "target: '10.0.0.5:443'"
MAIN = "{listen: '127.0.0.1:2', name: main}"
PUBLIC = "protocol: sni, listen: ':1', name: web"
AGENTS = "tunnel: {bridge: {agents: {home: {token: a-token-of-twenty-bytes}}}}\n"


def listeners(routes: str, *others: str, sni: str = PUBLIC) -> str:
    """Return a configuration with one listener a line, the sni listener first."""
    lines = [f"- {{{sni}, routes: [{routes}]}}", *(f"- {other}" for other in others)]
    return "listeners:\n" + "\n".join(lines) + "\n"


def routes(text: str, *others: str) -> tuple[SniRouteConfig, ...]:
    return read(listeners(text, *others)).listeners[0].routes


def warnings(config: str) -> list[str]:
    plan = build(configuration(config), Runtime(RecordingLog()), None)  # type: ignore[arg-type]
    return [str(warning) for warning in plan.warnings]


def test_conditions_and_target_are_read() -> None:
    text = f"{{sni: [a.test, '*.b.test'], alpn: h2, {TARGET}, send_proxy: v2, via: direct}}"
    (route,) = routes(text)
    assert route.via is not None and route.via.text == "direct"
    assert route._replace(via=None) == SniRouteConfig(
        sni=("a.test", "*.b.test"),
        alpn=("h2",),
        target=Address("10.0.0.5", 443),
        send_proxy="v2",
        path="listeners[0].routes[0]",
    )


def test_listener_and_host_are_read() -> None:
    main = MAIN.replace("}", ", clients: 192.0.2.0/24}")
    by_host, default = routes(f"{{host: w.test, {TARGET}}}, {{listener: main}}", main)
    assert (by_host.host, by_host.protocols) == (("w.test",), ("http",))
    assert (default.listener, default.target, default.protocols) == ("main", None, ())


def test_service_of_an_agent_is_the_target() -> None:
    text = listeners(
        "{sni: a.test, via: 'tunnel://home/8443'}", "{protocol: tunnel, listen: ':3', tls: {}}"
    )
    text = AGENTS + text.replace("tls: {}", "tls: {certificate: a.pem}")
    (route,) = read(text).listeners[0].routes
    assert route.target == Address("home", 8443)
    assert route.via is not None and route.via.text == "tunnel://home/8443"
    assert route.via in used_upstreams(read(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "2:52: listeners[0].routes: names no route"),
        ("{}", "2:53: listeners[0].routes[0].target: is missing: a route has a target, or the"),
        ("{sni: []}", "2:59: listeners[0].routes[0].sni: is an empty list"),
        (f"{{sni: '', {TARGET}}}", "2:59: listeners[0].routes[0].sni[0]: is empty"),
        (f"{{alpn: '', {TARGET}}}", "listeners[0].routes[0].alpn[0]: '' is not the name of a pro"),
        (f"{{protocol: ssl, {TARGET}}}", "protocol[0]: 'ssl' is not one of tls, http, socks4,"),
        (f"{{protocol: socks, {TARGET}}}", "tunnel (did you mean 'socks5'?)"),
        (f"{{names: a.test, {TARGET}}}", "listeners[0].routes[0].names: unknown key"),
        (
            f"{{sni: a.test, host: a.test, {TARGET}}}",
            "2:73: listeners[0].routes[0].host: is for HTTP, and sni for TLS: write two routes",
        ),
        (f"{{alpn: h2, host: a.test, {TARGET}}}", "host: is for HTTP, and alpn for TLS"),
        (f"{{alpn: h2, protocol: http, {TARGET}}}", "protocol: alpn can only match tls"),
        (f"{{host: a.test, protocol: tls, {TARGET}}}", "protocol: host can only match http"),
        (f"{{listener: main, {TARGET}}}", "target: has no meaning with listener, which says"),
        ("{listener: main, via: direct}", "via: has no meaning with listener, which says"),
        ("{listener: main, send_proxy: v1}", "send_proxy: has no meaning with listener"),
        (
            f"{{{TARGET}}}, {{sni: a.test, {TARGET}}}",
            "2:79: listeners[0].routes[1]: can never match: listeners[0].routes[0], which has no "
            "condition, takes the rest",
        ),
        ("{target: 'a.test'}", "target: must be host:port with a port between 1 and 65535"),
        ("{via: 'tunnel://home/8443'}", "tunnel.bridge.agents has no agent 'home'"),
        (
            "{listener: mian}",
            "2:64: listeners[0].routes[0].listener: there is no listener 'mian' (did you mean "
            "'main'?)",
        ),
        ("{listener: web}", "listeners[0].routes[0].listener: 'web' is this listener itself"),
        ("{listener: other}", "'other' is an sni listener as well: add its routes here"),
        (
            "{listener: names}",
            "'names' has the protocol udp: a route leads to sps, socks5, http, tcp, tunnel",
        ),
        (
            "{listener: main}",
            "2:64: listeners[0].routes[0].listener: would let everybody use the proxy 'main': set "
            "auth, clients or allow_open: true there",
        ),
    ],
)
def test_error_has_its_place_and_says_what_to_do(text: str, message: str) -> None:
    others = (
        *(MAIN, f"{{protocol: sni, listen: '127.0.0.1:3', name: other, routes: [{{{TARGET}}}]}}"),
        "{protocol: udp, listen: '127.0.0.1:4', name: names, target: 'a.test:53'}",
    )
    assert any(message in error for error in errors(listeners(text, *others)))


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        ("protocol: sps, listen: '127.0.0.1:1', routes: []", "routes: has no meaning for the pro"),
        ("protocol: sni, listen: ':1'", "listeners[0].routes: names no route"),
        (f"{PUBLIC}, routes: [{{{TARGET}}}], {TARGET}", "target: the protocol sni has no fixed"),
        (
            f"{PUBLIC}, routes: [{{{TARGET}}}], udp: {{}}",
            "udp: has no meaning for the protocol sni",
        ),
        (f"{PUBLIC}, routes: [{{{TARGET}}}], network: udp", "does not support udp"),
        (f"{PUBLIC}, routes: [{{{TARGET}}}], sniff: tls", "only tcp, redirect, tproxy have it"),
        (
            f"{PUBLIC}, routes: [{{{TARGET}}}], tls: {{certificate: a}}",
            "tls: an sni listener passes TLS on: write tls at the listener that a route leads to",
        ),
    ],
)
def test_key_that_does_not_fit_the_listener_is_an_error(listener: str, message: str) -> None:
    assert any(message in error for error in errors(f"listeners: [{{{listener}}}]"))


def test_wrong_pattern_is_an_error_with_the_place_of_its_route() -> None:
    for key, pattern in (("sni", "10.0.0.1"), ("host", "a..b")):
        text = listeners(f"{{{key}: '{pattern}', {TARGET}}}")
        with pytest.raises(ConfigError) as caught:
            build(configuration(text), Runtime(RecordingLog()), None)  # type: ignore[arg-type]
        assert "test.yaml:2:53: listeners[0].routes[0]" in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        "{listen: '127.0.0.1:2', name: main, clients: 192.0.2.0/24}",
        "{listen: '127.0.0.1:2', name: main, allow_open: true}",
        "{listen: '127.0.0.1:2', name: main, auth: required}",
        "{protocol: tcp, listen: '127.0.0.1:2', name: main, target: 'a.test:1'}",
    ],
)
def test_listener_with_a_guard_may_be_led_to(other: str) -> None:
    users = "users: {alice: {password: secret}}\n" if "auth" in other else ""
    assert read(users + listeners("{listener: main}", other)).listeners[0].routes


def test_local_listener_may_lead_everybody_to_a_local_proxy() -> None:
    for sni in ("protocol: sni, listen: '127.0.0.1:1'", f"{PUBLIC}, clients: 192.0.2.0/24"):
        assert read(listeners("{listener: main}", MAIN, sni=sni)).listeners[0].routes


def led_to(more: str = "") -> Config:
    main = f"{{listen: '127.0.0.1:2', name: main, allow_open: true{more}}}"
    return read(listeners("{listener: main}", main))


def test_proxy_that_others_are_led_to_is_no_local_one() -> None:
    """Hazard 162."""
    config = led_to()
    web, main = config.listeners
    assert (web.is_led_to, main.is_led_to, main.is_local) == (False, True, False)
    assert main.udp.max_sessions_per_client == 64
    # Its own connections come from loopback alone.
    assert main.limits.connections_per_client == main.limits.connections
    policies = make_policies(config)
    assert not policies["main"].permits("127.0.0.1")
    assert policies["web"].permits("127.0.0.1")
    alone = read(f"listeners: [{MAIN}]").listeners[0]
    assert (alone.is_local, alone.udp.max_sessions_per_client) == (True, 4096)
    assert led_to(", udp: {max_sessions_per_client: 9}").listeners[1].udp[5] == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{{sni: '*.test', {TARGET}}}, {{sni: a.test, alpn: h2, {TARGET}}}",
            "listeners[0].routes[1]: can never match: listeners[0].routes[0] at test.yaml:2:53 "
            "takes its connections",
        ),
        (f"{{protocol: tls, {TARGET}}}, {{sni: a.test, {TARGET}}}", "routes[1]: can never match"),
        ("{sni: a.test, listener: main}", "TLS comes here, but listener 'main' has no tls"),
        (
            "{listener: main}",
            "the UDP port of 'main' is on loopback, so that clients of other machines cannot use "
            "UDP ASSOCIATE: listen on another address there, or set network: [tcp]",
        ),
        (
            "{sni: a.test, target: '127.0.0.1:2'}",
            "the target 127.0.0.1:2 is listener 'main' of this daemon, where no client is led to: "
            "write listener: main",
        ),
    ],
)
def test_route_that_cannot_work_is_warned_of(text: str, message: str) -> None:
    main = MAIN.replace("}", ", allow_open: true}")
    assert any(message in warning for warning in warnings(listeners(text, main)))


def test_routes_that_do_not_hide_each_other_are_not_warned_of() -> None:
    text = ", ".join(
        f"{{{conditions}, {TARGET}}}"
        for conditions in (
            *("sni: a.test, alpn: h2", "sni: a.test", "host: a.test", "sni: '*.test'"),
            *("protocol: [http, socks5]", "protocol: tls"),
        )
    )
    assert warnings(listeners(f"{text}, {{{TARGET}}}")) == []


def test_listeners_and_routes_are_listed() -> None:
    main = "{listen: '127.0.0.1:2', name: main, network: tcp, allow_open: true}"
    text = listeners(
        f"{{sni: [a.test, b.test], alpn: h2, {TARGET}, via: far, send_proxy: v1}}, "
        "{host: w.test, listener: main}, {target: 'x.test:1'}",
        main,
    )
    lines = described(text + "upstreams: {far: 'socks5://192.0.2.1:1'}\n")
    assert [line for line in lines if line.startswith("route")] == [
        "route listeners[0].routes[0] on 'web': sni a.test or b.test, alpn h2 leads to "
        "10.0.0.5:443 through far, with a PROXY header v1",
        "route listeners[0].routes[1] on 'web': host w.test leads to listener 'main'",
        "route listeners[0].routes[2] on 'web': everything else leads to x.test:1",
    ]


def test_explain_says_which_route_a_flow_takes() -> None:
    main = MAIN.replace("}", ", allow_open: true, network: tcp}")
    text = listeners(
        "{sni: a.test, target: '192.0.2.5:443', via: far}, {host: w.test, listener: main}, "
        "{protocol: tls, target: '192.0.2.6:443'}",
        main,
    )
    text += "upstreams: {far: 'socks5://192.0.2.1:1'}\nrules: [{sni: b.test, via: block}]\n"
    plan = build(configuration(text), Runtime(RecordingLog()), None)  # type: ignore[arg-type]
    lines = {
        target: PlanQuestions(plan).explain(f"{target} on web")[1:4]
        for target in ("a.test:443", "b.test:443", "192.0.2.9:443", "w.test:80", "x.test:80")
    }
    place = "listeners[0].routes"
    assert [found[0] for found in lines.values()] == [
        f"route: {place}[0] (sni a.test) takes tls for a.test, leads to 192.0.2.5:443 through far",
        f"route: {place}[2] (protocol tls) takes tls for b.test, leads to 192.0.2.6:443",
        f"route: {place}[2] (protocol tls) takes tls for no name, leads to 192.0.2.6:443",
        f"route: {place}[1] (host w.test) takes http for w.test, leads to listener 'main'",
        "refused: no route matches http for x.test",
    ]
    assert f"none matches; {place}[0] applies" in lines["a.test:443"][1]
    assert lines["a.test:443"][2].startswith("upstream: far")
    assert lines["b.test:443"][1].startswith("rule: rules[0]")
    assert len(lines["w.test:80"]) == len(lines["x.test:80"]) == 1
