"""The raw tree of a configuration, and a reader that takes the keys of one mapping.

Scalars stay text until the schema gives them a type: 0123, no and 22:22 are kept as written.
Every node knows its place in the file.  A MapReader collects errors instead of raising them, and
reports the keys that nobody has taken as unknown.
"""

from __future__ import annotations

import os

from netproxy.config.units import parse_duration, parse_whole
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, TypeVar

if TYPE_CHECKING:
    from netproxy.config.tree.problems import Problems

Value = TypeVar("Value")
Default = TypeVar("Default")
DURATION_FLOOR = 0.001
"""Seconds: the shortest duration that a key accepts unless it has its own minimum."""
PATH_ITSELF = "takes the path itself, without !file"


class Source(NamedTuple):
    """Where the text of a node comes from."""

    path: str = ""
    """The file; "" for the command line."""
    exposed: bool = False
    """True if every user of the machine can read the text there."""
    is_value: bool = False
    """True if the text is that of the whole file, which is named by !file."""
    is_hidden: bool = False
    """True if the text comes from !file or the environment, so that no message repeats it."""
    is_foreign: bool = False
    """True if the file is one of another program: "!file" and "${NAME}" mean nothing in it."""

    def resolve(self, path: str) -> str:
        """Return a path of the file, which is relative to the folder of the file."""
        return os.path.join(os.path.dirname(self.path), path) if path else ""


class Node(NamedTuple):
    """A scalar as text, a list, or a mapping."""

    value: str | list[Node] | dict[str, Node]
    place: str
    """ "file:line:column", or the command-line option that gave it."""
    key_place: str = ""
    """The place of the node's key; "" if it has none."""
    source: Source = Source()


