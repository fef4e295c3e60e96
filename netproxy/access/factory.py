"""Users and destination policies from the configuration."""

from __future__ import annotations

from netproxy.access.destinations import GUARD, RANGES, Policy, networks
from netproxy.access.users import Users, check_password
from netproxy.config.schema import Config, DestinationsConfig, ListenerConfig
from netproxy.errors import ConfigError
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.interfaces.networks import IpNetwork, is_loopback


def make_users(config: Config) -> Users:
    """ConfigError for a broken hash."""
    for name, user in config.users.items():
        try:
            check_password(user.password)
        except ValueError as error:
            raise ConfigError(f"users.{name}.password: {error}", user.place) from error
    return Users({name: user.password for name, user in config.users.items()})


def make_policies(config: Config) -> dict[str, Policy]:
    """By listener's name, and for what a tunnel's exit is asked for; ConfigError."""
    agent = [TUNNEL_AGENT] if config.tunnel.agent else []
    given = config.destinations or DestinationsConfig(None, ())
    allow = _networks(given, "allow")
    if given.deny is not None:
        deny = _networks(given, "deny")
        return {
            name: Policy(deny, allow) for name in [*(one.name for one in config.listeners), *agent]
        }
    guard = Policy(networks(GUARD), allow)
    return {
        **{one.name: Policy() if _is_local(one) else guard for one in config.listeners},
        **{name: guard for name in agent},
    }


def _networks(given: DestinationsConfig, key: str) -> tuple[IpNetwork, ...]:
    found: list[IpNetwork] = []
    for text in getattr(given, key):
        try:
            found += networks((text,))
        except ValueError as error:
            raise ConfigError(
                f"destinations.{key}: '{text}' is neither a network nor one of {', '.join(RANGES)}",
                given.place,
            ) from error
    return tuple(found)


def _is_local(config: ListenerConfig) -> bool:
    """Only reached from this machine, which has the same freedom without us; or its target is what the file says."""
    return config.target is not None or all(
        is_loopback(address.host) for address in config.addresses
    )
