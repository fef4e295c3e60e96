"""YAML files as text and places (hazard 113), included files, secrets and variables."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from netproxy.config.tree import load as load_module
from netproxy.config.tree import parse as parse_module
from netproxy.config.tree.load import SIZE_LIMIT, load_file
from netproxy.config.tree.node import Source
from netproxy.config.tree.parse import DEPTH_LIMIT, parse_text
from netproxy.errors import ConfigError
from tests.config.reading import plain

pytest.importorskip("yaml")

GROUP = (1 << 31) - 7
"""The number of a group that no machine has a name for."""


def tree(text: str) -> Any:
    """Return the tree of a file "c.yaml" without places."""
    return plain(parse_text(text.encode(), Source("c.yaml")))


def error(raw: bytes | str) -> str:
    """Return the error of a file "c.yaml"."""
    with pytest.raises(ConfigError) as caught:
        parse_text(raw.encode() if isinstance(raw, str) else raw, Source("c.yaml"))
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
    def test_scalar_stays_text_as_written(self, written: str) -> None:
        assert tree(f"key: {written}") == {"key": written}
        assert tree(f"{written}: value") == {written: "value"}

    def test_lists_and_mappings_nest(self) -> None:
        assert tree("a: [1, {b: c}]\nd:\n  - e\n  -\n") == {"a": ["1", {"b": "c"}], "d": ["e", ""]}

    @pytest.mark.parametrize("text", ["", "\n", "# nothing but this\n", "---\n", "---\n...\n"])
    def test_empty_file_is_an_empty_mapping(self, text: str) -> None:
        assert tree(text) in ({}, "")

    def test_node_has_file_line_and_column(self) -> None:
        root = parse_text(b"a:\n  - b: c\n", Source("dir/c.yaml"))
        inner = root.value["a"].value[0]
        assert (root.place, inner.place) == ("dir/c.yaml:1:1", "dir/c.yaml:2:5")
        assert (inner.value["b"].place, inner.value["b"].key_place) == (
            "dir/c.yaml:2:8",
            "dir/c.yaml:2:5",
        )

    def test_quotes_blocks_and_unicode_are_decoded(self) -> None:
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
            (
                "a:\n  - !10.0.0.0/8",
                "c.yaml:2:5: the only tag allowed is !file "
                '(an exclusion is written in quotes: "!10.0.0.0/8")',
            ),
            ("a: [!fe80::1]", "c.yaml:1:5: a value that begins with '!' is written in quotes"),
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
            ("a: b: c", "c.yaml:1:5: a value that contains ': ' is written in quotes"),
        ],
    )
    def test_refused_yaml_has_place_and_words(self, text: str, message: str) -> None:
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
    def test_invalid_yaml_has_a_place(self, text: str) -> None:
        assert error(text).startswith("c.yaml:")
        assert error(text).split(":")[1].isdigit()

    @pytest.mark.parametrize(
        "raw, message",
        [
            (b"\xff\xfe\xfa", "1:1: the byte 0xff is not UTF-8: save the file as UTF-8"),
            (b"a: b\nc: \x80", "2:4: the byte 0x80 is not UTF-8: save the file as UTF-8"),
            (b"a: \x01", "1:4: the control character \\x01 is not allowed"),
            (b"a: \0", "1:4: the control character \\x00 is not allowed"),
            (b"\xff" * 100, "1:1: the byte 0xff is not UTF-8: save the file as UTF-8"),
        ],
    )
    def test_bytes_that_are_not_text_are_refused(self, raw: bytes, message: str) -> None:
        assert error(raw) == f"c.yaml:{message}"

    def test_merge_key_is_an_ordinary_key(self) -> None:
        assert tree("<<: {a: b}") == {"<<": {"a": "b"}}

    def test_yaml_error_does_not_repeat_the_line(self) -> None:
        """Hazard 111: the line may hold a password."""
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


class TestCharacters:
    """What no name, path or password may contain."""

    def test_nul_is_refused(self) -> None:
        assert error('a: "b\\0"') == "c.yaml:1:4: the value contains a NUL character"

    def test_nul_in_the_path_of_a_secret_is_refused(self) -> None:
        assert error('a: !file "b\\0"') == "c.yaml:1:4: the value contains a NUL character"

    def test_nul_in_a_secret_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"a\0b")
        path = tmp_path / "c.yaml"
        path.write_text("a: !file secret")
        with pytest.raises(ConfigError, match="contains a NUL character"):
            load_file(str(path))

    def test_variable_that_is_not_utf_8_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET", "caf\udce9")
        assert error("a: ${SECRET}") == "c.yaml:1:4: the value is not UTF-8"


class TestBombs:
    @pytest.mark.parametrize(
        "text",
        ["[" * 2000, "a: " + "[" * 2000 + "]" * 2000, "{a: " * 2000, "- " * 2000 + "x"],
        ids=["open", "closed", "mappings", "blocks"],
    )
    def test_deep_nesting_is_refused(self, text: str) -> None:
        assert f": nested deeper than {DEPTH_LIMIT} levels" in error(text)

    def test_nesting_up_to_the_limit_is_accepted(self) -> None:
        assert tree("[" * DEPTH_LIMIT + "]" * DEPTH_LIMIT)

    def test_exponential_aliases_are_refused(self) -> None:
        lines = ["a0: &a0 [x, x]"] + [
            f"a{number}: &a{number} [*a{number - 1}, *a{number - 1}]" for number in range(1, 40)
        ]
        assert error("\n".join(lines)) == "c.yaml:1:5: anchors and aliases are not allowed"

    def test_file_above_the_size_limit_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_bytes(b"# " + b"x" * (10 << 20))
        with pytest.raises(ConfigError) as caught:
            load_file(str(path))
        assert str(caught.value) == f"{path}: is larger than {SIZE_LIMIT} bytes"

    def test_long_mapping_is_accepted(self) -> None:
        assert len(tree("\n".join(f"k{number}: v" for number in range(2000)))) == 2000


class TestFiles:
    def test_secret_file_is_relative_to_the_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("hunter2\n")
        (tmp_path / "c.yaml").write_text("a: !file secret\nb: !file 'sec\u0072et'\n")
        assert plain(load_file(str(tmp_path / "c.yaml"))) == {"a": "hunter2", "b": "hunter2"}

    def test_secret_file_with_an_absolute_path_is_read_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("${HOME} stays text\r\n\n")
        assert tree(f"a: !file {tmp_path / 'secret'}") == {"a": "${HOME} stays text"}

    def test_missing_secret_file_is_an_error(self, tmp_path: Path) -> None:
        """Hazard 1.4: an unreadable secret keeps the daemon from starting."""
        path = tmp_path / "none"
        assert (
            error(f"a:\n  b: !file {path}")
            == f"c.yaml:2:6: !file {path}: No such file or directory"
        )

    def test_secret_file_of_root_alone_says_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: str) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(parse_module, "open_regular", refuse)
        monkeypatch.setattr(os, "getegid", GROUP.__int__)
        path = tmp_path / "pw"
        assert (
            error(f"a: !file {path}") == f"c.yaml:1:4: !file {path}: Permission denied "
            f"(as root: chgrp {GROUP} {path} && chmod g+r {path})"
        )

    def test_secret_file_that_is_not_utf8_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "binary"
        path.write_bytes(b"\xff\xfe")
        assert error(f"a: !file {path}") == f"c.yaml:1:4: !file {path}: not UTF-8"

    def test_directory_as_secret_file_is_an_error(self, tmp_path: Path) -> None:
        assert error(f"a: !file {tmp_path}") == f"c.yaml:1:4: !file {tmp_path}: Is a directory"

    def test_file_above_the_limit_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half a list of networks must not take effect."""
        monkeypatch.setattr(parse_module, "VALUE_LIMIT", 10)
        path = tmp_path / "long"
        path.write_text("x" * 10)
        assert tree(f"a: !file {path}") == {"a": "x" * 10}
        path.write_text("x" * 11)
        assert error(f"a: !file {path}") == (
            f"c.yaml:1:4: !file {path}: is longer than 10 characters"
        )

    def test_device_as_secret_file_is_an_error(self) -> None:
        message = "it is not a regular file"
        assert error("a: !file /dev/zero") == f"c.yaml:1:4: !file /dev/zero: {message}"

    @pytest.mark.parametrize(
        "name, reason", [("none.yaml", "No such file or directory"), ("", "Is a directory")]
    )
    def test_unreadable_configuration_is_an_error(
        self, tmp_path: Path, name: str, reason: str
    ) -> None:
        path = f"{tmp_path}/{name}"
        with pytest.raises(ConfigError) as caught:
            load_file(path)
        assert str(caught.value) == f"{path}: cannot be read: {reason}"


