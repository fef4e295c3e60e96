"""The router from the configuration: what is wrong with a pattern, a list or a database names the rule's place."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, Callable

import pytest

from netproxy.errors import ConfigError
from netproxy.router import lists
from tests.support.mmdb import database
from tests.support.relays import configuration, described
from tests.support.routing import Names, flow, routing

pytest.importorskip("yaml")
LISTENERS = "listeners: [{name: main, listen: '127.0.0.1:1080'}]\n"


def error(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        routing(LISTENERS + text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "rule, message",
    [
        ("{domain: 'a b', via: direct}", "'a b' is no domain name"),
        ("{domain: 10.0.0.1, via: direct}", "'10.0.0.1' is an address, not a domain name"),
        (
            "{domain: [fine.test, 'regex:('], via: direct}",
            "'regex:(' is no regular expression: missing ), unterminated subpattern at position 0",
        ),
        (
            "{domain: 'keyword:', via: direct}",
            "'keyword:': a keyword is made of ASCII letters, digits, '.', '-' and '_'",
        ),
        (
            "{ip: 10.0.0.1/8, via: direct}",
            "'10.0.0.1/8' has bits set behind its prefix: the network is 10.0.0.0/8",
        ),
        (
            "{ip: [10.0.0.0/8, nonsense], via: direct}",
            "'nonsense' is no network: write it as 10.0.0.0/8, fd00::/8 or a single address",
        ),
        (
            "{port: 70000, via: direct}",
            "'70000' is no port: write it as 443 or 8000-8100, up to 65535",
        ),
        ("{port: 9-1, via: direct}", "'9-1': the first port is above the last"),
        (
            "{not: {port: x}, via: direct}",
            "'x' is no port: write it as 443 or 8000-8100, up to 65535",
        ),
        (
            "{not: {ip: 10.0.0.0/33}, via: direct}",
            "'10.0.0.0/33' is no network: its prefix is longer than 32 bits",
        ),
    ],
)
def test_a_bad_pattern(rule: str, message: str) -> None:
    """Hazard 79."""
    assert (
        error(f"rules:\n  - {{via: direct}}\n  - {rule}") == f"test.yaml:4:5: rules[1]: {message}"
    )


class TestFiles:
    @pytest.mark.parametrize("key", ["domain_file", "ip_file"])
    def test_one_that_is_not_there(self, key: str, tmp_path: Path) -> None:
        path = tmp_path / "list.txt"
        assert error(f"rules: [{{{key}: {path}, via: direct}}]") == (
            f"test.yaml:2:9: rules[0]: {path}: cannot be read: No such file or directory"
        )

    def test_one_that_is_no_file(self, tmp_path: Path) -> None:
        assert error(f"rules: [{{ip_file: {tmp_path}, via: direct}}]") == (
            f"test.yaml:2:9: rules[0]: {tmp_path}: cannot be read: Is a directory"
        )

    @pytest.mark.parametrize(
        "key, text, message",
        [
            ("domain_file", "a.test\n\n# fine\nb test\n", ":4: 'b test' is no domain name"),
            (
                "ip_file",
                "10.0.0.0/8\n10.0.0.1/8\n",
                ":2: '10.0.0.1/8' has bits set behind its prefix: the network is 10.0.0.0/8",
            ),
        ],
    )
    def test_a_line_of_one(self, key: str, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "list.txt"
        path.write_text(text)
        assert (
            error(f"rules: [{{{key}: {path}, via: direct}}]")
            == f"test.yaml:2:9: rules[0]: {path}{message}"
        )

    def test_a_second_one_of_a_negation(self, tmp_path: Path) -> None:
        good = tmp_path / "good.txt"
        good.write_text("a.test\n")
        assert error(
            f"rules: [{{not: {{domain_file: [{good}, {tmp_path}/bad.txt]}}, via: direct}}]"
        ) == (
            f"test.yaml:2:9: rules[0]: {tmp_path}/bad.txt: cannot be read: No such file or directory"
        )

    def test_an_empty_one_matches_nothing(self, tmp_path: Path) -> None:
        """Hazard 79: in a rule that denies all others it is no door for everybody, nor a wall."""
        path = tmp_path / "empty.txt"
        path.write_text("# nothing yet\n\n")
        router = routing(
            LISTENERS
            + f"rules: [{{domain_file: {path}, via: direct}}, {{ip_file: {path}, via: direct}}, "
            f"{{not: {{ip_file: {path}}}, via: block}}]",
            Names({"a.test": ["203.0.113.1"]}),
        ).router
        for target in ("a.test", "10.0.0.1"):
            assert router.route(flow(f"tcp 10.0.0.1 -> {target}:80 on main")).dialer.name == "block"

    def test_one_without_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        """Installs a package whose database is this, or that raises this."""

        def install(what: Any) -> None:
            module: Any = types.ModuleType("maxminddb")
            module.InvalidDatabaseError = type("InvalidDatabaseError", (RuntimeError,), {})

            def open_database(path: str) -> Any:
                if isinstance(what, str):
                    raise module.InvalidDatabaseError(what)
                if isinstance(what, Exception):
                    raise what
                return what

            module.open_database = open_database
            monkeypatch.setitem(sys.modules, "maxminddb", module)

        return install

    def test_without_a_database(self) -> None:
        assert (
            error(self.RULE)
            == "test.yaml:3:5: geoip: needs geoip_database, a file in MaxMind's format"
        )

    def test_a_negation_needs_it_too(self) -> None:
        assert (
            error("rules: [{not: {geoip: CN}, via: direct}]")
            == "test.yaml:2:9: geoip: needs geoip_database, a file in MaxMind's format"
        )

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "maxminddb", None)
        assert error(self.RULE + self.DATABASE) == (
            "test.yaml:3:5: geoip: needs the Python package maxminddb (Debian: python3-maxminddb)"
        )

    @pytest.mark.parametrize(
        "failure, said",
        [
            (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
            (
                "Error opening database file. Is this a valid MaxMind DB file?",
                "Error opening database file. Is this a valid MaxMind DB file?",
            ),
        ],
    )
    def test_with_a_database_that_is_none(
        self, package: Callable[[Any], None], failure: Any, said: str
    ) -> None:
        package(failure)
        assert (
            error(self.RULE + self.DATABASE) == f"geoip_database: /nowhere/countries.mmdb: {said}"
        )

    def test_without_rules_about_countries_nothing_is_opened(
        self, package: Callable[[Any], None]
    ) -> None:
        package(AssertionError("opened"))
        routing(LISTENERS + self.DATABASE + "rules: [{port: 1, via: direct}]")

    @pytest.mark.parametrize(
        "found, country",
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
    def test_what_a_database_says(
        self, package: Callable[[Any], None], found: Any, country: str
    ) -> None:
        class Database:
            def get(self, host: str) -> Any:
                assert "%" not in host
                if isinstance(found, Exception):
                    raise found
                return found

        package(Database())
        router = routing(LISTENERS + self.RULE + self.DATABASE + "default: block", Names({})).router
        assert router.route(flow("tcp 10.0.0.1 -> 198.51.100.1:80 on main")).dialer.name == (
            "direct" if country else "block"
        )


class TestARealDatabase:
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
        "target, way",
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
    def test_is_asked_for_each_address(self, target: str, way: str, path: Path) -> None:
        names = Names({"de.test": ["203.0.113.7"], "both.test": ["2001:db8::7", "198.51.100.255"]})
        router = routing(
            LISTENERS
            + f"rules: [{{geoip: [cn, DE], via: direct}}]\ndefault: block\ngeoip_database: {path}",
            names,
        ).router
        assert router.route(flow(f"tcp 10.0.0.1 -> {target}:80 on main")).dialer.name == way

    def test_what_is_no_database(self, path: Path) -> None:
        path.write_text("not at all\n" * 100)
        assert error(f"rules: [{{geoip: CN, via: direct}}]\ngeoip_database: {path}").startswith(
            f"geoip_database: {path}: "
        )

    def test_one_that_is_not_there(self, path: Path) -> None:
        path.unlink()
        assert (
            error(f"rules: [{{geoip: CN, via: direct}}]\ngeoip_database: {path}")
            == f"geoip_database: {path}: No such file or directory"
        )


class TestAuto:
    @pytest.mark.parametrize(
        "auto, message",
        [
            ("{direct: 'a b'}", "'a b' is no domain name"),
            (
                "{upstream: [fine.test, 10.0.0.1/8]}",
                "'10.0.0.1/8' has bits set behind its prefix: the network is 10.0.0.0/8",
            ),
            (
                "{upstream: 'regex:['}",
                "'regex:[' is no regular expression: unterminated character set at position 0",
            ),
        ],
    )
    def test_a_bad_pin(self, auto: str, message: str) -> None:
        assert error(f"auto: {auto}") == f"test.yaml:2:7: auto: {message}"

    def test_rules_with_one_upstream_are_one_way_out(self) -> None:
        made = routing(
            LISTENERS
            + """upstreams: {a: 'socks5://192.0.2.1:1', b: 'socks5://192.0.2.2:1'}
rules: [{port: 1, via: auto, upstream: a}, {port: 2, via: auto, upstream: b}, {port: 3, via: auto, upstream: a}]""",
            Names({"a.test": ["203.0.113.1"]}),
        )
        assert len(made.autos) == 2
        ways = [
            made.router.route(flow(f"tcp 10.0.0.1 -> a.test:{port} on main")).dialer
            for port in (1, 2, 3)
        ]
        assert ways[0] is ways[2] is made.autos[0] and ways[1] is made.autos[1]

    def test_without_rules_that_need_it_there_is_none(self) -> None:
        assert routing(LISTENERS + "auto: {deadline: 1s}").autos == ()


def test_a_check_finds_it_and_opens_nothing() -> None:
    with pytest.raises(ConfigError, match=r"test.yaml:2:9: rules\[0\]: 'a b' is no domain name"):
        described(LISTENERS + "rules: [{domain: 'a b', via: direct}]")
