"""Conditions that are joined by "and" and "not"."""

from __future__ import annotations

import pytest

from netproxy.ctl.convert.terms.conditions import (
    ANY,
    CannotCombine,
    Match,
    both,
    covers,
    covers_names,
    negated,
    wanting,
)


@pytest.mark.parametrize(
    "key, first, second, common",
    [
        ("client", ["10.0.0.0/8"], ["10.1.0.0/16", "11.0.0.0/8"], ("10.1.0.0/16",)),
        ("ip", ["10.0.0.0/8"], ["fd00::/8"], ()),
        ("port", ["80-90"], ["85-100", "443"], ("85-90",)),
        ("port", ["80"], ["80", "81"], ("80",)),
        ("user", ["*"], ["joe"], ("joe",)),
        ("user", ["ann", "joe"], ["joe"], ("joe",)),
        ("command", ["connect", "http"], ["http"], ("http",)),
        (
            "domain",
            [".example"],
            ["a.example", "*.b.example", "a.test"],
            ("a.example", "*.b.example"),
        ),
        ("domain", ["keyword:ads"], ["ads.example", "a.example"], ("ads.example",)),
        ("domain", ["regex:^a"], ["a.example", "b.example"], ("a.example",)),
        ("hours", ["mon"], ["mon"], ("mon",)),
    ],
)
def test_two_conditions_of_a_key_are_what_they_have_in_common(
    key: str, first: list[str], second: list[str], common: tuple[str, ...]
) -> None:
    joined = both(wanting(key, first), wanting(key, second))
    assert joined == (wanting(key, common) if common else None)


@pytest.mark.parametrize("key, values", [("hours", ("mon", "tue")), ("domain", ("regex:a", ".b"))])
def test_what_no_rule_can_say_is_an_error(key: str, values: tuple[str, str]) -> None:
    with pytest.raises(CannotCombine):
        both(wanting(key, values[:1]), wanting(key, values[1:]))


def test_not_of_alternatives_is_one_rule() -> None:
    assert negated([wanting("port", ["80"]), wanting("ip", ["10.0.0.1"])]) == Match(
        {}, {"port": ("80",), "ip": ("10.0.0.1",)}
    )
    assert negated([ANY]) is None
    with pytest.raises(CannotCombine):
        negated([Match({"port": ("80",), "user": ("joe",)})])


def test_condition_and_its_opposite_match_nothing() -> None:
    assert both(wanting("port", ["80"]), Match({}, {"port": ("80", "443")})) is None
    assert both(wanting("user", ["joe"]), Match({}, {"user": ("*",)})) is None
    assert both(wanting("ip", ["10.0.0.0/8"]), Match({}, {"ip": ("10.1.0.0/16",)})) is not None


def test_not_of_not_is_the_condition_itself() -> None:
    assert negated([Match({}, {"port": ("80",)})]) == wanting("port", ["80"])


@pytest.mark.parametrize(
    "wider, narrower, expected",
    [
        (ANY, wanting("port", ["80"]), True),
        (wanting("port", ["80"]), ANY, False),
        (wanting("client", ["10.0.0.0/8"]), wanting("client", ["10.1.0.0/16"]), True),
        (wanting("client", ["10.1.0.0/16"]), wanting("client", ["10.0.0.0/8"]), False),
        (wanting("user", ["*"]), wanting("user", ["joe"]), True),
        (wanting("domain", [".a.example"]), wanting("domain", ["*.a.example"]), True),
        (Match({}, {"port": ("80",)}), wanting("port", ["443"]), False),
    ],
)
def test_covering_is_certain(wider: Match, narrower: Match, expected: bool) -> None:
    assert covers(wider, narrower) is expected


@pytest.mark.parametrize(
    "wider, narrower, expected",
    [
        (".a.example", "a.example", True),
        (".a.example", ".b.a.example", True),
        ("*.a.example", "a.example", False),
        ("*.a.example", ".a.example", False),
        ("*.a.example", ".b.a.example", True),
        ("*.a.example", "*.a.example", True),
        (".a.example", "aa.example", False),
        ("a.example", ".a.example", False),
        ("keyword:a", "regex:a", False),
        (".a.example", "keyword:a.example", False),
    ],
)
def test_patterns_of_names_cover_each_other(wider: str, narrower: str, expected: bool) -> None:
    assert covers_names(wider, narrower) is expected