class TestPipes:
    def test_configuration_is_read_from_a_pipe(self) -> None:
        reader, writer = os.pipe()
        try:
            os.write(writer, b"a: 1\n")
            os.close(writer)
            assert plain(load_file(f"/dev/fd/{reader}")) == {"a": "1"}
        finally:
            os.close(reader)

    def test_fifo_that_nobody_writes_into_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(load_module, "PIPE_SECONDS", 0.01)
        path = tmp_path / "fifo"
        os.mkfifo(path)
        with pytest.raises(ConfigError) as caught:
            load_file(str(path))
        assert str(caught.value) == (f"{path}: cannot be read: nothing has come from it for 0.01 s")

    def test_writer_that_falls_silent_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(load_module, "PIPE_SECONDS", 0.01)
        reader, writer = os.pipe()
        try:
            os.write(writer, b"a: 1\n")
            with pytest.raises(ConfigError, match="nothing has come from it"):
                load_file(f"/dev/fd/{reader}")
        finally:
            os.close(reader)
            os.close(writer)

    def test_included_fifo_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "other.yaml")
        path = tmp_path / "main.yaml"
        path.write_text("include: other.yaml\n")
        with pytest.raises(ConfigError) as caught:
            load_file(str(path))
        message = f"{tmp_path}/other.yaml: cannot be read: it is not a regular file"
        assert str(caught.value) == message


