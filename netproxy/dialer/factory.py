"""Dialers from the configuration: a way out is folded, the first hop innermost, groups with their members."""

from __future__ import annotations

import math
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from netproxy.config.schema import (
    Config,
    GroupConfig,
    HealthConfig,
    HopConfig,
    MemberConfig,
    UpstreamTlsConfig,
    UpstreamConfig,
)
from netproxy.dialer.block import BlockDialer
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.group import GroupDialer, Member
from netproxy.dialer.health import Check
from netproxy.dialer.hop import Hop, LoopGuard, Services
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.routing import Dialer
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.connect import DEFAULT_OPTIONS, KEEPALIVE_IDLE, SocketOptions
from netproxy.net.stream import Stream

_Steps = tuple[HopConfig | GroupConfig, ...]


class _Place(NamedTuple):
    """Where in the configuration something is folded."""

    name: str  # of the way out, "" for one without
    hops: int  # of the whole way

    def label(self, at: int, url: str) -> str:
        """Of the hop `at` (from 0), in errors."""
        if self.hops == 1:
            return f"'{self.name}' ({url})" if self.name else url
        return f"hop {at + 1} of '{self.name}' ({url})" if self.name else f"hop {at + 1} ({url})"


class _Made(NamedTuple):
    dialer: Dialer
    groups: list[GroupDialer]


class _Trust:
    """Whom TLS believes and what it shows, as a configuration has it; `context` is replaced when the files are read again."""

    def __init__(self, label: str, config: UpstreamTlsConfig) -> None:
        self._label = label
        self._config = config
        self.context: Any = None

    def read(self) -> Any:
        """ConfigError."""
        from netproxy.net import tls  # late: ssl costs 3 MiB, and few need it

        given = self._config
        try:
            return tls.client_context(given.ca, given.certificate, given.key, given.insecure)
        except ValueError as error:
            raise ConfigError(f"{self._label}: tls: {error}") from error


class PreparedRenewal:
    """TLS files that were read again; commit() makes them count."""

    def __init__(self, contexts: Sequence[tuple[_Trust, Any]]) -> None:
        self._contexts = contexts

    def commit(self) -> None:
        """Use the new contexts for new connections."""
        for trust, context in self._contexts:
            trust.context = context


