"""The exact words of every error in a configuration: where it is, what is wrong, what was meant."""

from __future__ import annotations

import pytest

from netproxy.config.load import load_text
from netproxy.config.node import Problems
from netproxy.config.read import read_config
from tests.config.test_read import errors

pytest.importorskip("yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("listners: []", "c.yaml:1:1: listners: unknown key (did you mean 'listeners'?)"),
        ("xyzzy: 2", "c.yaml:1:1: xyzzy: unknown key"),
        ("<<: {a: b}", "c.yaml:1:1: <<: unknown key"),
        ("log:\n  levle: debug", "c.yaml:2:3: log.levle: unknown key (did you mean 'level'?)"),
        (
            "timeouts: {conect: 1s}",
            "c.yaml:1:12: timeouts.conect: unknown key (did you mean 'connect'?)",
        ),
        ("udp: {batch: auto}", "c.yaml:1:7: udp.batch: unknown key (did you mean 'batching'?)"),
        (
            "users: {a: {password: x, pasword: y}}",
            "c.yaml:1:26: users.a.pasword: unknown key (did you mean 'password'?)",
        ),
        ("[1, 2]", "c.yaml:1:1: the file must be a mapping of keys to values"),
        ("text", "c.yaml:1:1: the file must be a mapping of keys to values"),
        ("log: loud", "c.yaml:1:6: log must be a mapping of keys to values"),
        ("users: [a]", "c.yaml:1:8: users must be a mapping of keys to values"),
        (
            "log: {level: loud}",
            "c.yaml:1:14: log.level: 'loud' is none of debug, info, warning, error",
        ),
        (
            "log: {level: inof}",
            "c.yaml:1:14: log.level: 'inof' is none of debug, info, warning, error (did you mean 'info'?)",
        ),
        ("log: {level: [info]}", "c.yaml:1:14: log.level: must be a single value"),
        ("log: {access: yes}", "c.yaml:1:15: log.access: 'yes' is none of true, false"),
        (
            "udp: {batching: x}",
            "c.yaml:1:17: udp.batching: 'x' is none of auto, mmsg, trains, single",
        ),
        (
            "timeouts: {connect: 30}",
            "c.yaml:1:21: timeouts.connect: '30' has no unit: write 30s for seconds or 30ms for milliseconds",
        ),
        (
            "timeouts: {drain: soon}",
            "c.yaml:1:19: timeouts.drain: 'soon' is no duration: write it as 500ms, 30s, 5m, 2h, 1d or 1h30m",
        ),
        ("timeouts: {handshake: 0}", "c.yaml:1:23: timeouts.handshake: must be longer than 0"),
        ("timeouts: {tcp_idle: 0s}", "c.yaml:1:22: timeouts.tcp_idle: must be longer than 0"),
        ("users: {a: {}}", "c.yaml:1:12: users.a.password: is missing or empty"),
        ("users: {a: {password: ''}}", "c.yaml:1:12: users.a.password: is missing or empty"),
        (
            "users: {'a:b': {password: x}}",
            "c.yaml:1:16: users.a:b: a user's name has 1 to 255 bytes and no ':'",
        ),
        (
            "users: {a: {password: x, limits: {sessions: 0}}}",
            "c.yaml:1:45: users.a.limits.sessions: '0' is no whole number above 0",
        ),
        (
            "default: nowhere",
            "c.yaml:1:10: default: not an upstream: write scheme://host:port, direct or block",
        ),
        (
            "default: ofice\nupstreams: {office: direct}",
            "c.yaml:1:10: default: not an upstream: write scheme://host:port, direct or block (did you mean 'office'?)",
        ),
        ("default: {a: b}", "c.yaml:1:10: default: needs a url, or members"),
        (
            "upstreams: {a: ['http://h:1', 'sock5://h:1']}",
            "c.yaml:1:31: upstreams.a[1]: 'sock5' is no scheme of an upstream (did you mean 'socks5'?)",
        ),
        (
            "upstreams: {a: [direct, 'http://h:1']}",
            "c.yaml:1:16: upstreams.a[0]: direct is no hop of a chain",
        ),
        (
            "upstreams: {a: ['http://h:1', block]}",
            "c.yaml:1:16: upstreams.a[1]: block is no hop of a chain",
        ),
        ("upstreams: {a: a}", "c.yaml:1:16: upstreams.a: the way leads back to itself"),
    ],
)
def test_of_a_file(text: str, message: str) -> None:
    assert errors(text) == [message]


