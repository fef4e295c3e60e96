"""The configuration file of gost as a tree whose leaves are directives."""

from __future__ import annotations

import re

from netproxy.config.tree.node import Node as ConfigNode
from netproxy.config.tree.node import Source as ConfigSource
from netproxy.config.tree.parse import parse_text
from netproxy.ctl.convert.command_lines.gost.nodes import SECRETS, shown_node
from netproxy.ctl.convert.source import ConversionError
from netproxy.errors import ConfigError
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

_LOGIN_KEYS = ("username", "password")
# Fields of messages, and keys of ciphers.
_SECRET_PATHS = re.compile(r"(?i)\.headers?\.|(?:\.|^)key$|authorization|cookie")


class Tree:
    """A mapping of the file, and the way to those within it."""

    def __init__(self, node: ConfigNode | None, directives: dict[int, Directive], notes: Notes):
        self.node, self._directives, self._notes = node, directives, notes

    def keys(self) -> list[str]:
        """Return the keys of the mapping."""
        value = self.node.value if self.node is not None else None
        return list(value) if isinstance(value, dict) else []

    def inner(self, *path: str) -> Tree:
        """Return a mapping or a list within this one; an empty one if there is none."""
        node = self.node
        for key in path:
            value = node.value if node is not None else None
            node = value.get(key) if isinstance(value, dict) else None
        return Tree(node, self._directives, self._notes)

    def elements(self, *path: str) -> list[Tree]:
        """Return the elements of a list."""
        node = self.inner(*path).node
        value = node.value if node is not None else None
        elements = value if isinstance(value, list) else []
        return [Tree(element, self._directives, self._notes) for element in elements]

    def leaves(self) -> Iterator[tuple[ConfigNode, Directive]]:
        """Yield all texts below, with their directives."""
        if self.node is not None:
            for leaf in _leaves(self.node):
                yield leaf, self._directives[id(leaf)]

    def text(self, *path: str) -> str:
        """Return a text, which is carried then; "" if there is none.  A list has commas."""
        tree = self.inner(*path)
        parts = []
        for leaf, directive in tree.leaves():
            if not self._notes.is_noted(directive):
                self._notes.carried(directive)
            parts.append(str(leaf.value))
        return ",".join(parts)

    def directive(self, *path: str) -> Directive | None:
        """Return the directive of a text, or the first one below."""
        return next((directive for _, directive in self.inner(*path).leaves()), None)

    def lose(self, why: str, advice: str = "") -> None:
        """Note that nothing below is carried."""
        for _, directive in self.leaves():
            self._notes.lost(directive, why, advice)


def read_tree(source: Source, notes: Notes) -> Tree:
    """Return the tree of a file in YAML or JSON.  Raises ConversionError."""
    # JSON may have tabs where YAML has none.
    text = re.sub(r"(?m)^[ \t]+", lambda match: match[0].replace("\t", "    "), source.text)
    try:
        root = parse_text(text.encode(), ConfigSource(source.name, is_foreign=True))
    except ConfigError as error:
        raise ConversionError(str(error).splitlines()[0]) from error
    directives: dict[int, Directive] = {}
    for path, leaf in _paths(root, ""):
        shown = f"{path}: {_shown(path, str(leaf.value))}"
        directives[id(leaf)] = notes.directive(source.name, _line(leaf), shown)
    return Tree(root, directives, notes)


def _leaves(node: ConfigNode) -> Iterator[ConfigNode]:
    yield from (leaf for _, leaf in _paths(node, ""))


def _paths(node: ConfigNode, path: str) -> Iterator[tuple[str, ConfigNode]]:
    if isinstance(node.value, dict):
        for key, inner in node.value.items():
            yield from _paths(inner, f"{path}.{key}" if path else key)
    elif isinstance(node.value, list):
        for inner in node.value:
            yield from _paths(inner, path)
    else:
        yield path, node


def _line(node: ConfigNode) -> int:
    """Return the line of "file:line:column"."""
    parts = node.place.rsplit(":", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else 0


def _shown(path: str, value: str) -> str:
    key = path.rpartition(".")[2]
    if key in _LOGIN_KEYS or SECRETS.search(key) or _SECRET_PATHS.search(path):
        return "***"
    # A URL may have a login, or a token among its parameters.
    return shown_node(value) if key in ("ServeNodes", "ChainNodes") or "://" in value else value
