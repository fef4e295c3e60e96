"""The router from the configuration: patterns, lists and databases compiled once; what is wrong with one names its rule."""

from __future__ import annotations

from typing import Any, Callable, Container, Iterable, Iterator, NamedTuple

from netproxy.config.schema import AutoConfig, ConditionsConfig, Config, RuleConfig, UpstreamConfig
from netproxy.errors import ConfigError
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import DestinationGuard, Dialer, Resolver
from netproxy.router.auto import AutoDialer, Pins, Verdicts, Ways
from netproxy.router.lists import read_domains, read_networks
from netproxy.router.matchers import DomainSet, NetworkSet, PortSet
from netproxy.router.patterns import DomainPattern, is_address, parse_domain
from netproxy.router.router import Condition, Rule, RuleRouter


class Means(NamedTuple):
    """What a router is built on.  `impatient`: the direct way out, with so many seconds for a connection."""

    dialer: Callable[[UpstreamConfig], Dialer]
    impatient: Callable[[float], Dialer]
    resolver: Resolver
    guard: DestinationGuard
    verdicts: Verdicts


class Routing(NamedTuple):
    router: RuleRouter
    autos: tuple[AutoDialer, ...]  # observers of what comes of their connections


def make_routing(config: Config, means: Means) -> Routing:
    """ConfigError where a pattern, a file or the database cannot be used."""
    countries = _countries(config)
    pins = _pins(config.auto)
    autos: dict[UpstreamConfig, AutoDialer] = {}

    def dialer(rule: RuleConfig) -> Dialer:
        if rule.upstream is None:
            return means.dialer(rule.via or UpstreamConfig())
        if rule.upstream not in autos:
            autos[rule.upstream] = AutoDialer(
                Ways(
                    means.dialer(UpstreamConfig()),
                    means.impatient(config.auto.deadline),
                    means.dialer(rule.upstream),
                ),
                pins,
                means.verdicts,
            )
        return autos[rule.upstream]

    rules = [_rule(rule, dialer(rule), countries) for rule in config.rules]
    by_listener = {one.name: means.dialer(one.upstream) for one in config.listeners if one.upstream}
    router = RuleRouter(
        rules, means.dialer(config.default), by_listener, means.resolver, means.guard
    )
    return Routing(router, tuple(autos.values()))


def _rule(config: RuleConfig, dialer: Dialer, countries: Callable[[str], str]) -> Rule:
    try:
        wanted = _compiled(config.conditions, countries)
        unwanted = _compiled(config.but_not, countries)
    except (ValueError, ConfigError) as error:  # the latter names a list file and its line
        raise ConfigError(f"{config.text.partition(' ')[0]}: {error}", config.place) from error
    general, aimed, placed = ((*yes, *map(_negated, no)) for yes, no in zip(wanted, unwanted))
    return Rule(config.text, dialer, general + aimed, placed, general)


class _Compiled(NamedTuple):
    general: list[Condition]  # of who asks, cheap ones first
    aimed: list[Condition]  # of the target's name and port
    placed: list[Condition]  # of its addresses


def _compiled(config: ConditionsConfig, countries: Callable[[str], str]) -> _Compiled:
    """ValueError, ConfigError."""
    general = [make(values) for name, make in _GENERAL.items() if (values := getattr(config, name))]
    aimed: list[Condition] = [_port(config.port)] if config.port else []
    if config.domain or config.domain_file:
        aimed.append(_domain(domains(config.domain, config.domain_file)))
    placed: list[Condition] = []
    networks = NetworkSet(_networks(config)) if config.ip or config.ip_file else None
    if networks is not None or config.geoip:
        placed.append(_address(networks or (), frozenset(config.geoip), countries))
    return _Compiled(general, aimed, placed)


def domains(patterns: Iterable[str], files: Iterable[str]) -> DomainSet:
    """ValueError, ConfigError."""
    return DomainSet(_patterns(patterns, files))


def _patterns(patterns: Iterable[str], files: Iterable[str]) -> Iterator[DomainPattern]:
    yield from map(parse_domain, patterns)
    for path in files:
        yield from read_domains(path)


def _networks(config: ConditionsConfig) -> Iterator[Any]:
    yield from config.ip
    for path in config.ip_file:
        yield from read_networks(path)


# -- conditions


def _one_of(field: Callable[[Flow], str]) -> Callable[[tuple[str, ...]], Condition]:
    def make(values: tuple[str, ...]) -> Condition:
        wanted = frozenset(values)
        return lambda flow: field(flow) in wanted

    return make


def _port(values: tuple[str, ...]) -> Condition:
    ports = PortSet(values)
    return lambda flow: flow.target.port in ports


def _client(values: tuple[Any, ...]) -> Condition:
    networks = NetworkSet(values)
    return lambda flow: flow.client.host in networks


def _domain(names: DomainSet) -> Condition:
    return lambda flow: flow.target.host in names


def _address(
    networks: Container[str], wanted: frozenset[str], countries: Callable[[str], str]
) -> Condition:
    """Any of the flow's addresses is in one of the networks or countries."""

    def holds(flow: Flow) -> bool:
        return any(
            address.host in networks or (wanted and countries(address.host) in wanted)
            for address in flow.addresses
        )

    return holds


def _negated(condition: Condition) -> Condition:
    return lambda flow: not condition(flow)


_GENERAL: dict[str, Callable[[tuple[Any, ...]], Condition]] = {
    "network": _one_of(lambda flow: flow.network),
    "listener": _one_of(lambda flow: flow.listener),
    "user": _one_of(lambda flow: flow.user),
    "client": _client,
}


# -- geoip


def _countries(config: Config) -> Callable[[str], str]:
    """Address -> country code, "" for none; ConfigError where rules ask for countries and nobody knows them."""
    asked = next(
        (rule for rule in config.rules if rule.conditions.geoip or rule.but_not.geoip), None
    )
    if asked is None:
        return lambda host: ""
    if not config.geoip_database:
        raise ConfigError("geoip: needs geoip_database, a file in MaxMind's format", asked.place)
    try:
        import maxminddb  # late, and optional
    except ImportError as error:
        raise ConfigError(
            "geoip: needs the Python package maxminddb (Debian: python3-maxminddb)", asked.place
        ) from error
    try:
        database = maxminddb.open_database(config.geoip_database)
    except (OSError, ValueError, maxminddb.InvalidDatabaseError) as error:
        raise ConfigError(
            f"geoip_database: {config.geoip_database}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return lambda host: _country(database, host)


def _country(database: Any, host: str) -> str:
    try:
        found = database.get(host.partition("%")[0])
    except ValueError:  # IPv6 in a database of IPv4
        return ""
    country = (
        found.get("country") or found.get("registered_country") if isinstance(found, dict) else None
    )
    return str(
        country.get("iso_code", "") if isinstance(country, dict) else country or ""
    )  # some databases have the code itself


# -- auto


class _Hosts:
    """Names and addresses, told apart."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """ValueError."""
        networks, names = [], []
        for text in patterns:
            expression = text.startswith(("keyword:", "regex:"))
            (networks if not expression and ("/" in text or is_address(text)) else names).append(
                text
            )
        self._names, self._networks = DomainSet(names), NetworkSet(networks)

    def __contains__(self, host: object) -> bool:
        return host in self._names or host in self._networks


def _pins(config: AutoConfig) -> Pins:
    try:
        return Pins(_Hosts(config.direct), _Hosts(config.upstream))
    except ValueError as error:
        raise ConfigError(f"auto: {error}", config.place) from error
