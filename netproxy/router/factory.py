"""Builds the router from the configuration.

Patterns, lists and databases are compiled once; an error names the rule that it is in.
Runs on the thread that builds a configuration, and blocks for files.
"""

from __future__ import annotations

import os
import time
from itertools import chain

from netproxy.config.schema import AutoConfig, ConditionsConfig, Config, RuleConfig, UpstreamConfig
from netproxy.errors import ConfigError, for_all
from netproxy.interfaces.flows import ANY_USER
from netproxy.interfaces.services import FetchedPath
from netproxy.interfaces.networks import IpNetwork, NetworkSet
from netproxy.interfaces.routing import DestinationGuard, Dialer, NamedFlows, Resolver
from netproxy.router import conditions, coverage
from netproxy.router.auto import AutoDialer, AutoDialers, Pins, Verdicts
from netproxy.router.countries import CountryDatabase
from netproxy.router.coverage import Scope, ValueSet
from netproxy.router.lists import read_domains, read_networks
from netproxy.router.matchers import DomainSet, MinuteSet, PortSet
from netproxy.router.patterns import (
    DomainPattern,
    is_address,
    parse_domain,
    parse_network,
    parse_ports,
)
from netproxy.router.router import Condition, Fallbacks, Rule, RuleRouter
from netproxy.typed import Any, Callable, Iterable, Iterator, NamedTuple, Sequence, TypeVar

Made = TypeVar("Made")


class RoutingDependencies(NamedTuple):
    """What a router is built on."""

    dialer: Callable[[UpstreamConfig], Dialer]
    direct_within: Callable[[float], Dialer]
    """Returns a direct dialer with so many seconds to connect."""
    fallbacks: Fallbacks
    """The upstreams of flows that no rule decides."""
    resolver: Resolver
    guard: DestinationGuard
    verdicts: Verdicts
    names: NamedFlows | None = None
    """Names flows to an address; None for nothing that does."""
    sockets: Dialer | None = None
    """Connects to targets that are UNIX sockets; None if there are none."""
    clock: Callable[[], time.struct_time] = time.localtime
    """Returns the time of the system's time zone.  Called for rules with `hours` alone."""


class Routing(NamedTuple):
    """A router, and the dialers that must be told of the records of their connections."""

    router: RuleRouter
    autos: tuple[AutoDialer, ...]


def make_routing(config: Config, dependencies: RoutingDependencies) -> Routing:
    """Build the router.  Raises ConfigError if a pattern, a file or the database is unusable."""
    facts = _Facts(_country_lookup(config), dependencies.clock)
    dialers = _RuleDialers(config.auto, dependencies)
    rules = for_all(lambda rule: _rule(rule, dialers.dialer(rule), facts), config.rules)
    fallbacks, resolver, guard = dependencies.fallbacks, dependencies.resolver, dependencies.guard
    names, sockets = dependencies.names, dependencies.sockets
    router = RuleRouter(rules, fallbacks, resolver, guard, names, sockets)
    return Routing(router, tuple(dialers.autos.values()))


class _RuleDialers:
    """Builds the dialers of rules.  Rules that name one upstream for auto share an AutoDialer."""

    def __init__(self, config: AutoConfig, dependencies: RoutingDependencies) -> None:
        """Compile the pins.  Raises ConfigError."""
        self.autos: dict[UpstreamConfig, AutoDialer] = {}
        self._dependencies = dependencies
        self._deadline = config.deadline
        try:
            direct = _made("auto.direct", _PinnedHosts, config.direct)
            self._pins = Pins(direct, _made("auto.upstream", _PinnedHosts, config.upstream))
        except ValueError as error:
            raise ConfigError(str(error), config.place) from error

    def dialer(self, rule: RuleConfig) -> Dialer:
        """Return the dialer of a rule."""
        dependencies = self._dependencies
        if rule.upstream is None:
            return dependencies.dialer(rule.via or UpstreamConfig())
        if rule.upstream not in self.autos:
            dialers = AutoDialers(
                dependencies.dialer(UpstreamConfig()),
                dependencies.direct_within(self._deadline),
                dependencies.dialer(rule.upstream),
            )
            self.autos[rule.upstream] = AutoDialer(dialers, self._pins, dependencies.verdicts)
        return self.autos[rule.upstream]


class _PinnedHosts:
    """A HostSet of domain patterns and networks in one list."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Compile the patterns.  Raises ValueError."""
        networks: list[IpNetwork] = []
        names: list[str] = []
        for text in patterns:
            is_expression = text.startswith(("keyword:", "regex:"))
            if not is_expression and ("/" in text or is_address(text)):
                networks.append(parse_network(text))
            else:
                names.append(text)
        self._names, self._networks = DomainSet(names), NetworkSet(networks)

    def __contains__(self, host: str) -> bool:
        return host in self._names or host in self._networks


# -- rules that never match


def unreachable_rules(rules: Sequence[RuleConfig]) -> Iterator[tuple[RuleConfig, RuleConfig]]:
    """Yield each rule that can never match, with the earlier rule that takes all its flows."""
    scopes = (Scope(_values(rule.conditions), _values(rule.but_not)) for rule in rules)
    return coverage.unreachable(zip(rules, scopes, strict=True))


