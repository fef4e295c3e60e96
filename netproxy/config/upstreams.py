"""Ways out as they stand in the file: a URL, a mapping with a URL and options, a chain of these, a group, or a name.

Names are read once, wherever they are first needed; one that leads back to itself is found.
"""

from __future__ import annotations

import re
from typing import Container

from netproxy.config.node import MapReader, Node, Problems, suggestion
from netproxy.config.schema import (
    GroupConfig,
    HealthConfig,
    HopConfig,
    MemberConfig,
    TlsConfig,
    UpstreamTlsConfig,
    UpstreamConfig,
)
from netproxy.config.units import parse_duration
from netproxy.config.url import HOST_NAME, hop_node, parse_hop, parse_host_port
from netproxy.interfaces.addresses import pack_ip

BALANCES = (
    "round-robin",
    "least-connections",
    "least-latency",
    "hash-client",
    "hash-target",
    "weighted",
    "failover",
)
MEMBERS_LIMIT = 1024  # hops that a group leads to: names that stand for groups of names multiply
DEPTH_LIMIT = 64  # names that stand for names
CHAIN_LIMIT = 16  # hops of a chain: each adds its delay and its header, and nobody means more
TLS_LIMIT = (
    3  # TLS within TLS: each layer must hold a whole record of the next in the buffer of one read
)
LEAST_INTERVAL = (
    0.5  # seconds between two health checks: the clock that starts them ticks once a second
)
MARK_LIMIT = 1 << 32  # SO_MARK has 32 bits
KEEPALIVE_LIMIT = 32767  # seconds: what the kernel takes for TCP_KEEPIDLE
# Expressions as text: compiled where they are first needed, which in most daemons is never.
# IFNAMSIZ, and what dev_valid_name() of the kernel lets pass; one of digits and dots alone is an address gone wrong.
_DEVICE = r"(?![\d.]+\Z)[^\s/:]{1,15}\Z"
_MARK = r"0[xX][0-9A-Fa-f]{1,8}\Z|[0-9]{1,10}\Z"
_PLAIN = ("direct", "block")
_NOWHERE = UpstreamConfig(())  # in the place of what is wrong


