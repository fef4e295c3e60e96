"""Errors hold no secret, wherever a mistake has put it."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.config.read import check, read_config
from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.node import Source
from netproxy.config.tree.problems import Problems
from netproxy.errors import ConfigError
from tests.config.reading import errors

pytest.importorskip("yaml")

SECRET = "hunter2"
# Mistakes near a secret in the file itself.
WRITTEN = [
    # users: no space after a colon, a list, a password without quotes
    "users: {alice: hunter2}",
    "users: {alice: {password:hunter2}}",
    "users: {alice:hunter2}",
    "users: {'alice:hunter2': {password: x}}",
    "users: ['alice:hunter2']",
    "users: alice:hunter2",
    "users: [{name: alice, password: hunter2}]",
    "users: {alice: {password: [hunter2]}}",
    "users: {alice: {passwd: hunter2}}",
    "users: {alice: {password: !hunter2}}",
    "users: {alice: {password: *hunter2}}",
    "users: {alice: {password: &hunter2}}",
    "users: {alice: {password: %hunter2}}",
    "users: {alice: {password: '\\hunter2}}",
    'users: {alice: {password: "hunter2\\q"}}',
    "users: {alice: {password: 'x'hunter2'}}",
    "users: {alice: {password: hunter2]}}",
    "users: {alice: {password: x,hunter2}}",
    "users: {alice: {password: hunter2, password: hunter2}}",
    # the URL of a proxy, or a login, where another value belongs
    "metrics: http://u:hunter2@127.0.0.1:9180",
    "control: unix:u:hunter2@x",
    "listeners: [{listen: 'socks5://alice:hunter2@:1080'}]",
    "listeners: [{listen: 'alice:hunter2@127.0.0.1:1080'}]",
    "listeners: ['socks5://alice:hunter2@:1080']",
    "listeners: [{listen: '127.0.0.1:0', auth: 'alice:hunter2'}]",
    "listeners: [{listen: '127.0.0.1:0', auth: {alice: hunter2}}]",
    "listeners: [{listen: '127.0.0.1:0', announce: 'alice:hunter2@h'}]",
    "listeners: [{listen: '127.0.0.1:0', clients: 'alice:hunter2@h'}]",
    "listeners: [{listen: '127.0.0.1:0', protocol: 'socks5://a:hunter2@h:1'}]",
    "listeners: [{listen: '127.0.0.1:0', bind: 'alice:hunter2@h:1'}]",
    "listeners: [{listen: '127.0.0.1:0', protocol: tcp, target: 'u:hunter2@h:1'}]",
    "listeners: [{listen: '127.0.0.1:0', proxy_protocol: 'alice:hunter2@h:1'}]",
    "listeners: [{listen: '127.0.0.1:0', tls: {password: hunter2}}]",
    # upstreams
    "default: {url: 'socks5://alice@h:1', password: hunter2}",
    "default: {url: http://u:x,hunter2@h:1}",
    "default: {members: [direct], health_check: {target: 'u:hunter2@h:1'}}",
    "upstreams: {'socks5://u:hunter2@h:1': direct}",
    "upstreams: {a:socks5://u:hunter2@h:1}",
    "upstreams: ['socks5://u:hunter2@h:1']",
    "rules: [{via: 'u:hunter2@h'}]",
    "rules: ['socks5://u:hunter2@h:1']",
    "dns: {servers: 'https://u:hunter2@h/dns-query'}",
    "dns: {servers: ['u:hunter2@9.9.9.9']}",
    # tunnels
    "tunnel: {agent: {bridge: 'tls://office:hunter2@h:1', name: a, token: hunter2}}",
    "tunnel: {agent: {bridge: 'tls://h:1', name: a, token:hunter2}}",
    "tunnel: {agent: {bridge: 'tls://h:1', name: a, services: {'u:hunter2@h': 'h:1'}}}",
    "tunnel: {bridge: {listen: 'tcp://home:hunter2@:7000', agents: {home: {}}}}",
    "tunnel: {bridge: {listen: 'tcp://:7000', agents: {home: hunter2}}}",
    "tunnel: {bridge: {listen: 'tcp://:7000', agents: {home:hunter2}}}",
    "tunnel: {bridge: {listen: 'tcp://:7000', agents: ['home:hunter2']}}",
    # metrics and auth
    "metrics_token: hunter2",
    "metrics_token:hunter2",
    "metrics_token: [hunter2]",
    "metrics_token: 'hunter2 hunter2 hunter2'",
    "auth: {url: 'http://u:hunter2@127.0.0.1/'}",
    "auth: {url: 'http://127.0.0.1/?key=hunter2'}",
    "auth: {url:http://u:hunter2@127.0.0.1/}",
    "auth: {command: 'check --token hunter2'}",
    "auth: {command: [check, hunter2]}",
    "auth: {token: hunter2}",
]
# Keys that get a secret from elsewhere by mistake; VALUE is "${SECRET}" or !file.
MISPLACED = [
    "metrics: VALUE",
    "status_page: VALUE",
    "control: VALUE",
    "log: {level: VALUE}",
    "log: {queue: VALUE}",
    "timeouts: {connect: VALUE}",
    "penalty: {after: VALUE}",
    "default: VALUE",
    "default: [VALUE]",
    "default: {members: [direct], balance: VALUE}",
    "default: {url: 'http://h:1', udp: VALUE, mark: VALUE, timeout: VALUE}",
    "listeners: [{listen: VALUE}]",
    "listeners: [{listen: '127.0.0.1:0', announce: VALUE, clients: VALUE, bind: VALUE}]",
    "listeners: [{listen: '127.0.0.1:0', upstream: VALUE, limits: {rate: VALUE}}]",
    "rules: [{client: VALUE, user: VALUE, port: VALUE, hours: VALUE, via: VALUE}]",
    "dns: {servers: [VALUE], cache: VALUE, prefer: VALUE, hosts: {a: VALUE}}",
    "tunnel: {agent: {bridge: VALUE, name: VALUE, token: VALUE, services: {'8022': VALUE}}}",
    "auth: {command: VALUE}",
    "users: {alice: {password: x, expires: VALUE, limits: {rate: VALUE, quota: VALUE}}}",
    "end_on_removal: VALUE",
]
# Keys that take the path of a file get its content.
PATHS = [
    "listeners: [{listen: '127.0.0.1:0', tls: {certificate: VALUE, key: VALUE}}]",
    "default: {url: 'https://h:1', tls: {ca: VALUE}}",
    "rules: [{domain_file: VALUE, via: direct}]",
    "users_file: VALUE",
    "geoip_database: VALUE",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_error_repeats_no_secret_that_a_mistake_has_misplaced(text: str) -> None:
    """Hazard 111."""
    try:
        parse_text(text.encode(), Source("c.yaml"))
    except ConfigError as error:
        told = str(error)
    else:
        told = "\n".join(errors(text))
    assert told and SECRET not in told


@pytest.mark.parametrize("text", MISPLACED + PATHS)
def test_error_repeats_no_value_of_a_file(text: str, tmp_path: Path) -> None:
    """Hazard 111."""
    (tmp_path / "secret").write_text(f"{SECRET}:{SECRET}\n")
    told = _errors(text.replace("VALUE", "!file secret"), tmp_path)
    assert SECRET not in told
    assert ("takes the path itself, without !file" in told) == (text in PATHS)


@pytest.mark.parametrize("text", MISPLACED)
def test_error_repeats_no_value_of_the_environment(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 111."""
    monkeypatch.setenv("SECRET", f"{SECRET}:{SECRET}")
    assert SECRET not in _errors(text.replace("VALUE", '"${SECRET}"'), tmp_path)


def test_error_repeats_a_value_that_is_no_secret() -> None:
    assert errors("log: {level: lowd}") == [
        "c.yaml:1:14: log.level: 'lowd' is not one of debug, info, warning, error"
    ]


def test_error_of_a_url_with_a_login_keeps_its_host() -> None:
    (error,) = errors("listeners: [{listen: 'socks5://u:p@h:1'}]")
    assert error.startswith("c.yaml:1:22: listeners[0].listen: '...@h:1' is not an address")


def test_hidden_values_are_known_after_an_earlier_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", SECRET)
    problems = Problems()
    problems.add("not a listener", "-l[0]")
    root = parse_text(b'log: {level: "${SECRET}"}', Source("c.yaml"))
    with pytest.raises(ConfigError) as caught:
        check(read_config(root, problems), problems)
    assert SECRET not in str(caught.value) and "log.level: '...' is not one" in str(caught.value)


def _errors(text: str, folder: Path) -> str:
    problems = Problems()
    source = Source(str(folder / "c.yaml"))
    with pytest.raises(ConfigError) as caught:
        check(read_config(parse_text(text.encode(), source), problems), problems)
    return str(caught.value)
