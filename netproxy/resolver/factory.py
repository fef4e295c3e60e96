"""Name servers and the plan of lookups from the configuration."""
from __future__ import annotations

from typing import Callable, Container, Iterator, NamedTuple, Sequence

from netproxy.config.schema import DnsConfig, NameServerConfig, WayConfig
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces import Address, Dialer, Flow, pack_ip
from netproxy.net.stream import Stream
from netproxy.resolver.forwarder import Branch, Forwarder
from netproxy.resolver.resolver import LookupFailed, Plan, ask_system
from netproxy.resolver.servers import HttpsServer, Server, Servers, StreamServer, UdpServer

NOBODY = Address("0.0.0.0", 0)      # the client of what we ask for ourselves
HOSTS_FILE = "/etc/hosts"


class Means(NamedTuple):
    """`direct` leads to servers without an upstream; `domains` compiles patterns and files to a set of names."""

    direct: Dialer
    way: Callable[[WayConfig], Dialer]
    domains: Callable[[Sequence[str], Sequence[str]], Container[str]]


class SystemNames:
    """A Resolver for the names of name servers themselves, on the thread that asks."""

    def resolve(self, target: Address, seconds: float = 0.0) -> list[Address]:
        if pack_ip(target.host) is not None:
            return [target]
        try:
            return [target._replace(host=host) for host in ask_system(target.host).addresses]
        except LookupFailed as error:
            raise DialError(Reason.NAME, target.host) from error

    known = resolve


def make_forwarder(config: DnsConfig, means: Means) -> Forwarder | None:
    """None where the system is asked.  ConfigError."""
    if not config.servers and not config.rules:
        return None
    branches = [Branch(_names(rule.domain, rule.domain_file, rule.place, means),
                       Servers([_server(one, means) for one in rule.servers]) if rule.servers else None) for rule in config.rules]
    servers = Servers([_server(one, means) for one in config.servers]) if config.servers else None
    return Forwarder(branches, servers, dict(config.hosts))


def make_plan(config: DnsConfig, forwarder: Forwarder | None) -> Plan:
    """How names are looked up: by the forwarder's servers, or by the system, which reads hosts(5) itself."""
    hosts = dict(config.hosts)
    if forwarder is None or not config.servers:
        return Plan(ask_system, hosts, config.prefer, config.cache)
    return Plan(forwarder.ask, {**dict(_read_hosts()), **hosts}, config.prefer, config.cache)


def _names(domain: Sequence[str], files: Sequence[str], place: str, means: Means) -> Container[str]:
    try:
        return means.domains(domain, files)
    except ValueError as error:
        raise ConfigError(f"dns.rules: {error}", place) from error


def _server(config: NameServerConfig, means: Means) -> Server:
    name = f"{config.scheme}://{config.server}{config.path}"
    way = means.way(config.upstream) if config.upstream else None
    secure = _secure(config)

    def dial() -> Stream:
        stream = (way or means.direct).dial(Flow("tcp", NOBODY, config.server, "", ""))
        try:
            secure(stream)
        except BaseException:
            stream.close()
            raise
        return stream

    if config.scheme == "https":
        return HttpsServer(name, dial, str(config.server) if config.server.port != 443 else config.server.host, config.path)
    stream = StreamServer(name, dial)
    # datagrams through a proxy would need a connection of their own each: TCP has to do for them (RFC 7766)
    return UdpServer(name, config.server, stream) if config.scheme == "udp" and way is None else stream


def _secure(config: NameServerConfig) -> Callable[[Stream], None]:
    if config.scheme not in ("tls", "https"):
        return lambda stream: None
    from netproxy.net import tls    # late: ssl costs 3 MiB, and few need it
    given = config.tls
    try:
        context = tls.client_context(given.ca, given.certificate, given.key, given.insecure)
    except ValueError as error:
        raise ConfigError(f"dns: {config.server}: tls: {error}", config.place) from error
    server_name = given.server_name or config.server.host
    return lambda stream: tls.connect(stream, context, server_name)


def _read_hosts() -> Iterator[tuple[str, tuple[str, ...]]]:
    """hosts(5): what cannot be read is left out, as the C library does."""
    found: dict[str, list[str]] = {}
    try:
        with open(HOSTS_FILE, encoding="ascii", errors="replace") as file:
            for line in file:
                address, *names = line.partition("#")[0].split() or [""]
                if pack_ip(address) is not None:
                    for name in names:
                        found.setdefault(name.lower().rstrip("."), []).append(address)
    except OSError:
        pass
    return ((name, tuple(addresses)) for name, addresses in found.items())
