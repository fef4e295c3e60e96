"""A YAML file as a raw tree: text and places, no YAML typing.

Three passes (read, events, nodes): the events are looked at first for what
makes parsers run wild (depth, aliases, tags), then composed; PyYAML's own
constructors, which would turn `no` into False and 22:22 into 1342, never run.
PyYAML is imported here and only when a file is read.
"""

from __future__ import annotations

import os
import re
from typing import Any

from netproxy.config.node import Node
from netproxy.errors import ConfigError

SIZE_LIMIT = 1 << 20  # bytes of a file: lists that are longer belong into files of their own
INCLUDE = "include"  # the key that names other files
INCLUDED_LIMIT = 256  # files: a pattern that meets more means something else
DEPTH_LIMIT = 32  # nested collections: a deeper tree is an attack on the parser's stack
SECRET_LIMIT = 65536  # bytes of a file named by !file
_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load_file(path: str) -> Node:
    """The tree of a file with those that it includes; ConfigError with file:line:column."""
    root = _load_one(path)
    patterns = root.value.pop(INCLUDE, None) if isinstance(root.value, dict) else None
    if patterns is not None:
        for other in _included(patterns, os.path.dirname(path)):
            _merge(root.value, _load_one(other))
    return root


def _included(patterns: Node, folder: str) -> list[str]:
    """Paths in the order of their names, pattern by pattern; one that nothing matches is none."""
    import glob  # late: few files include others

    found: dict[str, None] = {}
    for pattern in patterns.value if isinstance(patterns.value, list) else [patterns]:
        if not isinstance(pattern.value, str) or not pattern.value:
            raise ConfigError(
                f"{INCLUDE}: must be a pattern of file names, or a list of them", pattern.place
            )
        found.update(dict.fromkeys(sorted(glob.glob(os.path.join(folder, pattern.value)))))
    if len(found) > INCLUDED_LIMIT:
        raise ConfigError(f"{INCLUDE}: more than {INCLUDED_LIMIT} files", patterns.place)
    return list(found)


def _merge(into: dict[str, Node], root: Node) -> None:
    """Lists are joined, and mappings key by key; what is given twice is an error."""
    if not isinstance(root.value, dict):
        raise ConfigError("must be a mapping of keys to values", root.place)
    for key, node in root.value.items():
        place = node.key_place or node.place
        if key == INCLUDE:
            raise ConfigError("a file that is included includes no others", place)
        before = into.get(key)
        if before is None or before.value == "":
            into[key] = node
        elif isinstance(before.value, list) and isinstance(node.value, list):
            into[key] = before._replace(value=before.value + node.value)
        elif isinstance(before.value, dict) and isinstance(node.value, dict):
            if twice := before.value.keys() & node.value.keys():
                name = min(twice)
                raise ConfigError(
                    f"'{key}.{name}' is given in {before.value[name].place} too",
                    node.value[name].key_place or place,
                )
            into[key] = before._replace(value={**before.value, **node.value})
        else:
            raise ConfigError(f"'{key}' is given in {before.place} too", place)


def _load_one(path: str) -> Node:
    try:
        with open(path, "rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path) from error
    if len(raw) > SIZE_LIMIT:
        raise ConfigError(f"is larger than {SIZE_LIMIT} bytes", path)
    return load_text(raw, path)


def load_text(raw: bytes, path: str) -> Node:
    """The tree of a file's bytes; an empty file is an empty mapping."""
    try:
        import yaml  # late: 23 ms and 2.7 MiB that a start without a file does not pay
    except ImportError as error:
        raise ConfigError(
            "PyYAML is needed to read a YAML file (Debian: python3-yaml)", path
        ) from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml, raw, loader, path)
        root = yaml.compose(raw, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # newer libyaml counts for itself, and looks further ahead than the events that have come
        problem = _TOO_DEEP if "nesting depth" in str(error.problem) else error.problem
        raise ConfigError(problem or "not YAML", _place(path, mark) if mark else path) from error
    except yaml.YAMLError as error:  # bytes that are no text
        raise ConfigError("not YAML: a byte that is not allowed in text", path) from error
    return Node({}, path) if root is None else _convert(root, path)


def _check_events(yaml: Any, raw: bytes, loader: Any, path: str) -> None:
    depth = documents = 0
    for event in yaml.parse(raw, Loader=loader):
        wrong = ""
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_LIMIT:
                wrong = _TOO_DEEP
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                wrong = "only one document, please"
        if getattr(event, "anchor", None) is not None:
            wrong = "anchors and aliases are not used here"
        tag = getattr(event, "tag", None)
        if (
            tag not in (None, "!", "!file")
            and not isinstance(event, yaml.CollectionStartEvent)
            or (tag is not None and isinstance(event, yaml.CollectionStartEvent))
        ):
            wrong = "the only tag here is !file"
        if wrong:
            raise ConfigError(wrong, _place(path, event.start_mark))


def _convert(node: Any, path: str) -> Node:
    place = _place(path, node.start_mark)
    if node.id == "scalar":
        return Node(_text(node, place, path), place)
    if node.id == "sequence":
        return Node([_convert(child, path) for child in node.value], place)
    mapping: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key_place = _place(path, key_node.start_mark)
        if key_node.id != "scalar":
            raise ConfigError("a key must be a single word", key_place)
        if key_node.value in mapping:
            raise ConfigError(f"'{key_node.value}' is given twice", key_place)
        value = _convert(value_node, path)
        mapping[key_node.value] = value._replace(key_place=key_place)
    return Node(mapping, place)


def _text(node: Any, place: str, path: str) -> str:
    if node.tag == "!file":
        return _read_secret(os.path.join(os.path.dirname(path), node.value), place)
    return _VARIABLE.sub(lambda match: _variable(match[1], place), node.value)


def _variable(name: str, place: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(f"the environment has no variable {name}", place)
    return value


def _read_secret(path: str, place: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(SECRET_LIMIT).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"!file {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}", place
        ) from error


def _place(path: str, mark: Any) -> str:
    return f"{path}:{mark.line + 1}:{mark.column + 1}"