class Ways:
    def __init__(
        self,
        named: dict[str, Node],
        problems: Problems,
        warnings: list[str],
        agents: Container[str] = (),
    ) -> None:
        """`named`: what stands under `upstreams`; `agents`: whom tunnels may lead to."""
        self._named = named
        self._agents = agents
        self._problems = problems
        self._warnings = warnings
        self._read: dict[str, UpstreamConfig | None] = {}  # None while one is being read
        self._reading: list[str] = []
        self._groups: list[GroupConfig] = []  # kept, so that their ids stay theirs
        self._sizes: dict[int, int] = {}

    def read_all(self) -> dict[str, UpstreamConfig]:
        return {name: self._by_name(name, node.place) for name, node in self._named.items()}

    def read(self, node: Node, path: str) -> UpstreamConfig:
        if isinstance(node.value, list):
            return self._chain(node, path)
        if isinstance(node.value, dict):
            return UpstreamConfig(self._mapping(MapReader(node, path, self._problems)))
        if node.value in self._named:
            return self._by_name(node.value, node.place)
        return UpstreamConfig(self._hop(node, path))

    def _by_name(self, name: str, place: str) -> UpstreamConfig:
        if name not in self._read:
            if len(self._reading) >= DEPTH_LIMIT:
                self._problems.add(
                    f"upstreams.{name}: names lead to names more than {DEPTH_LIMIT} deep", place
                )
                return _NOWHERE
            self._read[name] = None
            self._reading.append(name)
            self._read[name] = self.read(self._named[name], f"upstreams.{name}")._replace(name=name)
            self._reading.pop()
        way = self._read[name]
        if way is None:
            self._problems.add(f"upstreams.{name}: the way leads back to itself", place)
            return _NOWHERE
        return way

    def _chain(self, node: Node, path: str) -> UpstreamConfig:
        ways = [self.read(each, f"{path}[{at}]") for at, each in enumerate(node.value)]
        if not ways:
            self._problems.add(f"{path}: names no way out", node.place)
            return _NOWHERE
        for at, way in enumerate(ways):
            for step in way.steps:
                if isinstance(step, HopConfig) and step.scheme in _PLAIN and len(ways) > 1:
                    self._problems.add(
                        f"{path}[{at}]: {step.scheme} is no hop of a chain", node.place
                    )
                if at and any(hop.scheme == "tunnel" for hop in UpstreamConfig((step,)).hops):
                    self._problems.add(
                        f"{path}[{at}]: a tunnel is the first hop: its agent comes to us",
                        node.place,
                    )
                if at and any(
                    hop.bind or hop.mark or hop.keepalive is not None
                    for hop in UpstreamConfig((step,)).hops
                ):
                    self._problems.add(
                        f"{path}[{at}]: bind, mark and keepalive are for the first hop: no other is reached from here",
                        node.place,
                    )
        steps = tuple(step for way in ways for step in way.steps)
        if sum(map(_length, steps)) > CHAIN_LIMIT:
            self._problems.add(f"{path}: a chain of more than {CHAIN_LIMIT} hops", node.place)
        if sum(map(_tls_depth, steps)) > TLS_LIMIT:
            self._problems.add(
                f"{path}: more than {TLS_LIMIT} hops with TLS, one within the other", node.place
            )
        return ways[0] if len(ways) == 1 else UpstreamConfig(steps[:CHAIN_LIMIT])

    # -- hops

    def _hop(self, node: Node, path: str) -> tuple[HopConfig, ...]:
        """From a URL, whose query parameters are the keys of the mapping; none where it is wrong."""
        try:
            if "?" not in node.value:
                return (self._known(parse_hop(node.value)),)
            section = MapReader(hop_node(node.value, node.place), path, self._problems)
        except ValueError as error:
            hint = suggestion(node.value, tuple(self._named)) if "://" not in node.value else ""
            self._problems.add(f"{path}: {error}{hint}", node.place)
            return ()
        return self._mapping(section)

    def _known(self, hop: HopConfig) -> HopConfig:
        """The hop; ValueError where it is a tunnel to nobody."""
        if hop.scheme == "tunnel" and hop.server.host not in self._agents:
            raise ValueError(f"tunnel.bridge.agents names no '{hop.server.host}'")
        return hop

    def _mapping(self, section: MapReader) -> tuple[HopConfig | GroupConfig, ...]:
        found: HopConfig | GroupConfig | None = (
            self._group(section) if section.has("members") else self._with_options(section)
        )
        section.finish()
        return (found,) if found else ()

    def _with_options(self, section: MapReader) -> HopConfig | None:
        if not section.has("url"):
            section.wrong("", "needs a url, or members")
        hop = section.read("url", lambda text: self._known(parse_hop(text)), None)
        if hop is None:
            section.rest()  # options of nothing
            return None
        hop = hop._replace(
            udp=section.choice("udp", ("auto", "uot", "none"), hop.udp),
            timeout=section.duration("timeout", None),
            bind=section.read("bind", _bind, ""),
            mark=section.read("mark", _mark, 0),
            keepalive=section.read("keepalive", _keepalive, None),
            tls=self._tls(section, hop),
        )
        if hop.scheme in _PLAIN and (hop.udp != "auto" or hop.timeout is not None):
            section.wrong("udp" if hop.udp != "auto" else "timeout", f"{hop.scheme} is no proxy")
        if hop.scheme == "tunnel" and (
            hop.udp != "auto" or hop.bind or hop.mark or hop.keepalive is not None
        ):
            section.wrong("", "a tunnel's agent comes to us: of the options only timeout is for it")
        return hop

    def _tls(self, section: MapReader, hop: HopConfig) -> UpstreamTlsConfig:
        given = section.has("tls")
        inner = section.mapping("tls")
        tls = UpstreamTlsConfig(
            inner.text("ca"),
            inner.text("certificate"),
            inner.text("key"),
            inner.read("server_name", server_name, ""),
            inner.flag("insecure", False),
        )
        if given and not hop.has_tls:
            section.wrong("tls", f"{hop.scheme} has none: the scheme is https or socks5+tls")
        if tls.key and not tls.certificate:
            inner.wrong("certificate", "is missing")
        if tls.insecure:
            self._warnings.append(
                f"{inner.path}.insecure: whoever answers for {hop.server} is believed, and reads all that goes there"
            )
        inner.finish()
        return tls

    # -- groups

    def _group(self, section: MapReader) -> GroupConfig:
        balance = section.choice("balance", BALANCES, BALANCES[0])
        members = tuple(
            self._member(node, f"{section.path}.members[{at}]", balance)
            for at, node in enumerate(section.items("members"))
        )
        if not members:
            section.wrong("members", "names no way out")
        ways = [
            member.upstream.name or member.upstream for member in members if member.upstream.steps
        ]
        if len(set(ways)) < len(ways):
            section.wrong("members", "names one way out twice: give it a weight instead")
        health = (
            self._health(section.mapping("health_check")) if section.has("health_check") else None
        )
        group = GroupConfig(section.path.rpartition("upstreams.")[2], members, balance, health)
        size = sum(self._size(step) for member in members for step in member.upstream.steps)
        if size > MEMBERS_LIMIT:
            section.wrong(
                "members", f"more than {MEMBERS_LIMIT} ways out, those of groups within counted"
            )
            group, size = group._replace(members=()), 0
        self._groups.append(group)
        self._sizes[id(group)] = size
        return group

    def _size(self, step: HopConfig | GroupConfig) -> int:
        """Hops in it and in all that it is made of: a group that is named twice counts twice."""
        return self._sizes[id(step)] if isinstance(step, GroupConfig) else 1

    def _member(self, node: Node, path: str, balance: str) -> MemberConfig:
        if isinstance(node.value, dict) and "via" in node.value:
            section = MapReader(node, path, self._problems)
            way = self.read(section.take("via") or node, f"{path}.via")
            weighted = section.has("weight")
            weight = section.whole("weight", 1)
            if weighted and balance != "weighted":
                section.wrong("weight", "counts where balance is weighted")
            section.finish()
            return MemberConfig(way, weight)
        return MemberConfig(self.read(node, path))

    def _health(self, section: MapReader) -> HealthConfig:
        given = HealthConfig()
        health = HealthConfig(
            section.read("target", parse_host_port, None),
            section.read("path", _path, ""),
            section.duration("interval", given.interval, LEAST_INTERVAL),
            section.duration("timeout", given.timeout),
        )
        if health.path and not health.target:
            section.wrong("target", "is missing: the path is asked for there")
        section.finish()
        return health


