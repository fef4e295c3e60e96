"""The configuration: YAML, whole files, URLs, rules, lists."""

from __future__ import annotations

import ipaddress
import tempfile
import urllib.parse
from typing import Any

import yaml

from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.node import Node, Source
from netproxy.config.tree.problems import Problems
from netproxy.config.read import check, read_config
from netproxy.config.url import (
    hop_node,
    listener_node,
    parse_announce,
    parse_hop,
    parse_host_port,
    parse_listen,
)
from netproxy.errors import ConfigError, DialError
from netproxy.interfaces.networks import IpNetwork, NetworkSet
from netproxy.router.factory import domains
from netproxy.router.lists import read_domains, read_networks
from netproxy.router.matchers import DomainSet, PortSet
from netproxy.router.patterns import APEX, BELOW, KEYWORD, DomainPattern, compile_expression
from netproxy.router.patterns import parse_domain
from tests.fuzz.target import Target, accepted
from tests.support.routing import flow, routing

_DEPTH_LIMIT = 12
_HOSTS = ("a", "ads.example", "x.ads.example", "example", "127.0.0.1", "10.1.2.3", "2001:db8::1")
_FLOWS = (
    "tcp 192.168.1.5 -> ads.example:443 on main",
    "udp alice@10.0.0.1 -> 10.1.2.3:53 on main",
    "tcp ::1 -> x.ads.example:80 on socks",
    "udp 192.0.2.1 -> 2001:db8::1:443 on main",
)


_PORTS = frozenset(range(65536))


# -- files


def _check_file(data: bytes) -> None:
    """A whole file: a configuration or ConfigError, with the place of every error."""
    # Its text would be read as an input.
    if b"!file" in data and b"/" in data:
        return
    try:
        root = parse_text(data, Source("file.yaml"))
    except ConfigError as error:
        assert str(error).startswith("file.yaml"), error
        assert str(error).isprintable(), error
        return
    assert _size(root) <= 2 * len(data) + 1
    _check_against_yaml(root, data)
    problems = Problems()
    config = read_config(root, problems)
    try:
        check(config, problems)
    except ConfigError as error:
        assert problems.errors
        for line, problem in zip(str(error).split("\n"), problems.errors, strict=True):
            assert line == str(problem) and line.startswith("file.yaml"), line


def _size(node: Node) -> int:
    """Return the number of nodes in a tree."""
    if isinstance(node.value, dict):
        return 1 + sum(map(_size, node.value.values()))
    return 1 + (sum(map(_size, node.value)) if isinstance(node.value, list) else 0)


