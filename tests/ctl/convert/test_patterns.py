"""Patterns of names: POSIX expressions and wildcards."""

from __future__ import annotations

import pytest

from netproxy.ctl.convert.terms.patterns import from_expression, from_wildcards
from netproxy.router.patterns import parse_domain


@pytest.mark.parametrize(
    "text, extended, expected",
    [
        (r"^cnn\.com$", False, "cnn.com"),
        (r"\.cnn\.com$", False, "*.cnn.com"),
        (r".*\.cnn\.com$", True, "*.cnn.com"),
        (r"(^|\.)cnn\.com$", True, ".cnn.com"),
        (r"cnn", False, "keyword:cnn"),
        (r".*CNN\.com.*", True, "keyword:cnn.com"),
        (r"^ads\?[0-9]\+x", False, r"regex:^ads?[0-9]+x"),
        (r"a+b?(c)", False, r"regex:a\+b\?\(c\)"),
        (r"^(a|b)[[:digit:]_]{2}$", True, r"regex:^(a|b)[0-9_]{2}$"),
        (r"[^]a]", True, r"regex:[^\]a]"),
        (r"a.b", False, "regex:a.b"),
    ],
)
def test_expression_becomes_a_pattern(text: str, extended: bool, expected: str) -> None:
    assert from_expression(text, extended) == expected
    parse_domain(expected)


@pytest.mark.parametrize("text", ["[a", "(", r"\d", "[[:nothing:]]", "[[.a.]]", "ä[", "*"])
def test_expression_that_cannot_be_said_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        from_expression(text, True)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.example", "a.example"),
        ("*.a.example", "*.a.example"),
        ("*ads*", "keyword:ads"),
        ("*ads.example", r"regex:^.*ads\.example$"),
        ("a?.example", r"regex:^a.\.example$"),
    ],
)
def test_wildcards_become_a_pattern(text: str, expected: str) -> None:
    assert from_wildcards(text) == expected
    parse_domain(expected)
