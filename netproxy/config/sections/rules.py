"""Reads the sections `rules`, `auto` and `destinations`.

Patterns stay text and files stay unread: router.factory reads both, and reports their errors
with the rule's place.
"""

from __future__ import annotations

from netproxy.config.hours import parse_hours
from netproxy.config.tree.node import MapReader, Node
from netproxy.config.tree.problems import Problems
from netproxy.config.schema import AutoConfig, ConditionsConfig, DestinationsConfig, RuleConfig
from netproxy.config.units import parse_network
from netproxy.config.sections.upstreams import UpstreamReader
from netproxy.interfaces.flows import ANY_USER, COMMANDS
from netproxy.interfaces.services import DOMAINS, NETWORKS
from netproxy.interfaces.networks import IpNetwork
from netproxy.typed import TYPE_CHECKING, Collection

if TYPE_CHECKING:
    from netproxy.config.remote_lists import ListReader

AUTO = "auto"
RULES_LIMIT = 1000
"""Rules.  Every new flow is compared with each; thousands of names belong in one rule's file."""
VERDICTS_LIMIT = 1 << 20
"""Verdicts of some 300 bytes each."""
TEXT_LIMIT = 5
"""Values of a condition that the text of a rule shows."""
_TARGETS = ("via", "upstream")


class RuleReader:
    """Reads rules; knows the listeners and the users, whose names a condition may have."""

    def __init__(
        self,
        upstreams: UpstreamReader,
        listeners: Collection[str] | None,
        users: Collection[str] | None,
        lists: ListReader,
        problems: Problems,
    ) -> None:
        """Names that are None are not known: any may be that of a listener, or of a user.

        Users are not known if another program checks logins.
        """
        self._upstreams = upstreams
        self._listeners = listeners
        self._users = users
        self._lists = lists
        self._problems = problems

    def read(self, nodes: list[Node]) -> tuple[RuleConfig, ...]:
        """Return the rules in the order of the file; none if there are too many."""
        if len(nodes) > RULES_LIMIT:
            self._problems.add(
                f"rules: more than {RULES_LIMIT} rules "
                "(put names into a domain_file and networks into an ip_file)",
                nodes[0].place,
            )
            return ()
        return tuple(self._rule(node, f"rules[{index}]") for index, node in enumerate(nodes))

    def _rule(self, node: Node, path: str) -> RuleConfig:
        section = MapReader(node, path, self._problems)
        conditions, but_not = self._conditions(section), self._but_not(section)
        via_node, upstream_node = section.take("via"), section.take("upstream")
        section.finish()
        is_auto = via_node is not None and via_node.value == AUTO
        if via_node is None:
            hint = " (write via in place of upstream)" if upstream_node is not None else ""
            section.add_error("via", f"is missing{hint}")
        elif is_auto and upstream_node is None:
            message = "is missing: auto needs an upstream for when the direct connection fails"
            section.add_error("upstream", message)
        elif upstream_node is not None and not is_auto:
            section.add_error("upstream", "is only for via: auto")
        via = self._upstreams.read(via_node, f"{path}.via") if via_node and not is_auto else None
        upstream = (
            self._upstreams.read(upstream_node, f"{path}.upstream") if upstream_node else None
        )
        return RuleConfig(conditions, but_not, via, upstream, f"{path} ({_text(node)})", node.place)

    def _but_not(self, section: MapReader) -> ConditionsConfig:
        is_given, inner = section.has("not"), section.mapping("not")
        if is_given and not inner.has_more():
            section.add_error("not", "is empty: it needs a condition")
        conditions = self._conditions(inner)
        inner.finish()
        return conditions

    def _conditions(self, section: MapReader) -> ConditionsConfig:
        # An empty list would match nothing, or everything: it is a mistake.
        for key in filter(section.is_empty_list, ConditionsConfig._fields):
            section.add_error(key, "is an empty list")
        return ConditionsConfig(
            domain=section.values("domain", _word),
            domain_file=self._lists.read(section, DOMAINS),
            ip=section.values("ip", _word),
            ip_file=self._lists.read(section, NETWORKS),
            geoip=section.values("geoip", _country),
            port=section.values("port", _word),
            network=section.values("network", parse_network),
            client=section.values("client", IpNetwork.parse),
            user=section.values("user", self._user),
            listener=section.values("listener", self._listener),
            hours=section.values("hours", parse_hours, commas=True),
            sni=section.values("sni", _word),
            command=section.values("command", _command),
        )

    def _listener(self, name: str) -> str:
        return name if self._listeners is None else _known("listener", name, self._listeners)

    def _user(self, name: str) -> str:
        word = _word(name)
        is_any = self._users is None or word == ANY_USER
        return word if is_any else _known("user", word, self._users or ())


def _known(kind: str, name: str, names: Collection[str]) -> str:
    """Return a name.  Raises ValueError if it is not among the names, with one spelled alike."""
    if name not in names:
        from netproxy.config.tree.hints import suggestion  # late: only for errors

        hint = suggestion(name, tuple(names))
        raise ValueError(f"there is no {kind} '{name}'{hint}")
    return name


def _text(node: Node) -> str:
    """Return the conditions of a rule in one line, for people."""
    if not isinstance(node.value, dict):
        return _value_text(node)
    conditions = {key: value for key, value in node.value.items() if key not in _TARGETS}
    return _mapping_text(conditions) or "everything"


def _value_text(node: Node) -> str:
    if isinstance(node.value, dict):
        return f"{{{_mapping_text(node.value)}}}"
    if isinstance(node.value, list):
        shown = [_value_text(value) for value in node.value[:TEXT_LIMIT]]
        return f"[{', '.join(shown + ['...'] * (len(node.value) > TEXT_LIMIT))}]"
    return node.value


def _mapping_text(mapping: dict[str, Node]) -> str:
    return ", ".join(f"{key}: {_value_text(node)}" for key, node in mapping.items())


def read_auto(section: MapReader) -> AutoConfig:
    """Return the section `auto`."""
    defaults = AutoConfig()
    auto = AutoConfig(
        section.duration("deadline", defaults.deadline),
        section.duration("remember", defaults.remember),
        section.whole("entries", defaults.entries),
        section.values("direct", _word),
        section.values("upstream", _word),
        section.place,
    )
    if auto.entries > VERDICTS_LIMIT:
        section.add_error("entries", f"must be at most {VERDICTS_LIMIT}")
    section.finish()
    return auto


def read_destinations(section: MapReader) -> DestinationsConfig:
    """Return the section `destinations`."""
    has_deny = section.has("deny")
    deny, allow = section.values("deny", _word), section.values("allow", _word)
    section.finish()
    return DestinationsConfig(deny if has_deny else None, allow, section.place)


def _country(text: str) -> str:
    if len(text) != 2 or not text.isalpha() or not text.isascii():
        raise ValueError(f"'{text}' is not a country code of two letters")
    return text.upper()


def _command(text: str) -> str:
    return _known("command", text, COMMANDS)


def _word(text: str) -> str:
    """Return the text.  Raises ValueError if it is empty."""
    if not text:
        raise ValueError("is empty")
    return text
