"""The YAML that is written: quoting, order, comments and long lines."""

from __future__ import annotations

import random

import pytest

from netproxy.ctl.convert.draft.draft import Draft, Value
from netproxy.ctl.convert.notes import Notes
from netproxy.ctl.convert.draft.writer import scalar_text, yaml_text

yaml = pytest.importorskip("yaml")

ODD = (
    *("", " ", "a b", "a: b", "#a", "a#b", "a #b", "'", '"', "\\", "!file x", "- a", "~", "null"),
    *("yes", "0x1f", "1e3", "::1", "a:", "%x", "@x", "`x", "{a", "[a", "a]", "a,b", "*a", "&a"),
    *("|", ">", "?", "ü", "\x00", "\n", "\t", "\x7f", "\u2028", "\ud800", "😀", "${HOME}"),
)


@pytest.mark.parametrize("text", [text for text in ODD if text != "\ud800"])
def test_text_is_read_as_it_was(text: str) -> None:
    draft = Draft()
    draft.put("a", text)
    draft.put("b", [text, {"c": text}])
    draft.put("d", {"e": [text] * 40})
    loaded = yaml.load(yaml_text(draft), yaml.BaseLoader)
    del loaded["listeners"]
    assert loaded == {"a": text, "b": [text, {"c": text}], "d": {"e": [text] * 40}}


@pytest.mark.parametrize("seed", range(30))
def test_any_tree_is_read_as_it_was(seed: int) -> None:
    chance = random.Random(seed)

    def tree(depth: int) -> Value:
        kind = chance.choice("tld") if depth else "t"
        if kind == "t":
            return "".join(chance.choices("ab:#,[]{}\"' \\!-/.~é\n", k=chance.randint(0, 12)))
        if kind == "l":
            return [tree(depth - 1) for _ in range(chance.randint(1, 4))]
        return {f"k{at}": tree(depth - 1) for at in range(chance.randint(1, 4))}

    draft = Draft()
    draft.put("section", value := tree(3))
    draft.rule({"via": "block", "x": value})
    loaded = yaml.load(yaml_text(draft), yaml.BaseLoader)
    assert loaded["section"] == value
    assert loaded["rules"] == [{"via": "block", "x": value}]


def test_plain_words_have_no_quotes() -> None:
    for text in ("127.0.0.1:80", "socks5h://a.example:1", "10.0.0.0/8", "a-b_c", "!x"):
        assert (scalar_text(text) == text) is (text != "!x")


def test_comments_name_where_values_come_from_and_cannot_be_broken_out_of() -> None:
    draft, notes = Draft(), Notes()
    directive = notes.directive("old.conf", 7, "Port\n8080\u2028x")
    draft.listener({"listen": "127.0.0.1:1"}, directive)
    assert yaml_text(draft) == (
        'listeners:\n  # old.conf:7: Port 8080 x\n  - {listen: "127.0.0.1:1"}\n'
    )


def test_sections_are_in_one_order_however_they_were_made() -> None:
    draft = Draft()
    for name in ("log", "zzz", "default", "timeouts"):
        draft.put(name, "x")
    draft.rule({"via": "block"})
    draft.listener({"listen": ":1"})
    draft.upstream("office", "http://a.example:1")
    keys = [
        line[:-1].partition(":")[0] for line in yaml_text(draft).splitlines() if line[:1].isalpha()
    ]
    assert keys == ["listeners", "upstreams", "default", "rules", "timeouts", "log", "zzz"]


def test_upstreams_that_are_equal_are_one() -> None:
    draft = Draft()
    names = [draft.upstream("a", "http://a:1"), draft.upstream("b", "http://a:1")]
    names += [draft.upstream("a", "http://a:2"), draft.upstream("direct", "http://a:3")]
    names.append(draft.upstream("a b/c", "http://a:4"))
    assert names == ["a", "a", "a-2", "direct-2", "a-b-c"]
