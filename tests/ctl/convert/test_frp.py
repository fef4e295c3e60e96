"""frps and frpc: a bridge, and an agent with its services."""

from __future__ import annotations

import random
import re
import sys

import pytest

from netproxy.ctl.convert.frp.toml import TomlValue, read_toml
from netproxy.ctl.convert.source import ConversionError
from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

SERVER = """
bindAddr = "192.0.2.1"
bindPort = 7000
auth.token = "0123456789abcdef"
allowPorts = [{ start = 2000, end = 2010 }, { single = 22 }]
vhostHTTPSPort = 443
[log]
level = "warn"
to = "./frps.log"
"""
CLIENT = """
serverAddr = "frps.example"
serverPort = 7000
user = "home"
auth.method = "token"
auth.token = "0123456789abcdef"
"""
PROXY = '[[proxies]]\nname = "x"\ntype = "%s"\nlocalPort = 80\n'
SERVICE = PROXY % "tcp" + "remotePort = 8080\n"
INI = """
[common]
server_addr = 192.0.2.1
server_port = 7000
token = 0123456789abcdef

[ssh]
type = tcp
local_ip = 127.0.0.1
local_port = 22
remote_port = 6000

[range:games]
type = udp
local_port = 6010-6011,6022
remote_port = 7010-7012
use_compression = true
"""


def frpc(text: str) -> Converted:
    return converted("frp", CLIENT + text, "frpc.toml")


def agent(text: str) -> dict[str, object]:
    found = frpc(text).config["tunnel"]["agent"]
    assert isinstance(found, dict)
    return found


def test_server_is_a_bridge() -> None:
    result = converted("frp", SERVER, "frps.toml")
    ports = [
        f"192.0.2.1:{port}{network}" for port in ("2000-2010", "22") for network in ("", "/udp")
    ]
    assert result.config["tunnel"]["bridge"] == {
        "listen": "tcp://192.0.2.1:7000",
        "agents": {"frpc": {"token": "0123456789abcdef", "ports": ports}},
    }
    assert result.config["log"] == {"level": "warning"}
    assert [line for line, _ in result.changed] == [0, 0, 6]
    assert result.lost == []


@pytest.mark.parametrize(
    "text",
    [
        "[[allowPorts]]\nstart = 2000\nend = 2010\n[[allowPorts]]\nsingle = 22\n",
        "allowPorts = [ # a comment\n {start = 2000, end = 2010},\n {single = 22},\n]\n",
    ],
)
def test_all_forms_of_the_ports_are_read(text: str) -> None:
    result = converted("frp", f'auth.token = "0123456789abcdef"\n{text}', "frps.toml")
    ports = result.config["tunnel"]["bridge"]["agents"]["frpc"]["ports"]
    assert [port for port in ports if "/" not in port] == ["0.0.0.0:2000-2010", "0.0.0.0:22"]


def test_server_without_a_token_admits_nobody_who_does_not_know_the_new_one() -> None:
    results = [converted("frp", "bindPort = 7000\n", "frps.toml") for _ in range(2)]
    tokens = {result.config["tunnel"]["bridge"]["agents"]["frpc"]["token"] for result in results}
    assert len(tokens) == 2 and all(re.fullmatch("[0-9a-f]{32}", token) for token in tokens)


def test_certificates_of_both_sides() -> None:
    tls = '[transport.tls]\ncertFile = "a.crt"\nkeyFile = "a.key"\ntrustedCaFile = "ca.crt"\n'
    bridge = converted("frp", SERVER + tls, "frps.toml").config["tunnel"]["bridge"]
    assert bridge["listen"] == "192.0.2.1:7000"
    assert bridge["tls"] == {"certificate": "a.crt", "key": "a.key", "client_ca": "ca.crt"}
    client = agent(tls + 'serverName = "b.example"\n' + SERVICE)
    assert client["bridge"] == "tls://frps.example:7000"
    assert client["tls"] == {
        **{"ca": "ca.crt", "certificate": "a.crt", "key": "a.key", "server_name": "b.example"}
    }


def test_client_is_an_agent() -> None:
    assert agent('transport.proxyURL = "http://bob:pw@192.0.2.9:3128"\n' + SERVICE) == {
        "bridge": "tcp://frps.example:7000",
        "name": "home",
        "token": "0123456789abcdef",
        "upstream": "http://bob:pw@192.0.2.9:3128",
        "services": {8080: "127.0.0.1:80"},
    }


def test_unusable_proxy_of_the_client_blocks() -> None:
    client = agent('transport.proxyURL = "ntlm://192.0.2.9:3128"\n' + SERVICE)
    assert client["upstream"] == "block"


def test_proxy_protocol() -> None:
    text = PROXY % "tcp" + 'remotePort = 1\ntransport.proxyProtocolVersion = "v2"\n'
    assert agent(text)["services"] == {1: {"target": "127.0.0.1:80", "proxy_protocol": True}}


def test_names_are_routes_of_the_bridge() -> None:
    result = frpc(PROXY % "https" + 'customDomains = ["a.example"]\n' + PROXY % "http")
    services = result.config["tunnel"]["agent"]["services"]
    assert services == {20080: "127.0.0.1:80", 20081: "127.0.0.1:80"}
    assert '#   - {sni: [a.example], via: "tunnel://home/20080"}' in result.text


