"""The section `auth`: what it may say, and what follows for listeners and rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from netproxy.config.schema import AuthConfig
from tests.config.reading import errors, read

pytest.importorskip("yaml")

LISTENER = "listeners: [{listen: ':1080'}]\n"


def test_program_is_read_with_its_times() -> None:
    config = read(
        LISTENER + "auth: {command: [./check, -v], timeout: 1s, cache: 0, cache_failures: 1m}"
    )
    expected = AuthConfig(("./check", "-v"), "", 1.0, 0.0, 60.0, "c.yaml:2:17")
    assert config.auth == expected and config.auth.is_set
    assert config.listeners[0].auth == "required"
    assert not config.warnings
    assert "check" not in repr(config.auth)


def test_service_is_read_and_rules_may_name_any_user() -> None:
    config = read(
        LISTENER + "auth: {url: 'https://auth.example/check'}\nrules: [{user: anybody, via: block}]"
    )
    assert config.auth.url == "https://auth.example/check"
    assert config.rules[0].conditions.user == ("anybody",)
    assert read(LISTENER + "auth: {url: 'http://[::1]:8080'}").auth.is_set


def test_timeout_that_no_login_can_wait_for_is_warned_of() -> None:
    warnings = read(LISTENER + "auth: {command: [/a], timeout: 6s}").warnings
    assert warnings[0].endswith(
        "auth.timeout: a login can wait 2 x timeout = 12s, longer than timeouts.handshake (10s): "
        "lower auth.timeout"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("auth: {timeout: 1s}", "auth: needs either command or url"),
        ("auth: {command: [/a], url: 'https://a/'}", "auth: needs either command or url"),
        ("auth: {command: []}", "auth.command: names no program"),
        ("auth: {command: check}", "auth.command: 'check' is not the path of a program"),
        ("auth: {url: 'http://auth.example/'}", "auth.url: sends passwords in plain text"),
        (
            "auth: {url: 'http://localhost:8000'}",
            "auth.url: needs an address with http: write 127.0.0.1 or [::1], or use https",
        ),
        ("auth: {url: 'https://a:0/'}", "auth.url: has the port 0, which is not from 1 to 65535"),
        ("auth: {url: 'http://127.0.0.1:99999'}", "auth.url: has the port 99999, which is not"),
        ("auth: {url: 'https://u:secret@a/'}", "auth.url: is not the URL of a service"),
        ("auth: {url: 'https://a/?key=secret'}", "auth.url: is not the URL of a service"),
        ("auth: {url: ftp://a/}", "auth.url: is not the URL of a service"),
        ("auth: {command: [/a], cach: 1s}", "auth.cach: unknown key (did you mean 'cache'?)"),
        ("auth: required", "auth must be a mapping of keys to values"),
    ],
)
def test_mistake_is_told(text: str, expected: str) -> None:
    found = errors(LISTENER + text)
    assert expected in found[0] and "secret" not in "".join(found)


def test_configuration_without_external_check_loads_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("listeners: [{listen: '127.0.0.1:1080'}]\nusers: {a: {password: b}}\n")
    code = (
        "import sys; from netproxy.cli import main; main(['-t', '-q', '-c', sys.argv[1]]); "
        "print(*sorted(name for name in sys.modules if name in ('netproxy.access.external', "
        "'subprocess', 'http.client', 'netproxy.config.sections.auth', "
        "'netproxy.config.sections.users_file')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == ""
