"""Mistakes that people make in the file, and the one line that each of them is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.config.tree.hints import SECTIONS
from tests.config.reading import errors, read

pytest.importorskip("yaml")

# Each as "LINE:COLUMN: message".
SYNTAX = {
    "listeners:\n\t- protocol: sps\n": "2:1: a tab in the indentation: YAML takes spaces only",
    "log:\n  level: info\n\taccess: true\n": (
        "3:1: a tab in the indentation: YAML takes spaces only"
    ),
    "log:\n  level: info\n access: true\n": (
        "3:2: the indentation of this line fits no line above it"
    ),
    "log:\n  level: info\n    access: true\n": (
        "3:5: the line is indented deeper than the one above, which has a value already"
    ),
    "listeners:\n  - protocol: sps\n   listen: ':1'\n": (
        "3:4: the indentation of this line fits no line above it"
    ),
    "default:direct\nlog: {level: info}\n": "1:1: there is no space after 'default:'",
    "listeners:\n  - protocol:sps\n    listen: ':1'\n": (
        "2:5: there is no space after 'protocol:'"
    ),
    "users:\n  a:\n    password:hunter2\n    limits: {}\n": (
        "3:5: there is no space after 'password:'"
    ),
    "log\nlevel: info\n": "1:1: there is no ':' after this word",
    "default: direct: now\n": "1:16: a value that contains ': ' is written in quotes",
    'default: "direct\nlog: {level: info}\n': "1:10: the quote that opens here is never closed",
    "default: 'direct\nlog: {level: info}\n": "1:10: the quote that opens here is never closed",
    'default: "direct\ngeoip_database: "x"\n': (
        "1:10: the quote that opens here ends in line 2: one is missing between"
    ),
    'default: "a" b\n': "1:14: the value ends before this: put all of it in quotes",
    'default: "C:\\path"\n': (
        "1:13: a backslash in double quotes is written \\\\ (or take single quotes)"
    ),
    "listeners: [a, b\nlog: {}\n": "1:12: the '[' that opens here is never closed",
    "listeners:\n  - {listen: a\nlog: {}\n": "2:5: the '{' that opens here is never closed",
    "log: {level: info": "1:6: the '{' that opens here is never closed",
    "log: {level: info access: true}\n": (
        "1:25: a ',' or a closing bracket is missing before this"
    ),
    "log: {level: info}}\n": "1:19: the '}' closes nothing",
    "default: direct\n- a\n": (
        "2:1: list items ('- ...') and keys are mixed at the same indentation"
    ),
    "listeners: [{listen: :1080}]\n": "1:22: a value that begins with ':' is written in quotes",
    "default: *\n": "1:10: a value that begins with '*' is written in quotes",
    "default: @x\n": "1:10: a value that begins with '@' is written in quotes",
    "default: `x`\n": "1:10: a value that begins with '`' is written in quotes",
    "default: - x\n": "1:10: a value that begins with '-' is written in quotes",
    "default: ]\n": "1:10: a value that begins with ']' is written in quotes",
}
VALUES = {
    "listeners: [{listen: 1080}]": (
        "1:22: listeners[0].listen: '1080' is not an address to listen on "
        "(write 127.0.0.1:1080 for this machine alone, :1080 for every address)"
    ),
    "listeners: [{listen: '::1:1080'}]": (
        "1:22: listeners[0].listen: '::1:1080' is not an address to listen on (write [::1]:1080)"
    ),
    "listeners: [{listen: '127.0.0.1:1', announce: 10.0.0}]": (
        "1:47: listeners[0].announce: '10.0.0' is not an address, address:port or host name"
    ),
    "listeners: [{listen: ':1', clients: 10.0.0.1/8}]": (
        "1:37: listeners[0].clients[0]: '10.0.0.1/8' is not a valid network: "
        "bits behind the prefix are set (write 10.0.0.0/8)"
    ),
    "listeners: [{listen: ':1', clients: '10.0.0.0/8, 192.168.0.0/16'}]": (
        "1:37: listeners[0].clients[0]: '10.0.0.0/8, 192.168.0.0/16' is one text: "
        "write a list, [10.0.0.0/8, 192.168.0.0/16]"
    ),
    "listeners: [protocol:sps]": (
        "1:13: listeners[0] must be a mapping of keys to values (there is no space after "
        "'protocol:')"
    ),
    "log: {level:info}": "1:7: log.level:info: has no space after 'level:'",
    "default: 10.0.0.1:1080": (
        "1:10: default: not an upstream: write scheme://host:port, direct or block "
        "(the scheme is missing: socks5://... or http://...)"
    ),
    "default: socks5://fd00::1:1080": (
        "1:10: default: must be host:port with a port between 1 and 65535 "
        "(an IPv6 address in brackets: [v6]:port)"
    ),
    "users: {alice: 'scrypt$1$1$1$a$b'}": (
        '1:16: users.alice must be a mapping: write alice: {password: "..."}'
    ),
    "users: [{alice: hunter2}]": (
        "1:8: users must be a mapping of keys to values (write the keys without '- ' before them)"
    ),
    "metrics: 0.0.0.0:9180": (
        "1:10: metrics: 0.0.0.0:9180 can be reached from other machines: set a metrics_token"
    ),
    "clients: [10.0.0.0/8]": "1:1: clients: unknown key here (it belongs to listeners[])",
    "timeouts: {level: debug}": "1:12: timeouts.level: unknown key here (it belongs to log)",
    "log: {handshake: 1s}": "1:7: log.handshake: unknown key here (it belongs to timeouts)",
    "user: {alice: {password: x}}": "1:1: user: unknown key (did you mean 'users'?)",
    "rule: []": "1:1: rule: unknown key (did you mean 'rules'?)",
    "upstream: {a: direct}": "1:1: upstream: unknown key (did you mean 'upstreams'?)",
}
HASHES = {
    "$2y$10$abcdefghijklmnopqrstuu0123456789": "bcrypt",
    "$2b$12$abcdefghijklmnopqrstuu0123456789": "bcrypt",
    "$1$abc$defghijk": "md5-crypt",
    "$apr1$abc$defghijk": "md5-crypt",
    "$5$abc$defghijk": "sha256-crypt",
    "$6$abc$defghijk": "sha512-crypt",
    "$y$j9T$abc$defghijk": "yescrypt",
    "$argon2id$v=19$m=65536,t=3,p=4$abc$def": "Argon2",
    "pbkdf2:sha256:600000$abc$def": "PBKDF2",
    "{SSHA}abcdefgh": "LDAP",
}


@pytest.mark.parametrize("libyaml", [True, False])
@pytest.mark.parametrize("text", SYNTAX)
def test_mistake_in_yaml_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, text: str, libyaml: bool
) -> None:
    """The message is the same with both parsers of PyYAML."""
    if not libyaml:
        monkeypatch.setattr("yaml.__with_libyaml__", False)
    assert errors(text) == [f"c.yaml:{SYNTAX[text]}"]


@pytest.mark.parametrize("text", VALUES)
def test_mistake_in_a_value_is_told_in_one_line(text: str) -> None:
    assert errors(text) == [f"c.yaml:{VALUES[text]}"]


@pytest.mark.parametrize("password", HASHES)
def test_hash_of_another_program_is_an_error(password: str) -> None:
    """Hazard 144."""
    assert errors(f"users:\n  alice: {{password: '{password}'}}\n") == [
        f"c.yaml:2:21: users.alice.password: is a hash of the kind {HASHES[password]}, which "
        "NetProxy does not check: make a hash of the password with 'netproxyctl hash-password'"
    ]


@pytest.mark.parametrize("password", ["null", "~", "Null", "NULL"])
def test_password_that_is_null_in_yaml_is_an_error(password: str) -> None:
    assert errors(f"users: {{ed: {{password: {password}}}}}") == [
        f"c.yaml:1:24: users.ed.password: is empty: {password} stands for no value in YAML"
    ]


@pytest.mark.parametrize("password", ["$2", "$100", "$1$", "{SHARED", "scrypt:1", "$x$y$z"])
def test_password_that_looks_a_little_like_a_hash_is_a_password(password: str) -> None:
    config = read(f"users: {{alice: {{password: '{password}'}}}}")
    assert config.users["alice"].password == password
    assert [line for line in config.warnings if "is plain text" in line]


def test_listener_on_localhost_is_not_open() -> None:
    (listener,) = read("listeners: [{listen: 'localhost:1080'}]").listeners
    assert listener.addresses == (("127.0.0.1", 1080),)


def test_keys_of_the_hints_belong_to_one_section_each() -> None:
    keys = [key for keys in SECTIONS.values() for key in keys]
    assert len(keys) == len(set(keys))


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    from netproxy.config.tree.load import load_file
    from netproxy.config.tree.node import Problems
    from netproxy.config.read import read_config

    (tmp_path / "conf.d").mkdir()
    (tmp_path / "main.yaml").write_text(
        "include: conf.d/*.yaml\n"
        "geoip_database: geo.mmdb\n"
        "listeners: [{listen: '127.0.0.1:1', tls: {certificate: a.pem, key: /b.key}}]\n"
        "default: {url: 'https://h:1', tls: {ca: ca.pem}}\n"
    )
    (tmp_path / "conf.d" / "x.yaml").write_text(
        "rules: [{domain_file: [ads, /etc/ads], ip_file: nets, via: block}]\n"
    )
    problems = Problems()
    config = read_config(load_file(str(tmp_path / "main.yaml")), problems)
    assert not problems.errors
    tls, (rule,) = config.listeners[0].tls, config.rules
    assert tls is not None
    assert (tls.certificate, tls.key) == (f"{tmp_path}/a.pem", "/b.key")
    assert config.geoip_database == f"{tmp_path}/geo.mmdb"
    assert next(config.default.hops).tls.ca == f"{tmp_path}/ca.pem"
    assert rule.conditions.domain_file == (f"{tmp_path}/conf.d/ads", "/etc/ads")
    assert rule.conditions.ip_file == (f"{tmp_path}/conf.d/nets",)