def _values(config: ConditionsConfig) -> dict[str, ValueSet]:
    """Return the values of conditions, by what they look at.  Raises ValueError."""
    values: dict[str, ValueSet] = {}
    if set(config.network) not in (set(), {"tcp", "udp"}):
        values["network"] = coverage.Words(config.network)
    if config.command:
        values["command"] = coverage.Words(config.command)
    if config.listener:
        values["listener"] = coverage.Words(config.listener)
    if config.user:
        values["user"] = coverage.Words(config.user, ANY_USER)
    if config.client:
        values["client"] = coverage.Networks(config.client)
    if config.port:
        values["port"] = coverage.Ranges(map(parse_ports, config.port))
    if config.hours:
        values["hours"] = coverage.Ranges(chain.from_iterable(config.hours))
    if config.domain or config.domain_file:
        values["name"] = coverage.Names(map(parse_domain, config.domain), config.domain_file)
    if config.sni:
        values["sni"] = coverage.Names(map(parse_domain, config.sni), ())
    if config.ip or config.ip_file or config.geoip:
        networks = map(parse_network, config.ip)
        values["address"] = coverage.Networks(networks, config.ip_file + config.geoip)
    return values


# -- conditions


class _Facts(NamedTuple):
    """What conditions look up beyond the flow."""

    country_of: Callable[[str], str]
    clock: Callable[[], time.struct_time]


def _rule(config: RuleConfig, dialer: Dialer, facts: _Facts) -> Rule:
    label = config.text.partition(" ")[0]
    try:
        wanted = _compile(config.conditions, facts, label)
        unwanted = _compile(config.but_not, facts, f"{label}.not")
    except ValueError as error:
        raise ConfigError(str(error), config.place) from error
    except ConfigError as error:  # names a list file and its line
        raise ConfigError(f"{label}: {error}", config.place) from error
    client, target, address = (
        (*yes, *map(conditions.negated, no)) for yes, no in zip(wanted, unwanted, strict=True)
    )
    return Rule(config.text, dialer, client + target, address, client, label)


class _Compiled(NamedTuple):
    """The conditions of a rule by what they look at, cheap ones first."""

    client: Sequence[Condition]
    """Everything except the target and the time."""
    target: Sequence[Condition]
    """The target's name and port, and the time: they may differ among the flows of a client."""
    address: Sequence[Condition]
    """The flow's addresses."""


def _compile(config: ConditionsConfig, facts: _Facts, label: str) -> _Compiled:
    """Compile conditions; `label` names what they belong to.  Raises ValueError or ConfigError."""
    target: list[Condition] = []
    if config.port:
        target.append(conditions.port_in(_made(f"{label}.port", PortSet, config.port)))
    if config.hours:
        minutes = MinuteSet(chain.from_iterable(config.hours))
        target.append(conditions.time_in(minutes, facts.clock))
    if config.domain or config.domain_file:
        names = _made(f"{label}.domain", domains, config.domain, config.domain_file)
        target.append(conditions.name_in(names))
    if config.sni:
        target.append(conditions.server_name_in(_made(f"{label}.sni", domains, config.sni, ())))
    address: list[Condition] = []
    if config.ip or config.ip_file or config.geoip:
        networks = _made(f"{label}.ip", NetworkSet, _networks(config))
        address.append(conditions.address_in(networks, frozenset(config.geoip), facts.country_of))
    return _Compiled(list(_client_conditions(config)), target, address)


def _made(label: str, make: Callable[..., Made], *values: Any) -> Made:
    """Return make(*values), whose ValueError gets a label.  Any: the values of one condition."""
    try:
        return make(*values)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def _client_conditions(config: ConditionsConfig) -> Iterator[Condition]:
    if config.network:
        yield conditions.network_in(frozenset(config.network))
    if config.command:
        yield conditions.command_in(frozenset(config.command))
    if config.listener:
        yield conditions.listener_in(frozenset(config.listener))
    if config.user:
        yield conditions.user_in(frozenset(config.user))
    if config.client:
        yield conditions.client_in(NetworkSet(config.client))


def domains(patterns: Iterable[str], files: Iterable[str]) -> DomainSet:
    """Return the set of the names in patterns and files.  Raises ValueError or ConfigError."""
    return DomainSet(_patterns(patterns, files))


def _patterns(patterns: Iterable[str], files: Iterable[str]) -> Iterator[DomainPattern]:
    yield from map(parse_domain, patterns)
    for path in filter(_is_there, files):
        yield from read_domains(path)


def _networks(config: ConditionsConfig) -> Iterator[IpNetwork]:
    yield from map(parse_network, config.ip)
    for path in filter(_is_there, config.ip_file):
        yield from read_networks(path)


def _is_there(path: str) -> bool:
    """Return whether a list can be read: False for one that was not fetched yet."""
    return not isinstance(path, FetchedPath) or os.path.exists(path)


def _country_lookup(config: Config) -> Callable[[str], str]:
    """Return a function from an address to the code of its country, "" if not known.

    Raises ConfigError if rules name countries and there is no database.
    """
    for rule in config.rules:
        if rule.conditions.geoip or rule.but_not.geoip:
            if not config.geoip_database:
                raise ConfigError(
                    "geoip: needs geoip_database, a file in MaxMind's format", rule.place
                )
            database = CountryDatabase(config.geoip_database, rule.place, config.geoip_place)
            return database.country_of
    return _no_country


def _no_country(host: str) -> str:
    return ""