class TestEnvironment:
    def test_variable_within_text_is_replaced_and_stays_text(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NETPROXY_TEST", "a: [b")
        assert tree("a: 'x ${NETPROXY_TEST} y ${NETPROXY_TEST}'") == {"a": "x a: [b y a: [b"}

    def test_empty_variable_gives_empty_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NETPROXY_TEST", "")
        assert tree("a: ${NETPROXY_TEST}") == {"a": ""}

    def test_unset_variable_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NETPROXY_TEST", raising=False)
        assert (
            error("x: y\na: b ${NETPROXY_TEST}")
            == "c.yaml:2:4: the environment variable NETPROXY_TEST is not set"
        )

    @pytest.mark.parametrize(
        "text", ["$HOME", "${}", "${1A}", "$${", "scrypt$16384$8$1$a$b", "${A B}"]
    )
    def test_other_dollar_signs_stay_text(self, text: str) -> None:
        assert tree(f"a: '{text}'") == {"a": text}

    def test_value_of_a_variable_is_not_expanded_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NETPROXY_TEST", "${HOME}")
        assert tree("a: ${NETPROXY_TEST}") == {"a": "${HOME}"}


def test_missing_pyyaml_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    assert error("a: b") == "c.yaml: PyYAML is needed to read a YAML file (Debian: python3-yaml)"


class TestInclude:
    def load(self, folder: Path, **files: str) -> object:
        for name, text in files.items():
            path = folder / (f"conf.d/{name}.yaml" if name != "main" else "main.yaml")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return plain(load_file(str(folder / "main.yaml")))

    def test_included_lists_and_mappings_are_joined_in_name_order(self, tmp_path: Path) -> None:
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

    def test_pattern_without_matches_includes_nothing(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, main="include: [conf.d/*.yaml, more/*]\na: b") == {"a": "b"}

    def test_pattern_leaves_out_hidden_and_other_files(self, tmp_path: Path) -> None:
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
            ("a: b", "c: [", "conf.d/x.yaml:1:4: "),
        ],
    )
    def test_error_in_an_included_file_has_its_place(
        self, tmp_path: Path, main: str, included: str, message: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            self.load(tmp_path, main="include: conf.d/*.yaml\n" + main, x=included)
        assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message.format(tmp_path))

    def test_include_that_is_a_mapping_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="main.yaml:1:10: include: must be a pattern"):
            self.load(tmp_path, main="include: {a: b}")
