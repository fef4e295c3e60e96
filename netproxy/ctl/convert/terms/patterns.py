"""Patterns of names: POSIX expressions and shell patterns, as `domain` of rules writes them.  Pure.

Simple expressions become plain names, which people read more easily and rules compare faster.
"""

from __future__ import annotations

import fnmatch
import re

_CLASSES = {
    **{"alpha": "a-zA-Z", "digit": "0-9", "alnum": "a-zA-Z0-9", "lower": "a-z", "upper": "A-Z"},
    **{"space": r"\s", "blank": r" \t", "xdigit": "0-9a-fA-F"},
    "punct": r"!-/:-@\[-`{-~",
}
# The characters that mean something with a backslash in basic expressions, without in others.
_SWAPPED = "(){}+?|"
_NAME = r"(?:[a-zA-Z0-9_-]|\\\.)+"
_WHOLE = re.compile(rf"\^({_NAME})\$")
_BELOW = re.compile(rf"(?:\.\*)?\\\.({_NAME})\$")
_SUFFIX = re.compile(rf"\(\^\|\\\.\)({_NAME})\$")
_WORD = re.compile(r"(?:\.\*)?((?:[a-zA-Z0-9_-]|\\\.)+)(?:\.\*)?")


def from_expression(text: str, extended: bool) -> str:
    """Return the pattern for a basic or an extended POSIX expression.  Raises ValueError."""
    expression = _translated(text, extended)
    if match := _WHOLE.fullmatch(expression):
        return match[1].replace("\\.", ".")
    if match := _BELOW.fullmatch(expression):
        return "*." + match[1].replace("\\.", ".")
    if match := _SUFFIX.fullmatch(expression):
        return "." + match[1].replace("\\.", ".")
    if match := _WORD.fullmatch(expression):
        return "keyword:" + match[1].replace("\\.", ".").lower()
    return _checked(expression)


def from_wildcards(text: str) -> str:
    """Return the pattern for a name with "*" and "?", which match dots as well.

    Raises ValueError.
    """
    if not re.search(r"[*?\[]", text):
        return text
    if re.fullmatch(r"\*\.[\w.-]+", text):
        return text
    if match := re.fullmatch(r"\*([\w.-]+)\*", text):
        return "keyword:" + match[1].lower()
    if re.search(r"\[", text):
        return _checked(f"^{fnmatch.translate(text)}")
    parts = {"*": ".*", "?": "."}
    return _checked(f"^{''.join(parts.get(char) or re.escape(char) for char in text)}$")


def _checked(expression: str) -> str:
    if not expression.isascii():
        raise ValueError("an expression with other letters than those of ASCII")
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"an expression that Python does not know: {error}") from error
    return f"regex:{expression}"


def _translated(text: str, extended: bool) -> str:
    """Return a POSIX expression in the syntax of Python."""
    result, at = "", 0
    while at < len(text):
        char, after = text[at], text[at + 1 : at + 2]
        if char == "\\" and after:
            if not extended and after in _SWAPPED:
                result += after
            elif after.isalnum() and after not in "wWbB123456789":
                raise ValueError(f"the escape \\{after}")
            else:
                result += char + after
            at += 2
        elif char == "[":
            bracket, at = _bracket(text, at)
            result += bracket
        else:
            is_literal = not extended and char in _SWAPPED
            result += "\\" + char if is_literal or char == "\\" else char
            at += 1
    return result


def _bracket(text: str, at: int) -> tuple[str, int]:
    """Return the bracket expression that begins at an index, and the index behind it."""
    end = at + 1 + (text[at + 1 : at + 2] == "^")
    inner, start = "", end
    while end < len(text) and (text[end] != "]" or end == start):
        named = re.compile(r"\[:([a-z]+):\]").match(text, end)
        if named:
            if named[1] not in _CLASSES:
                raise ValueError(f"the class {named[0]}")
            inner += _CLASSES[named[1]]
            end = named.end()
            continue
        if text.startswith(("[.", "[="), end):
            raise ValueError("a collating element")
        inner += "\\" + text[end] if text[end] in "\\[]" else text[end]
        end += 1
    if end >= len(text):
        raise ValueError("a bracket without its end")
    return text[at:start] + inner + "]", end + 1
