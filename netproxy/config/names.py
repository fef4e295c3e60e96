"""The `dns` section: which name servers are asked for which names, and by which way."""

from __future__ import annotations

import re
from typing import Iterator, NamedTuple, Sequence

from netproxy.config.node import MapReader, Node, Problems
from netproxy.config.schema import (
    DnsConfig,
    DnsRuleConfig,
    ListenerConfig,
    NameServerConfig,
    UpstreamTlsConfig,
    UpstreamConfig,
)
from netproxy.config.upstreams import Ways, server_name
from netproxy.config.url import HOST_NAME, parse_host_port
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.networks import is_loopback

PORTS = {"udp": 53, "tcp": 53, "tls": 853, "https": 443}
NAME_LIMIT = 254  # characters, with a dot at the end
CACHE_LIMIT = 1 << 20  # names; some 300 bytes each, answers of a dns listener as many
_URL = r"(?:(udp|tcp|tls|https)://)?(\[[0-9a-fA-F:.]+\]|[^/:\[\]]+|(?:[0-9a-fA-F.]*:){2}[0-9a-fA-F:.]*)(?::(\d{1,5}))?(/[\x21-\x7e]*)?\Z"


class _Url(NamedTuple):
    scheme: str
    server: Address
    path: str


def read_dns(
    section: MapReader, ways: Ways, listeners: Sequence[ListenerConfig], warnings: list[str]
) -> DnsConfig:
    """`listeners`: the dns listeners of the file."""
    problems = section.problems
    asked = section.has("servers")
    servers = _servers(section, "servers", ways, problems)
    hosts = dict(_hosts(section.mapping("hosts")))
    rules = tuple(
        _rule(node, f"dns.rules[{at}]", ways, problems)
        for at, node in enumerate(section.items("rules"))
    )
    dns = DnsConfig(
        servers,
        rules,
        section.read("cache", _cache, DnsConfig().cache),
        section.choice("prefer", ("ipv4", "ipv6"), ""),
        tuple(sorted(hosts.items())),
        section.place,
    )
    section.finish()
    if listeners and not asked:
        section.wrong("servers", f"is missing: whom listener '{listeners[0].name}' asks")
    for server in (*servers, *(one for rule in rules for one in rule.servers)):
        _check(server, listeners, problems)
        warnings += _warnings(server, dns)
    return dns


def _check(
    server: NameServerConfig, listeners: Sequence[ListenerConfig], problems: Problems
) -> None:
    """That no listener asks itself: as far as addresses tell that."""
    for listener in listeners:
        for address in listener.addresses:
            everywhere = not any(pack_ip(address.host) or b"\1") and is_loopback(server.server.host)
            if server.upstream is None and (
                server.server == address or everywhere and server.server.port == address.port
            ):
                problems.add(
                    f"dns: {server.server} is listener '{listener.name}' itself", server.place
                )


def _warnings(server: NameServerConfig, dns: DnsConfig) -> Iterator[str]:
    if server.tls.insecure:
        yield f"dns: {server.server}: whoever answers there is believed"
    for step in server.upstream.steps[:1] if server.upstream else ():
        for hop in UpstreamConfig((step,)).hops:
            name = hop.server.host if hop.server else ""
            if name and pack_ip(name) is None and name not in dict(dns.hosts):
                yield f"dns: {server.server}: its upstream's name, {name}, may have to be asked of it: write an address, or put it in dns.hosts"


def _rule(node: Node, path: str, ways: Ways, problems: Problems) -> DnsRuleConfig:
    section = MapReader(node, path, problems)
    domain, files = tuple(section.texts("domain", str)), tuple(section.texts("domain_file", str))
    block = section.flag("block", False)
    servers = _servers(section, "servers", ways, problems)
    section.finish()
    if not domain and not files:
        section.wrong("domain", "is missing: which names it is for")
    if block == bool(servers):
        section.wrong(
            "servers",
            "has no use where the names are blocked" if block else "is missing, or block: true",
        )
    return DnsRuleConfig(domain, files, servers, node.place)


def _servers(
    section: MapReader, key: str, ways: Ways, problems: Problems
) -> tuple[NameServerConfig, ...]:
    found = [
        _server(node, f"{section.path}.{key}[{at}]", ways, problems)
        for at, node in enumerate(section.items(key))
    ]
    return tuple(server for server in found if server is not None)


def _server(node: Node, path: str, ways: Ways, problems: Problems) -> NameServerConfig | None:
    """A URL or an address, or a mapping with a `url` and how to get there."""
    section = MapReader(
        node if isinstance(node.value, dict) else Node({"url": node}, node.place), path, problems
    )
    named = section.has("url")
    url = section.read("url", _parse_url, None)
    upstream = section.take("upstream")
    given = section.has("tls")
    inner = section.mapping("tls")
    tls = UpstreamTlsConfig(
        inner.text("ca"),
        inner.text("certificate"),
        inner.text("key"),
        inner.read("server_name", server_name, ""),
        inner.flag("insecure", False),
    )
    if tls.key and not tls.certificate:
        inner.wrong("certificate", "is missing")
    inner.finish()
    section.finish()
    if url is None:
        if not named:
            section.wrong("url", "is missing")
        return None
    if given and url.scheme not in ("tls", "https"):
        section.wrong("tls", f"{url.scheme} has none")
    way = ways.read(upstream, f"{path}.upstream") if upstream is not None else None
    return NameServerConfig(url.scheme, url.server, url.path, way, tls, node.place)


def _parse_url(text: str) -> _Url:
    """ValueError."""
    match = None if pack_ip(text) is not None else re.match(_URL, text)
    scheme, host, port, path = match.groups() if match else ("udp", text, None, None)
    scheme = scheme or "udp"
    host = host.strip("[]")
    if (match is None and pack_ip(text) is None) or (path and path != "/" and scheme != "https"):
        raise ValueError(
            f"'{text}' is no name server: write 192.168.1.1, tcp://..., tls://9.9.9.9 or https://dns.example/dns-query"
        )
    if pack_ip(host) is None and scheme in ("udp", "tcp"):
        raise ValueError(
            f"'{host}' is a name: a name server is reached by its address, but for tls:// and https://"
        )
    address = parse_host_port(
        f"[{host}]:{port or PORTS[scheme]}" if ":" in host else f"{host}:{port or PORTS[scheme]}"
    )
    return _Url(scheme, address, (path or "/dns-query") if scheme == "https" else "")


def _hosts(section: MapReader) -> list[tuple[str, tuple[str, ...]]]:
    """The names are the user's own."""
    found = []
    for name, node in section.rest().items():
        if not re.match(HOST_NAME, name.rstrip(".")) or len(name) > NAME_LIMIT:
            section.wrong("", f"'{name}' is no host name", node.key_place)
        one = MapReader(Node({name: node}, node.place), section.path, section.problems)
        found.append((name.lower().rstrip("."), tuple(one.texts(name, _address))))
    return found


def _address(text: str) -> str:
    if pack_ip(text) is None:
        raise ValueError(f"'{text}' is no IP address")
    return text


def _cache(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= CACHE_LIMIT):
        raise ValueError(f"'{text}' is no number of names between 0 and {CACHE_LIMIT}")
    return int(text)
