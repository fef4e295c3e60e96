"""Lists upstreams, name servers and targets of a configuration, wherever it names them."""

from __future__ import annotations

from netproxy.config.schema import Config, NameServerConfig, UpstreamConfig
from netproxy.interfaces.addresses import Address
from netproxy.typed import Iterator


def used_upstreams(config: Config) -> list[UpstreamConfig]:
    """Return every upstream that the configuration names, in use or not."""
    return [upstream for upstream in _upstreams(config) if upstream is not None]


def name_servers(config: Config) -> Iterator[NameServerConfig]:
    """Yield every name server that the configuration names, those of its rules last."""
    yield from config.dns.servers
    for rule in config.dns.rules:
        yield from rule.servers


def fixed_targets(config: Config) -> Iterator[tuple[Address, str]]:
    """Yield every target that a listener leads its clients to, with its place."""
    for listener in config.listeners:
        if listener.target is not None:
            yield listener.target, listener.place
        for route in listener.routes:
            if route.target is not None:
                yield route.target, route.place


def _upstreams(config: Config) -> Iterator[UpstreamConfig | None]:
    yield config.default
    yield from config.upstreams.values()
    for user in config.users.values():
        yield user.upstream
    for listener in config.listeners:
        yield listener.upstream
        for route in listener.routes:
            yield route.via
    for rule in config.rules:
        yield from (rule.via, rule.upstream)
    for server in name_servers(config):
        yield server.upstream
    if config.tunnel.agent is not None:
        yield config.tunnel.agent.upstream
