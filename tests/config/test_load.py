"""A YAML file as text and places: what HAZARDS 113 asks for, and secrets from files and the environment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from netproxy.config import load as load_module
from netproxy.config.load import DEPTH_LIMIT, SIZE_LIMIT, load_file, load_text
from netproxy.config.node import Node
from netproxy.errors import ConfigError

pytest.importorskip("yaml")


def plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    return [plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def tree(text: str) -> Any:
    return plain(load_text(text.encode(), "c.yaml"))


def error(raw: bytes | str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(raw.encode() if isinstance(raw, str) else raw, "c.yaml")
    return str(caught.value)


class TestText:
    @pytest.mark.parametrize(
        "written",
        [
            "22:22",
            "0123",
            "no",
            "1.10",
            "0x10",
            "1_000",
            "~",
            "null",
            "true",
            "2020-01-01",
            ".inf",
            "=",
            "1e3",
            "0o17",
        ],
    )
    def test_a_scalar_is_what_it_says(self, written: str) -> None:
        assert tree(f"key: {written}") == {"key": written}
        assert tree(f"{written}: value") == {written: "value"}

    def test_collections(self) -> None:
        assert tree("a: [1, {b: c}]\nd:\n  - e\n  -\n") == {"a": ["1", {"b": "c"}], "d": ["e", ""]}

    @pytest.mark.parametrize("text", ["", "\n", "# nothing but this\n", "---\n", "---\n...\n"])
    def test_an_empty_file_is_an_empty_mapping(self, text: str) -> None:
        assert tree(text) in ({}, "")

    def test_every_node_knows_its_place(self) -> None:
        root = load_text(b"a:\n  - b: c\n", "dir/c.yaml")
        inner = root.value["a"].value[0]
        assert (root.place, inner.place) == ("dir/c.yaml:1:1", "dir/c.yaml:2:5")
        assert (inner.value["b"].place, inner.value["b"].key_place) == (
            "dir/c.yaml:2:8",
            "dir/c.yaml:2:5",
        )

    def test_quotes_blocks_and_unicode(self) -> None:
        assert tree("a: 'it''s'\nb: \"tab\\t\"\nc: |\n  two\n  lines\nd: Z\u00fcrich\n") == {
            "a": "it's",
            "b": "tab\t",
            "c": "two\nlines\n",
            "d": "Z\u00fcrich",
        }


class TestRefused:
    @pytest.mark.parametrize(
        "text, message",
        [
            (
                "a: !!python/object/apply:os.system [ls]",
                "c.yaml:1:4: the only tag allowed is !file",
            ),
            ("a: !!str b", "c.yaml:1:4: the only tag allowed is !file"),
            ("a: !other b", "c.yaml:1:4: the only tag allowed is !file"),
            ("a: !file [b]", "c.yaml:1:4: the only tag allowed is !file"),
            ("a: !!map {b: c}", "c.yaml:1:4: the only tag allowed is !file"),
            ("a: 1\nb: 2\na: 3\n", "c.yaml:3:1: 'a' is given twice"),
            ("a:\n  b: 1\n  b: 1\n", "c.yaml:3:3: 'b' is given twice"),
            ("a: &x 1\nb: *x", "c.yaml:1:4: anchors and aliases are not allowed"),
            ("a: *x", "c.yaml:1:4: anchors and aliases are not allowed"),
            ("a: &x {b: c}", "c.yaml:1:4: anchors and aliases are not allowed"),
            ("a: &x {b: c}\nd:\n  <<: *x\n", "c.yaml:1:4: anchors and aliases are not allowed"),
            ("a: b\n---\nc: d\n", "c.yaml:2:1: the file must hold a single YAML document"),
            ("? [a, b]\n: c", "c.yaml:1:3: a key must be a single word"),
            ("? {a: b}\n: c", "c.yaml:1:3: a key must be a single word"),
            ("a: b: c", "c.yaml:1:5: mapping values are not allowed in this context"),
        ],
    )
    def test_says_where(self, text: str, message: str) -> None:
        assert error(text) == message

    @pytest.mark.parametrize(
        "text",
        [
            "a: [",
            "a: {b",
            "a: 'b",
            "\ta: b",
            "a: @b",
            "a: `b",
            "a: %b",
            "- a\nb: c",
            'a: "\\q"',
            "[a]: [b]]",
        ],
    )
    def test_what_is_no_yaml_has_a_place(self, text: str) -> None:
        assert error(text).startswith("c.yaml:")
        assert error(text).split(":")[1].isdigit()

    @pytest.mark.parametrize(
        "raw", [b"\xff\xfe\xfa", b"a: \x80", b"a: \x01", b"a: \0", b"\xff" * 100]
    )
    def test_bytes_that_are_no_text(self, raw: bytes) -> None:
        assert error(raw) == "c.yaml: not YAML: it contains a byte that is not allowed in text"

    def test_a_merge_key_is_a_key_like_others(self) -> None:
        assert tree("<<: {a: b}") == {"<<": {"a": "b"}}

    def test_an_error_does_not_repeat_the_line(self) -> None:
        """HAZARDS 111: it may hold a password."""
        for text in (
            "password: 'hunter2",
            "password: @hunter2",
            "password: *hunter2",
            "password: !hunter2 x",
            "p: a: hunter2",
            'password: "\\qhunter2"',
            "password: &hunter2 x",
        ):
            assert "hunter2" not in error(text)


class TestBombs:
    @pytest.mark.parametrize(
        "text",
        ["[" * 2000, "a: " + "[" * 2000 + "]" * 2000, "{a: " * 2000, "- " * 2000 + "x"],
        ids=["open", "closed", "mappings", "blocks"],
    )
    def test_depth(self, text: str) -> None:
        assert f": nested deeper than {DEPTH_LIMIT} levels" in error(text)

    def test_depth_within_the_limit(self) -> None:
        assert tree("[" * DEPTH_LIMIT + "]" * DEPTH_LIMIT)

    def test_aliases(self) -> None:
        lines = ["a0: &a0 [x, x]"] + [
            f"a{number}: &a{number} [*a{number - 1}, *a{number - 1}]" for number in range(1, 40)
        ]
        started = time.monotonic()
        assert error("\n".join(lines)) == "c.yaml:1:5: anchors and aliases are not allowed"
        assert time.monotonic() - started < 1.0

    def test_size(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_bytes(b"# " + b"x" * (10 << 20))
        with pytest.raises(ConfigError) as caught:
            load_file(str(path))
        assert str(caught.value) == f"{path}: is larger than {SIZE_LIMIT} bytes"

    def test_a_long_list_is_fine(self) -> None:
        assert len(tree("\n".join(f"k{number}: v" for number in range(2000)))) == 2000


class TestFiles:
    def test_a_secret_from_a_file_beside_the_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("hunter2\n")
        (tmp_path / "c.yaml").write_text("a: !file secret\nb: !file 'sec\u0072et'\n")
        assert plain(load_file(str(tmp_path / "c.yaml"))) == {"a": "hunter2", "b": "hunter2"}

    def test_by_its_whole_path(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("${HOME} stays text\r\n\n")
        assert tree(f"a: !file {tmp_path / 'secret'}") == {"a": "${HOME} stays text"}

    def test_that_is_not_there(self, tmp_path: Path) -> None:
        """HAZARDS 1.4: an unreadable secret refuses the start."""
        path = tmp_path / "none"
        assert (
            error(f"a:\n  b: !file {path}")
            == f"c.yaml:2:6: !file {path}: No such file or directory"
        )

    def test_that_is_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "binary"
        path.write_bytes(b"\xff\xfe")
        assert error(f"a: !file {path}") == f"c.yaml:1:4: !file {path}: not UTF-8"

    def test_that_is_a_directory(self, tmp_path: Path) -> None:
        assert error(f"a: !file {tmp_path}") == f"c.yaml:1:4: !file {tmp_path}: Is a directory"

    def test_that_never_ends_is_read_so_far(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load_module, "SECRET_LIMIT", 10)
        assert tree("a: !file /dev/zero") == {"a": "\0" * 10}

    @pytest.mark.parametrize(
        "name, reason", [("none.yaml", "No such file or directory"), ("", "Is a directory")]
    )
    def test_a_configuration_that_cannot_be_read(
        self, tmp_path: Path, name: str, reason: str
    ) -> None:
        path = f"{tmp_path}/{name}"
        with pytest.raises(ConfigError) as caught:
            load_file(path)
        assert str(caught.value) == f"{path}: cannot be read: {reason}"


class TestEnvironment:
    def test_a_variable_within_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NETPROXY_TEST", "a: [b")
        assert tree("a: 'x ${NETPROXY_TEST} y ${NETPROXY_TEST}'") == {"a": "x a: [b y a: [b"}

    def test_an_empty_one_is_empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NETPROXY_TEST", "")
        assert tree("a: ${NETPROXY_TEST}") == {"a": ""}

    def test_one_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NETPROXY_TEST", raising=False)
        assert (
            error("x: y\na: b ${NETPROXY_TEST}")
            == "c.yaml:2:4: the environment variable NETPROXY_TEST is not set"
        )

    @pytest.mark.parametrize(
        "text", ["$HOME", "${}", "${1A}", "$${", "scrypt$16384$8$1$a$b", "${A B}"]
    )
    def test_other_dollars_are_text(self, text: str) -> None:
        assert tree(f"a: '{text}'") == {"a": text}

    def test_what_a_variable_holds_is_not_looked_at_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NETPROXY_TEST", "${HOME}")
        assert tree("a: ${NETPROXY_TEST}") == {"a": "${HOME}"}


def test_without_pyyaml_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    assert error("a: b") == "c.yaml: PyYAML is needed to read a YAML file (Debian: python3-yaml)"


class TestInclude:
    def load(self, folder: Path, **files: str) -> object:
        for name, text in files.items():
            path = folder / (f"conf.d/{name}.yaml" if name != "main" else "main.yaml")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return plain(load_file(str(folder / "main.yaml")))

    def test_lists_are_joined_and_mappings_too_in_the_order_of_names(self, tmp_path: Path) -> None:
        assert self.load(
            tmp_path,
            main="include: conf.d/*.yaml\nlisteners: [a]\nusers: {u: 1}\nlog:\n",
            b="listeners: [c]\nusers: {w: 3}",
            a="listeners: [b]\nusers: {v: 2}\nlog: {level: debug}\ncontrol: x",
        ) == {
            "listeners": ["a", "b", "c"],
            "users": {"u": "1", "v": "2", "w": "3"},
            "log": {"level": "debug"},
            "control": "x",
        }

    def test_nothing_there_is_nothing_included(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, main="include: [conf.d/*.yaml, more/*]\na: b") == {"a": "b"}

    def test_hidden_files_and_others_are_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "conf.d").mkdir()
        for name in (".hidden.yaml", "old.yaml.bak", "README"):
            (tmp_path / "conf.d" / name).write_text("a: wrong")
        assert self.load(tmp_path, main="include: conf.d/*.yaml") == {}

    @pytest.mark.parametrize(
        "main, included, message",
        [
            (
                "users: {u: 1}",
                "users: {u: 2}",
                "conf.d/x.yaml:1:9: 'users.u' is already given in {0}/main.yaml:2:12",
            ),
            (
                "default: direct",
                "default: direct",
                "conf.d/x.yaml:1:1: 'default' is already given in {0}/main.yaml:2:10",
            ),
            (
                "listeners: [a]",
                "listeners: {a: b}",
                "conf.d/x.yaml:1:1: 'listeners' is already given in {0}/main.yaml:2:12",
            ),
            ("a: b", "include: y", "conf.d/x.yaml:1:1: an included file cannot include others"),
            ("a: b", "[c]", "conf.d/x.yaml:1:1: must be a mapping of keys to values"),
            ("a: b", "c: [", "conf.d/x.yaml:2:1: "),
        ],
    )
    def test_what_does_not_fit_has_its_place(
        self, tmp_path: Path, main: str, included: str, message: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            self.load(tmp_path, main="include: conf.d/*.yaml\n" + main, x=included)
        assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message.format(tmp_path))

    def test_a_pattern_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="main.yaml:1:10: include: must be a pattern"):
            self.load(tmp_path, main="include: {a: b}")
