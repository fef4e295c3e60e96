"""The raw tree of a configuration, and a reader that takes the keys of one mapping.

Scalars stay text until the schema gives them a type: 0123, no and 22:22 are kept as written.
Every node knows its place in the file.  A MapReader collects errors instead of raising them, and
reports the keys that nobody has taken as unknown.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, TypeVar

from netproxy.config.units import parse_duration, parse_whole
from netproxy.errors import ConfigError, printable

Value = TypeVar("Value")
Default = TypeVar("Default")
DURATION_FLOOR = 0.001
"""Seconds: the shortest duration that a key accepts unless it has its own minimum."""
EDITS_LIMIT = 2
"""Edits between a word and the known word that is suggested for it."""


class Node(NamedTuple):
    """A scalar as text, a list, or a mapping."""

    value: str | list[Node] | dict[str, Node]
    place: str
    """ "file:line:column", or the command-line option that gave it."""
    key_place: str = ""
    """The place of the node's key; "" if it has none."""


class Problems:
    """Errors and warnings of one configuration, in the order in which they were found."""

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []
        self.warnings: list[str] = []

    def add(self, message: str, place: str) -> None:
        """Add an error: the configuration cannot be used."""
        self.errors.append(ConfigError(message, place))

    def warn(self, message: str) -> None:
        """Add a warning: the configuration can be used, but probably should not."""
        self.warnings.append(printable(message))


class MapReader:
    """Reads one mapping.  `path` is its place in the tree, such as "listeners[0]"."""

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
        """Return the node of a key, None if there is none.  The key is known from now on."""
        self._keys.append(key)
        return self._left.pop(key, None)

    def has(self, key: str) -> bool:
        """Return whether the key is there and not taken yet."""
        return key in self._left

    def has_more(self) -> bool:
        """Return whether there is any key that is not taken yet."""
        return bool(self._left)

    def is_empty_list(self, key: str) -> bool:
        """Return whether the key is there, not taken yet, and an empty list."""
        return key in self._left and self._left[key].value == []

    def read(self, key: str, parse: Callable[[str], Value], default: Default) -> Value | Default:
        """Take a scalar and parse it.

        A ValueError of `parse` becomes an error of the configuration with the same text; the
        result is then the default.
        """
        node = self.take(key)
        if node is None:
            return default
        return self._scalar(node, key, parse, default)

    def text(self, key: str, default: str = "") -> str:
        """Take a scalar as text."""
        return self.read(key, str, default)

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """Take a scalar that must be one of the choices."""

        def parse(text: str) -> str:
            if text not in choices:
                hint = suggestion(text, choices, EDITS_LIMIT)
                raise ValueError(f"'{text}' is not one of {', '.join(choices)}{hint}")
            return text

        return self.read(key, parse, default)

    def flag(self, key: str, default: bool) -> bool:
        """Take "true" or "false"."""
        return self.choice(key, ("true", "false"), "true" if default else "false") == "true"

    def whole(self, key: str, default: Default) -> int | Default:
        """Take a whole number from 1 to 2**31 - 1."""
        return self.read(key, parse_whole, default)

    def duration(
        self, key: str, default: Default, floor: float = DURATION_FLOOR
    ) -> float | Default:
        """Take a duration of at least `floor` seconds, in seconds."""

        def parse(text: str) -> float:
            seconds = parse_duration(text)
            if seconds < floor:
                shortest = f"at least {floor:g}s" if floor > DURATION_FLOOR else "longer than 0"
                raise ValueError(f"must be {shortest}")
            return seconds

        return self.read(key, parse, default)

    def items(self, key: str) -> list[Node]:
        """Take a list.  A single value counts as a list of one."""
        node = self.take(key)
        if node is None:
            return []
        return node.value if isinstance(node.value, list) else [node]

    def values(self, key: str, parse: Callable[[str], Value]) -> tuple[Value, ...]:
        """Take a list of scalars and parse them; those with an error are left out."""
        parsed = [
            self._scalar(node, f"{key}[{index}]", parse, None)
            for index, node in enumerate(self.items(key))
        ]
        return tuple(value for value in parsed if value is not None)

    def mapping(self, key: str) -> MapReader:
        """Take a mapping and return its reader; an empty one if the key is not there."""
        node = self.take(key)
        return MapReader(node or Node({}, self.place), self._name(key), self.problems)

    def rest(self) -> dict[str, Node]:
        """Take all keys that are left: for mappings whose keys are names of the user's own."""
        rest, self._left = self._left, {}
        return rest

    def finish(self) -> None:
        """Report every key that is left as unknown."""
        for key, node in self._left.items():
            hint = suggestion(key, tuple(self._keys))
            place = node.key_place or node.place
            self.problems.add(f"{self._name(key)}: unknown key{hint}", place)

    def add_error(self, key: str, message: str, place: str = "") -> None:
        """Add an error about a key, or about the mapping itself if the key is ""."""
        self.problems.add(f"{self._name(key)}: {message}", place or self.place)

    def _scalar(
        self, node: Node, key: str, parse: Callable[[str], Value], default: Default
    ) -> Value | Default:
        if not isinstance(node.value, str):
            self.add_error(key, "must be a single value", node.place)
            return default
        try:
            return parse(node.value)
        except ValueError as error:
            self.add_error(key, str(error), node.place)
            return default

    def _name(self, key: str) -> str:
        return ".".join(filter(None, (self.path, key)))


def suggestion(word: str, known: tuple[str, ...], edits: int | None = None) -> str:
    """Return " (did you mean 'x'?)" if a known word is spelled nearly like this one, else "".

    With `edits`, the known word must be at most so many edits away, and at most half of its
    length: "ssh" is not a misspelled "sps".
    """
    import difflib  # late: only needed for an error

    for near in difflib.get_close_matches(word, known):
        if edits is None or edit_distance(word, near) <= min(edits, len(near) // 2):
            return f" (did you mean '{near}'?)"
    return ""


def edit_distance(first: str, second: str) -> int:
    """Return how many letters to insert, delete or replace to get from one word to the other."""
    row = list(range(len(second) + 1))
    for index, letter in enumerate(first, 1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(second, 1):
            replaced = diagonal + (letter != other)
            diagonal, row[column] = row[column], min(replaced, row[column] + 1, row[column - 1] + 1)
    return row[-1]
