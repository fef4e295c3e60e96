"""Parses YAML into a raw tree: text and places, without YAML's types.

Three passes: the bytes, then the parser's events, then the nodes.  The events are checked first,
for depth, aliases and tags that make parsers use too much memory or time.  PyYAML's constructors,
which turn `no` into False and 22:22 into 1342, never run.  PyYAML is imported only when a file
is read.
"""

from __future__ import annotations

import io
import os
import re
import stat

from netproxy.config.tree.node import Node, Source
from netproxy.errors import ConfigError, cannot_read, open_regular
from netproxy.typed import IO, TYPE_CHECKING, Any, Iterator, Protocol

if TYPE_CHECKING:
    from yaml import Event
    from yaml import Node as YamlNode


DEPTH_LIMIT = 32
"""Nested collections.  A deeper tree is an attack on the parser's stack."""
VALUE_LIMIT = 1 << 20
"""Characters of a file named by !file: some 60,000 networks."""
_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class _Mark(Protocol):
    """A place in a file as PyYAML and libyaml give it, counted from 0."""

    @property
    def line(self) -> int:
        """The line."""

    @property
    def column(self) -> int:
        """The column."""


def parse_text(raw: bytes, source: Source) -> Node:
    """Return the tree of a file's bytes; an empty file is an empty mapping.

    Nothing else is read for the file of another program (Source.is_foreign).
    Raises ConfigError with file:line:column.
    """
    try:
        import yaml  # late: 23 ms and 2.7 MiB that a start without a file saves
    except ImportError as error:
        message = "PyYAML is needed to read a YAML file (Debian: python3-yaml)"
        raise ConfigError(message, source.path) from error
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        _check_events(yaml.parse(raw, Loader=loader), source.path)
        root = yaml.compose(raw, Loader=loader)
    except yaml.YAMLError as error:
        from netproxy.config.tree import syntax  # late: only needed for an error

        # Newer versions of libyaml count the depth too, and read further ahead than the events.
        if isinstance(error, yaml.MarkedYAMLError) and "nesting depth" in str(error.problem):
            raise ConfigError(_TOO_DEEP, _place(source.path, error.problem_mark)) from error
        message, mark = syntax.explain(error, raw)
        raise ConfigError(message, _place(source.path, mark)) from error
    return Node({}, source.path, source=source) if root is None else _convert(root, source)


def is_exposed(file: IO[Any]) -> bool:  # Any: a file of bytes or of text
    """Return whether every user of the machine can read an open file by its name."""
    if not os.fstat(file.fileno()).st_mode & stat.S_IROTH:
        return False
    folder = os.path.dirname(os.path.realpath(file.name))
    while os.stat(folder).st_mode & stat.S_IXOTH:
        if folder == os.path.dirname(folder):
            return True
        folder = os.path.dirname(folder)
    return False


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
                problem = "the only tag allowed is !file" + _tag_hint(event)
        if problem:
            raise ConfigError(problem, _place(path, event.start_mark))


def _tag_hint(event: Event) -> str:
    """Return how an exclusion such as "!10.0.0.0/8" is written, if it became a tag."""
    tag, text = getattr(event, "tag", ""), getattr(event, "value", "")
    has_address = re.match(r"![0-9A-Fa-f]+[.:]", tag) and not text
    return f' (an exclusion is written in quotes: "{tag}")' if has_address else ""


def _convert(node: YamlNode, source: Source) -> Node:
    """Return a composed YAML node, and all nodes below it, as text and places."""
    import yaml

    place = _place(source.path, node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(child, source) for child in node.value], place, "", source)
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, place, source)
    mapping: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key_place = _place(source.path, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError("a key must be a single word", key_place)
        if key_node.value in mapping:
            raise ConfigError(f"'{key_node.value}' is given twice", key_place)
        value = _convert(value_node, source)
        mapping[key_node.value] = value._replace(key_place=key_place)
    return Node(mapping, place, "", source)


def _scalar(node: YamlNode, place: str, source: Source) -> Node:
    """Return a scalar, read from another file or from the environment if it says so."""
    text = _checked_text(node.value, place)
    if source.is_foreign:
        if node.tag == "!file":
            raise ConfigError("!file is a tag of netproxyd alone", place)
        return Node(text, place, "", source)
    if node.tag == "!file":
        return _read_value(source.resolve(text), place)

    def variable(match: re.Match[str]) -> str:
        value = os.environ.get(match[1])
        if value is None:
            raise ConfigError(f"the environment variable {match[1]} is not set", place)
        return value

    expanded = _checked_text(_VARIABLE.sub(variable, text), place)
    # The file does not tell what the environment does.
    if expanded == text:
        return Node(text, place, "", source)
    return Node(expanded, place, "", Source(source.path, is_hidden=True))


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


def _read_value(path: str, place: str) -> Node:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            text = file.read(VALUE_LIMIT + 1)
            source = Source(path, is_exposed(file), is_value=True, is_hidden=True)
    except OSError as error:
        raise ConfigError(f"!file {path}: {cannot_read(error, path)}", place) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"!file {path}: not UTF-8", place) from error
    if len(text) > VALUE_LIMIT:
        raise ConfigError(f"!file {path}: is longer than {VALUE_LIMIT} characters", place)
    return Node(_checked_text(text.rstrip("\r\n"), place), place, "", source)


def _place(path: str, mark: _Mark | None) -> str:
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
