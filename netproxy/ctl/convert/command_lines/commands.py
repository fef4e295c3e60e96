"""Finds the commands of a program in a text: a script, a unit, a compose file, or words.

One command a line, with the quotes of a shell; a backslash at the end of a line continues it.
Pure.
"""

from __future__ import annotations

import re
import shlex

from netproxy.ctl.convert.command_lines.compose import compose_commands
from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import TYPE_CHECKING, Callable, Iterator, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.source import Source

# Stands for the end of a line within a command; no text has it.
_LINE_END = "\x01"
# What may stand before a command: the key of a unit, of a compose file or of a container file.
_PREFIX = re.compile(
    r"^\s*(?:ExecStart\s*=\s*[@:+!-]*|(?:command|entrypoint):|CMD|ENTRYPOINT|- )\s*"
)
# A comment, and what may have its sign without being one: quotes and escapes.
_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*'|\\.)|(?:^|(?<=\s))#.*""")
# What ends a command for a shell, and what sends its output elsewhere.
_END = re.compile(r"(?:&&?|\|\|?|;|\d*[<>].*)\Z")


class Word(NamedTuple):
    """A word of a command, and the line that it is on."""

    text: str
    line: int


class Style(NamedTuple):
    """What the commands of a program look like."""

    program: str
    """An expression for the name of the program."""
    start: str
    """An expression for the first words of a command without the program."""


def read_commands(source: Source, style: Style) -> list[list[Word]]:
    """Return the commands, without the program.  Raises ConversionError if there are none."""
    if source.words:
        words = [Word(text, 0) for text in source.words]
        commands = [_without_program(words, style) or words]
    else:
        composed = compose_commands(source.text, style.program)
        if composed:
            commands = [[Word(text, line) for text, line in command] for command in composed]
        else:
            lines = (words for words in _lines(source, style) if words)
            commands = list(filter(None, (_of_program(words, style) for words in lines)))
    if not commands:
        raise ConversionError(f"{source.name}: has no command of this program")
    return commands


def _lines(source: Source, style: Style) -> Iterator[list[Word]]:
    """Yield the words of each line, with the lines that continue it.  Raises ConversionError."""
    text = re.sub(r"\\[ \t]*\r?\n", f" {_LINE_END} ", source.text.replace(_LINE_END, ""))
    number = 1
    for line in text.splitlines():
        start = number
        number += 1 + line.count(_LINE_END)
        line = _PREFIX.sub("", line, count=1)
        if line.startswith("[") and line.rstrip().endswith("]"):
            # A list, as container files have it.
            line = line.strip().strip("[]").replace('",', '" ')
        try:
            yield list(_words(line, start))
        except ValueError:
            # A text of several lines may stand in a script, but not in a command of the program.
            if re.search(style.program, line):
                text = f"{source.name}:{start}: a quotation mark has no end"
                raise ConversionError(text) from None


def _words(line: str, number: int) -> Iterator[Word]:
    for word in shlex.split(_COMMENT.sub(lambda match: match[1] or "", line)):
        if word == _LINE_END:
            number += 1
        else:
            yield Word(word.replace(_LINE_END, ""), number)


def _of_program(words: list[Word], style: Style) -> list[Word]:
    """Return the command of a line; [] if it is none of the program."""
    command = _without_program(words, style)
    if not command and re.match(style.start, " ".join(word.text for word in words)):
        command = words
    for at, word in enumerate(command):
        if _END.match(word.text):
            return command[:at]
    return command


def _without_program(words: list[Word], style: Style) -> list[Word]:
    """Return what follows the name of the program; [] if it is not there."""
    for at, word in enumerate(words):
        if is_program(word.text, style.program):
            return words[at + 1 :]
    return []


def is_program(word: str, expression: str) -> bool:
    """Return whether a word is a program, or an image that is named after it."""
    name = word.rstrip("/").rpartition("/")[2]
    return bool(re.fullmatch(rf"(?:{expression})(?:\.exe|:[\w.-]+)?", name, re.IGNORECASE))


def split_texts(words: list[Word], separator: Callable[[str], bool]) -> list[list[Word]]:
    """Return the parts of a command between the words that separate them."""
    parts: list[list[Word]] = [[]]
    for word in words:
        if separator(word.text):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]
