"""Makes what a plan has of the names that clients ask dns listeners for.

Thread: main.
"""

from __future__ import annotations

from netproxy.config.schema import TRANSPARENT, Config
from netproxy.handler.factory import DnsDependencies
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.daemon.runtime import Runtime
    from netproxy.interfaces.routing import NamedFlows
    from netproxy.resolver.client_names.fake_addresses import FakeAddresses
    from netproxy.resolver.forwarder import DnsForwarder


def make_fakes(config: Config, runtime: Runtime) -> FakeAddresses | None:
    """Return the fake addresses, None without any.  Raises ConfigError."""
    fake = config.dns.fake
    if not fake.networks:
        return None
    # late: few configurations have fake addresses; the last one because relays use it at once
    from netproxy.relay.table import written_addresses  # noqa: F401
    from netproxy.resolver.client_names.factory import make_fake_addresses
    from netproxy.router.factory import domains

    return make_fake_addresses(fake, domains, runtime.names.fakes)


def make_named_flows(
    config: Config, runtime: Runtime, fakes: FakeAddresses | None
) -> NamedFlows | None:
    """Return what names flows by what dns listeners have told their clients."""
    if not config.dns.remember and fakes is None:
        return None
    # late: few configurations remember, or have fake addresses
    from netproxy.router.named import FakeTargets, RememberedNames

    names = None
    if config.dns.remember:
        transparent = {item.name for item in config.listeners if item.protocol in TRANSPARENT}
        names = RememberedNames(runtime.names.memory, transparent)
    return names if fakes is None else FakeTargets(fakes, names)


def make_dns_dependencies(
    config: Config, runtime: Runtime, forwarder: DnsForwarder | None
) -> DnsDependencies | None:
    """Return what dns listeners need, None without name servers."""
    if forwarder is None:
        return None
    from netproxy.resolver.answer_cache import AnswerCache  # late: few have name servers

    arenas = runtime.datagrams.arenas
    cache = AnswerCache(config.dns.cache, config.dns.serve_stale)
    memory = runtime.names.memory if config.dns.remember else None
    return DnsDependencies(forwarder, cache, runtime.queries, arenas, memory)
