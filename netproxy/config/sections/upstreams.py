"""Reads upstreams of the file: names, chains and groups.  hops.py reads their hops.

An upstream is written as a URL, a mapping with a URL and options or with a command, a chain or
a group of upstreams, or a name from `upstreams`.  Each name is read once, when it is first used.
"""

from __future__ import annotations

import re

from netproxy.config.sections.hops import HopReader
from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import (
    GroupConfig,
    HealthConfig,
    HopConfig,
    MemberConfig,
    UpstreamConfig,
)
from netproxy.config.url import PLAIN_SCHEMES, hop_node, parse_host_port
from netproxy.typed import Callable, Container, Iterator, Sequence

BALANCES = (
    *("round-robin", "least-connections", "least-latency", "hash-client", "hash-target"),
    *("weighted", "failover"),
)
MEMBERS_LIMIT = 1024
"""Hops that a group leads to.  Groups of names of groups multiply."""
DEPTH_LIMIT = 64
"""Names that refer to names."""
CHAIN_LIMIT = 16
"""Hops of a chain.  Each adds its delay and its header; a longer chain is a mistake."""
TLS_LIMIT = 3
"""TLS within TLS: the buffer of one read must hold a whole record of each inner layer."""
RESERVED_NAMES = (*PLAIN_SCHEMES, "auto")
"""Words that have a meaning where the name of an upstream may stand."""
INTERVAL_FLOOR = 0.5
"""Seconds between two health checks: the clock that starts them ticks once a second."""

Step = HopConfig | GroupConfig
_EMPTY = UpstreamConfig(())
"""Stands for an upstream with an error."""


class UpstreamReader:
    """Reads upstreams wherever the file has them, and remembers those with a name."""

    def __init__(
        self, named: dict[str, Node], problems: Problems, agents: Container[str] = ()
    ) -> None:
        """`named`: the mapping `upstreams`; `agents`: the names that a tunnel may lead to."""
        self._problems = problems
        self._named = {name: node for name, node in named.items() if self._is_name(name, node)}
        self._hops = HopReader(problems, agents)
        self._read: dict[str, UpstreamConfig | None] = {}
        """The upstreams that are read; None while one is being read."""
        self._depth = 0
        """Names that are being read."""
        self._groups: list[GroupConfig] = []
        """Keeps the groups alive, so that their ids are not used again."""
        self._sizes: dict[int, int] = {}
        """Hops of each group, by id: hashing a group visits all its members."""

    def _is_name(self, name: str, node: Node) -> bool:
        """Return whether an upstream may have a name; report it if not."""
        if message := _name_error(name):
            self._problems.add(f"upstreams: {message}", node.key_place or node.place)
        return not message

    def read_all(self) -> dict[str, UpstreamConfig]:
        """Return the upstreams of the mapping `upstreams` by name."""
        return {name: self._by_name(name, node.place) for name, node in self._named.items()}

    def read(self, node: Node, path: str) -> UpstreamConfig:
        """Return the upstream that a node describes; one without steps if it has an error."""
        if isinstance(node.value, list):
            return self._chain(node.value, node.place, path)
        if isinstance(node.value, dict):
            return UpstreamConfig(self._mapping(MapReader(node, path, self._problems)))
        if node.value in self._named:
            return self._by_name(node.value, node.place)
        return UpstreamConfig(self._url(node, path))

    def _by_name(self, name: str, place: str) -> UpstreamConfig:
        if name not in self._read:
            path = f"upstreams.{name}"
            if self._depth >= DEPTH_LIMIT:
                message = f"names refer to names more than {DEPTH_LIMIT} levels deep"
                self._problems.add(f"{path}: {message}", place)
                return _EMPTY
            self._read[name] = None
            self._depth += 1
            self._read[name] = self.read(self._named[name], path)._replace(name=name)
            self._depth -= 1
        upstream = self._read[name]
        if upstream is None:
            self._problems.add(f"upstreams.{name}: the upstream refers back to itself", place)
            return _EMPTY
        return upstream

    def _url(self, node: Node, path: str) -> tuple[Step, ...]:
        """Return the step of a URL; its query parameters are keys of the mapping."""
        text = str(node.value)
        try:
            if "?" not in text:
                return (self._hops.parse(node),)
            mapping = hop_node(text, node)
        except ValueError as error:
            from netproxy.config.tree.hints import suggestion  # late: only for errors

            is_word = "://" not in text
            if is_word and self._problems.is_unread_as_a_whole("upstreams"):
                # It is probably the name of one that could not be read.
                return ()
            hint = suggestion(text, tuple(self._named)) if is_word else ""
            self._problems.add(f"{path}: {error}{hint}", node.place, path)
            return ()
        return self._mapping(MapReader(mapping, path, self._problems))

    def _mapping(self, section: MapReader) -> tuple[Step, ...]:
        is_group = section.has("members")
        step: Step | None = self._group(section) if is_group else self._hops.read(section)
        section.finish()
        return (step,) if step else ()

    # -- chains

    def _chain(self, nodes: list[Node], place: str, path: str) -> UpstreamConfig:
        upstreams = [self.read(node, f"{path}[{index}]") for index, node in enumerate(nodes)]
        if not upstreams:
            self._problems.add(f"{path}: names no upstream", place)
            return _EMPTY
        if len(upstreams) == 1:
            return upstreams[0]
        for index, upstream in enumerate(upstreams):
            for step in upstream.steps:
                for message in _chain_errors(step, is_first=not index):
                    self._problems.add(f"{path}[{index}]: {message}", place)
        steps = tuple(step for upstream in upstreams for step in upstream.steps)
        if _length(steps) > CHAIN_LIMIT:
            self._problems.add(f"{path}: a chain of more than {CHAIN_LIMIT} hops", place)
        if _tls_depth(steps) > TLS_LIMIT:
            message = f"more than {TLS_LIMIT} hops with TLS, one inside the other"
            self._problems.add(f"{path}: {message}", place)
        return UpstreamConfig(steps[:CHAIN_LIMIT])

    # -- groups

    def _group(self, section: MapReader) -> GroupConfig:
        balance = section.choice("balance", BALANCES, BALANCES[0])
        members = tuple(
            self._member(node, f"{section.path}.members[{index}]", balance)
            for index, node in enumerate(section.items("members"))
        )
        if not members:
            section.add_error("members", "names no upstream")
        valid = [member.upstream for member in members if member.upstream.steps]
        if len({upstream.name or upstream for upstream in valid}) < len(valid):
            section.add_error("members", "names the same upstream twice: give it a weight instead")
        has_health = section.has("health_check")
        health = _read_health(section.mapping("health_check")) if has_health else None
        group = GroupConfig(section.path.rpartition("upstreams.")[2], members, balance, health)
        size = sum(self._size(step) for member in members for step in member.upstream.steps)
        if size > MEMBERS_LIMIT:
            message = f"more than {MEMBERS_LIMIT} upstreams, including those of inner groups"
            section.add_error("members", message)
            group, size = group._replace(members=()), 0
        self._groups.append(group)
        self._sizes[id(group)] = size
        return group

    def _size(self, step: Step) -> int:
        """Return the hops of a step; a group that is named twice counts twice."""
        return self._sizes[id(step)] if isinstance(step, GroupConfig) else 1

    def _member(self, node: Node, path: str, balance: str) -> MemberConfig:
        if not isinstance(node.value, dict) or "via" not in node.value:
            return MemberConfig(self.read(node, path))
        section = MapReader(node, path, self._problems)
        upstream = self.read(section.take("via") or node, f"{path}.via")
        has_weight = section.has("weight")
        weight = section.whole("weight", 1)
        of_group = path.rpartition(".members")[0]
        is_known = not self._problems.is_unread(f"{of_group}.balance")
        if has_weight and balance != "weighted" and is_known:
            section.add_error("weight", "needs balance: weighted")
        section.finish()
        return MemberConfig(upstream, weight)


