"""Converts texts, checks that the result is valid, and reads it again as plain values."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from netproxy.config.read import check, read_config
from netproxy.config.tree.node import Source as ConfigSource
from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.problems import Problems
from netproxy.ctl.convert.command import convert
from netproxy.ctl.convert.notes import Kind, Notes
from netproxy.ctl.convert.source import Source


class Converted(NamedTuple):
    text: str
    config: dict[str, Any]
    notes: Notes

    @property
    def lost(self) -> list[tuple[int, str]]:
        """The lines of the directives that were not carried, with the reasons."""
        return self._noted(Kind.LOST)

    @property
    def changed(self) -> list[tuple[int, str]]:
        """The lines of the directives that were carried with a difference."""
        return self._noted(Kind.CHANGED)

    @property
    def rules(self) -> list[dict[str, Any]]:
        return list(self.config.get("rules", []))

    def _noted(self, kind: Kind) -> list[tuple[int, str]]:
        return [
            (note.directive.line if note.directive else 0, note.why)
            for note in self.notes.told()
            if note.kind is kind
        ]


def converted(
    form: str, text: str, path: str = "old.conf", words: tuple[str, ...] = ()
) -> Converted:
    """Convert a text; fail if netproxyd would refuse the result."""
    result, notes = convert(form, Source(path, text, words))
    problems = Problems()
    check(read_config(parse_text(result.encode(), ConfigSource("result")), problems), problems)
    return Converted(result, yaml.safe_load(result), notes)
