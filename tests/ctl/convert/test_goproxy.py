"""Command lines of goproxy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

SCRIPT = """\
proxy http -t tls -p ":38080" -C proxy.crt -K proxy.key -a bob:s3cret --daemon
proxy socks --always -t tcp -p 127.0.0.1:1080 \\
  -T tls -P "192.0.2.1:38080" -C proxy.crt -K proxy.key -Q 1
"""
WHOLE = """\
# Made by netproxyctl convert from proxies.sh.
# Check it with: netproxyd -t -c FILE
# Not carried over: proxies.sh:3: -Q 1: is not an option that is known

listeners:
  # proxies.sh:1: http
  # proxies.sh:1: -p :38080
  - protocol: http
    listen: ":38080"
    network: [tcp]
    tls: {certificate: proxy.crt, key: proxy.key, client_ca: proxy.crt}
    auth: required
  # proxies.sh:2: socks
  # proxies.sh:2: -p 127.0.0.1:1080
  # goproxy relays UDP only with --udp: delete `network` to serve UDP
  - {protocol: socks5, listen: "127.0.0.1:1080", network: [tcp], auth: none, upstream: 192.0.2.1}

upstreams:
  # proxies.sh:3: -P 192.0.2.1:38080
  192.0.2.1:
    url: socks5h+tls://192.0.2.1:38080
    tls: {ca: proxy.crt, certificate: proxy.crt, key: proxy.key}

rules:
  # goproxy serves no BIND
  - {listener: socks5-1080, command: bind, via: block}

users:
  # proxies.sh:1: -a ***
  # a password in plain text: better write its hash (netproxyctl hash-password), or !file
  bob: {password: s3cret}
"""
TUNNEL = """\
proxy bridge -p ":33080" -C proxy.crt -K proxy.key --client-keys str://home,office
proxy server -r "127.0.0.1:28080@:80" -r "udp://:53@[office]192.0.2.53:53" --k home \\
  -P "127.0.0.1:33080" -C proxy.crt -K proxy.key
