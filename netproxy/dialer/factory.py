"""Dialers from the configuration.

An upstream is folded from its steps, the first hop innermost: the dialer of each hop wraps the
dialer before it.  The factory keeps what it has built: a reload that changes something else
must leave UDP sessions, which belong to a dialer, as they are.  Main thread only.
Modules for proxies, groups and TLS are imported late: many configurations need none.
"""

from __future__ import annotations

import math
from functools import partial

from netproxy.config.schema import GroupConfig, HealthConfig, HopConfig
from netproxy.dialer.plain.block import BlockDialer
from netproxy.dialer.direct import DirectDialer
from netproxy.net.socket_options import DEFAULT_OPTIONS, KEEPALIVE_IDLE, SocketOptions
from netproxy.typed import TYPE_CHECKING, Callable, Iterable, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.config.schema import MemberConfig, UpstreamConfig, UpstreamTlsConfig
    from netproxy.dialer.direct import TargetResolver
    from netproxy.dialer.group import GroupDialer
    from netproxy.dialer.health import Check
    from netproxy.dialer.hop import ProxyDialer
    from netproxy.dialer.member import Member
    from netproxy.dialer.trust import TlsRenewal, TlsTrust
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import PacketDependencies
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.routing import Dialer
    from netproxy.net.udp_sockets import UdpSocketFactory

    Steps = tuple[HopConfig | GroupConfig, ...]


class _Upstream(NamedTuple):
    """A configured upstream that has been built."""

    dialer: Dialer
    groups: Sequence[GroupDialer]
    """The groups among its steps, without those within groups."""


