"""Builds routers from configurations.

An error in a pattern, a list or a database names the place of the rule.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, Callable

import pytest

from netproxy.errors import ConfigError
from netproxy.router import lists
from tests.support.relays import described
from tests.support.mmdb import database
from tests.support.routing import StubResolver, flow, routing

pytest.importorskip("yaml")
LISTENERS = "listeners: [{name: main, listen: '127.0.0.1:1080'}]\n"


def error(text: str) -> str:
    """Return the message of the ConfigError that a configuration raises."""
    with pytest.raises(ConfigError) as caught:
        routing(LISTENERS + text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NO_KEYWORD = "is not a valid keyword (expected ASCII letters, digits, '.', '-' and '_')"
NO_PORT = "is not a valid port (expected 443 or 8000-8100, at most 65535)"
BITS_SET = "'10.0.0.1/8' is not a valid network: bits behind the prefix are set (write 10.0.0.0/8)"
NO_EXPRESSION = "is not a valid regular expression:"
BAD_RULES = {
    "domain: 'a b'": "domain: 'a b' is not a valid domain name",
    "domain: 10.0.0.1": "domain: '10.0.0.1' is an address, not a domain name",
    "domain: [fine.test, 'regex:(']": f"domain: 'regex:(' {NO_EXPRESSION}"
    " missing ), unterminated subpattern at position 0",
    "domain: 'keyword:'": f"domain: 'keyword:' {NO_KEYWORD}",
    "ip: 10.0.0.1/8": f"ip: {BITS_SET}",
    "ip: [10.0.0.0/8, nonsense]": "ip: 'nonsense' is not a valid network"
    " (expected an address or CIDR, such as 10.0.0.0/8)",
    "port: 70000": f"port: '70000' {NO_PORT}",
    "port: 9-1": "port: '9-1' is not a valid range: the first port is above the last",
    "not: {port: x}": f"not.port: 'x' {NO_PORT}",
    "not: {ip: 10.0.0.0/33}": "not.ip: '10.0.0.0/33' is not a valid network:"
    " the prefix is longer than 32 bits",
    "sni: 'a b'": "sni: 'a b' is not a valid domain name",
}


@pytest.mark.parametrize("condition, message", BAD_RULES.items())
def test_bad_pattern_is_an_error_with_the_rules_place(condition: str, message: str) -> None:
    """Hazard 79."""
    text = f"rules:\n  - {{via: direct}}\n  - {{{condition}, via: direct}}"
    assert error(text) == f"test.yaml:4:5: rules[1].{message}"


class TestFiles:
    @pytest.mark.parametrize("key", ["domain_file", "ip_file"])
    def test_missing_list_is_an_error_with_the_rules_place(self, key: str, tmp_path: Path) -> None:
        path = tmp_path / "list.txt"
        assert error(f"rules: [{{{key}: {path}, via: direct}}]") == (
            f"test.yaml:2:9: rules[0]: {path}: cannot be read: No such file or directory"
        )

    def test_directory_in_place_of_a_list_is_an_error(self, tmp_path: Path) -> None:
        assert error(f"rules: [{{ip_file: {tmp_path}, via: direct}}]") == (
            f"test.yaml:2:9: rules[0]: {tmp_path}: cannot be read: Is a directory"
        )

    @pytest.mark.parametrize(
        "key, text, message",
        [
            (
                "domain_file",
                "a.test\n\n# fine\nb test\n",
                ":4: 'b test' is not a valid domain name",
            ),
            ("ip_file", "10.0.0.0/8\n10.0.0.1/8\n", f":2: {BITS_SET}"),
        ],
    )
    def test_bad_line_of_a_list_is_an_error_with_its_number(
        self, key: str, text: str, message: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "list.txt"
        path.write_text(text)
        assert (
            error(f"rules: [{{{key}: {path}, via: direct}}]")
            == f"test.yaml:2:9: rules[0]: {path}{message}"
        )

    def test_missing_list_of_a_negation_is_an_error(self, tmp_path: Path) -> None:
        good = tmp_path / "good.txt"
        good.write_text("a.test\n")
        bad = tmp_path / "bad.txt"
        text = f"rules: [{{not: {{domain_file: [{good}, {bad}]}}, via: direct}}]"
        assert error(text) == (
            f"test.yaml:2:9: rules[0]: {bad}: cannot be read: No such file or directory"
        )

    def test_empty_list_matches_nothing(self, tmp_path: Path) -> None:
        """Hazard 79: neither does everything match, nor is it an error."""
        path = tmp_path / "empty.txt"
        path.write_text("# nothing yet\n\n")
        router = routing(
            LISTENERS
            + f"rules: [{{domain_file: {path}, via: direct}}, {{ip_file: {path}, via: direct}}, "
            f"{{not: {{ip_file: {path}}}, via: block}}]",
            StubResolver({"a.test": ["203.0.113.1"]}),
        ).router
        for target in ("a.test", "10.0.0.1"):
            assert router.route(flow(f"tcp 10.0.0.1 -> {target}:80 on main")).dialer.name == "block"

    def test_list_with_too_many_entries_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lists, "ENTRY_LIMIT", 3)
        path = tmp_path / "list.txt"
        path.write_text("10.0.0.1\n" * 4)
        assert error(f"rules: [{{ip_file: {path}, via: direct}}]").startswith(
            f"test.yaml:2:9: rules[0]: {path}:4: "
        )


class TestCountries:
    RULE = "rules:\n  - {geoip: [CN, DE], via: direct}\n"
    DATABASE = "geoip_database: /nowhere/countries.mmdb\n"

    @pytest.fixture
    def package(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
        """Return a function that installs a package with a database, or with a failure."""

        def install(database: Any) -> None:
            module: Any = types.ModuleType("maxminddb")
            module.InvalidDatabaseError = type("InvalidDatabaseError", (RuntimeError,), {})

            def open_database(path: str) -> Any:
                if isinstance(database, str):
                    raise module.InvalidDatabaseError(database)
                if isinstance(database, Exception):
                    raise database
                return database

            module.open_database = open_database
            monkeypatch.setitem(sys.modules, "maxminddb", module)

        return install

    def test_countries_without_a_database_are_an_error(self) -> None:
        assert (
            error(self.RULE)
            == "test.yaml:3:5: geoip: needs geoip_database, a file in MaxMind's format"
        )

    def test_negated_country_without_a_database_is_an_error(self) -> None:
        assert (
            error("rules: [{not: {geoip: CN}, via: direct}]")
            == "test.yaml:2:9: geoip: needs geoip_database, a file in MaxMind's format"
        )

    def test_countries_without_the_package_are_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "maxminddb", None)
        assert error(self.RULE + self.DATABASE) == (
            "test.yaml:3:5: geoip: needs the Python package maxminddb (Debian: python3-maxminddb)"
        )

    @pytest.mark.parametrize(
        "failure, message",
        [
            (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
            (
                "Error opening database file. Is this a valid MaxMind DB file?",
                "Error opening database file. Is this a valid MaxMind DB file?",
            ),
        ],
    )
    def test_database_that_cannot_be_opened_is_an_error(
        self, package: Callable[[Any], None], failure: Any, message: str
    ) -> None:
        package(failure)
        assert (
            error(self.RULE + self.DATABASE)
            == f"test.yaml:4:17: geoip_database: /nowhere/countries.mmdb: {message}"
        )

    def test_database_is_not_opened_without_rules_for_countries(
        self, package: Callable[[Any], None]
    ) -> None:
        package(AssertionError("opened"))
        routing(LISTENERS + self.DATABASE + "rules: [{port: 1, via: direct}]")

    @pytest.mark.parametrize(
        "entry, country",
        [
            ({"country": {"iso_code": "DE"}}, "DE"),
            ({"registered_country": {"iso_code": "CN"}}, "CN"),
            ({"country": "DE"}, "DE"),
            ({"country": {"iso_code": "FR"}, "registered_country": {"iso_code": "DE"}}, ""),
            ({"country": {}}, ""),
            ({}, ""),
            (None, ""),
            (["DE"], ""),
            (ValueError("IPv6 in a database of IPv4"), ""),
        ],
    )
    def test_country_is_read_from_every_form_of_a_record(
        self, package: Callable[[Any], None], entry: Any, country: str
    ) -> None:
        class Database:
            def get(self, host: str) -> Any:
                assert "%" not in host
                if isinstance(entry, Exception):
                    raise entry
                return entry

        package(Database())
        router = routing(
            LISTENERS + self.RULE + self.DATABASE + "default: block", StubResolver({})
        ).router
        assert router.route(flow("tcp 10.0.0.1 -> 198.51.100.1:80 on main")).dialer.name == (
            "direct" if country else "block"
        )


class TestRealDatabase:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        pytest.importorskip("maxminddb")
        path = tmp_path / "countries.mmdb"
        path.write_bytes(
            database(
                {
                    "203.0.113.0/24": {"country": {"iso_code": "DE"}},
                    "198.51.100.128/25": {"registered_country": {"iso_code": "CN"}},
                    "192.0.2.1": {"continent": {"code": "EU"}},
                }
            )
        )
        return path

    @pytest.mark.parametrize(
        "target, upstream",
        [
            ("203.0.113.200", "direct"),
            ("198.51.100.129", "direct"),
            ("198.51.100.1", "block"),
            ("192.0.2.1", "block"),
            ("10.0.0.1", "block"),
            ("[2001:db8::1]", "block"),
            ("de.test", "direct"),
            ("both.test", "direct"),
            ("nowhere.test", "block"),
        ],
    )
    def test_real_database_gives_the_country_of_any_address(
        self, target: str, upstream: str, path: Path
    ) -> None:
        names = StubResolver(
            {"de.test": ["203.0.113.7"], "both.test": ["2001:db8::7", "198.51.100.255"]}
        )
        router = routing(
            LISTENERS
            + f"rules: [{{geoip: [cn, DE], via: direct}}]\ndefault: block\ngeoip_database: {path}",
            names,
        ).router
        assert router.route(flow(f"tcp 10.0.0.1 -> {target}:80 on main")).dialer.name == upstream

    def test_file_that_is_no_database_is_an_error(self, path: Path) -> None:
        path.write_text("not at all\n" * 100)
        assert error(f"rules: [{{geoip: CN, via: direct}}]\ngeoip_database: {path}").startswith(
            f"test.yaml:3:17: geoip_database: {path}: "
        )

    def test_missing_database_is_an_error(self, path: Path) -> None:
        path.unlink()
        assert (
            error(f"rules: [{{geoip: CN, via: direct}}]\ngeoip_database: {path}")
            == f"test.yaml:3:17: geoip_database: {path}: No such file or directory"
        )


class TestAuto:
    @pytest.mark.parametrize(
        "auto, message",
        [
            ("{direct: 'a b'}", "direct: 'a b' is not a valid domain name"),
            ("{upstream: [fine.test, 10.0.0.1/8]}", f"upstream: {BITS_SET}"),
            (
                "{upstream: 'regex:['}",
                f"upstream: 'regex:[' {NO_EXPRESSION} unterminated character set at position 0",
            ),
        ],
    )
    def test_bad_pin_is_an_error_with_its_place(self, auto: str, message: str) -> None:
        assert error(f"auto: {auto}") == f"test.yaml:2:7: auto.{message}"

    def test_auto_rules_with_one_upstream_share_a_dialer(self) -> None:
        text = """
upstreams: {a: 'socks5://192.0.2.1:1', b: 'socks5://192.0.2.2:1'}
rules:
- {port: 1, via: auto, upstream: a}
- {port: 2, via: auto, upstream: b}
- {port: 3, via: auto, upstream: a}
"""
        router, autos = routing(LISTENERS + text, StubResolver({"a.test": ["203.0.113.1"]}))
        dialers = [
            router.route(flow(f"tcp 10.0.0.1 -> a.test:{port} on main")).dialer
            for port in (1, 2, 3)
        ]
        assert dialers == [autos[0], autos[1], autos[0]] and len(autos) == 2

    def test_no_auto_dialer_without_a_rule_for_it(self) -> None:
        assert routing(LISTENERS + "auto: {deadline: 1s}").autos == ()


def test_check_of_a_configuration_finds_a_bad_pattern() -> None:
    with pytest.raises(ConfigError) as caught:
        described(LISTENERS + "rules: [{domain: 'a b', via: direct}]")
    message = "test.yaml:2:9: rules[0].domain: 'a b' is not a valid domain name"
    assert str(caught.value) == message
