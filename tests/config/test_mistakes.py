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
    "log: {level:info}": "1:7: log.level: there is no space after 'level:'",
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
    "upstreams: {a: {url: 'http://h:1', user: bob}}": (
        "1:36: upstreams.a.user: unknown key "
        "(a login is part of the url: USER:PASSWORD and an @ before the host)"
    ),
    "default: {members: ['http://h:1'], balance: failover, check: {}}": (
        "1:55: default.check: unknown key (did you mean 'health_check'?)"
    ),
    "rules: [{country: DE, via: direct}]": (
        "1:10: rules[0].country: unknown key (did you mean 'geoip'?)"
    ),
    "dns: {servers: [{url: 'udp://9.9.9.9', password: x}]}": (
        "1:40: dns.servers[0].password: unknown key here (it belongs to users.NAME)"
    ),
    "timeouts: {level: debug}": "1:12: timeouts.level: unknown key here (it belongs to log)",
    "log: {handshake: 1s}": "1:7: log.handshake: unknown key here (it belongs to timeouts)",
    "user: {alice: {password: x}}": "1:1: user: unknown key (did you mean 'users'?)",
    "rule: []": "1:1: rule: unknown key (did you mean 'rules'?)",
    "upstream: {a: direct}": "1:1: upstream: unknown key (did you mean 'upstreams'?)",
}
HASHES = {
    "$2b$12$ykrLAfOYxYLC7Bz1x.z4W.RILXaOeKp9HoWOIIrBOnpFE8c/B5BSy": "bcrypt",
    "$2y$12$ykrLAfOYxYLC7Bz1x.z4W.RILXaOeKp9HoWOIIrBOnpFE8c/B5BSy": "bcrypt",
    "$1$iKwg.aB4$uBbiNp8NNgqsLF.JSOVzX/": "md5-crypt",
    "$apr1$abcdefgh$h9FWgUz3n9YxylKLlR5SQ/": "md5-crypt",
    "$5$A1t/SoEn43pnGBR6$0ry0KJUnMYEEc7Y..IevbqitGuZdr5lpuc/NrgDrMpB": "sha256-crypt",
    "$6$rounds=5000$abc$IdWKNKTJEb8LxY7CGg8YBXlvtfZzFw7Mp/r6niK9YB2mdvgY"
    "..TKjv1T..8RadRt2qvUHYRLr/TsVArtr91iR1": "sha512-crypt",
    "$6$yOWJ10bJtpJgm/b.$Kuk9M4lg76.9QyHx1ZpksA4CCKSbDlU4dlO/e70nFvj3d012"
    "ugoLVFp/bucPQ1ihOekq.HMb7Z3C6Jh7D9gxt0": "sha512-crypt",
    "$7$CU..../....2Q9obwLhin8qvQl6sisAO/$zLxvLFYPM5KAGpCZJUSlO9j165rU./sf1Adr0M4C5A4": (
        "scrypt-crypt"
    ),
    "$y$j9T$F5Jx5fExrKuPp53xLKQ..1$GmcwIgvdUC9qLWcKCi6gklUa1dM3ziD43YxYNURLKy0": "yescrypt",
    "$gy$j9T$F5Jx5fExrKuPp53xLKQ..1$uE5FcoxTz78xZpMZkpTmj/0MogyeNUSLIjdCxpQjz.8": "yescrypt",
    "$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$" + "Ab+/" * 10 + "AbC": "Argon2",
    "$argon2i$m=4096,t=3,p=1$c2FsdHNhbHQ$" + "Ab+/" * 10 + "AbC": "Argon2",
    "$pbkdf2-sha256$29000$c2FsdA$" + "Ab./" * 10 + "AbC": "PBKDF2",
    "pbkdf2:sha256:1000$salt$a8df899f3c4f204d967e0ad63c092987c10055ebb017b3d9d28add218d4f7aad": (
        "PBKDF2"
    ),
    "scrypt:1024:8:1$salt$" + "eba9bb7eb94c6ebd" * 8: "Werkzeug",
    "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=": "LDAP",
    "{SSHA}gVK8WC9YyFT1gMsQHTGCgT3sSv5zYWx0": "LDAP",
    "{SHA512}" + "Ab+/" * 21 + "Aa==": "LDAP",
    "{MD5}Xr4ilOzQ4PCOq3aQ0qbuaQ==": "LDAP",
    "{SMD5}Xr4ilOzQ4PCOq3aQ0qbuaXNhbHQ=": "LDAP",
    "{CRYPT}h40./Wck2luaI": "LDAP",
    "{CRYPT}$1$iKwg.aB4$uBbiNp8NNgqsLF.JSOVzX/": "LDAP",
}
NO_HASHES = [
    *("$2", "$100", "$1$", "{SHARED", "scrypt:1", "$x$y$z", "$2b$12$short"),
    *("$1$money$", "$1$money$more", "$5$for$me", "$6$rounds=1$a$b", "$y$es$no$maybe"),
    *("{MD5}x", "{SHA}", "{SSHA}password", "{CRYPT}ed", "$argon2id$a$b$c", "$pbkdf2$1$a$b"),
    *("pbkdf2:sha256:1000$salt$beef", "scrypt:1024:8:1$salt$beef", "$7$up$down"),
    # One character more than a digest, and one that is not of its alphabet.
    "$1$iKwg.aB4$uBbiNp8NNgqsLF.JSOVzX/x",
    "$1$iKwg.aB4$uBbiNp8NNgqsLF.JSOVzX-",
]


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


@pytest.mark.parametrize("password", NO_HASHES)
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
    from netproxy.config.tree.problems import Problems
    from netproxy.config.read import read_config

    (tmp_path / "conf.d").mkdir()
    (tmp_path / "main.yaml").write_text(
        "include: conf.d/*.yaml\n"
        "geoip_database: geo.mmdb\n"
        "state: state\n"
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
    assert config.state == f"{tmp_path}/state"
    assert next(config.default.hops).tls.ca == f"{tmp_path}/ca.pem"
    assert rule.conditions.domain_file == (f"{tmp_path}/conf.d/ads", "/etc/ads")
    assert rule.conditions.ip_file == (f"{tmp_path}/conf.d/nets",)
