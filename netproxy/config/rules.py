"""Rules, the smart way out's memory and where clients may be led, as they stand in the file.

Patterns and files are read where rules are compiled (router.factory): what is wrong
with one is found there, and says the rule's place.
"""

from __future__ import annotations

from typing import Any, Callable

from netproxy.config.node import MapReader, Node, Problems
from netproxy.config.schema import AutoConfig, ConditionsConfig, DestinationsConfig, RuleConfig
from netproxy.config.upstreams import Ways
from netproxy.interfaces.networks import IpNetwork

AUTO = "auto"
RULES_LIMIT = (
    1000  # each is asked for each new flow; thousands of names belong into one rule's file
)
VERDICTS_LIMIT = 1 << 20  # some 300 bytes each
TEXT_LIMIT = 5  # values of a condition that are repeated where a rule is named
_SETS = (
    "domain",
    "domain_file",
    "ip",
    "ip_file",
    "geoip",
    "port",
    "network",
    "client",
    "user",
    "listener",
)


def read_rules(
    nodes: list[Node], ways: Ways, listeners: frozenset[str], problems: Problems
) -> tuple[RuleConfig, ...]:
    """`listeners`: their names, so that a rule for one that is not there is found."""
    if len(nodes) > RULES_LIMIT:
        problems.add(
            f"rules: more than {RULES_LIMIT}: put names and networks into a domain_file or an ip_file",
            nodes[0].place,
        )
        nodes = []
    return tuple(
        _read_rule(node, f"rules[{at}]", ways, listeners, problems) for at, node in enumerate(nodes)
    )


def _read_rule(
    node: Node, path: str, ways: Ways, listeners: frozenset[str], problems: Problems
) -> RuleConfig:
    section = MapReader(node, path, problems)
    text = f"{path} ({_text(node)})"
    conditions = _conditions(section, listeners)
    but_not = _but_not(section, listeners)
    via, upstream = section.take("via"), section.take("upstream")
    section.finish()
    auto = via is not None and via.value == AUTO
    if via is None:
        section.wrong("via", "is missing")
    elif auto != (upstream is not None):
        section.wrong(
            "upstream",
            "is missing: where auto goes when the direct way fails" if auto else "is for via: auto",
        )
    way = ways.read(via, f"{path}.via") if via is not None and not auto else None
    fallback = ways.read(upstream, f"{path}.upstream") if upstream is not None else None
    return RuleConfig(conditions, but_not, way, fallback, text, node.place)


def _but_not(section: MapReader, listeners: frozenset[str]) -> ConditionsConfig:
    given, inner = section.has("not"), section.mapping("not")
    if given and not inner.has_more():
        section.wrong("not", "names nothing")
    found = _conditions(inner, listeners)
    inner.finish()
    return found


def _conditions(section: MapReader, listeners: frozenset[str]) -> ConditionsConfig:
    def listener(name: str) -> str:
        if name not in listeners:
            raise ValueError(f"there is no listener '{name}'")
        return name

    parsers: dict[str, Callable[[str], Any]] = {
        "network": _network,
        "client": IpNetwork.parse,
        "listener": listener,
        "geoip": _country,
    }
    for key in _SETS:
        if section.empty(key):
            section.wrong(
                key, "names nothing"
            )  # it would match nothing, or everything: it is a mistake
    return ConditionsConfig(
        **{key: tuple(section.texts(key, parsers.get(key, _word))) for key in _SETS}
    )


def _text(node: Node) -> str:
    """A rule in one line, for people."""
    if not isinstance(node.value, dict):
        return str(node.value)
    return (
        "everything"
        if not set(node.value) - {"via", "upstream"}
        else ", ".join(
            f"{key}: {_value_text(value.value)}"
            for key, value in node.value.items()
            if key not in ("via", "upstream")
        )
    )


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{key}: {_value_text(inner.value)}" for key, inner in value.items())
            + "}"
        )
    if isinstance(value, list):
        shown = [_value_text(one.value) for one in value[:TEXT_LIMIT]]
        return "[" + ", ".join(shown + ["..."] * (len(value) > TEXT_LIMIT)) + "]"
    return str(value)


def read_auto(section: MapReader) -> AutoConfig:
    given = AutoConfig()
    auto = AutoConfig(
        section.duration("deadline", given.deadline),
        section.duration("remember", given.remember),
        section.whole("entries", given.entries),
        tuple(section.texts("direct", _word)),
        tuple(section.texts("upstream", _word)),
        section.place,
    )
    if auto.entries > VERDICTS_LIMIT:
        section.wrong("entries", f"the most is {VERDICTS_LIMIT}")
    section.finish()
    return auto


def read_destinations(section: MapReader) -> DestinationsConfig:
    given, deny, allow = (
        section.has("deny"),
        tuple(section.texts("deny", _word)),
        tuple(section.texts("allow", _word)),
    )
    section.finish()
    return DestinationsConfig(deny if given else None, allow, section.place)


def _network(text: str) -> str:
    if text not in ("tcp", "udp"):
        raise ValueError(f"'{text}' is neither tcp nor udp")
    return text


def _country(text: str) -> str:
    if len(text) != 2 or not text.isalpha() or not text.isascii():
        raise ValueError(f"'{text}' is no country code of two letters")
    return text.upper()


def _word(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text
