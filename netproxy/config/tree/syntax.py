"""Says what is wrong with a file that is not YAML, and where, in words that users know.

The parser's own words tell what it has expected, seldom what the user has done.  Pure; used only
for errors.  No message repeats a value, which may be a secret.
"""

from __future__ import annotations

import re

import yaml

from netproxy.typed import Iterator, NamedTuple

TAB = "a tab in the indentation: YAML takes spaces only"
_KEY_WITHOUT_SPACE = re.compile(r"\s*(?:- +)*([A-Za-z_][A-Za-z0-9_.-]*):(?!//)[^\s:]")
# A character of these begins an alias, an anchor, a tag, a list or the like.
_SPECIAL = "*&!|>%@`:,]}?-"


class Mark(NamedTuple):
    """A place in a file, counted from 0."""

    line: int
    column: int


_Explanation = tuple[str, Mark | None]


def explain(error: yaml.YAMLError, raw: bytes) -> _Explanation:
    """Return what is wrong with the text, and where."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return _wrong_byte(raw)
    return _Fault(error, raw).explain()


def _wrong_byte(raw: bytes) -> _Explanation:
    """Find the first byte that no text has."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        message = f"the byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        return message, _end(before)
    for index, char in enumerate(text):
        if not char.isprintable() and char not in "\t\r\n\x85\u2028\u2029\ufeff":
            return f"the control character {ascii(char)[1:-1]} is not allowed", _end(text[:index])
    return "not YAML: it contains a character that is not allowed in text", None


def _end(text: str) -> Mark:
    """Return the place behind a text."""
    return Mark(text.count("\n"), len(text) - text.rfind("\n") - 1)


class _Fault:
    """An error of the parser, beside the lines that it is about."""

    def __init__(self, error: yaml.MarkedYAMLError, raw: bytes) -> None:
        encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        self._raw = raw
        self._lines = raw.decode(encoding, "replace").split("\n")
        self._problem = str(error.problem or "")
        self._context = str(error.context or "")
        context = error.context_mark
        mark = error.problem_mark or context
        self._mark = Mark(mark.line, mark.column) if mark else Mark(0, 0)
        self._begin = Mark(context.line, context.column) if context else self._mark

    def explain(self) -> _Explanation:
        """Return what is wrong, and where."""
        for explanation in self._explanations():
            return explanation
        return f"not YAML: {self._problem}", self._mark

    def _explanations(self) -> Iterator[_Explanation]:
        """Yield what may be wrong, the most probable first."""
        line, column = self._mark
        if "\t" in self._before() + self._char() and not self._before().strip():
            yield TAB, Mark(line, self._line(line).index("\t"))
        if "quoted scalar" in self._context and "end of stream" in self._problem:
            yield "the quote that opens here is never closed", self._begin
        if "escape" in self._problem or "quoted scalar" in self._context:
            message = "a backslash in double quotes is written \\\\ (or take single quotes)"
            # libyaml's mark is at the backslash, PyYAML's own behind it.
            backslash = self._line(line).rfind("\\", 0, column + 1)
            yield message, Mark(line, backslash if backslash >= 0 else column)
        if "mapping values are not allowed" in self._problem:
            yield self._unexpected_colon()
        if "flow" in self._context and ("expected ','" in self._problem or not self._char()):
            yield self._unclosed_bracket()
        if "while parsing a block" in self._context and "node content" not in self._problem:
            yield self._wrong_indentation()
        special = self._special()
        if special is not None:
            char = self._line(special.line)[special.column]
            yield f"a value that begins with '{char}' is written in quotes", special

    def _line(self, number: int) -> str:
        return self._lines[number] if number < len(self._lines) else ""

    def _before(self) -> str:
        """Return the line up to the mark."""
        return self._line(self._mark.line)[: self._mark.column]

    def _char(self) -> str:
        """Return the character at the mark, "" at the end of a line."""
        return self._line(self._mark.line)[self._mark.column : self._mark.column + 1]

    def _unexpected_colon(self) -> _Explanation:
        line = self._mark.line
        above = [number for number in range(line) if self._line(number).strip()][-1:]
        for number in (line, *above):
            if match := _KEY_WITHOUT_SPACE.match(self._line(number)):
                message = f"there is no space after '{match[1]}:'"
                return message, Mark(number, match.start(1))
        if re.search(r":\s", self._before()):
            return "a value that contains ': ' is written in quotes", self._mark
        for number in above:
            if ":" not in self._line(number):
                return "there is no ':' after this word", self._start(number)
        message = "the line is indented deeper than the one above, which has a value already"
        return message, self._start(line)

    def _unclosed_bracket(self) -> _Explanation:
        if self._begin.line == self._mark.line and self._char():
            return "a ',' or a closing bracket is missing before this", self._mark
        opened: list[Mark] = []
        for token in self._tokens():
            if isinstance(token, (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)):
                opened.append(Mark(token.start_mark.line, token.start_mark.column))
            elif isinstance(token, (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)):
                del opened[-1:]
        begin = opened[-1] if opened else self._begin
        bracket = self._line(begin.line)[begin.column : begin.column + 1]
        return f"the '{bracket}' that opens here is never closed", begin

    def _wrong_indentation(self) -> _Explanation:
        opened = self._quote_over_lines()
        if opened is not None:
            message = f"the quote that opens here ends in line {self._mark.line + 1}"
            return f"{message}: one is missing between", opened
        if self._before().strip(" -"):
            if self._char() in ("}", "]"):
                return f"the '{self._char()}' closes nothing", self._mark
            return "the value ends before this: put all of it in quotes", self._mark
        if self._mark.column == self._begin.column:
            return "list items ('- ...') and keys are mixed at the same indentation", self._mark
        return "the indentation of this line fits no line above it", self._mark

    def _quote_over_lines(self) -> Mark | None:
        """Return where the quoted text begins that ends just before the mark, on a later line."""
        opened = None
        for token in self._tokens():
            if isinstance(token, yaml.ScalarToken) and token.style in ("'", '"'):
                start, end = token.start_mark, token.end_mark
                if start.line < end.line == self._mark.line:
                    opened = Mark(start.line, start.column)
        return opened

    def _tokens(self) -> Iterator[yaml.Token]:
        """Yield the tokens up to the first place that makes none."""
        try:
            yield from yaml.scan(self._raw, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return

    def _special(self) -> Mark | None:
        """Return the place of a special character that begins a value."""
        for mark in (self._begin, self._mark):
            char = self._line(mark.line)[mark.column : mark.column + 1]
            if char and char in _SPECIAL:
                return mark
        return None

    def _start(self, number: int) -> Mark:
        """Return where the text of a line begins."""
        line = self._line(number)
        return Mark(number, len(line) - len(line.lstrip()))
