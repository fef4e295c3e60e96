"""Reads TOML as far as frp's files use it, with the line of each value.

The module tomllib knows no lines, and Python 3.10 does not have it.  Not read are texts of several
lines, dates and numbers that are not whole.
"""

from __future__ import annotations

import re

from netproxy.ctl.convert.source import ConversionError
from netproxy.typed import NamedTuple, TypeAlias, Union

Scalar: TypeAlias = Union[str, int, bool]
TomlValue: TypeAlias = Union[Scalar, "list[TomlValue]", "dict[str, TomlValue]"]

DEPTH_LIMIT = 20
"""Lists and tables within each other."""
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BASIC = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_LITERAL = re.compile(r"'([^'\n]*)'")
_NUMBER = re.compile(r"[+-]?\d[\d_]*(?![\d.eE:-])")
_BLANKS = re.compile(r"[ \t]*")
_SPACE = re.compile(r"(?:\s|#[^\n]*)*")
_ESCAPE = re.compile(r'\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[btnfr"\\])')
_ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}


class Setting(NamedTuple):
    """A key with its value.  Elements of lists of tables have their number in the path."""

    path: tuple[str | int, ...]
    value: TomlValue
    line: int


def read_toml(text: str, name: str) -> list[Setting]:
    """Return all settings of a file, in its order.  Raises ConversionError."""
    return _Parser(text, name).parse()


class _Parser:
    def __init__(self, text: str, name: str) -> None:
        self._text, self._name, self._at = text.replace("\r\n", "\n"), name, 0
        self._settings: list[Setting] = []
        self._table: tuple[str | int, ...] = ()
        self._counts: dict[tuple[str | int, ...], int] = {}

    def parse(self) -> list[Setting]:
        self._skip(_SPACE)
        while self._at < len(self._text):
            if self._text.startswith("[", self._at):
                self._header()
            else:
                self._pair()
            self._skip(_BLANKS)
            rest = self._text[self._at : self._at + 1]
            if rest and rest not in "#\n":
                raise self._error("something follows a value")
            self._skip(_SPACE)
        return self._settings

    def _header(self) -> None:
        is_list = self._text.startswith("[[", self._at)
        self._at += 2 if is_list else 1
        key = self._key()
        self._expect("]]" if is_list else "]")
        path = self._within_lists(key[:-1] if is_list else key)
        if is_list:
            path = (*path, key[-1])
            number = self._counts.get(path, -1) + 1
            self._counts[path] = number
            path = (*path, number)
        self._table = path

    def _within_lists(self, key: tuple[str, ...]) -> tuple[str | int, ...]:
        """Return the path of a table: within a list it belongs to the last element."""
        path: tuple[str | int, ...] = ()
        for part in key:
            path = (*path, part)
            if path in self._counts:
                path = (*path, self._counts[path])
        return path

    def _pair(self) -> None:
        line = self._line()
        key = self._key()
        self._expect("=")
        value = self._value(0)
        self._settings.append(Setting((*self._table, *key), value, line))

    def _key(self) -> tuple[str, ...]:
        """Read a key, which may have several parts with dots between them."""
        parts: list[str] = []
        while True:
            self._skip(_BLANKS)
            quoted = _BASIC.match(self._text, self._at) or _LITERAL.match(self._text, self._at)
            match = quoted or _BARE.match(self._text, self._at)
            if not match:
                raise self._error("a key is expected")
            self._at = match.end()
            parts.append(match[1] if quoted else match[0])
            self._skip(_BLANKS)
            if not self._text.startswith(".", self._at):
                return tuple(parts)
            self._at += 1

    def _value(self, depth: int) -> TomlValue:
        self._skip(_BLANKS)
        if depth > DEPTH_LIMIT:
            raise self._error("too many lists within lists")
        if self._text.startswith(('"""', "'''"), self._at):
            raise self._error("texts of several lines are not read")
        if match := _BASIC.match(self._text, self._at):
            self._at = match.end()
            return _ESCAPE.sub(_unescaped, match[1])
        if match := _LITERAL.match(self._text, self._at):
            self._at = match.end()
            return match[1]
        if self._text.startswith("[", self._at):
            return self._list(depth)
        if self._text.startswith("{", self._at):
            return self._inline_table(depth)
        for word, value in (("true", True), ("false", False)):
            if self._text.startswith(word, self._at):
                self._at += len(word)
                return value
        if match := _NUMBER.match(self._text, self._at):
            self._at = match.end()
            return int(match[0].replace("_", ""))
        raise self._error("a value is expected")

    def _list(self, depth: int) -> list[TomlValue]:
        values: list[TomlValue] = []
        self._at += 1
        while True:
            self._skip(_SPACE)
            if self._text.startswith("]", self._at):
                self._at += 1
                return values
            values.append(self._value(depth + 1))
            self._skip(_SPACE)
            if not self._text.startswith("]", self._at):
                self._expect(",")

    def _inline_table(self, depth: int) -> dict[str, TomlValue]:
        table: dict[str, TomlValue] = {}
        self._at += 1
        while True:
            self._skip(_BLANKS)
            if self._text.startswith("}", self._at):
                self._at += 1
                return table
            key = ".".join(self._key())
            self._expect("=")
            table[key] = self._value(depth + 1)
            self._skip(_BLANKS)
            if not self._text.startswith("}", self._at):
                self._expect(",")

    def _expect(self, sign: str) -> None:
        self._skip(_BLANKS)
        if not self._text.startswith(sign, self._at):
            raise self._error(f"'{sign}' is expected")
        self._at += len(sign)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1

    def _error(self, what: str) -> ConversionError:
        return ConversionError(f"{self._name}:{self._line()}: not TOML that is understood: {what}")


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "uU":
        number = int(code[1:], 16)
        is_character = number < 0x110000 and not 0xD800 <= number < 0xE000
        return chr(number) if is_character else "\ufffd"
    return _ESCAPED.get(code, code)
