"""Users, destination policies, binds and the store of usage, from the configuration."""

from __future__ import annotations

from itertools import chain

from netproxy.access.accounts.standing import Terms
from netproxy.access.accounts.subject import NO_LIMITS, Limits, ListenerRates
from netproxy.access.checks.known_users import KnownUsers, Nobody
from netproxy.access.destinations import DEFAULT_DENY, RANGES, DestinationPolicy, parse_networks
from netproxy.config.schema import DestinationsConfig, LimitsConfig, QuotaConfig, UserLimitsConfig
from netproxy.errors import ConfigError, for_all
from netproxy.interfaces.flows import TUNNEL_AGENT, TUNNEL_DIRECT
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, NamedTuple

if TYPE_CHECKING:
    from netproxy.access.accounts.book import AccountBook
    from netproxy.access.accounts.counting import Counting
    from netproxy.access.accounts.usage_store import UsageStore
    from netproxy.access.sources import Sources
    from netproxy.config.schema import Config, ListenerConfig, UpstreamConfig, UserConfig
    from netproxy.interfaces.networks import IpNetwork
    from netproxy.interfaces.routing import Bind
    from netproxy.interfaces.services import Log


class Binds(NamedTuple):
    """The binds that concern the flows of all listeners."""

    users: Mapping[str, Bind]
    """By the user's name."""
    needs_incoming: bool
    """True if a user or an upstream asks for the local address that the client connected to."""


def make_users(config: Config, earlier: KnownUsers | None = None) -> KnownUsers:
    """Return the users of a configuration.  Raises ConfigError for an invalid hash.

    They remember what the `earlier` ones do of users whose password is the same.
    """
    if not config.users:
        return Nobody()
    from netproxy.access.users import Users  # late: many configurations have no users

    for_all(_check_user, config.users.items())
    users = Users({name: user.password for name, user in config.users.items()})
    if isinstance(earlier, Users):
        users.take_over(earlier)
    return users


def _check_user(user: tuple[str, UserConfig]) -> None:
    from netproxy.access.users import check_password  # late: as above

    name, config = user
    try:
        check_password(config.password)
    except ValueError as error:
        raise ConfigError(f"users.{name}.password: {error}", config.place) from error


def make_limits(config: Config) -> dict[str, Limits]:
    """Return the limits of users by name; a user without a limit is left out."""
    limits = {name: _limits(user.limits) for name, user in config.users.items()}
    return {name: of_user for name, of_user in limits.items() if of_user != NO_LIMITS}


class GrantedLimits:
    """Applies the limits that an external check of logins sets (access.external.logins.Granted)."""

    def __init__(self, book: AccountBook) -> None:
        self._book = book

    def granted(self, user: str, limits: object) -> None:
        """Apply limits to a user from now on."""
        assert isinstance(limits, UserLimitsConfig)  # what the parser of answers makes
        self._book.grant(user, _limits(limits))


def _limits(config: UserLimitsConfig) -> Limits:
    return Limits(
        config.connections,
        config.sessions,
        config.connection_rate,
        config.rate_up,
        config.rate_down,
        config.burst,
    )


def make_terms(config: Config) -> dict[str, Terms]:
    """Return the terms of users by name; a user without an end or a quota is left out."""
    terms = {name: Terms(user.expires, *user.limits.quota) for name, user in config.users.items()}
    return {name: of_user for name, of_user in terms.items() if of_user != Terms()}


def make_rates(config: Config) -> dict[str, ListenerRates]:
    """Return the rates of listeners and ports of agents by name; those without are left out."""
    limits = {listener.name: listener.limits for listener in config.listeners}
    agents = config.tunnel.bridge.agents if config.tunnel.bridge else {}
    for agent, of_agent in agents.items():
        for port in of_agent.ports:
            if port.limits != LimitsConfig():
                # No listener has such a name: see daemon.checks.
                for number in range(port.first, port.last + 1):
                    limits.setdefault(f"{agent}-{number}", port.limits)
    rates = {
        name: ListenerRates(given.rate, given.rate_per_client, given.connection_rate_per_client)
        for name, given in limits.items()
    }
    return {name: of_listener for name, of_listener in rates.items() if any(of_listener)}


