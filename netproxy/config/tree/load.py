"""Loads a configuration file, and the files that it includes, as one raw tree."""

from __future__ import annotations

import errno
import os
import select

from netproxy.config.tree.node import Node, Source
from netproxy.config.tree.parse import is_exposed, parse_text
from netproxy.errors import ConfigError, cannot_read, open_regular
from netproxy.typed import IO, Callable

SIZE_LIMIT = 1 << 20
"""Bytes of a file.  Longer lists belong in files of their own."""
PIPE_SECONDS = 5.0
"""How long a program that writes a configuration into a pipe may be silent."""
INCLUDE = "include"
"""The key that names other files."""
INCLUDED_LIMIT = 256
"""Files.  A pattern that matches more is a mistake."""


def load_file(path: str) -> Node:
    """Return the tree of a file, merged with the files that it includes.

    Raises ConfigError with file:line:column.
    """
    root = _parse(path, _open_any)
    if isinstance(root.value, dict):
        patterns = root.value.pop(INCLUDE, None)
        for other in _included(patterns, os.path.dirname(path)) if patterns else ():
            _merge(root.value, _parse(other, open_regular))
    return root


def _parse(path: str, opened: Callable[[str], IO[bytes]]) -> Node:
    try:
        with opened(path) as file:
            raw = _content(file.fileno())
            source = Source(path, is_exposed(file))
    except OSError as error:
        raise ConfigError(f"cannot be read: {cannot_read(error, path)}", path) from error
    if len(raw) > SIZE_LIMIT:
        raise ConfigError(f"is larger than {SIZE_LIMIT} bytes", path)
    return parse_text(raw, source)


def _open_any(path: str) -> IO[bytes]:
    """Open a file, or a pipe such as /dev/stdin.  Raises OSError; does not wait for a writer."""
    return open(path, "rb", opener=_open_without_waiting)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _content(descriptor: int) -> bytes:
    """Return the bytes of a file, SIZE_LIMIT + 1 at most.

    Raises OSError, also if nobody writes into a pipe.
    """
    raw, poll = b"", select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(raw) <= SIZE_LIMIT:
        if not poll.poll(PIPE_SECONDS * 1000):
            raise OSError(errno.ETIMEDOUT, f"nothing has come from it for {PIPE_SECONDS:g} s")
        piece = os.read(descriptor, SIZE_LIMIT + 1 - len(raw))
        if not piece:
            break
        raw += piece
    return raw


def _included(patterns: Node, folder: str) -> list[str]:
    """Return the paths that match, pattern by pattern, in the order of their names.

    Raises ConfigError for a name without wildcards that does not exist.
    """
    import glob  # late: few files include others

    paths: dict[str, None] = {}
    for pattern in patterns.value if isinstance(patterns.value, list) else [patterns]:
        if not isinstance(pattern.value, str) or not pattern.value:
            message = f"{INCLUDE}: must be a pattern of file names, or a list of them"
            raise ConfigError(message, pattern.place)
        path = os.path.join(folder, pattern.value)
        names = sorted(glob.glob(path))
        if not names and not glob.has_magic(pattern.value):
            message = f"{INCLUDE}: {path}: no such file (only a pattern may match none)"
            raise ConfigError(message, pattern.place)
        paths.update(dict.fromkeys(names))
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