def _name_error(name: str) -> str:
    """Return what keeps a text from being the name of an upstream, "" if nothing does."""
    if name in RESERVED_NAMES:
        return f"'{name}' is a reserved word (choose another name)"
    if not name:
        return "a name is empty"
    if "://" in name or not name.isprintable() or re.search(r"\s", name):
        return f"'{name}' is not a name (it takes no spaces, no control characters and no '://')"
    return ""


def _read_health(section: MapReader) -> HealthConfig:
    defaults = HealthConfig()
    health = HealthConfig(
        section.read("target", parse_host_port, None),
        section.read("path", _path, ""),
        section.duration("interval", defaults.interval, INTERVAL_FLOOR),
        section.duration("timeout", defaults.timeout),
    )
    if health.path and not health.target:
        section.add_error("target", "is missing: the path is requested from it")
    section.finish()
    return health


def _path(text: str) -> str:
    if not re.match(r"/[\x21-\x7e]*\Z", text):
        raise ValueError("must begin with / and hold no spaces")
    return text


def _chain_errors(step: Step, is_first: bool) -> Iterator[str]:
    """Yield what keeps a step out of its place in a chain of several hops."""
    if isinstance(step, HopConfig) and step.scheme in PLAIN_SCHEMES:
        yield f"{step.scheme} cannot be a hop of a chain"
    if is_first:
        return
    hops = list(UpstreamConfig((step,)).hops)
    if any(hop.scheme == "command" for hop in hops):
        yield "a command must be the first hop: no proxy carries a program"
    if any(hop.is_local for hop in hops):
        yield "a UNIX socket must be the first hop: no proxy connects to those of this machine"
    if any(hop.scheme == "tunnel" for hop in hops):
        yield "a tunnel must be the first hop: its agent connects to this daemon"
    if any(hop.bind or hop.mark or hop.keepalive is not None for hop in hops):
        yield "bind, mark and keepalive are for the first hop: this machine dials no other"


def _length(steps: Sequence[Step]) -> int:
    """Return the hops that a connection passes at most."""
    return sum(1 if isinstance(step, HopConfig) else _longest(step, _length) for step in steps)


def _tls_depth(steps: Sequence[Step]) -> int:
    """Return the layers of TLS that a connection has at most."""
    return sum(
        step.has_tls if isinstance(step, HopConfig) else _longest(step, _tls_depth)
        for step in steps
    )


def _longest(group: GroupConfig, measure: Callable[[Sequence[Step]], int]) -> int:
    return max((measure(member.upstream.steps) for member in group.members), default=0)
