"""Finds commands in a compose file: `command` of the services whose image has the program."""

from __future__ import annotations

import re
import shlex

from netproxy.typed import Any, Iterator


def compose_commands(text: str, program: str) -> list[list[tuple[str, int]]]:
    """Return the words of the commands with their lines; [] for any other text."""
    if not re.search(r"^services:", text, re.MULTILINE) or "image:" not in text:
        return []
    import yaml  # late: few conversions need it here

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return []
    services = _mapping(root).get("services")
    return [
        words
        for service in _mapping(services).values()
        if (words := list(_command(_mapping(service), program)))
    ]


# The nodes of PyYAML have no types that a checker knows.
def _mapping(node: Any) -> dict[str, Any]:
    if getattr(node, "id", "") != "mapping":
        return {}
    return {str(key.value): value for key, value in node.value}


def _command(service: dict[str, Any], program: str) -> Iterator[tuple[str, int]]:
    image = str(getattr(service.get("image"), "value", ""))
    name = image.rpartition("/")[2].partition(":")[0]
    if not re.fullmatch(program, name):
        return
    node = service.get("command")
    if getattr(node, "id", "") == "sequence":
        assert node is not None
        for element in node.value:
            yield str(element.value), element.start_mark.line + 1
    elif node is not None:
        try:
            words = shlex.split(str(node.value))
        except ValueError:
            return
        yield from ((word, node.start_mark.line + 1) for word in words)
