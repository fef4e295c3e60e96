"""A value of a wrong kind is one error, whatever key it belongs to and whatever follows from it."""

from __future__ import annotations

from typing import Callable, Iterator

import pytest

from netproxy.config.read import check, read_config
from netproxy.config.tree.node import Node, Source
from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.problems import Problems
from netproxy.errors import ConfigError
from tests.test_documented import FULL, general, whole_text

pytest.importorskip("yaml")

Path = tuple[str | int, ...]
ROOT = parse_text(whole_text().encode(), Source(str(FULL)))
PLACE = "here"


def walk(node: Node, path: Path) -> Iterator[tuple[Path, Node]]:
    """Yield every value of a tree with the keys that lead to it."""
    children: list[tuple[str | int, Node]] = []
    if isinstance(node.value, dict):
        children.extend(node.value.items())
    elif isinstance(node.value, list):
        children.extend(enumerate(node.value))
    for key, child in children:
        yield (*path, key), child
        yield from walk(child, (*path, key))


def replaced(node: Node, path: Path, new: Node) -> Node:
    """Return a tree with another value in one place."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(node.value, dict):
        assert isinstance(key, str)
        return node._replace(value={**node.value, key: replaced(node.value[key], rest, new)})
    assert isinstance(node.value, list) and isinstance(key, int)
    items = list(node.value)
    items[key] = replaced(items[key], rest, new)
    return node._replace(value=items)


def text_of(path: Path) -> str:
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def keys() -> dict[str, tuple[Path, Node]]:
    """Return the first value of each key of the full example."""
    found: dict[str, tuple[Path, Node]] = {}
    for path, node in walk(ROOT, ()):
        found.setdefault(general(text_of(path)), (path, node))
    return found


def errors_of(tree: Node) -> list[str]:
    problems = Problems()
    config = read_config(tree, problems)
    if not problems.errors:
        try:
            check(config, problems)
        except ConfigError as error:
            return str(error).split("\n")
    return list(map(str, problems.errors))


def leaf(text: str, old: Node) -> Node:
    return Node(text, PLACE, old.key_place, old.source)


KINDS: dict[str, Callable[[Node], Node]] = {
    "a mapping": lambda old: Node({"x": leaf("y", old)}, PLACE, old.key_place),
    "a list in a list": lambda old: Node(
        [Node([leaf("a", old)], PLACE)], PLACE, old.key_place, old.source
    ),
    "an empty list": lambda old: Node([], PLACE, old.key_place, old.source),
    "a text": lambda old: leaf("%%", old),
}


@pytest.mark.parametrize("kind", KINDS)
def test_value_of_a_wrong_kind_is_one_error(kind: str) -> None:
    wrong: dict[str, list[str]] = {}
    for key, (path, old) in keys().items():
        if kind == "a mapping" and key == "upstreams":
            # Of the right kind: it has an upstream named x, and all others are missing.
            continue
        errors = errors_of(replaced(ROOT, path, KINDS[kind](old)))
        is_about_it = any(error.startswith(PLACE) for error in errors)
        # A mapping with an unknown key is of the right kind; so is a value whose error is told of
        # what refers to it.
        if len(errors) > 1 and is_about_it and not any("unknown key" in text for text in errors):
            wrong[key] = errors
    assert wrong == {}


def test_errors_of_several_values_are_all_told() -> None:
    path, old = keys()["listeners[].clients"]
    words = Node([leaf("a", old), leaf("b", old)], PLACE, old.key_place, old.source)
    errors = errors_of(replaced(ROOT, path, words))
    assert [error.partition(": ")[2][:23] for error in errors] == [
        "listeners[0].clients[0]",
        "listeners[0].clients[1]",
    ]