@pytest.mark.parametrize(
    "text, message",
    [
        ("protocl: sps", "2:29: listeners[0].protocl: unknown key (did you mean 'protocol'?)"),
        (
            "protocol: socks",
            "2:39: listeners[0].protocol: 'socks' is none of sps, socks5, http, tcp, udp, dns, tunnel (did you mean 'socks5'?)",
        ),
        (
            "udp: {relay: any}",
            "2:35: listeners[0].udp.relay: unknown key (did you mean 'relay_port'?)",
        ),
        (
            "udp: {relay_port: 5-3}",
            "2:47: listeners[0].udp.relay_port: '5-3' is none of shared, any or FIRST-LAST",
        ),
        (
            "udp: {relay_port: 0-3}",
            "2:47: listeners[0].udp.relay_port: '0-3' is none of shared, any or FIRST-LAST",
        ),
        (
            "udp: {relay_port: 9-65536}",
            "2:47: listeners[0].udp.relay_port: '9-65536' is none of shared, any or FIRST-LAST",
        ),
        (
            "udp: {relay_port: 5}",
            "2:47: listeners[0].udp.relay_port: '5' is none of shared, any or FIRST-LAST",
        ),
        (
            "udp: {mapping: full-cone}",
            "2:44: listeners[0].udp.mapping: 'full-cone' is none of endpoint-independent, symmetric",
        ),
        (
            "udp: {filtering: none}",
            "2:46: listeners[0].udp.filtering: 'none' is none of endpoint-independent, address-dependent, address-and-port-dependent",
        ),
        (
            "udp: {max_sessions: many}",
            "2:49: listeners[0].udp.max_sessions: 'many' is no whole number above 0",
        ),
        (
            "limits: {connections: -1}",
            "2:51: listeners[0].limits.connections: '-1' is no whole number above 0",
        ),
        (
            "limits: {connections: 0123456789012}",
            "2:51: listeners[0].limits.connections: '0123456789012' is no whole number above 0",
        ),
        (
            "limits: {connections_per_client: 1.5}",
            "2:62: listeners[0].limits.connections_per_client: '1.5' is no whole number above 0",
        ),
        ("network: [tcp, sctp]", "2:44: listeners[0].network[1]: 'sctp' is neither tcp nor udp"),
        (
            "network: udp",
            "2:5: listeners[0].network: datagrams of sps need its TCP connections: add tcp",
        ),
        (
            "protocol: http, network: udp",
            "2:5: listeners[0].network: datagrams of http need its TCP connections: add tcp",
        ),
        (
            "clients: [10.0.0.1/8]",
            "2:39: listeners[0].clients[0]: '10.0.0.1/8' is not a valid network: bits behind the prefix are set (the network is 10.0.0.0/8)",
        ),
        ("clients: everybody", "2:38: listeners[0].clients[0]: 'everybody' is not a valid network (expected an address or CIDR, such as 10.0.0.0/8)"),
        ("auth: required", "2:5: listeners[0].auth: there are no users"),
        ("auth: maybe", "2:35: listeners[0].auth: 'maybe' is none of required, optional, none"),
        (
            "announce: 'a b'",
            "2:39: listeners[0].announce: 'a b' is no address, address:port or host name",
        ),
        ("announce: {clients: 10.0.0.0/8}", "2:39: listeners[0].announce[0]: names no address"),
        (
            "upstream: nowhere",
            "2:39: listeners[0].upstream: not an upstream: write scheme://host:port, direct or block",
        ),
        ("target: 'h:1'", "2:5: listeners[0].target: sps has none: its clients name theirs"),
        ("protocol: tcp", "2:5: listeners[0].target: is missing"),
        (
            "protocol: udp, target: h",
            "2:52: listeners[0].target: not host:port with a port between 1 and 65535",
        ),
        ("name: [a]", "2:35: listeners[0].name: must be a single value"),
        ("allow_open: yes", "2:41: listeners[0].allow_open: 'yes' is none of true, false"),
    ],
)
def test_of_a_listener(text: str, message: str) -> None:
    assert errors(f"listeners:\n  - {{listen: '127.0.0.1:1', {text}}}") == [f"c.yaml:{message}"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "2:5: listeners[0].listen: is missing"),
        (
            "{listen: 1080}",
            "2:14: listeners[0].listen: '1080' is no address to listen on: write host:port, :port or [v6]:port",
        ),
        (
            "{listen: 'h:70000'}",
            "2:14: listeners[0].listen: 'h:70000' names no ports between 0 and 65535",
        ),
        (
            "{listen: ['127.0.0.1:1', '[::1]:1']}",
            "2:14: listeners[0].listen: must be a single value",
        ),
        ("{listen: {host: 127.0.0.1}}", "2:14: listeners[0].listen: must be a single value"),
        ("127.0.0.1:1", "2:5: listeners[0] must be a mapping of keys to values"),
    ],
)
def test_of_where_to_listen(text: str, message: str) -> None:
    assert errors(f"listeners:\n  - {text}")[0] == f"c.yaml:{message}"


def test_two_listeners_of_one_name() -> None:
    assert errors(
        "listeners:\n  - {listen: '127.0.0.1:1', name: a}\n  - {listen: '127.0.0.2:1', name: a}\n"
    ) == ["c.yaml:3:5: listeners[1].name: 'a' is the name of another listener"]


def test_a_listener_named_as_the_flows_of_a_tunnels_agent() -> None:
    assert errors("listeners: [{listen: '127.0.0.1:0', name: tunnel-agent}]\n") == [
        "c.yaml:1:13: listeners[0].name: 'tunnel-agent' is what a tunnel's agent is asked for"
    ]


def test_two_listeners_on_one_address() -> None:
    assert errors(
        "listeners:\n  - {listen: '127.0.0.1:1-2', name: a}\n  - {listen: '127.0.0.1:2', name: b, network: tcp}\n"
    ) == ["c.yaml:3:5: listeners[1].listen: tcp 127.0.0.1:2 is taken by listener 'a'"]


def test_two_listeners_on_one_port_of_different_networks_are_fine() -> None:
    problems = Problems()
    text = "listeners:\n  - {listen: '127.0.0.1:1', name: a, network: tcp}\n  - {listen: '127.0.0.1:1', name: b, protocol: udp, target: 'h:1'}\n"
    assert len(read_config(load_text(text.encode(), "c.yaml"), problems).listeners) == 2
    assert not problems.found


def test_all_that_is_wrong_is_said_at_once() -> None:
    assert errors("a: 1\nlog: {level: loud, b: 2}\nlisteners: [{listen: 1, protocol: x}]\n") == [
        "c.yaml:3:35: listeners[0].protocol: 'x' is none of sps, socks5, http, tcp, udp, dns, tunnel",
        "c.yaml:3:22: listeners[0].listen: '1' is no address to listen on: write host:port, :port or [v6]:port",
        "c.yaml:2:14: log.level: 'loud' is none of debug, info, warning, error",
        "c.yaml:2:20: log.b: unknown key",
        "c.yaml:1:1: a: unknown key",
    ]
