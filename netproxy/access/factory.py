"""Users and destination policies from the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netproxy.access.accounts import NO_LIMITS, Limits, ListenerRates
from netproxy.access.destinations import DEFAULT_DENY, RANGES, DestinationPolicy, parse_networks
from netproxy.access.users import Users, check_password
from netproxy.config.schema import DestinationsConfig
from netproxy.errors import ConfigError
from netproxy.interfaces.flows import TUNNEL_AGENT
from netproxy.interfaces.networks import is_loopback

if TYPE_CHECKING:
    from netproxy.config.schema import Config, ListenerConfig
    from netproxy.interfaces.networks import IpNetwork


def make_users(config: Config) -> Users:
    """Return the users of a configuration.  Raises ConfigError for an invalid hash."""
    for name, user in config.users.items():
        try:
            check_password(user.password)
        except ValueError as error:
            raise ConfigError(f"users.{name}.password: {error}", user.place) from error
    return Users({name: user.password for name, user in config.users.items()})


def make_limits(config: Config) -> dict[str, Limits]:
    """Return the limits of users by name; a user without a limit is left out."""
    limits = {}
    for name, user in config.users.items():
        of_user = user.limits
        given = Limits(
            of_user.connections,
            of_user.sessions,
            of_user.connection_rate,
            of_user.rate_up,
            of_user.rate_down,
            of_user.burst,
        )
        if given != NO_LIMITS:
            limits[name] = given
    return limits


def make_rates(config: Config) -> dict[str, ListenerRates]:
    """Return the rates of listeners by name; a listener without a rate is left out."""
    rates = {
        listener.name: ListenerRates(listener.limits.rate, listener.limits.rate_per_client)
        for listener in config.listeners
    }
    return {name: of_listener for name, of_listener in rates.items() if any(of_listener)}


def make_policies(config: Config) -> dict[str, DestinationPolicy]:
    """Return the destination policies by the listener's name.

    TUNNEL_AGENT stands for what a bridge asks its agent for.  Raises ConfigError.
    """
    destinations = config.destinations or DestinationsConfig(None, ())
    allow = _networks("allow", destinations.allow, destinations.place)
    if destinations.deny is None:
        guarded = DestinationPolicy(parse_networks(DEFAULT_DENY), allow)
        unguarded = DestinationPolicy()
    else:
        deny = _networks("deny", destinations.deny, destinations.place)
        guarded = unguarded = DestinationPolicy(deny, allow)
    policies = {
        listener.name: unguarded if _needs_no_guard(listener) else guarded
        for listener in config.listeners
    }
    if config.tunnel.agent:
        policies[TUNNEL_AGENT] = guarded
    return policies


def _networks(key: str, names: tuple[str, ...], place: str) -> tuple[IpNetwork, ...]:
    networks: list[IpNetwork] = []
    for text in names:
        try:
            networks += parse_networks((text,))
        except ValueError as error:
            expected = f"neither a network nor one of {', '.join(RANGES)}"
            raise ConfigError(f"destinations.{key}: '{text}' is {expected}", place) from error
    return tuple(networks)


def _needs_no_guard(listener: ListenerConfig) -> bool:
    """Return whether the listener's clients can reach nothing that they could not reach anyway.

    Its target is fixed by the configuration, or its clients are on this machine.
    """
    if listener.target is not None:
        return True
    return all(is_loopback(address.host) for address in listener.addresses)