def _check_against_yaml(root: Node, data: bytes) -> None:
    """PyYAML, told to leave all scalars text, reads the same tree."""
    if b"!" in data or b"${" in data:
        return
    try:
        theirs = yaml.load(data, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        # libyaml, which we read with, takes more than PyYAML's own parser.
        return
    assert _plain(root) == ({} if theirs is None else theirs)


def _plain(node: Node) -> Any:
    """Return a tree of text.  Any: it nests."""
    if isinstance(node.value, dict):
        return {key: _plain(value) for key, value in node.value.items()}
    return list(map(_plain, node.value)) if isinstance(node.value, list) else node.value


# -- URLs


def _check_url(data: bytes) -> None:
    # As an argument of the command line.
    text = data.decode("utf-8", "surrogateescape")
    for parse in (parse_listen, parse_host_port, parse_announce):
        accepted(parse, text)
    origin = Node(text, "-l")
    for make, place in ((hop_node, origin), (listener_node, "-l")):
        node = accepted(make, text, place)
        if node is not None:
            assert _size(node) <= 2 * len(text) + 2
            _read_listener_or_hop(node)
    hop = accepted(parse_hop, text)
    if hop is None or hop.scheme in ("direct", "block", "tunnel"):
        return
    # Python's split refuses a lone bracket in a password: then there is nothing to compare.
    parts = accepted(urllib.parse.urlsplit, text)
    # It strips and drops letters that no URL has: then neither.
    if parts is None or parts.geturl().rstrip("/?") != text.rstrip("/?"):
        return
    assert parts.scheme == hop.scheme and parts.port == hop.server.port
    assert (parts.hostname or "").lower() == hop.server.host
    user = urllib.parse.unquote(parts.username or "", errors="strict")
    password = urllib.parse.unquote(parts.password or "", errors="strict")
    assert (user, password) == (hop.user, hop.password), (parts, hop)


def _read_listener_or_hop(node: Node) -> None:
    """Read a node as a file's: every mistake is an error of the configuration."""
    place = node.place
    for tree in (
        Node({"listeners": Node([node], place)}, place),
        Node({"upstreams": Node({"a": node}, place)}, place),
    ):
        problems = Problems()
        read_config(tree, problems)
        assert all(str(error).isprintable() for error in problems.errors), problems.errors


# -- rules

_RULES_HEAD = b"""
listeners: [{listen: '127.0.0.1:1080', name: main}, {listen: '127.0.0.1:1081', name: socks}]
upstreams: {proxy: 'socks5://127.0.0.1:9'}
default: direct
rules:
"""


def _check_rules(data: bytes) -> None:
    """Rules that compile decide every flow, in the same way twice."""
    if b"file" in data:
        return
    try:
        root = parse_text(_RULES_HEAD + data, Source("file.yaml"))
        problems = Problems()
        config = check(read_config(root, problems), problems)
        router = routing(config).router
    except ConfigError as error:
        assert str(error), error
        return
    for text in _FLOWS:
        decisions = []
        for _ in range(2):
            try:
                decisions.append(str(router.route(flow(text)).dialer))
            except DialError as error:
                decisions.append(str(error))
        rule, outcome = router.explain(flow(text))
        expected = str(outcome) if isinstance(outcome, DialError) else str(outcome.dialer)
        assert decisions == [expected, expected], (rule, decisions, expected)


# -- lists and patterns


def _check_lists(data: bytes) -> None:
    """A list file, as domains and as networks, and each of its lines as a pattern."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(data)
        file.flush()
        names = _list(read_domains, file.name)
        networks = _list(read_networks, file.name)
        if names is not None:
            assert len(names) <= len(data)
            _check_domains(names)
            compiled = domains((), (file.name,))
            assert [host in compiled for host in _HOSTS] == [
                host in DomainSet(names) for host in _HOSTS
            ]
        if networks is not None:
            _check_networks(networks)
    for line in data.decode("utf-8", "replace").splitlines():
        pattern = accepted(parse_domain, line)
        if pattern is not None:
            _check_domains([pattern])
        _check_network_text(line)
        ports = accepted(PortSet, (line,))
        if ports is not None:
            first, _, last = line.partition("-")
            inside = range(int(first), int(last or first) + 1)
            for port in {0, inside.start - 1, *inside[:1], *inside[-1:], inside.stop} & _PORTS:
                assert (port in ports) == (port in inside), (port, line)


def _list(read: Any, path: str) -> Any:
    """Return what a list holds, None for its refusal.  Any: domains or networks."""
    try:
        return list(read(path))
    except ConfigError as error:
        assert str(error).startswith(path), error
        return None


def _check_domains(patterns: list[DomainPattern]) -> None:
    """A set holds a name if one of the patterns matches it by itself."""
    names = DomainSet(patterns)
    hosts = [*_HOSTS, *(text for kind, text in patterns if kind & (APEX | BELOW))]
    hosts += [f"x.{host}" for host in hosts if not host[-1:].isdigit() and len(host) < 200]
    for host in hosts:
        if _is_address(host):
            continue
        assert (host in names) == any(_matches(pattern, host) for pattern in patterns), host


def _matches(pattern: DomainPattern, host: str) -> bool:
    if pattern.kind == KEYWORD:
        return pattern.text in host
    if pattern.kind & (APEX | BELOW):
        apex = bool(pattern.kind & APEX) and host == pattern.text
        return apex or (bool(pattern.kind & BELOW) and host.endswith("." + pattern.text))
    return compile_expression(pattern.text).search(host) is not None


def _is_address(host: str) -> bool:
    return accepted(ipaddress.ip_address, host) is not None


def _check_network_text(text: str) -> None:
    network = accepted(IpNetwork.parse, text)
    if network is not None:
        reference = ipaddress.ip_network(text)
        size, shift = reference.max_prefixlen // 8, reference.max_prefixlen - reference.prefixlen
        first = int(reference.network_address)
        if size == 16 and first >> 32 == 0xFFFF and shift <= 32:
            size, first = 4, first & 0xFFFFFFFF
        assert network == (size, first >> shift, shift), (text, network)


def _check_networks(networks: list[IpNetwork]) -> None:
    compiled = NetworkSet(networks)
    for host in ("10.1.2.3", "127.0.0.1", "192.168.0.0", "2001:db8::1", "::", "255.255.255.255"):
        assert (host in compiled) == any(network.holds(host) for network in networks), host


_YAML = (
    *(b"listeners: ", b"- ", b": ", b"{", b"}", b"[", b"]", b", ", b"\n", b"\n  ", b"'", b'"'),
    *(b"upstreams: ", b"rules: ", b"users: ", b"timeouts: ", b"tunnel: ", b"dns: ", b"log: "),
    *(b"listen: '127.0.0.1:1080'", b"via: direct", b"via: block", b"domain: ", b"ip: ", b"port: "),
    *(b"client: 10.0.0.0/8", b"network: udp", b"user: alice", b"not: {", b"password: secret"),
    *(b"!file ", b"${HOME}", b"&a", b"*a", b"---", b"# ", b"|\n ", b">\n ", b"\\0", b"\\ud800"),
    *(b"socks5://127.0.0.1:9", b"sps://", b"protocol: dns", b"5s", b"1h30m", b"true", b"? "),
    *(b"limits: {connections: 1}", b"udp: {batching: auto}", b"destinations: {deny: [lan]}"),
    *(b"auto: {deadline: 1s}", b"metrics: 127.0.0.1:9", b"control: unix:/run/x", b"tls: {"),
)
_PATTERNS = (
    *(b"*.", b".", b"keyword:", b"regex:", b"example", b"ads.", b"xn--", b"0.0.0.0 ", b"# "),
    *(b"10.0.0.0/8", b"2001:db8::/32", b"::ffff:10.0.0.0/104", b"/0", b"1-65535", b"443", b"\n"),
    *(b"address=/", b"server=/", b"/", b"localhost", b"\xc3\x9f", b"\xe2\x80\x8c", b"\xef\xbb\xbf"),
    *(b"\xe3\x80\x82", b"(a|b)+", b"[", b"%eth0", b"\0", b"\xc2\x85", b"\xe2\x80\xa8"),
)
_URLS = (
    *(b"socks5://", b"socks4://", b"http://", b"https://", b"tunnel://", b"sps://", b"direct"),
    *(b"user:password@", b"127.0.0.1:1080", b"[::1]:80", b"example.com:443", b"?", b"&", b"="),
    *(b"%40", b"%ff", b"%", b"tls.ca", b"udp.mapping=symmetric", b",", b"systemd:", b"8000-8010"),
    *(b"auth=optional", b"limits.connections=5", b":", b"/", b"#", b"@", b".", b"users=alice"),
)

TARGETS = (
    Target("config", _check_file, _YAML, 2048, {"config.tree.parse.DEPTH_LIMIT": _DEPTH_LIMIT}),
    Target("rules", _check_rules, _YAML + _PATTERNS, 1024),
    Target("lists", _check_lists, _PATTERNS, 1024, {"router.lists.LINE_LIMIT": 200}),
    Target("url", _check_url, _URLS, 512),
)