def make_usage_store(
    config: Config, environment: Mapping[str, str], running: UsageStore | None, log: Log
) -> UsageStore | None:
    """Return the store of a configuration, None if it has neither `state` nor quotas.

    The folder is `state`, or else the first of STATE_DIRECTORY, which the service manager sets
    in the `environment`.  The store is `running` if that is in the same folder; else the caller
    closes `running` when nothing is saved there any more.  Opens files.  Raises ConfigError if
    the folder cannot be used, or if there is none for a quota.
    """
    folder, name = config.state, user_with_quota(config)
    if not folder and name:
        folder = environment.get("STATE_DIRECTORY", "").partition(":")[0]
        if not folder:
            needs = "needs state, a folder that keeps what was moved"
            message = f"users.{name}.limits.quota: {needs}"
            raise ConfigError(message, config.users[name].place)
    if not folder:
        return None
    if running is not None and running.folder == folder:
        return running
    from netproxy.access.accounts.usage_store import (
        UsageStore,
    )  # late: few configurations have quotas

    try:
        return UsageStore(folder, log)
    except ConfigError as error:
        raise ConfigError(f"state: {error}", config.state and config.state_place) from error


class PreparedCounts:
    """Limits, quotas and the store of a configuration: the store is open, in use from commit().

    A PreparedChange.
    """

    def __init__(
        self, config: Config, counting: Counting, environment: Mapping[str, str], log: Log
    ) -> None:
        """Open the store; a worker has none.  Raises ConfigError."""
        self._config = config
        self._counting, self._store = counting, counting.store
        if not counting.is_worker:
            self._store = make_usage_store(config, environment, counting.store, log)

    def commit(self) -> None:
        """Put them into force, for running flows as well."""
        config, counting = self._config, self._counting
        counting.reserve(config.users)
        counting.use_store(self._store)
        counting.standing.configure(make_terms(config))
        counting.accounts.configure(make_limits(config), make_rates(config))

    def discard(self) -> None:
        """Close a store that was opened."""
        if self._store is not None and self._store is not self._counting.store:
            self._store.close()


def user_with_quota(config: Config) -> str:
    """Return the name of the first user with a quota, "" if there is none."""
    users = config.users.items()
    return next((name for name, user in users if user.limits.quota != QuotaConfig()), "")


def make_sources(listener: ListenerConfig, binds: Binds) -> Sources | None:
    """Return where the flows of a listener leave from, None if no bind concerns them."""
    if listener.bind is None and not (binds.users or binds.needs_incoming):
        return None
    from netproxy.access.sources import Sources  # late: few configurations have such a bind

    incoming = binds.needs_incoming or (listener.bind is not None and listener.bind.incoming)
    return Sources(listener.bind, listener.name, binds.users, incoming)


def make_binds(config: Config, upstreams: Iterable[UpstreamConfig]) -> Binds:
    """Return the binds that concern all listeners; `upstreams` are all that are in use."""
    users = {name: user.bind for name, user in config.users.items() if user.bind is not None}
    of_hops = (hop.bind for upstream in upstreams for hop in upstream.hops)
    incoming = any(bind is not None and bind.incoming for bind in (*users.values(), *of_hops))
    return Binds(users, incoming)


def make_policies(config: Config) -> dict[str, DestinationPolicy]:
    """Return the destination policies by the listener's name.

    TUNNEL_AGENT stands for what a bridge asks its agent for, TUNNEL_DIRECT for the addresses that
    direct paths lead to.  Raises ConfigError.
    """
    destinations = config.destinations or DestinationsConfig(None, ())
    given = (("allow", destinations.allow), ("deny", destinations.deny or ()))
    allow, deny = for_all(lambda names: _networks(*names, destinations.place), given)
    if destinations.deny is None:
        guarded = DestinationPolicy(parse_networks(DEFAULT_DENY), allow)
        unguarded = DestinationPolicy()
    else:
        guarded = unguarded = DestinationPolicy(deny, allow)
    policies = {
        listener.name: unguarded if _needs_no_guard(listener) else guarded
        for listener in config.listeners
    }
    if config.tunnel.agent:
        policies[TUNNEL_AGENT] = guarded
    policies[TUNNEL_DIRECT] = guarded
    return policies


def _networks(key: str, names: tuple[str, ...], place: str) -> tuple[IpNetwork, ...]:
    def parse(text: str) -> tuple[IpNetwork, ...]:
        try:
            return parse_networks((text,))
        except ValueError as error:
            expected = f"neither a network nor one of {', '.join(RANGES)}"
            raise ConfigError(f"destinations.{key}: '{text}' is {expected}", place) from error

    return tuple(chain.from_iterable(for_all(parse, names)))


def _needs_no_guard(listener: ListenerConfig) -> bool:
    """Return whether the listener's clients can reach nothing that they could not reach anyway.

    Its targets are fixed by the configuration, or its clients are on this machine.
    """
    if listener.target is not None or listener.routes:
        return True
    return listener.is_local