class DialerFactory:
    """Keeps what it made: a reload that changes something else leaves UDP sessions, which hang on their dialer, as they are."""

    def __init__(
        self,
        reach: TargetResolver,
        datagrams: UdpSocketFactory,
        seconds: float,
        services: Services,
        limit: float = math.inf,
        tunnel: Callable[[str, float], Dialer] | None = None,
    ) -> None:
        """`seconds`: for each connection, and for each proxy's handshake; with `limit` none has more, whatever it asks for.

        `tunnel(agent, seconds)` leads through an agent.
        """
        self._tunnel: Any = tunnel
        self._limit = limit
        self._services = services
        self._reach = reach
        self._datagrams = datagrams
        self._seconds = seconds
        self._direct = DirectDialer(reach, datagrams, min(seconds, limit))
        self._made: dict[UpstreamConfig, _Made] = {}
        self._trusts: dict[UpstreamTlsConfig, _Trust] = {}
        self._members: dict[tuple[str, MemberConfig, _Steps], Member] = {}

    def dialer(self, config: UpstreamConfig) -> Dialer:
        """The way out; the same one for the same configuration.  ConfigError where a file cannot be used."""
        if config not in self._made:
            groups: list[GroupDialer] = []
            dialer = self._fold(config, self._direct, (), groups)
            if dialer is not self._direct and dialer.carries:
                dialer = Member(
                    config.name or config.text, dialer, 1, groups
                )  # the same, with its figures
            self._made[config] = _Made(dialer, groups)
        return self._made[config].dialer

    def impatient(self, seconds: float) -> Dialer:
        """The direct way out with so many seconds for a connection."""
        return DirectDialer(self._reach, self._datagrams, min(seconds, self._limit))

    def config_of(self, dialer: Dialer) -> UpstreamConfig | None:
        """What a way out that is in use was made of."""
        return next((way for way, made in self._made.items() if made.dialer is dialer), None)

    def retain(self, configs: Iterable[UpstreamConfig]) -> None:
        """Forget all dialers except those of these upstreams."""
        kept = set(configs)
        self._made = {way: made for way, made in self._made.items() if way in kept}
        used = {step.tls for way in kept for step in way.hops}
        self._trusts = {config: trust for config, trust in self._trusts.items() if config in used}
        live = {member for group in self.groups() for member in group.members}
        self._members = {key: member for key, member in self._members.items() if member in live}

    def groups(self) -> list[GroupDialer]:
        """All that are in use, groups within groups too."""
        found: dict[GroupDialer, None] = {}

        def visit(groups: Iterable[GroupDialer]) -> None:
            for group in groups:
                if group not in found:
                    found[group] = None
                    for member in group.members:
                        visit(member.groups)

        for made in self._made.values():
            visit(made.groups)
        return list(found)

    def describe_flows(
        self, ways: Mapping[str, UpstreamConfig]
    ) -> list[tuple[str, Dialer, Sequence[GroupDialer]]]:
        """Name, dialer and groups of each, of those that were made."""
        return [
            (name, self._made[way].dialer, self._made[way].groups)
            for name, way in ways.items()
            if way in self._made
        ]

    def _fold(
        self, config: UpstreamConfig, via: Dialer, before: _Steps, groups: list[GroupDialer]
    ) -> Dialer:
        """`before` are the steps that `via` leads over.  Adds the groups on the way to `groups`."""
        place = _Place(config.name, len(config.steps))
        for at, step in enumerate(config.steps):
            if isinstance(step, GroupConfig):
                via = self._group(step, via, before + config.steps[:at])
                groups.append(via)
            elif step.scheme == "block":
                return BlockDialer()
            elif step.scheme == "tunnel":
                via = self._tunnel(step.server.host, self._patience(step))
            elif step.scheme == "direct":
                via = self._leave(step) if via is self._direct else via
            else:
                via = self._hop(step, self._leave(step) if via is self._direct else via, place, at)
        return via

    def _leave(self, step: HopConfig) -> Dialer:
        """How this machine is left for a first hop, or for the target itself."""
        keepalive = KEEPALIVE_IDLE if step.keepalive is None else step.keepalive
        local, device = (step.bind, "") if pack_ip(step.bind) is not None else ("", step.bind)
        outgoing = SocketOptions(local, device, step.mark, keepalive)
        if outgoing == DEFAULT_OPTIONS and step.timeout is None:
            return self._direct
        return DirectDialer(self._reach, self._datagrams, self._patience(step), outgoing)

    def _patience(self, step: HopConfig) -> float:
        return min(step.timeout or self._seconds, self._limit)

    def _hop(self, step: HopConfig, via: Dialer, place: _Place, at: int) -> Dialer:
        label, last = place.label(at, step.url), at == place.hops - 1
        hop = Hop(
            place.name if last and place.name else step.url,
            label,
            step.server,
            via,
            self._patience(step),
            step.user,
            step.password,
            self._secure(step, label),
            LoopGuard(),
        )
        make = _dialers()[step.scheme]
        plain = make(hop, self._reach, self._services, step.udp == "auto")
        if step.udp != "uot":
            return plain
        from netproxy.dialer.uot import UotDialer  # late, as those below

        return UotDialer(plain, make(hop, None, self._services, False), self._services.counter)

    def _secure(self, step: HopConfig, label: str) -> Callable[[Stream], None] | None:
        if not step.has_tls:
            return None
        from netproxy.net import tls  # late: ssl costs 3 MiB, and few need it

        trust = self._trusts.get(step.tls)
        if trust is None:
            trust = _Trust(label, step.tls)
            trust.context = trust.read()
            self._trusts[step.tls] = trust
        server_name = step.tls.server_name or step.server.host
        return lambda stream: tls.connect(stream, trust.context, server_name)

    def prepare_renewal(self, configs: Iterable[UpstreamConfig]) -> PreparedRenewal:
        """Read the TLS files of these upstreams again.

        The new contents count for new connections from commit() on.  Raises ConfigError.
        """
        used = {step.tls for config in configs for step in config.hops}
        return PreparedRenewal(
            [(trust, trust.read()) for config, trust in self._trusts.items() if config in used]
        )

    def _group(self, step: GroupConfig, via: Dialer, before: _Steps) -> GroupDialer:
        members = [self._member(step.name, one, via, before) for one in step.members]
        group = GroupDialer(step.name, members, step.balance, self._seconds)
        if step.health is not None:
            group.checks = [
                check
                for one, member in zip(step.members, members)
                for check in self._check(step, one, member, via)
            ]
        else:
            for member in members:
                member.up = True  # what checks had found is not known any more
        return group

    def _member(self, group: str, config: MemberConfig, via: Dialer, before: _Steps) -> Member:
        key = (group, config, before)
        if key not in self._members:
            groups: list[GroupDialer] = []
            dialer = self._fold(config.upstream, via, before, groups)
            self._members[key] = Member(
                config.upstream.name or config.upstream.text, dialer, config.weight, groups
            )
        return self._members[key]

    def _check(
        self, group: GroupConfig, config: MemberConfig, member: Member, via: Dialer
    ) -> Iterator[Check]:
        health, first = group.health or HealthConfig(), config.upstream.steps[0]
        impatient = DialerFactory(
            self._reach,
            self._datagrams,
            health.timeout,
            self._services,
            health.timeout,
            self._tunnel,
        )
        first_via = impatient._direct if via is self._direct else via
        if health.target is not None:
            way = (
                member.dialer
                if member.groups
                else impatient._fold(config.upstream, first_via, (), [])
            )
            yield Check(
                group.name,
                member,
                health.target,
                way,
                health.path.encode("ascii"),
                health.interval,
                health.timeout,
            )
        elif (
            isinstance(first, HopConfig) and first.server.port
        ):  # a group checks its own, and direct has nothing to ask
            via = impatient._leave(first) if via is self._direct else via
            yield Check(group.name, member, first.server, via, b"", health.interval, health.timeout)


