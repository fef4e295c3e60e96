"""Reads the section `dns`: name servers, rules for names, and fixed addresses of names.

Looks up nothing and opens no file: resolver.factory reads the files of names.
"""

from __future__ import annotations

import re

from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import (
    DnsConfig,
    DnsRuleConfig,
    FakeConfig,
    ListenerConfig,
    NameServerConfig,
    UpstreamConfig,
)
from netproxy.config.sections.tls import read_client_tls
from netproxy.config.units import parse_duration
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.config.url import HOST_NAME, parse_host_port
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.services import DOMAINS
from netproxy.interfaces.networks import IpNetwork, is_loopback
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.config.remote_lists import ListReader

PORTS = {"udp": 53, "tcp": 53, "tls": 853, "https": 443}
NAME_LIMIT = 254
"""Characters of a name, with a dot at the end."""
CACHE_LIMIT = 1 << 20
"""Names, of some 300 bytes each.  A dns listener caches as many answers, of the same size."""
STALE_LIMIT = 7 * 86400.0
"""Seconds: RFC 8767 section 5 suggests one to three days."""
FAKE_BITS = 8
"""Bits behind the prefix of a network of fake addresses: each name that is in use needs one."""
NAT64_BITS = (32, 40, 48, 56, 64, 96)
"""Bits of a prefix, RFC 6052 section 2.2."""
_NAT64_WORDS: dict[str, tuple[IpNetwork | None, bool]] = {
    "auto": (None, True),
    "off": (None, False),
}
_IPV6 = r"(?:[0-9a-fA-F.]*:){2}[0-9a-fA-F:.]*"
_URL = (
    r"(?:(udp|tcp|tls|https)://)?"
    rf"(\[[0-9a-fA-F:.]+\]|[^/:\[\]]+|{_IPV6})"
    r"(?::([0-9]{1,5}))?"
    r"(/[\x21-\x7e]*)?\Z"
)
_EXPECTED = (
    "(expected 192.168.1.1, tcp://192.168.1.1, tls://9.9.9.9 or https://dns.example/dns-query)"
)


class _ServerUrl(NamedTuple):
    scheme: str
    server: Address
    path: str


class DnsReader:
    """Reads the section `dns`."""

    def __init__(self, upstreams: UpstreamReader, lists: ListReader, problems: Problems) -> None:
        self._upstreams = upstreams
        self._lists = lists
        self._problems = problems

    def read(self, section: MapReader, listeners: Sequence[ListenerConfig]) -> DnsConfig:
        """Return the section's configuration.  `listeners`: those with the protocol dns."""
        has_servers = section.has("servers")
        servers = self._servers(section, "servers")
        hosts = dict(_hosts(section.mapping("hosts")))
        rules = tuple(
            self._rule(MapReader(node, f"dns.rules[{index}]", self._problems))
            for index, node in enumerate(section.items("rules"))
        )
        dns = DnsConfig(
            servers,
            rules,
            section.read("cache", _cache, DnsConfig().cache),
            section.choice("prefer", ("ipv4", "ipv6"), ""),
            tuple(sorted(hosts.items())),
            section.read("serve_stale", _stale, DnsConfig().serve_stale),
            *section.read("nat64", _nat64, _NAT64_WORDS["auto"]),
            section.flag("remember", False),
            self._fake(section),
            section.place,
        )
        section.finish()
        for key, is_set in (("remember", dns.remember), ("fake", bool(dns.fake.networks))):
            if is_set and not listeners:
                section.warn(key, "there is no listener with the protocol dns")
        if listeners and not has_servers:
            message = f"is missing: listener '{listeners[0].name}' needs name servers"
            section.add_error("servers", message)
        for server in (*servers, *(server for rule in rules for server in rule.servers)):
            self._check(server, listeners)
            for warning in _warnings(server, dns):
                self._problems.warn(f"dns: {server.server}: {warning}", server.place)
        return dns

    def _fake(self, section: MapReader) -> FakeConfig:
        """Return the fake addresses: networks, or a mapping with networks and names."""
        node = section.peek("fake")
        if node is None:
            section.has("fake")  # known, for the hints of other keys
            return FakeConfig()
        reader, key = section, "fake"
        domain: tuple[str, ...] = ()
        exceptions: tuple[str, ...] = ()
        if isinstance(node.value, dict):
            reader, key = section.mapping("fake"), "networks"
            domain, exceptions = reader.values("domain", str), reader.values("except", str)
            if not reader.has(key):
                reader.add_error(key, "is missing (expected networks, such as 198.18.0.0/15)")
        networks = reader.values(key, _fake_network)
        if len({network.size for network in networks}) < len(networks):
            reader.add_error(key, "has two networks of one family")
        if reader is not section:
            reader.finish()
        return FakeConfig(networks, domain, exceptions, node.place)

    def _rule(self, section: MapReader) -> DnsRuleConfig:
        domain, files = section.values("domain", str), self._lists.read(section, DOMAINS)
        block = section.flag("block", False)
        servers = self._servers(section, "servers")
        section.finish()
        if not domain and not files:
            message = "is missing: the rule needs domain or domain_file"
            section.add_error("domain", message, given=("domain_file",))
        if block and servers:
            section.add_error("servers", "cannot be combined with block: true")
        if not block and not servers:
            section.add_error("servers", "is missing (or set block: true)", given=("block",))
        return DnsRuleConfig(domain, files, servers, section.place)

    def _servers(self, section: MapReader, key: str) -> tuple[NameServerConfig, ...]:
        servers = [
            self._server(node, f"{section.path}.{key}[{index}]")
            for index, node in enumerate(section.items(key))
        ]
        return tuple(server for server in servers if server is not None)

    def _server(self, node: Node, path: str) -> NameServerConfig | None:
        """Return a name server: a URL, or a mapping with a url and options."""
        is_mapping = isinstance(node.value, dict)
        mapping = node if is_mapping else Node({"url": node}, node.place)
        section = MapReader(mapping, path, self._problems)
        has_url, has_tls = section.has("url"), section.has("tls")
        url = section.read("url", _parse_url, None)
        upstream_node = section.take("upstream")
        tls = read_client_tls(section.mapping("tls"))
        section.finish()
        if url is None:
            if not has_url:
                section.add_error("url", "is missing")
            return None
        if has_tls and url.scheme not in ("tls", "https"):
            section.add_error("tls", f"the scheme {url.scheme} has no TLS (use tls or https)")
        upstream = (
            self._upstreams.read(upstream_node, f"{path}.upstream") if upstream_node else None
        )
        return NameServerConfig(url.scheme, url.server, url.path, upstream, tls, node.place)

    def _check(self, server: NameServerConfig, listeners: Sequence[ListenerConfig]) -> None:
        """Report a server that is a listener of the daemon's own, if the addresses tell."""
        if server.upstream is not None:
            return
        for listener in listeners:
            for address in listener.addresses:
                is_unspecified = not any(pack_ip(address.host) or b"\1")
                is_own = is_unspecified and is_loopback(server.server.host)
                if server.server == address or is_own and server.server.port == address.port:
                    message = f"is listener '{listener.name}' of this daemon"
                    self._problems.add(f"dns: {server.server} {message}", server.place)


