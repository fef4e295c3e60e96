"""Name servers and the plan of lookups from the configuration."""

from __future__ import annotations

import time
from functools import partial
from typing import Callable, Container, Iterator, Mapping, NamedTuple, Sequence

from netproxy.config.schema import DnsConfig, NameServerConfig, UpstreamConfig
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import DestinationGuard, Dialer
from netproxy.net.stream import Stream
from netproxy.resolver.forwarder import Branch, Forwarder
from netproxy.resolver.resolver import LookupFailed, Plan, ask_system
from netproxy.resolver.servers import HttpsServer, Server, Servers, StreamServer, UdpServer

NOBODY = Address("0.0.0.0", 0)  # the client of what we ask for ourselves
HOSTS_FILE = "/etc/hosts"


class Means(NamedTuple):
    """`direct(seconds)` leads to servers without an upstream, as far as the gatekeeper permits it.

    `domains` compiles patterns and files to a set of names.
    """

    direct: Callable[[float], Dialer]
    dialer: Callable[[UpstreamConfig], Dialer]
    domains: Callable[[Sequence[str], Sequence[str]], Container[str]]
    guard: DestinationGuard


class SystemNames:
    """A Resolver for the names of name servers themselves, on the thread that asks."""

    def __init__(self, hosts: Mapping[str, tuple[str, ...]]) -> None:
        """`hosts` of the configuration; for what is not there the system is asked."""
        self._hosts = hosts

    def resolve(self, target: Address, seconds: float = 0.0) -> list[Address]:
        if pack_ip(target.host) is not None:
            return [target]
        try:
            found = self._hosts.get(target.host) or ask_system(target.host).addresses
            return [target._replace(host=host) for host in found]
        except LookupFailed as error:
            raise DialError(Reason.NAME, target.host) from error

    known = resolve


def make_forwarder(config: DnsConfig, means: Means) -> Forwarder:
    """For a configuration with servers or rules.  ConfigError."""
    branches = [
        Branch(
            _names(rule.domain, rule.domain_file, rule.place, means),
            Servers([_server(one, means) for one in rule.servers]) if rule.servers else None,
        )
        for rule in config.rules
    ]
    servers = Servers([_server(one, means) for one in config.servers]) if config.servers else None
    return Forwarder(branches, servers, dict(config.hosts))


def make_plan(config: DnsConfig, forwarder: Forwarder) -> Plan:
    """How names are looked up: as the forwarder knows, and hosts(5), which the system would read itself."""
    return Plan(
        forwarder.ask, {**dict(_read_hosts()), **dict(config.hosts)}, config.prefer, config.cache
    )


def _names(domain: Sequence[str], files: Sequence[str], place: str, means: Means) -> Container[str]:
    try:
        return means.domains(domain, files)
    except ValueError as error:
        raise ConfigError(f"dns.rules: {error}", place) from error


def _server(config: NameServerConfig, means: Means) -> Server:
    name = f"{config.scheme}://{config.server}{config.path}"
    way = means.dialer(config.upstream) if config.upstream else None
    secure = _secure(config)

    def dial(deadline: float) -> Stream:
        left = max(0.0, deadline - time.monotonic())
        stream = (way or means.direct(left)).dial(_flow("tcp", config.server))
        try:
            stream.limit(max(0.0, deadline - time.monotonic()))
            secure(stream)
        except BaseException:
            stream.close()
            raise
        return stream

    if config.scheme == "https":
        return HttpsServer(name, dial, str(config.server).removesuffix(":443"), config.path)
    stream = StreamServer(name, dial)
    # datagrams through a proxy would need a connection of their own each: TCP has to do for them (RFC 7766)
    if config.scheme != "udp" or way is not None:
        return stream
    return UdpServer(
        name,
        config.server,
        stream,
        partial(means.guard.permitted, _flow("udp", config.server), (config.server,)),
    )


def _flow(network: str, target: Address) -> Flow:
    """Of ours: there is no client."""
    return Flow(network, NOBODY, target, "", "")


def _secure(config: NameServerConfig) -> Callable[[Stream], None]:
    if config.scheme not in ("tls", "https"):
        return lambda stream: None
    from netproxy.net import tls  # late: ssl costs 3 MiB, and few need it

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