def udp_warnings(config: Config, dialers: DialerFactory) -> list[str]:
    """Listeners whose datagrams have no way out: said at the start, not lost in silence."""
    return [
        f"listener '{one.name}' takes UDP, but its way out, {(one.upstream or config.default).text}, carries none"
        for one in config.listeners
        if "udp" in one.network
        and one.protocol != "dns"
        and "udp" not in dialers.dialer(one.upstream or config.default).carries
    ]


def _dialers() -> dict[str, Callable[[Hop, TargetResolver | None, Services, bool], Dialer]]:
    """By scheme."""
    from netproxy.dialer.http import HttpDialer  # late: 0.4 MiB, and many have no upstream
    from netproxy.dialer.socks4 import Socks4Dialer
    from netproxy.dialer.socks5 import Socks5Dialer

    return {
        "socks4": lambda hop, reach, services, udp: Socks4Dialer(hop, reach),
        "socks4a": lambda hop, reach, services, udp: Socks4Dialer(hop, None),
        "socks5": Socks5Dialer,
        "socks5h": lambda hop, reach, services, udp: Socks5Dialer(hop, None, services, udp),
        "socks5+tls": Socks5Dialer,
        "socks5h+tls": lambda hop, reach, services, udp: Socks5Dialer(hop, None, services, udp),
        "http": lambda hop, reach, services, udp: HttpDialer(hop, services.counter, udp),
        "https": lambda hop, reach, services, udp: HttpDialer(hop, services.counter, udp),
    }
