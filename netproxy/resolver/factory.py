"""Builds name servers and the plan of lookups from the configuration.

Runs on the thread that builds a configuration.
"""

from __future__ import annotations

import time
from functools import partial

from netproxy.config.schema import DnsConfig, DnsRuleConfig, NameServerConfig, UpstreamConfig
from netproxy.errors import ConfigError, DialError, Reason, for_all
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address, pack_ip
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.networks import HostSet
from netproxy.interfaces.routing import DestinationGuard, Dialer
from netproxy.interfaces.services import Counter
from netproxy.net.stream import Stream
from netproxy.resolver.forwarder import DnsForwarder, ForwardingRule
from netproxy.resolver.group import NameServerGroup
from netproxy.resolver.resolver import LookupFailed, LookupPlan, ask_system
from netproxy.resolver.servers import HttpsServer, NameServer, StreamServer, UdpServer
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence, TypeAlias

if TYPE_CHECKING:
    from netproxy.resolver.client_names.fake_addresses import FakeAddresses

HOSTS_FILE = "/etc/hosts"
Domains: TypeAlias = Callable[[Sequence[str], Sequence[str]], HostSet]
"""Compiles patterns and files to a set of names.  Raises ValueError or ConfigError."""


class ResolverDependencies(NamedTuple):
    """What name servers are built on."""

    direct_within: Callable[[float], Dialer]
    """Returns a direct dialer with so many seconds to connect.  It obeys `guard`."""
    dialer: Callable[[UpstreamConfig], Dialer]
    domains: Domains
    guard: DestinationGuard
    counter: Counter
    fakes: FakeAddresses | None = None
    """The fake addresses, which clients of dns listeners get."""


class SystemResolver:
    """A Resolver for the names of name servers.  It asks the system, on the caller's thread."""

    def __init__(self, hosts: Mapping[str, tuple[str, ...]]) -> None:
        """Ask the system for names that are not in `hosts`, addresses by name."""
        self._hosts = hosts

    def resolve(self, target: Address, client: str = "", seconds: float = 0.0) -> list[Address]:
        """Return the addresses of a target, at least one; `client` and `seconds` have no effect.

        Blocks.  Raises DialError(NAME).
        """
        if pack_ip(target.host) is not None:
            return [target]
        try:
            hosts = self._hosts.get(target.host) or ask_system(target.host).addresses
        except LookupFailed as error:
            raise DialError(Reason.NAME, target.host) from error
        if not hosts:
            raise DialError(Reason.NAME, target.host)
        return [target._replace(host=host) for host in hosts]

    known = resolve


def make_forwarder(config: DnsConfig, dependencies: ResolverDependencies) -> DnsForwarder:
    """Build the forwarder for a configuration with servers or rules.  Raises ConfigError."""

    def make(rule: DnsRuleConfig) -> ForwardingRule:
        names = _names(rule.domain, rule.domain_file, rule.place, dependencies)
        return ForwardingRule(names, _group(rule.servers, dependencies))

    rules = for_all(make, config.rules)
    servers, hosts = _group(config.servers, dependencies), dict(config.hosts)
    return DnsForwarder(rules, servers, hosts, dependencies.counter, dependencies.fakes)


def make_lookup_plan(config: DnsConfig, forwarder: DnsForwarder) -> LookupPlan:
    """Return the plan that asks the forwarder.

    It includes the names of hosts(5), which the system would read by itself.
    """
    hosts = {**_read_hosts(), **dict(config.hosts)}
    return LookupPlan(
        forwarder.ask,
        hosts,
        config.prefer,
        config.cache,
        config.serve_stale,
        config.nat64,
        config.find_nat64,
    )


def _names(
    domain: Sequence[str], files: Sequence[str], place: str, dependencies: ResolverDependencies
) -> HostSet:
    try:
        return dependencies.domains(domain, files)
    except ValueError as error:
        raise ConfigError(f"dns.rules: {error}", place) from error


def _group(
    configs: Sequence[NameServerConfig], dependencies: ResolverDependencies
) -> NameServerGroup | None:
    """Return the group of the servers, None for none."""
    servers = [_server(config, dependencies) for config in configs]
    return NameServerGroup(servers) if servers else None


def _server(config: NameServerConfig, dependencies: ResolverDependencies) -> NameServer:
    name = f"{config.scheme}://{config.server}{config.path}"
    dialer = _ServerDialer(config, dependencies)
    if config.scheme == "https":
        host = str(config.server).removesuffix(":443")
        return HttpsServer(name, dialer.dial, host, config.path)
    stream = StreamServer(name, dialer.dial)
    # Datagrams through an upstream would need a connection for each exchange: TCP is used
    # instead (RFC 7766).
    if config.scheme != "udp" or dialer.upstream is not None:
        return stream
    flow = _flow("udp", config.server)
    check = partial(dependencies.guard.permitted, flow, (config.server,))
    return UdpServer(name, config.server, stream, check)


class _ServerDialer:
    """Connects to one name server, with TLS if its scheme needs it."""

    def __init__(self, config: NameServerConfig, dependencies: ResolverDependencies) -> None:
        """Load the TLS files.  Raises ConfigError."""
        self.upstream = dependencies.dialer(config.upstream) if config.upstream else None
        self._direct_within = dependencies.direct_within
        self._server = config.server
        self._secure = _secure(config)

    def dial(self, deadline: float) -> Stream:
        """Connect until `deadline` (monotonic seconds).  Blocks.  Raises NetProxyError.

        An upstream has its own time limit.
        """
        dialer = self.upstream
        if dialer is None:
            dialer = self._direct_within(max(0.0, deadline - time.monotonic()))
        # Every dialer returns a net.stream.Stream; the interface shows less of it.
        stream: Stream = dialer.dial(_flow("tcp", self._server))  # type: ignore[assignment]
        try:
            stream.limit(max(0.0, deadline - time.monotonic()))
            if self._secure is not None:
                self._secure(stream)
        except BaseException:
            stream.close()
            raise
        return stream


def _flow(network: str, server: Address) -> Flow:
    """Return the flow of our own query: there is no client and no listener."""
    return Flow(network, UNSPECIFIED_ADDRESS, server, "", "")


def _secure(config: NameServerConfig) -> Callable[[Stream], None] | None:
    """Return the TLS handshake with a server, None if its scheme has none.

    Raises ConfigError if a file cannot be used.
    """
    if config.scheme not in ("tls", "https"):
        return None
    # Late: ssl costs 3 MiB, and few configurations need it.
    from netproxy.net import tls

    options = config.tls
    try:
        context = tls.client_context(options.ca, options.certificate, options.key, options.insecure)
    except ValueError as error:
        raise ConfigError(f"dns: {config.server}: tls: {error}", config.place) from error
    server_name = options.server_name or config.server.host
    return partial(tls.connect, context=context, server_name=server_name)


def _read_hosts() -> dict[str, tuple[str, ...]]:
    """Return the names of hosts(5).  Lines that cannot be read are skipped, as in libc."""
    hosts: dict[str, list[str]] = {}
    try:
        with open(HOSTS_FILE, encoding="ascii", errors="replace") as file:
            for line in file:
                address, *names = line.partition("#")[0].split() or [""]
                if pack_ip(address) is not None:
                    for name in names:
                        hosts.setdefault(name.lower().rstrip("."), []).append(address)
    except OSError:
        pass
    return {name: tuple(addresses) for name, addresses in hosts.items()}