def read_tls(section: MapReader) -> TlsConfig | None:
    tls = TlsConfig(
        section.text("certificate"), section.text("key"), section.text("client_ca"), section.place
    )
    if (tls.key or tls.client_ca) and not tls.certificate:
        section.wrong("certificate", "is missing")
    section.finish()
    return tls if tls.certificate else None


def _length(step: HopConfig | GroupConfig) -> int:
    """Hops that it adds, at the most."""
    if isinstance(step, HopConfig):
        return 1
    return max((sum(map(_length, member.upstream.steps)) for member in step.members), default=0)


def _tls_depth(step: HopConfig | GroupConfig) -> int:
    """How many layers of TLS it adds, at the most."""
    if isinstance(step, HopConfig):
        return int(step.has_tls)
    return max((sum(map(_tls_depth, member.upstream.steps)) for member in step.members), default=0)


def server_name(text: str) -> str:
    if pack_ip(text) is None and not re.match(HOST_NAME, text):
        raise ValueError(f"'{text}' is no name of a server")
    return text


def _bind(text: str) -> str:
    if pack_ip(text) is not None or re.match(_DEVICE, text):
        return text
    raise ValueError(f"'{text}' is neither an address nor an interface")


def _keepalive(text: str) -> float:
    seconds = parse_duration(text)
    if seconds > KEEPALIVE_LIMIT:
        raise ValueError(f"the longest is {KEEPALIVE_LIMIT}s")
    return seconds


def _mark(text: str) -> int:
    mark = int(text, 16 if text[1:2] in ("x", "X") else 10) if re.match(_MARK, text) else 0
    if not 0 < mark < MARK_LIMIT:
        raise ValueError(f"'{text}' is no mark: a number above 0, decimal or 0x...")
    return mark


def _path(text: str) -> str:
    if not re.match(r"/[\x21-\x7e]*\Z", text):
        raise ValueError("a path begins with / and has no space in it")
    return text
