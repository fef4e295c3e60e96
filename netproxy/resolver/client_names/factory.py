"""Makes the fake addresses of a configuration.  Runs on the thread that builds it."""

from __future__ import annotations

from netproxy.errors import ConfigError
from netproxy.resolver.client_names.fake_addresses import FakeAddresses, FakeNames
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.config.schema import FakeConfig
    from netproxy.resolver.client_names.fake_table import FakeTable
    from netproxy.resolver.factory import Domains


def make_fake_addresses(config: FakeConfig, domains: Domains, table: FakeTable) -> FakeAddresses:
    """Return the fake addresses.  Raises ConfigError if a pattern of names is wrong."""
    try:
        names = domains(config.domain, ()) if config.domain else None
        chosen = FakeNames(names, domains(config.exceptions, ()))
    except ValueError as error:
        raise ConfigError(f"dns.fake: {error}", config.place) from error
    return FakeAddresses(config.networks, chosen, table)
