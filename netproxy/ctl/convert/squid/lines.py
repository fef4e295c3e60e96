"""The lines of squid.conf: tags and their words, with the files that it includes."""

from __future__ import annotations

import re
import shlex

from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

DEPTH_LIMIT = 8
"""Files within files."""
_SECRET = re.compile(r"\b(login=[^:\s]*:|cachemgr_passwd\s+)\S+")


class Line(NamedTuple):
    """A tag and its words."""

    directive: Directive
    tag: str
    words: tuple[str, ...]
    source: Source
    """The file that it is in."""

    @property
    def word(self) -> str:
        """The first word, "" for none."""
        return self.words[0] if self.words else ""


def read_lines(source: Source, notes: Notes, depth: int = 0) -> Iterator[Line]:
    """Yield the lines of a file and of those that it includes, in their order."""
    for number, text in _joined(source.text):
        words = _words(text)
        if not words:
            continue
        shown = _SECRET.sub(r"\1***", " ".join(text.split()))
        directive = notes.directive(source.name, number, shown)
        tag = words[0]
        if tag != "include":
            yield Line(directive, tag, tuple(words[1:]), source)
            continue
        notes.carried(directive)
        for pattern in words[1:]:
            try:
                if depth == DEPTH_LIMIT:
                    raise ConversionError("too many files within files")
                included = source.included(pattern)
            except ConversionError as error:
                notes.lost(directive, str(error))
                continue
            for file in included:
                yield from read_lines(file, notes, depth + 1)


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers; one that ends with a backslash goes on."""
    whole, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        start = start or number
        if not whole and line.lstrip().startswith("#"):
            start = 0
            continue
        if line.endswith("\\"):
            whole += line[:-1] + " "
            continue
        yield start, whole + line
        whole, start = "", 0
    if whole:
        yield start, whole


def _words(text: str) -> list[str]:
    """Return the words of a line; a word that begins with "#" begins a comment."""
    words: list[str] = []
    for word in text.split():
        if word.startswith("#"):
            break
        words.append(word)
    return words


def unquoted(word: str) -> str:
    """Return a word without its quotes."""
    try:
        return " ".join(shlex.split(word))
    except ValueError:
        return word
