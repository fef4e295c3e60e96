"""The commands of 3proxy.cfg: words with quotes, and files whose words belong to a command."""

from __future__ import annotations

import re

from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source

DEPTH_LIMIT = 8
"""Files within files."""
# A quotation mark within quotes is written twice.
_WORD = re.compile(r'((?:"(?:[^"]|"")*"|[^\s"])+)|("(?:[^"]|"")*)$')
_PASSWORD = re.compile(r"(?<=:)(CL|CR|NT):\S+")


class Command(NamedTuple):
    """A command and its words."""

    directive: Directive
    name: str
    words: tuple[str, ...]

    def word(self, at: int, default: str = "") -> str:
        """Return a word, or the default if there are fewer."""
        return self.words[at] if at < len(self.words) else default


def read_commands(source: Source, notes: Notes, depth: int = 0) -> Iterator[Command]:
    """Yield the commands of a file and of those that it includes, up to `end`."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.strip() or line[0] in "# \t":
            continue
        text, *rest = (match[0] for match in _WORD.finditer(line))
        name = unquoted(text).lower()
        directive = notes.directive(source.name, number, _shown(name, line))
        if name == "end":
            notes.carried(directive)
            return
        try:
            words = tuple(word for part in rest for word in _expanded(part, source))
            if name != "include":
                yield Command(directive, name, words)
                continue
            if depth == DEPTH_LIMIT:
                raise ConversionError("too many files within files")
            notes.carried(directive)
            for word in words:
                for file in source.included(word):
                    yield from read_commands(file, notes, depth + 1)
        except ConversionError as error:
            notes.lost(directive, str(error))


def unquoted(word: str) -> str:
    """Return a word without its quotes."""
    return re.sub(r'"((?:[^"]|"")*)"?', lambda match: match[1].replace('""', '"'), word)


def _expanded(word: str, source: Source) -> list[str]:
    """Return a word, or the words of the file that `$file` names.  Raises ConversionError."""
    if not word.startswith("$"):
        return [unquoted(word)]
    (file,) = source.included(unquoted(word[1:]))
    return [unquoted(match[0]) for match in _WORD.finditer(file.text)]


def _shown(name: str, line: str) -> str:
    """Return a command without its secrets."""
    if name in ("parent", "radius") and len(line.split()) > 5:
        return " ".join(line.split()[:5]) + " ***"
    return _PASSWORD.sub(r"\1:***", line.strip())