class DialerFactory:
    """Builds the dialers of upstreams and keeps them: one for each configuration."""

    def __init__(
        self,
        target_resolver: TargetResolver,
        datagrams: UdpSocketFactory,
        seconds: float,
        dependencies: PacketDependencies,
        limit: float = math.inf,
        tunnel: Callable[[Address, float], Dialer] | None = None,
        command: Callable[[HopConfig, str], Dialer] | None = None,
    ) -> None:
        """`seconds` limit each connection and each proxy's handshake.

        `limit` caps all time limits, those of the configuration included.  `tunnel(agent,
        seconds)` returns a dialer through an agent, or to its service if the port is not 0;
        `command(step, upstream)` one through a program; None if the configuration has none.
        """
        self._target_resolver, self._datagrams = target_resolver, datagrams
        self._seconds = seconds
        self._dependencies = dependencies
        self._limit = limit
        self._tunnel, self._command = tunnel, command
        self.direct_client: Callable[[ProxyDialer], ProxyDialer] | None = None
        """Lets datagrams go directly to agents behind a proxy; None in health checks."""
        self._direct = DirectDialer(target_resolver, datagrams, min(seconds, limit))
        self._upstreams: dict[UpstreamConfig, _Upstream] = {}
        self._trusts: dict[UpstreamTlsConfig, TlsTrust] = {}
        self._members: dict[tuple[str, MemberConfig, Steps], Member] = {}

    def dialer(self, config: UpstreamConfig) -> Dialer:
        """Return the dialer of an upstream, the same for the same configuration.

        Raises ConfigError if a file cannot be used.
        """
        if config not in self._upstreams:
            groups: list[GroupDialer] = []
            dialer = self._fold(config, self._direct, (), groups)
            if dialer is not self._direct and dialer.carries:
                from netproxy.dialer.member import Member  # late: see above

                # A Member counts what the upstream carries.
                dialer = Member(config.name or config.text, dialer, 1, groups)
            self._upstreams[config] = _Upstream(dialer, groups)
        return self._upstreams[config].dialer

    def direct_within(self, seconds: float) -> Dialer:
        """Return a direct dialer whose connections may take `seconds`."""
        return DirectDialer(self._target_resolver, self._datagrams, min(seconds, self._limit))

    def config_of(self, dialer: Dialer) -> UpstreamConfig | None:
        """Return the configuration that a dialer was built from."""
        for config, upstream in self._upstreams.items():
            if upstream.dialer is dialer:
                return config
        return None

    def retain(self, configs: Iterable[UpstreamConfig]) -> None:
        """Forget all upstreams except these, after a reload."""
        kept = set(configs)
        self._upstreams = {
            config: upstream for config, upstream in self._upstreams.items() if config in kept
        }
        in_use = {hop.tls for config in kept for hop in config.hops}
        self._trusts = {tls: trust for tls, trust in self._trusts.items() if tls in in_use}
        live = {member for group in self.groups() for member in group.members}
        self._members = {key: member for key, member in self._members.items() if member in live}

    def prepare_renewal(self, configs: Iterable[UpstreamConfig]) -> TlsRenewal | None:
        """Read the TLS files of these upstreams again; commit() on the result uses them.

        Upstreams that are not built yet read their files when they are.  Returns None if there
        is no file to read.  Raises ConfigError.
        """
        places = {hop.tls: hop.tls.place for config in configs for hop in config.hops}
        trusts = [(trust, places[tls]) for tls, trust in self._trusts.items() if tls in places]
        if not trusts:
            return None
        from netproxy.dialer.trust import TlsRenewal  # late: see above

        return TlsRenewal(trusts)

    def groups(self) -> list[GroupDialer]:
        """Return all groups in use, each once, groups within groups included."""
        groups: dict[GroupDialer, None] = {}

        def visit(inner: Iterable[GroupDialer]) -> None:
            for group in inner:
                if group not in groups:
                    groups[group] = None
                    for member in group.members:
                        visit(member.groups)

        for upstream in self._upstreams.values():
            visit(upstream.groups)
        return list(groups)

    def upstreams(
        self, configs: Mapping[str, UpstreamConfig]
    ) -> list[tuple[str, Dialer, Sequence[GroupDialer]]]:
        """Return name, dialer and groups of these configurations, as far as they are built."""
        return [
            (name, *self._upstreams[config])
            for name, config in configs.items()
            if config in self._upstreams
        ]

    def _fold(
        self, config: UpstreamConfig, via: Dialer, before: Steps, groups: list[GroupDialer]
    ) -> Dialer:
        """Return the dialer of an upstream behind `via`.

        `before` are the steps that `via` consists of.  Appends the upstream's groups to `groups`.
        """
        for index, step in enumerate(config.steps):
            if isinstance(step, GroupConfig):
                group = self._group(step, via, before + config.steps[:index])
                groups.append(group)
                via = group
            elif step.scheme == "block":
                return BlockDialer()
            elif step.scheme == "tunnel":
                assert self._tunnel is not None
                via = self._tunnel(step.server, self._timeout(step))
            elif step.scheme == "command":
                assert self._command is not None
                via = self._command(step, config.name)
            elif step.scheme == "direct":
                via = self._first(step, config.name) if via is self._direct else via
            else:
                via = self._first(step, config.name) if via is self._direct else via
                via = self._proxy(step, via, config, index)
        return via

    def _first(self, step: HopConfig, upstream: str) -> Dialer:
        """Return the dialer without a proxy that the first step of an upstream needs."""
        if step.is_local:
            from netproxy.dialer.plain.unix import UnixDialer  # late: see above

            return UnixDialer(self._timeout(step), is_hop=True)
        keepalive = KEEPALIVE_IDLE if step.keepalive is None else step.keepalive
        outgoing, bind = SocketOptions(mark=step.mark, keepalive=keepalive), step.bind
        resolver, datagrams, seconds = self._target_resolver, self._datagrams, self._timeout(step)
        if bind is not None:
            key = f"upstreams.{upstream}.bind" if upstream else "bind"
            if bind.prefix is not None or bind.incoming:
                from netproxy.dialer.plain.source_dialer import SourceDialer  # late: see above

                return SourceDialer(resolver, datagrams, seconds, outgoing, bind, key)
            label = f"{key}: {bind.text}" if bind.address else ""
            outgoing = outgoing._replace(address=bind.address, device=bind.device, label=label)
        if outgoing == DEFAULT_OPTIONS and step.timeout is None:
            return self._direct
        return DirectDialer(resolver, datagrams, seconds, outgoing)

    def _timeout(self, step: HopConfig) -> float:
        return min(step.timeout or self._seconds, self._limit)

    def _proxy(self, step: HopConfig, via: Dialer, config: UpstreamConfig, index: int) -> Dialer:
        from netproxy.dialer.hop import Hop, LoopGuard, hop_label  # late: see above
        from netproxy.dialer.schemes import BUILDERS, RESOLVING

        label = hop_label(config.name, index, len(config.steps), step.url)
        is_last = index == len(config.steps) - 1
        hop = Hop(
            config.name if is_last and config.name else step.url,
            label,
            step.server,
            via,
            self._timeout(step),
            step.user,
            step.password,
            self._secure(step, label),
            LoopGuard(),
            step.send_proxy,
        )
        build = BUILDERS[step.scheme]
        resolver = self._target_resolver if step.scheme in RESOLVING else None
        if step.direct and self.direct_client is not None:
            return self.direct_client(build(hop, resolver, self._dependencies, "connect-udp"))
        if step.udp != "uot":
            return build(hop, resolver, self._dependencies, step.udp)
        from netproxy.dialer.uot import UotDialer  # late: see above

        plain = build(hop, resolver, self._dependencies, "none")
        carrier = build(hop, None, self._dependencies, "none")
        return UotDialer(plain, carrier, self._dependencies.counter)

    def _secure(self, step: HopConfig, label: str) -> Callable[[Stream], None] | None:
        """Return the TLS handshake with a proxy, None for a proxy without TLS."""
        if not step.has_tls:
            return None
        from netproxy.dialer.trust import TlsFiles, TlsTrust  # late: see above

        tls = step.tls
        if tls not in self._trusts:
            files = TlsFiles(tls.ca, tls.certificate, tls.key, tls.insecure)
            self._trusts[tls] = TlsTrust(label, files, tls.place)
        server_name = tls.server_name or step.server.host
        return partial(self._trusts[tls].connect, server_name=server_name)

    def _group(self, step: GroupConfig, via: Dialer, before: Steps) -> GroupDialer:
        from netproxy.dialer.group import GroupDialer  # late: see above

        members = [self._member(step.name, config, via, before) for config in step.members]
        group = GroupDialer(step.name, members, step.balance, self._seconds)
        if step.health is not None:
            checks = [
                self._check(step, config, member, via)
                for config, member in zip(step.members, members, strict=True)
            ]
            group.checks = [check for check in checks if check is not None]
        else:
            for member in members:
                # A member kept from a configuration with checks must not stay down.
                member.up = True
        return group

    def _member(self, group: str, config: MemberConfig, via: Dialer, before: Steps) -> Member:
        """Return a member; one kept from before a reload, if its own steps are the same."""
        from netproxy.dialer.member import Member  # late: see above

        key = group, config, before
        if key not in self._members:
            groups: list[GroupDialer] = []
            dialer = self._fold(config.upstream, via, before, groups)
            name = config.upstream.name or config.upstream.text
            self._members[key] = Member(name, dialer, config.weight, groups)
        return self._members[key]

    def _check(
        self, group: GroupConfig, config: MemberConfig, member: Member, via: Dialer
    ) -> Check | None:
        """Return the health check of a member, None if there is nothing to check."""
        from netproxy.dialer.health import Check  # late: see above

        health, first = group.health or HealthConfig(), config.upstream.steps[0]
        # Its time limits are those of the check, and its dials are not counted by members.
        parts = (self._target_resolver, self._datagrams, health.timeout, self._dependencies)
        factory = DialerFactory(*parts, health.timeout, self._tunnel, self._command)
        if health.target is not None:
            target, path, dialer = health.target, health.path, member.dialer
            if not member.groups:
                start = factory._direct if via is self._direct else via
                dialer = factory._fold(config.upstream, start, (), [])
        elif isinstance(first, HopConfig) and first.has_server:
            target, path = first.server, ""
            dialer = factory._first(first, config.upstream.name) if via is self._direct else via
        else:
            # A group has its own checks; a direct member has no server to check.
            return None
        request, times = path.encode("ascii"), (health.interval, health.timeout)
        return Check(group.name, member, target, dialer, request, *times)
