"""Loads a YAML file as a raw tree: text and places, without YAML's types.

Three passes: the bytes, then the parser's events, then the nodes.  The events are checked first,
for depth, aliases and tags that make parsers use too much memory or time.  PyYAML's constructors,
which turn `no` into False and 22:22 into 1342, never run.  PyYAML is imported only when a file
is read.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Iterator, Protocol

from netproxy.config.node import Node
from netproxy.errors import ConfigError

if TYPE_CHECKING:
    from yaml import Event
    from yaml import Node as YamlNode

SIZE_LIMIT = 1 << 20
"""Bytes of a file.  Longer lists belong in files of their own."""
INCLUDE = "include"
"""The key that names other files."""
INCLUDED_LIMIT = 256
"""Files.  A pattern that matches more is a mistake."""
DEPTH_LIMIT = 32
"""Nested collections.  A deeper tree is an attack on the parser's stack."""
SECRET_LIMIT = 65536
"""Bytes of a file named by !file."""
_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class _Mark(Protocol):
    """A place in a file as PyYAML and libyaml give it, counted from 0."""

    line: int
    column: int


def load_file(path: str) -> Node:
    """Return the tree of a file, merged with the files that it includes.

    Raises ConfigError with file:line:column.
    """
    root = _load_one(path)
    if isinstance(root.value, dict):
        patterns = root.value.pop(INCLUDE, None)
        for other in _included(patterns, os.path.dirname(path)) if patterns else ():
            _merge(root.value, _load_one(other))
    return root


def load_text(raw: bytes, path: str) -> Node:
    """Return the tree of a file's bytes; an empty file is an empty mapping.

    Raises ConfigError with file:line:column.
    """
    try:
        import yaml  # late: 23 ms and 2.7 MiB that a start without a file saves
    except ImportError as error:
        message = "PyYAML is needed to read a YAML file (Debian: python3-yaml)"
        raise ConfigError(message, path) from error
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        _check_events(yaml.parse(raw, Loader=loader), path)
        root = yaml.compose(raw, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # Newer versions of libyaml count the depth too, and read further ahead than the events.
        problem = _TOO_DEEP if "nesting depth" in str(error.problem) else error.problem
        raise ConfigError(problem or "not YAML", _place(path, mark)) from error
    except yaml.YAMLError as error:
        message = "not YAML: it contains a byte that is not allowed in text"
        raise ConfigError(message, path) from error
    return Node({}, path) if root is None else _convert(root, path)


# -- files


def _load_one(path: str) -> Node:
    try:
        with open(path, "rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path) from error
    if len(raw) > SIZE_LIMIT:
        raise ConfigError(f"is larger than {SIZE_LIMIT} bytes", path)
    return load_text(raw, path)


def _included(patterns: Node, folder: str) -> list[str]:
    """Return the paths that match, pattern by pattern, in the order of their names."""
    import glob  # late: few files include others

    paths: dict[str, None] = {}
    for pattern in patterns.value if isinstance(patterns.value, list) else [patterns]:
        if not isinstance(pattern.value, str) or not pattern.value:
            message = f"{INCLUDE}: must be a pattern of file names, or a list of them"
            raise ConfigError(message, pattern.place)
        paths.update(dict.fromkeys(sorted(glob.glob(os.path.join(folder, pattern.value)))))
    if len(paths) > INCLUDED_LIMIT:
        raise ConfigError(f"{INCLUDE}: more than {INCLUDED_LIMIT} files match", patterns.place)
    return list(paths)


def _merge(tree: dict[str, Node], root: Node) -> None:
    """Add an included file to the tree: lists are joined, and mappings key by key.

    Raises ConfigError if a key is given twice.
    """
    if not isinstance(root.value, dict):
        raise ConfigError("must be a mapping of keys to values", root.place)
    for key, node in root.value.items():
        place = node.key_place or node.place
        if key == INCLUDE:
            raise ConfigError("an included file cannot include others", place)
        before = tree.get(key)
        if before is None or before.value == "":
            tree[key] = node
        elif isinstance(before.value, list) and isinstance(node.value, list):
            tree[key] = before._replace(value=before.value + node.value)
        elif isinstance(before.value, dict) and isinstance(node.value, dict):
            if twice := before.value.keys() & node.value.keys():
                name = min(twice)
                message = f"'{key}.{name}' is already given in {before.value[name].place}"
                raise ConfigError(message, node.value[name].key_place or place)
            tree[key] = before._replace(value={**before.value, **node.value})
        else:
            raise ConfigError(f"'{key}' is already given in {before.place}", place)


# -- YAML


def _check_events(events: Iterator[Event], path: str) -> None:
    """Refuse what the composer must not see: deep trees, aliases, tags, several documents."""
    import yaml

    depth = documents = 0
    for event in events:
        problem = ""
        collection = isinstance(event, yaml.CollectionStartEvent)
        if collection:
            depth += 1
            if depth > DEPTH_LIMIT:
                problem = _TOO_DEEP
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                problem = "the file must hold a single YAML document"
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            problem = "anchors and aliases are not allowed"
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            if event.tag is not None and (collection or event.tag not in ("!", "!file")):
                problem = "the only tag allowed is !file"
        if problem:
            raise ConfigError(problem, _place(path, event.start_mark))


def _convert(node: YamlNode, path: str) -> Node:
    """Return a composed YAML node, and all nodes below it, as text and places."""
    import yaml

    place = _place(path, node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(child, path) for child in node.value], place)
    if not isinstance(node, yaml.MappingNode):
        return Node(_text(node, place, path), place)
    mapping: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key_place = _place(path, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError("a key must be a single word", key_place)
        if key_node.value in mapping:
            raise ConfigError(f"'{key_node.value}' is given twice", key_place)
        value = _convert(value_node, path)
        mapping[key_node.value] = value._replace(key_place=key_place)
    return Node(mapping, place)


def _text(node: YamlNode, place: str, path: str) -> str:
    """Return a scalar's text, read from the file or the environment if it says so."""
    text = _checked_text(node.value, place)
    if node.tag == "!file":
        secret = _read_secret(os.path.join(os.path.dirname(path), text), place)
        return _checked_text(secret, place)

    def variable(match: re.Match[str]) -> str:
        value = os.environ.get(match[1])
        if value is None:
            raise ConfigError(f"the environment variable {match[1]} is not set", place)
        return value

    return _checked_text(_VARIABLE.sub(variable, text), place)


def _checked_text(text: str, place: str) -> str:
    """Return the text.  Raises ConfigError for what no name, path or password may contain."""
    if "\0" in text:
        raise ConfigError("the value contains a NUL character", place)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # A variable of the environment with other bytes, or an escape of half a character.
        raise ConfigError("the value is not UTF-8", place) from error
    return text


def _read_secret(path: str, place: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(SECRET_LIMIT).rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"!file {path}: {error.strerror}", place) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"!file {path}: not UTF-8", place) from error


def _place(path: str, mark: _Mark | None) -> str:
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
