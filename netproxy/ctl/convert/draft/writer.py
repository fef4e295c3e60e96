"""Writes a draft as YAML, with comments, in the order of netproxyd.yaml(5).  Pure."""

from __future__ import annotations

import re

from netproxy.typed import TYPE_CHECKING, Iterable, Iterator, Mapping

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Entry, Value

LINE = 100
"""Characters of a line: longer mappings are written on several lines."""
_SECTIONS = (
    *("workers", "listeners", "upstreams", "default", "rules", "auto", "geoip_database"),
    *("destinations", "dns", "tunnel", "users", "users_file", "auth", "penalty", "state"),
    *("udp", "tcp", "timeouts", "log", "control", "metrics", "metrics_token", "status_page"),
)
"""The order of the sections; all others follow in the order in which they were made."""
# What YAML reads as a plain text, whatever stands around it.
_PLAIN = re.compile(r"[A-Za-z0-9/.](?:[A-Za-z0-9_./+@%=~:-]*[A-Za-z0-9_./+@%=~-])?\Z")


def yaml_text(draft: Draft) -> str:
    """Return the whole file."""
    blocks = ["\n".join(_comments(draft.remarks, ""))]
    parts: dict[str, Iterable[str]] = {
        "listeners": _list("listeners", draft.listeners),
        "rules": _list("rules", draft.rules),
        "upstreams": _mapping("upstreams", draft.upstreams),
        "users": _mapping("users", draft.users),
    }
    for name in sorted((*parts, *draft.sections), key=_rank):
        lines = parts[name] if name in parts else _section(name, draft.sections[name])
        blocks.append("\n".join(lines))
    return "\n\n".join(filter(None, blocks)) + "\n"


def _rank(name: str) -> int:
    return _SECTIONS.index(name) if name in _SECTIONS else len(_SECTIONS)


def _section(name: str, entry: Entry) -> Iterator[str]:
    yield from _comments(entry.comments, "")
    yield from _pair(name, entry.value, "")


def _list(name: str, entries: list[Entry]) -> Iterator[str]:
    if not entries:
        # Without the key there would be the default listener.
        yield from ["listeners: []"] if name == "listeners" else []
        return
    yield f"{name}:"
    for entry in entries:
        yield from _comments(entry.comments, "  ")
        yield from _item(entry.value, "  ")


def _mapping(name: str, entries: Mapping[str, Entry]) -> Iterator[str]:
    if entries:
        yield f"{name}:"
    for key, entry in entries.items():
        yield from _comments(entry.comments, "  ")
        yield from _pair(key, entry.value, "  ")


def _comments(comments: Iterable[str], indent: str) -> Iterator[str]:
    for comment in comments:
        shown = "".join(char if char.isprintable() else "?" for char in comment)
        yield f"{indent}# {shown}".rstrip()


def _item(value: Value, indent: str) -> Iterator[str]:
    """Yield the lines of an element of a list."""
    short = f"{indent}- {flow_text(value)}"
    if len(short) <= LINE or not isinstance(value, dict):
        yield short
        return
    start = f"{indent}- "
    for key, inner in value.items():
        lines = list(_pair(key, inner, indent + "  "))
        yield start + lines[0][len(start) :]
        yield from lines[1:]
        start = indent + "  "


def _pair(key: str, value: Value, indent: str) -> Iterator[str]:
    """Yield the lines of a key and its value."""
    head = f"{indent}{scalar_text(key)}:"
    short = f"{head} {flow_text(value) if isinstance(value, (dict, list)) else _scalar(value)}"
    if len(short) <= LINE or not value or not isinstance(value, (dict, list)):
        yield short
        return
    yield head
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            yield from _pair(inner_key, inner, indent + "  ")
    else:
        for inner in value:
            yield from _item(inner, indent + "  ")


def flow_text(value: Value) -> str:
    """Return a value on one line, within brackets if it is a list or a mapping."""
    if isinstance(value, dict):
        pairs = (f"{scalar_text(key)}: {flow_text(inner)}" for key, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(flow_text, value))}]"
    text = _scalar(value)
    # Within brackets a colon may be taken for the end of a key.
    return f'"{text}"' if ":" in text and text[:1] != '"' else text


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return scalar_text(str(value))


def scalar_text(text: str) -> str:
    """Return a text as YAML, in quotes if it needs them."""
    if _PLAIN.match(text):
        return text
    return '"' + "".join(map(_quoted, text)) + '"'


def _quoted(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08x}"