class MapReader:
    """Reads one mapping.  `path` is its place in the tree, such as "listeners[0]"."""

    def __init__(self, node: Node, path: str, problems: Problems) -> None:
        self.place = node.place
        self.path = path
        self.problems = problems
        self._left: dict[str, Node] = {}
        self._keys: list[str] = []
        self._places: dict[str, str] = {}
        """The places of the values that were taken, by key."""
        self._is_mapping = isinstance(node.value, dict) or node.value == ""
        if isinstance(node.value, dict):
            self._left = dict(node.value)
        elif not self._is_mapping:
            from netproxy.config.tree.hints import mapping_hint  # late: only for errors

            subject, hint = path or "the file", mapping_hint(node.value)
            problems.add(f"{subject} must be a mapping of keys to values{hint}", node.place, path)

    def take(self, key: str) -> Node | None:
        """Return the node of a key, None if there is none.  The key is known from now on."""
        self._keys.append(key)
        node = self._left.pop(key, None)
        if node is not None:
            self._places[key] = node.place
        return node

    def has(self, key: str) -> bool:
        """Return whether the key is there and not taken yet.  It is known from now on."""
        self._keys.append(key)
        return key in self._left

    def peek(self, key: str) -> Node | None:
        """Return the node of a key that is not taken yet; None if there is none."""
        return self._left.get(key)

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

    def secret(self, key: str, parse: Callable[[str], str] = str) -> str:
        """Take a password or a token; warn if every user of the machine can read it there."""
        node = self._left.get(key)
        value = self.read(key, parse, "")
        if node is not None and value:
            self.problems.check_secret(node)
        return value

    def path_of(self, key: str) -> str:
        """Take the path of a file, which is relative to the folder of the file that names it."""
        node = self._left.get(key)
        path = self.text(key)
        if node is not None and node.source.is_value:
            self.add_error(key, PATH_ITSELF)
            return ""
        return node.source.resolve(path) if node is not None else ""

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """Take a scalar that must be one of the choices."""

        def parse(text: str) -> str:
            if text not in choices:
                from netproxy.config.tree.hints import EDITS_LIMIT, suggestion  # late: for errors

                hint = suggestion(text, choices, EDITS_LIMIT)
                # A URL or user:password is no misspelled word, and holds a secret.
                subject = "is" if ":" in text else f"'{text}' is"
                raise ValueError(f"{subject} not one of {', '.join(choices)}{hint}")
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
        nodes = self._nodes(key)
        self.take(key)
        return nodes

    def values(
        self, key: str, parse: Callable[[str], Value], commas: bool = False
    ) -> tuple[Value, ...]:
        """Take scalars, which may hold `commas`, and parse them; wrong ones are left out."""
        is_list = key in self._left and isinstance(self._left[key].value, list)
        parse_one = parse if is_list or commas else _alone(parse)
        parsed = [
            self._scalar(node, f"{key}[{index}]", parse_one, None)
            for index, node in enumerate(self.items(key))
        ]
        return tuple(value for value in parsed if value is not None)

    def paths(self, key: str) -> tuple[str, ...]:
        """Take a list of paths of files, as path_of() does."""
        nodes = self._nodes(key)
        paths = self.values(key, _path)
        if any(node.source.is_value for node in nodes):
            self.add_error(key, PATH_ITSELF)
            return ()
        return tuple(nodes[0].source.resolve(path) for path in paths)

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
            from netproxy.config.tree import hints  # late: only for errors

            place = node.key_place or node.place
            if node.value == "" and (joined := hints.joined_key(key)):
                self._add(joined, f"there is no space after '{joined}:'", place)
                continue
            known = tuple(self._keys)
            near = hints.synonym(key, known) or hints.suggestion(key, known, hints.EDITS_LIMIT)
            hint = near or hints.misplaced(key, known) or hints.suggestion(key, known)
            if node.value == "" and not hint:
                # It may be the second half of a password that has a comma.
                self.problems.add(f"{self.path or 'the file'}: {hints.NO_VALUE}", place)
                continue
            self._add(key, f"unknown key{hint}", place)

    def add_error(
        self, key: str, message: str, place: str = "", given: tuple[str, ...] = ()
    ) -> None:
        """Add an error about a key, or about the mapping itself if the key is "".

        The place is that of the key's value, or of the mapping if the key is not there.
        Nothing is added if that could not be read, or the value of a key in `given`: this error
        follows from it.
        """
        # A node that is not a mapping has been reported already.
        if not self._is_mapping:
            return
        if not any(self.problems.is_unread(self._name(cause)) for cause in (key, *given)):
            self._add(key, message, place or self.place_of(key))

    def warn(self, key: str, message: str) -> None:
        """Add a warning about a key; its place is that of add_error()."""
        self.problems.warn(f"{self._name(key)}: {message}", self.place_of(key))

    def _add(self, key: str, message: str, place: str, is_unread: bool = False) -> None:
        name = self._name(key)
        self.problems.add(f"{name}: {message}", place, name if is_unread else "")

    def place_of(self, key: str) -> str:
        """Return the place of a key's value, or that of the mapping if the key is not there."""
        if key in self._left:
            return self._left[key].place
        return self._places.get(key) or self.place

    def _nodes(self, key: str) -> list[Node]:
        node = self._left.get(key)
        if node is None:
            return []
        return node.value if isinstance(node.value, list) else [node]

    def _scalar(
        self, node: Node, key: str, parse: Callable[[str], Value], default: Default
    ) -> Value | Default:
        if not isinstance(node.value, str):
            self._add(key, "must be a single value", node.place, is_unread=True)
            return default
        try:
            return parse(node.value)
        except ValueError as error:
            self._add(key, str(error), node.place, is_unread=True)
            return default

    def _name(self, key: str) -> str:
        return ".".join(filter(None, (self.path, key)))


def _alone(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """Return `parse` with a better error for several values that are written as one text."""

    def parse_alone(text: str) -> Value:
        try:
            return parse(text)
        except ValueError:
            if "," in text:
                raise ValueError(f"'{text}' is one text: write a list, [{text}]") from None
            raise

    return parse_alone


def _path(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text