def _warnings(server: NameServerConfig, dns: DnsConfig) -> Iterator[str]:
    if server.tls.insecure:
        yield "the certificate is not checked: any server that answers there is trusted"
    for step in server.upstream.steps[:1] if server.upstream else ():
        for hop in UpstreamConfig((step,)).hops:
            name = hop.server.host
            is_name = pack_ip(name) is None and not hop.is_local
            if name and is_name and name not in dict(dns.hosts):
                yield (
                    f"the name of its upstream, {name}, may have to be looked up at this server: "
                    "write an address, or add the name to dns.hosts"
                )


def _parse_url(text: str) -> _ServerUrl:
    """Return a server's scheme, address and path.  Raises ValueError."""
    is_address = pack_ip(text) is not None
    match = None if is_address else re.match(_URL, text)
    scheme, host, port, path = match.groups() if match else ("udp", text, None, None)
    scheme = scheme or "udp"
    host = host.strip("[]")
    if (match is None and not is_address) or (path and path != "/" and scheme != "https"):
        raise ValueError(f"'{text}' is not a name server {_EXPECTED}")
    if pack_ip(host) is None and scheme in ("udp", "tcp"):
        raise ValueError(
            f"'{host}' is a host name: a name server with udp or tcp needs an IP address"
        )
    port = port or PORTS[scheme]
    address = parse_host_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return _ServerUrl(scheme, address, (path or "/dns-query") if scheme == "https" else "")


def _hosts(section: MapReader) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names of dns.hosts, in lower case and without dot at the end, with addresses."""
    for name, node in section.rest().items():
        if not re.match(HOST_NAME, name.rstrip(".")) or len(name) > NAME_LIMIT:
            section.add_error("", f"'{name}' is not a host name", node.key_place)
        reader = MapReader(Node({name: node}, node.place), section.path, section.problems)
        yield name.lower().rstrip("."), reader.values(name, _address)


def _address(text: str) -> str:
    if pack_ip(text) is None:
        raise ValueError(f"'{text}' is not an IP address")
    return text


def _stale(text: str) -> float:
    seconds = parse_duration(text)
    if seconds > STALE_LIMIT:
        raise ValueError(f"'{text}' is longer than {STALE_LIMIT / 86400:g}d")
    return seconds


def _nat64(text: str) -> tuple[IpNetwork | None, bool]:
    """Return the prefix, and whether it is looked up."""
    if text in _NAT64_WORDS:
        return _NAT64_WORDS[text]
    try:
        network = IpNetwork.parse(text)
    except ValueError:
        network = None
    if network is None or network.size != 16 or 128 - network.shift not in NAT64_BITS:
        lengths = ", ".join(map(str, NAT64_BITS))
        raise ValueError(
            f"'{text}' is not auto, off or an IPv6 prefix of {lengths} bits, such as 64:ff9b::/96"
        )
    return network, False


def _fake_network(text: str) -> IpNetwork:
    network = IpNetwork.parse(text)
    if network.shift < FAKE_BITS:
        raise ValueError(f"'{text}' has too few addresses: {1 << FAKE_BITS} are the least")
    return network


def _cache(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= CACHE_LIMIT):
        raise ValueError(f"'{text}' is not a number of names between 0 and {CACHE_LIMIT}")
    return int(text)
