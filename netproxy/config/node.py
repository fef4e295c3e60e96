"""The raw tree that a configuration is read from, whatever it was written in.

Scalars stay text until the schema says what they are, so that 0123, no and
22:22 mean what they say.  Every node knows its place.  A MapReader takes the
keys of one mapping by type, collects what is wrong, and knows what was not taken.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, TypeVar

from netproxy.config.units import parse_duration
from netproxy.errors import ConfigError

Value = TypeVar("Value")
LEAST = 0.001  # seconds of a duration, where none but 0 is too short


class Node(NamedTuple):
    """`value` is a str, a list of nodes, or a dict of str -> node."""

    value: Any
    place: str  # "file:line:column", or the option it was given by
    key_place: str = ""  # of its key, where it has one


class Problems:
    """All that is wrong with a configuration, in the order it was found."""

    def __init__(self) -> None:
        self.found: list[ConfigError] = []

    def add(self, message: str, place: str) -> None:
        self.found.append(ConfigError(message, place))


class MapReader:
    """One mapping; `path` is its place in the tree ("listeners[0]"), for messages."""

    def __init__(self, node: Node, path: str, problems: Problems) -> None:
        self.place = node.place
        self.path = path
        self.problems = problems
        self._left: dict[str, Node] = {}
        self._keys: list[str] = []
        if isinstance(node.value, dict):
            self._left = dict(node.value)
        elif node.value != "":
            problems.add(f"{path or 'the file'} must be a mapping of keys to values", node.place)

    def take(self, key: str) -> Node | None:
        """The node of a key, or None.  What is never taken is an unknown key."""
        self._keys.append(key)
        return self._left.pop(key, None)

    def has(self, key: str) -> bool:
        """Whether a key that was not taken yet is there."""
        return key in self._left

    def has_more(self) -> bool:
        """Whether there is a key that was not taken yet."""
        return bool(self._left)

    def empty(self, key: str) -> bool:
        """Whether a key that was not taken yet is a list of nothing."""
        return key in self._left and self._left[key].value == []

    def read(self, key: str, parse: Callable[[str], Value], default: Value) -> Value:
        """A scalar, by `parse`, whose ValueError is the message."""
        node = self.take(key)
        if node is None:
            return default
        return self._scalar(node, key, parse, default)

    def text(self, key: str, default: str = "") -> str:
        return self.read(key, str, default)

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        def one_of(text: str) -> str:
            if text not in choices:
                raise ValueError(
                    f"'{text}' is none of {', '.join(choices)}{suggestion(text, choices)}"
                )
            return text

        return self.read(key, one_of, default)

    def flag(self, key: str, default: bool) -> bool:
        return self.choice(key, ("true", "false"), "true" if default else "false") == "true"

    def whole(self, key: str, default: int) -> int:
        def number(text: str) -> int:
            if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
                raise ValueError(f"'{text}' is no whole number above 0")
            return int(text)

        return self.read(key, number, default)

    def duration(self, key: str, default: Any, least: float = LEAST) -> Any:
        """Seconds."""

        def seconds(text: str) -> float:
            value = parse_duration(text)
            if value < least:
                raise ValueError(
                    f"must be at least {least:g}s" if least > LEAST else "must be longer than 0"
                )
            return value

        return self.read(key, seconds, default)

    def items(self, key: str) -> list[Node]:
        """The members of a list; a single value is a list of one."""
        node = self.take(key)
        if node is None:
            return []
        return node.value if isinstance(node.value, list) else [node]

    def texts(self, key: str, parse: Callable[[str], Value]) -> list[Value]:
        found = [
            self._scalar(node, f"{key}[{at}]", parse, None)
            for at, node in enumerate(self.items(key))
        ]
        return [value for value in found if value is not None]

    def mapping(self, key: str) -> MapReader:
        """The mapping under a key, empty where it is not there."""
        node = self.take(key)
        return MapReader(node or Node({}, self.place), self._name(key), self.problems)

    def rest(self) -> dict[str, Node]:
        """All that is left, for mappings whose keys are the user's own names."""
        rest, self._left = self._left, {}
        return rest

    def finish(self) -> None:
        """Whatever was not taken is unknown."""
        for key, node in self._left.items():
            self.problems.add(
                f"{self._name(key)}: unknown key{suggestion(key, tuple(self._keys))}",
                node.key_place or node.place,
            )

    def wrong(self, key: str, message: str, place: str = "") -> None:
        self.problems.add(f"{self._name(key)}: {message}", place or self.place)

    def _scalar(self, node: Node, key: str, parse: Callable[[str], Value], default: Value) -> Value:
        if not isinstance(node.value, str):
            self.wrong(key, "must be a single value", node.place)
            return default
        try:
            return parse(node.value)
        except ValueError as error:
            self.wrong(key, str(error), node.place)
            return default

    def _name(self, key: str) -> str:
        return ".".join(filter(None, (self.path, key)))


def suggestion(word: str, known: tuple[str, ...]) -> str:
    """ " (did you mean 'x'?)" or nothing."""
    import difflib  # late: only needed when something is wrong

    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
