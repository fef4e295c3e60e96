"""Parses danted.conf: keywords with values, and blocks such as "socks pass { ... }".  Pure."""

from __future__ import annotations

import re

from netproxy.ctl.convert.source import ConversionError, Source
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive, Notes

BLOCKS = ("client", "socks", "hostid", "pass", "block", "route", "redirect", "monitor")
"""The words that a block begins with."""
# Keywords whose colon may be followed by a value without a blank.
_KEYWORDS = {
    *("from", "to", "via", "command", "protocol", "proxyprotocol", "log", "libwrap", "user"),
    *("group", "socksmethod", "clientmethod", "method", "bandwidth", "internal", "external"),
    *("logoutput", "errorlog", "debug", "compatibility", "extension", "srchost"),
}
_KEYWORD = re.compile(r"([A-Za-z][A-Za-z0-9._]*):(.*)", re.DOTALL)


class Statement(NamedTuple):
    """A keyword and its values."""

    directive: Directive
    key: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The values with a blank between them."""
        return " ".join(self.words)


class Block(NamedTuple):
    """A block: the words in front of it, and its statements."""

    directive: Directive
    kind: str
    """ "client", "socks", "route", ..."""
    passes: bool
    """False for "block"."""
    statements: tuple[Statement, ...]

    def all(self, key: str) -> list[Statement]:
        """Return the statements with a keyword."""
        return [statement for statement in self.statements if statement.key == key]

    def words(self, *keys: str) -> list[str]:
        """Return the values of keywords in lower case; [] if they are not given."""
        return [
            word.lower()
            for statement in self.statements
            if statement.key in keys
            for word in statement.words
        ]


class _Token(NamedTuple):
    text: str
    line: int


def parse(source: Source, notes: Notes) -> tuple[list[Statement], list[Block]]:
    """Return the settings and the blocks of a file.  Raises ConversionError."""
    settings: list[Statement] = []
    blocks: list[Block] = []
    pending: list[_Token] = []
    inner: list[_Token] | None = None
    for token in _tokens(source.text):
        if token.text == "{":
            inner, head = [], pending
            pending = []
            opened = token.line
        elif token.text == "}":
            if inner is None:
                raise ConversionError(f"{source.name}:{token.line}: a }} without a {{")
            # Settings may stand before the words of the block.
            kept = len(head)
            while kept and head[kept - 1].text.lower() in BLOCKS:
                kept -= 1
            settings += _statements(head[:kept], source, notes)
            blocks.append(_block(head[kept:], inner, opened, (source, notes)))
            inner = None
        elif inner is not None:
            inner.append(token)
        else:
            pending.append(token)
    if inner is not None:
        raise ConversionError(f"{source.name}:{opened}: a {{ without its }}")
    return settings + _statements(pending, source, notes), blocks


def _tokens(text: str) -> Iterator[_Token]:
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.partition("#")[0]
        for word in re.findall(r'[{}]|"[^"]*"|[^\s{}]+', bare):
            yield _Token(word.strip('"') or word, number)


def _block(
    head: list[_Token], inner: list[_Token], line: int, context: tuple[Source, Notes]
) -> Block:
    source, notes = context
    words = [token.text.lower() for token in head]
    kind = words[0] if words else ""
    if kind in ("pass", "block"):
        # The syntax before version 1.4.
        kind = "socks"
    text = " ".join([*words, "{", *(token.text for token in inner), "}"])
    directive = notes.directive(source.name, head[0].line if head else line, text)
    statements = tuple(_statements(inner, source, notes))
    return Block(directive, kind, "block" not in words, statements)


def _statements(tokens: list[_Token], source: Source, notes: Notes) -> list[Statement]:
    found: list[tuple[int, str, list[str]]] = []
    for token in tokens:
        match = _KEYWORD.match(token.text)
        if match and _is_keyword(match):
            found.append((token.line, match[1].lower(), [match[2]] if match[2] else []))
        elif found:
            found[-1][2].append(token.text)
        else:
            found.append((token.line, token.text.lower(), []))
    return [
        Statement(
            notes.directive(source.name, line, f"{key}: {' '.join(words)}"), key, tuple(words)
        )
        for line, key, words in found
    ]


def _is_keyword(match: re.Match[str]) -> bool:
    """Return whether a word with a colon is a keyword, and not an IPv6 address."""
    name, rest = match[1].lower(), match[2]
    return name in _KEYWORDS or "." in name or (not rest and not match[0].endswith("::"))