"""


def goproxy(command: str, path: str = "proxies.sh") -> Converted:
    return converted("goproxy", f"proxy {command}\n", path)


def listener(command: str) -> dict[str, object]:
    [found] = goproxy(command).config["listeners"]
    assert isinstance(found, dict)
    return found


def upstream(command: str) -> object:
    config = goproxy(command).config
    return config["upstreams"][config["listeners"][0]["upstream"]]


def test_script_becomes_a_configuration() -> None:
    result = converted("goproxy", SCRIPT, "proxies.sh")
    assert result.text == WHOLE


def test_file_of_options_is_a_command(tmp_path: Path) -> None:
    text = "Http\n-t tcp\n-p 127.0.0.1:33080\n--forever\n# a comment\n-l 8K\n"
    expected = {
        **{"protocol": "http", "listen": "127.0.0.1:33080", "network": ["tcp"]},
        "limits": {"rate_per_client": "65536bit/s"},
    }
    assert converted("goproxy", text).config["listeners"] == [expected]
    (tmp_path / "options.txt").write_text(text)
    assert goproxy("@options.txt", str(tmp_path / "a.sh")).config["listeners"] == [expected]


@pytest.mark.parametrize(
    "command, expected",
    [
        ("http", {"protocol": "http", "listen": ":33080", "network": ["tcp"], "allow_open": True}),
        (
            "socks -p 127.0.0.1:1080 --udp --udp-port 20000",
            {
                **{"protocol": "socks5", "listen": "127.0.0.1:1080"},
                "udp": {"relay_port": "20000-20000"},
            },
        ),
        (
            "sps -p 127.0.0.1:1080 --udp --max-conns 10 --max-conns-rate 5 --ip-rate 1M -B",
            {
                **{"protocol": "sps", "listen": "127.0.0.1:1080", "bind": "incoming"},
                "limits": {
                    **{"connections": 10, "connection_rate_per_client": "5/s"},
                    "rate_per_client": "8388608bit/s",
                },
            },
        ),
        (
            "sps -p 127.0.0.1:1080 --redir",
            {"protocol": "redirect", "listen": "127.0.0.1:1080", "sniff": []},
        ),
        (
            "sps -p 127.0.0.1:1080 --disable-http",
            {"protocol": "socks5", "listen": "127.0.0.1:1080", "network": ["tcp"]},
        ),
        (
            "tcp -p 127.0.0.1:2222 -T tcp -P 192.0.2.7:22 --bind-ip eth0:2222",
            {
                **{"protocol": "tcp", "listen": "127.0.0.1:2222", "target": "192.0.2.7:22"},
                "bind": "eth0",
            },
        ),
        (
            "udp -p :5353 -T udp -P 192.0.2.1:53 --ip-allow str://10.0.*.*",
            {
                **{"protocol": "udp", "listen": ":5353", "target": "192.0.2.1:53"},
                "clients": ["10.0.0.0/16"],
            },
        ),
    ],
)
def test_command_is_a_listener(command: str, expected: dict[str, object]) -> None:
    assert listener(command) == expected


def test_several_ports_are_several_listeners() -> None:
    config = goproxy("tcp -p ':80,:8000-8001' -T tcp -P 192.0.2.1:0").config
    assert [(entry["listen"], entry["target"]) for entry in config["listeners"]] == [
        *((f":{port}", f"192.0.2.1:{port}") for port in (80, 8000, 8001))
    ]
    [locked] = goproxy("tcp -p :8000-8001 -T tcp -P 192.0.2.1:22 --lock-port").config["listeners"]
    assert (locked["listen"], locked["target"]) == (":8000-8001", "192.0.2.1:22")


@pytest.mark.parametrize(
    "command, expected",
    [
        ("http -T tcp -P 192.0.2.1:80", "http://192.0.2.1:80"),
        ("socks -T tcp -P 192.0.2.1:1080 -A bob:p@ss", "socks5h://bob:p%40ss@192.0.2.1:1080"),
        ("sps -S socks -T tcp -P 192.0.2.1:1080", "socks5h://192.0.2.1:1080"),
        ("sps -P https://bob:pw@192.0.2.1:443", "https://bob:pw@192.0.2.1:443"),
        (
            "http -T tcp -P 192.0.2.1:80?w=1 -P 192.0.2.2:80?w=3 --lb-method=weight "
            "--lb-retrytime 100 --lb-timeout 1000",
            {
                "members": [{"via": "192.0.2.1", "weight": 1}, {"via": "192.0.2.2", "weight": 3}],
                **{
                    "balance": "weighted",
                    "health_check": {"interval": "500ms", "timeout": "1000ms"},
                },
            },
        ),
        (
            "socks -P 192.0.2.1:80 -P 192.0.2.2:80 --lb-method=hash --lb-hashtarget",
            {"members": ["192.0.2.1", "192.0.2.2"], "balance": "hash-target"},
        ),
        (
            "http -P 192.0.2.1:80 --jumper socks5://bob:pw@192.0.2.9:1080",
            ["192.0.2.9", "192.0.2.1"],
        ),
        (
            "http -T ssh -P 192.0.2.1:22 -u joe -S joe.key",
            {
                "command": [
                    *("ssh", "-o", "BatchMode=yes", "-i", "joe.key", "-l", "joe"),
                    *("-W", "[%h]:%p", "192.0.2.1"),
                ]
            },
        ),
    ],
)
def test_parent_is_an_upstream(command: str, expected: object) -> None:
    assert upstream(command) == expected


@pytest.mark.parametrize(
    "command, line",
    [
        ("http -T kcp -P 192.0.2.1:80 --kcp-key s3cret", "is not reached without -T kcp"),
        ("http -T tcp -P 192.0.2.1:80 -Z s3cret", "is not reached without -Z"),
        ("sps -S ss -H aes-256-cfb -J s3cret -P 192.0.2.1:80", "Shadowsocks"),
    ],
)
def test_parent_that_cannot_be_carried_blocks_and_is_told(command: str, line: str) -> None:
    result = goproxy(command)
    assert result.config["listeners"][0]["upstream"] == "block"
    assert any(line in why for _, why in result.lost)
    assert "s3cret" not in result.text


@pytest.mark.parametrize(
    "command",
    [
        *("http -t kcp -p :80 --kcp-key x", "socks -t tcp -z x -p :80", "sps -m -p :80"),
        *("tcp -p :80 -T tls -P 192.0.2.1:80", "tcp -p :80 -T udp -P 192.0.2.1:53"),
        *("udp -p :53 -T tcp -P 192.0.2.1:80", "dns --default system -p :53", "keygen -C proxy"),
        *("http -p :x", "server -r :80@:80 -P 192.0.2.1:33080"),
    ],
)
def test_command_that_cannot_be_carried_leaves_no_listener(command: str) -> None:
    result = goproxy(command)
    assert result.config["listeners"] == []
    assert len(result.lost) == len(result.notes.directives)


def test_lists_are_rules(tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text("a.example\n# no\n192.0.2.0/24\n")
    rules = goproxy(
        "http -p 127.0.0.1:80 -T tcp -P 192.0.2.1:80 -b blocked.txt -d str://b.example "
        "--stop 'str://**.ads.example,*.c.example,d.example' --stop-port str://25,6000-6010 "
        "--intelligent=intelligent",
        str(tmp_path / "a.sh"),
    ).rules
    assert rules == [
        {"domain": ["*.ads.example", r"regex:^[^.]*\.c\.example$", "d.example"], "via": "block"},
        {"port": [25, "6000-6010"], "via": "block"},
        {"ip": "192.0.2.0/24", "via": "192.0.2.1"},
        {"domain": ".a.example", "via": "192.0.2.1"},
        {"domain": ".b.example", "via": "direct"},
        {"via": "auto", "upstream": "192.0.2.1"},
    ]


def test_list_of_permitted_targets_that_cannot_be_read_permits_nothing() -> None:
    result = goproxy("http -p 127.0.0.1:80 --only /nonexistent --ip-allow /nonexistent")
    assert result.rules == [{"via": "block"}]
    assert len(result.lost) == 2


def test_users_have_limits_and_upstreams(tmp_path: Path) -> None:
    (tmp_path / "users").write_text("ann:two:5:1000:http://192.0.2.9:3128\n")
    config = goproxy("socks -p :1080 -a bob:one -F users", str(tmp_path / "a.sh")).config
    assert config["users"] == {
        "bob": {"password": "one"},
        "ann": {
            **{"password": "two", "limits": {"connections": 5, "rate": "8000bit/s"}},
            "upstream": "192.0.2.9",
        },
    }


@pytest.mark.parametrize("option", ["-F /nonexistent", "--auth-url http://192.0.2.1/auth"])
def test_users_that_are_not_known_leave_nothing_open(option: str) -> None:
    result = goproxy(f"http -p :80 {option}")
    assert result.config["listeners"][0]["auth"] == "required"
    assert list(result.config["users"]) == ["change-me"]


def test_dns_asks_its_servers_through_the_parent() -> None:
    config = goproxy("dns -S socks -T tcp -P 192.0.2.1:1080 -q 1.1.1.1#5353 -p 127.0.0.1:53").config
    assert config["dns"]["servers"] == [{"url": "1.1.1.1:5353", "upstream": "192.0.2.1"}]
    assert config["upstreams"] == {"192.0.2.1": "socks5h://192.0.2.1:1080"}
    assert len(goproxy("dns --default direct").config["dns"]["servers"]) == 3


def test_server_of_a_bridge_is_a_listener_through_the_agent() -> None:
    result = converted("goproxy", TUNNEL, "proxies.sh")
    bridge = result.config["tunnel"]["bridge"]
    assert bridge["listen"] == ":33080"
    assert bridge["tls"] == {
        **{"certificate": "proxy.crt", "key": "proxy.key", "client_ca": "proxy.crt"}
    }
    tokens = [agent["token"] for agent in bridge["agents"].values()]
    assert list(bridge["agents"]) == ["home", "office"] and len(set(tokens)) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", token) for token in tokens)
    assert result.config["listeners"] == [
        {
            **{"protocol": "tcp", "listen": "127.0.0.1:28080", "target": "127.0.0.1:80"},
            "upstream": "tunnel://home",
        },
        {
            **{"protocol": "udp", "listen": ":53", "target": "192.0.2.53:53"},
            **{"upstream": "tunnel://office", "allow_open": True},
        },
    ]
    assert result.lost == []


def test_client_is_an_agent_and_an_exit() -> None:
    result = goproxy("client -P bridge.example:33080 -C proxy.crt -K proxy.key --k home")
    assert result.config["tunnel"]["agent"] == {
        **{"bridge": "tls://bridge.example:33080", "name": "home", "exit": True},
        "token": "write here the token of the bridge",
        "tls": {"ca": "proxy.crt", "certificate": "proxy.crt", "key": "proxy.key"},
    }
    # An exit refuses this machine's own services unless it is told not to.
    assert result.config["destinations"] == {"allow": ["loopback"]}


def test_no_secret_is_in_a_comment() -> None:
    result = goproxy(
        "sps -p :80 -a bob:s3cret -A ann:s3cret -P http://x:s3cret@192.0.2.1:80 -j s3cret"
    )
    comments = [line for line in result.text.splitlines() if "# " in line]
    assert "s3cret" not in "".join(comments)