@pytest.mark.parametrize(
    "plugin, listener",
    [
        ('type = "socks5"', {"protocol": "socks5"}),
        (
            'type = "http_proxy"\nhttpUser = "bob"\nhttpPassword = "pw"',
            {"protocol": "http", "auth": "required"},
        ),
        (
            'type = "unix_domain_socket"\nunixPath = "/run/x"',
            {"protocol": "tcp", "target": "unix:/run/x"},
        ),
        (
            'type = "tls2raw"\nlocalAddr = "127.0.0.1:81"\ncrtPath = "c"\nkeyPath = "k"',
            {"protocol": "tcp", "target": "127.0.0.1:81"}
            | {"tls": {"certificate": "c", "key": "k"}},
        ),
    ],
)
def test_plugins_are_listeners_of_the_agent(plugin: str, listener: dict[str, object]) -> None:
    text = f'[[proxies]]\nname = "x"\ntype = "tcp"\nremotePort = 9000\n[proxies.plugin]\n{plugin}\n'
    result = frpc(text)
    assert result.config["listeners"] == [
        {**listener, "listen": "127.0.0.1:9000", "network": ["tcp"]}
    ]
    assert result.config["tunnel"]["agent"]["services"] == {9000: "127.0.0.1:9000"}
    assert result.lost == []


@pytest.mark.parametrize(
    "text, count",
    [
        (PROXY % "stcp" + 'secretKey = "s3cret"\n', 4),
        (PROXY % "xtcp", 3),
        (PROXY % "tcp", 3),
        (SERVICE + "transport.useCompression = true\n", 1),
        ('[[visitors]]\nname = "v"\n[[visitors]]\nname = "w"\n', 2),
        ('[[httpPlugins]]\nname = "v"\n[[httpPlugins]]\nname = "w"\n', 2),
    ],
)
def test_what_is_not_carried_is_named(text: str, count: int) -> None:
    result = frpc(text)
    assert len(result.lost) == count
    assert all(line > CLIENT.count("\n") for line, _ in result.lost)
    assert "s3cret" not in str(result.lost) + result.text


def test_proxies_that_are_not_started_need_nothing() -> None:
    result = frpc('start = ["y"]\n' + SERVICE)
    assert (result.lost, "tunnel" in result.config) == ([], False)


def test_older_form() -> None:
    result = converted("frp", INI, "frpc.ini")
    assert result.config["tunnel"]["agent"]["services"] == {
        6000: "127.0.0.1:22",
        **{"7010/udp": "127.0.0.1:6010", "7011/udp": "127.0.0.1:6011"},
        "7012/udp": "127.0.0.1:6022",
    }
    assert [line for line, _ in result.lost] == [17]


def test_environment_is_read_by_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRP_TOKEN", "0123456789abcdef")
    text = 'serverAddr = "a.example"\nauth.token = "{{ .Envs.FRP_TOKEN }}"\n' + SERVICE
    result = converted("frp", text, "frpc.toml")
    assert result.config["tunnel"]["agent"]["token"] == "${FRP_TOKEN}"


def test_secrets_are_not_in_comments() -> None:
    text = 'auth = {method = "token", token = "s3cret"}\nbindPort = 1\n'
    result = converted("frp", text, "frps.toml")
    assert result.text.count("s3cret") == 1
    assert not any("s3cret" in directive.text for directive in result.notes.directives)


@pytest.mark.parametrize(
    "text, message",
    [
        ('x = """a"""', "frpc.toml:1: not TOML that is understood: texts of several lines"),
        ("a = 1 b = 2", "frpc.toml:1: not TOML that is understood: something follows a value"),
        ("\n[a", "frpc.toml:2: not TOML that is understood: ']' is expected"),
        ("{}", "frpc.toml: write it as TOML"),
    ],
)
def test_files_that_are_not_understood(text: str, message: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(message)):
        converted("frp", text, "frpc.toml")


def _nested(text: str) -> dict[str, object]:
    """Return what read_toml says as tables within tables, with numbers as keys for lists."""
    whole: dict[str, object] = {}
    for path, value, _ in read_toml(text, "x"):
        table = whole
        for part in path[:-1]:
            table = table.setdefault(str(part), {})  # type: ignore[assignment]
        table[str(path[-1])] = value
    return whole


def _numbered(value: object) -> object:
    if isinstance(value, dict):
        return {key: _numbered(part) for key, part in value.items()}
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return {str(number): _numbered(part) for number, part in enumerate(value)}
    return value


VALUES = (
    *("1", "-7", "1_000", "true", "false", '"a b"', r'"a\"\\\n\u00e9"', "'c:\\d'", "[]", '"#"'),
    *('["a", 2,]', "[\n 1, # one\n 2\n]", "[[1], ['x']]"),
)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is newer")
@pytest.mark.parametrize("seed", range(50))
def test_toml_is_read_as_python_reads_it(seed: int) -> None:
    import tomllib

    chance = random.Random(seed)
    lines: list[str] = []
    for number in range(chance.randint(1, 12)):
        kind = chance.random()
        if kind < 0.15:
            lines.append(f"[t{number}.'u v']  # a table")
        elif kind < 0.4:
            lines.append("[[list]]")
            if chance.random() < 0.5:
                lines += ["x.y = 1", "[list.sub]"]
        key = chance.choice(["k", "a.b", '"q r".k'])
        lines.append(f"{key}{number} = {chance.choice(VALUES)}")
    text = "\n".join(lines) + "\n"
    assert _nested(text) == _numbered(tomllib.loads(text)), text


def test_tables_within_a_line_are_read() -> None:
    value: TomlValue = {"a": 1, "b.c": ["x"]}
    assert read_toml("k = {a = 1, b.c = ['x']}", "x")[0].value == value
