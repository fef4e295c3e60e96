"""Command lines of gost."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.ctl.convert.source import ConversionError
from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

SCRIPT = """\
#!/bin/sh
# A comment with gost -L in it.
gost -L http://bob:s3cret@:8080?bypass=10.0.0.0/8,.ads.example \\
  -L tcp://127.0.0.1:2222/192.0.2.7:22 \\
  -F 'socks5+tls://ann:pa%20ss@192.0.2.1:1080?secure=true&serverName=proxy.example' \\
  -F http://192.0.2.2:3128?knock=x >/dev/null 2>&1 &
"""
WHOLE = """\
# Made by netproxyctl convert from gost.sh.
# Check it with: netproxyd -t -c FILE
# Not carried over: gost.sh:6: knock=x: a wrong login is answered as such

listeners:
  # gost.sh:3: -L http://***@:8080
  - {protocol: http, listen: ":8080", network: [tcp], upstream: chain, auth: required}
  # gost.sh:4: -L tcp://127.0.0.1:2222/192.0.2.7:22
  - {protocol: tcp, listen: "127.0.0.1:2222", target: "192.0.2.7:22", upstream: chain}

upstreams:
  # gost.sh:5: -F socks5+tls://***@192.0.2.1:1080
  # its URL has a password: better write !file and the name of a file with the URL
  192.0.2.1: {url: "socks5h+tls://ann:pa%20ss@192.0.2.1:1080", tls: {server_name: proxy.example}}
  # gost.sh:6: -F http://192.0.2.2:3128
  192.0.2.2: http://192.0.2.2:3128
  # gost.sh:5: -F socks5+tls://***@192.0.2.1:1080
  # gost.sh:6: -F http://192.0.2.2:3128
  chain: [192.0.2.1, 192.0.2.2]

rules:
  # gost.sh:3: bypass=10.0.0.0/8,.ads.example
  - {ip: 10.0.0.0/8, listener: http-8080, via: block}
  - {domain: .ads.example, listener: http-8080, via: block}

users:
  # gost.sh:3: -L http://***@:8080
  # a password in plain text: better write its hash (netproxyctl hash-password), or !file
  bob: {password: s3cret}
"""


def gost(command: str, path: str = "gost.sh") -> Converted:
    return converted("gost", f"gost {command}\n", path)


def listener(command: str) -> dict[str, object]:
    [found] = gost(command).config["listeners"]
    assert isinstance(found, dict)
    return found


def test_script_becomes_a_configuration() -> None:
    result = converted("gost", SCRIPT, "gost.sh")
    assert result.text == WHOLE
    assert [line for line, _ in result.lost] == [6]


@pytest.mark.parametrize(
    "text",
    [
        "[Service]\nExecStart=/usr/bin/gost -L :8080 -F=http://192.0.2.1:3128\nRestart=always\n",
        "sudo ip netns exec a gost -L=:8080 -F 192.0.2.1:3128 && echo done\n",
        "docker run -p 8080:8080 gogost/gost:3.2 -L :8080 -F http://192.0.2.1:3128\n",
        "services:\n  gost:\n    image: gogost/gost\n    command: -L :8080 -F http://192.0.2.1:3128\n",
        "services:\n  gost:\n    image: ginuerzh/gost:2\n    command:\n      - -L=:8080\n"
        "      - -F=http://192.0.2.1:3128\n",
        'CMD ["gost", "-L", ":8080", "-F", "http://192.0.2.1:3128"]\n',
        "-L :8080 \\\n -F http://192.0.2.1:3128\n",
        "echo 'two\nlines'\ngost -L :8080 -F http://192.0.2.1:3128 # it's it\n",
    ],
)
def test_commands_are_found_where_people_keep_them(text: str) -> None:
    config = converted("gost", text).config
    assert config["upstreams"] == {"192.0.2.1": "http://192.0.2.1:3128"}
    assert config["listeners"][0]["listen"] == ":8080"


@pytest.mark.parametrize(
    "command, expected",
    [
        (":8080", {"protocol": "sps", "listen": ":8080", "network": ["tcp"], "allow_open": True}),
        ("socks5://127.0.0.1:1080?udp=true", {"protocol": "socks5", "listen": "127.0.0.1:1080"}),
        (
            "https://:443?cert=a.crt&key=a.key",
            {
                **{"protocol": "http", "listen": ":443", "network": ["tcp"], "allow_open": True},
                "tls": {"certificate": "a.crt", "key": "a.key"},
            },
        ),
        (
            "udp://127.0.0.1:5353/192.0.2.1:53?ttl=180s",
            {
                **{"protocol": "udp", "listen": "127.0.0.1:5353", "target": "192.0.2.1:53"},
                "udp": {"idle_timeout": "180s"},
            },
        ),
        (
            "tls://127.0.0.1:443/:80?certFile=a.pem&keyFile=a.pem",
            {
                **{"protocol": "tcp", "listen": "127.0.0.1:443", "target": "127.0.0.1:80"},
                "tls": {"certificate": "a.pem"},
            },
        ),
        (
            "red://127.0.0.1:12345",
            {"protocol": "redirect", "listen": "127.0.0.1:12345", "sniff": []},
        ),
        (
            "red://127.0.0.1:12345?sniffing=true&tproxy=true",
            {
                **{"protocol": "tproxy", "listen": "127.0.0.1:12345", "network": ["tcp"]},
                "sniff_dial": "name",
            },
        ),
        (
            "redu://127.0.0.1:12345",
            {"protocol": "tproxy", "listen": "127.0.0.1:12345", "network": ["udp"]},
        ),
        (
            "http://127.0.0.1:8080?climiter=100&limiter.in=10MB&limiter.out=10MB&interface=eth0",
            {
                **{"protocol": "http", "listen": "127.0.0.1:8080", "network": ["tcp"]},
                **{"limits": {"connections": 100, "rate": "83886080bit/s"}, "bind": "eth0"},
            },
        ),
        (
            "tcp://127.0.0.1:80/192.0.2.1:80?proxyProtocol=1&handler.proxyProtocol=2",
            {
                **{"protocol": "tcp", "listen": "127.0.0.1:80", "target": "192.0.2.1:80"},
                **{"proxy_protocol": ["0.0.0.0/0", "::/0"], "send_proxy": "v2"},
            },
        ),
    ],
)
def test_service_is_a_listener(command: str, expected: dict[str, object]) -> None:
    assert listener(f"-L '{command}'") == expected


def test_ports_of_a_range_have_targets_of_their_own() -> None:
    config = gost("-L tcp://:8000-8001/192.0.2.1:9000-9005").config
    assert [(entry["listen"], entry["target"]) for entry in config["listeners"]] == [
        (":8000", "192.0.2.1:9000"),
        (":8001", "192.0.2.1:9001"),
    ]


@pytest.mark.parametrize(
    "node, upstream",
    [
        ("192.0.2.1:3128", "http://192.0.2.1:3128"),
        ("socks5://192.0.2.1:1080?notls=true", "socks5h://192.0.2.1:1080"),
        ("socks4://joe@192.0.2.1:1080", "socks4a://joe@192.0.2.1:1080"),
        ("http://:8081?auth=dXNlcjpwYTpzcw==", "http://user:pa%3Ass@127.0.0.1:8081"),
        ("https://192.0.2.1:443", {"url": "https://192.0.2.1:443", "tls": {"insecure": True}}),
        (
            "http+tls://a.example:443?caFile=ca.pem&certFile=me.pem&keyFile=me.key",
            {
                "url": "https://a.example:443",
                "tls": {"ca": "ca.pem", "certificate": "me.pem", "key": "me.key"},
            },
        ),
        (
            "socks5://192.0.2.1:1080?so_mark=100&interface=eth1&proxyProtocol=1",
            {
                **{"url": "socks5h://192.0.2.1:1080", "bind": "eth1", "mark": 100},
                "send_proxy": "v1",
            },
        ),
        ("direct://:0?interface=eth0", {"url": "direct", "bind": "eth0"}),
        (
            "sshd://joe@gate.example:2222?privateKeyFile=id",
            {
                "command": [
                    *("ssh", "-o", "BatchMode=yes", "-i", "id", "-p", 2222, "-l", "joe"),
                    *("-W", "[%h]:%p", "gate.example"),
                ]
            },
        ),
    ],
)
def test_node_is_an_upstream(node: str, upstream: object) -> None:
    config = gost(f"-L http://127.0.0.1:8080 -F '{node}'").config
    name = config["listeners"][0]["upstream"]
    assert config["upstreams"] == {name: upstream}


def test_nodes_of_one_hop_are_a_group() -> None:
    config = gost(
        "-L :8080?hash=host -F socks5://192.0.2.1:1080,192.0.2.2:1080?strategy=hash "
        "-F http://192.0.2.3:80,192.0.2.4:80?strategy=fifo"
    ).config
    assert config["upstreams"]["group"] == {
        **{"members": ["192.0.2.1", "192.0.2.2"], "balance": "hash-target"}
    }
    assert config["upstreams"]["group-2"]["balance"] == "failover"
    assert config["upstreams"]["chain"] == ["group", "group-2"]


def test_proxy_that_cannot_be_carried_blocks_and_is_told() -> None:
    result = gost("-L :8080 -F ss://aes-256-gcm:s3cret@192.0.2.1:8388 -F http://192.0.2.2:80")
    assert result.config["listeners"][0]["upstream"] == "block"
    assert [line for line, _ in result.lost] == [1]
    assert "s3cret" not in result.text


@pytest.mark.parametrize(
    "service, why",
    [
        ("ss://aes-256-gcm:s3cret@:8388", "Shadowsocks"),
        ("relay+wss://:8443", "relay"),
        ("http+ws://:8080?path=/ws", "ws: "),
        ("sni://:443", "names alone"),
        ("tun://:8421?net=192.0.2.1/24", "network device"),
        ("tcp://:8080", "has no target"),
        ("http://bob", "has no port"),
    ],
)
def test_service_that_cannot_be_carried_is_told(service: str, why: str) -> None:
    result = gost(f"-L '{service}'")
    assert result.config["listeners"] == []
    assert why in result.lost[0][1]


def test_bypass_of_a_hop_ends_the_chain_there() -> None:
    rules = gost(
        "-L http://127.0.0.1:8080 -F http://192.0.2.1:80?bypass=~a.example,.b.example "
        "-F http://192.0.2.2:80?bypass=10.0.0.0/8,c.example:443"
    ).rules
    assert rules == [
        {"not": {"domain": ["a.example", ".b.example"]}, "via": "direct"},
        {"ip": "10.0.0.0/8", "via": "192.0.2.1"},
        {"domain": "c.example", "port": 443, "via": "192.0.2.1"},
    ]


def test_list_of_permitted_targets_with_ports_refuses_all_others() -> None:
    rules = gost("-L http://127.0.0.1:8080?bypass=~a.example:443,192.0.2.1-192.0.2.2").rules
    assert rules == [
        {"domain": "a.example", "port": 443, "via": "direct"},
        {"ip": ["192.0.2.1", "192.0.2.2"], "via": "direct"},
        {"via": "block"},
    ]


def test_permissions_of_version_2() -> None:
    rules = gost(
        "-L 'http://127.0.0.1:8080?blacklist=*:10.0.*.*:*&whitelist=tcp:*.a.example:80,443'"
    ).rules
    assert rules == [
        {"ip": "10.0.0.0/16", "via": "block"},
        {"network": "tcp", "domain": "*.a.example", "port": [80, 443], "via": "direct"},
        {"via": "block"},
    ]


def test_admission_is_who_may_connect() -> None:
    assert listener("-L http://:8080?admission=~10.0.0.0/8,::1")["clients"] == ["10.0.0.0/8", "::1"]
    result = gost("-L http://:8080?admission=10.0.0.1,bad.example")
    assert result.config["listeners"][0]["clients_deny"] == ["10.0.0.1"]
    assert "bad.example" in result.lost[0][1]


def test_login_of_one_service_does_not_open_another() -> None:
    result = gost("-L http://bob:one@:8080 -L socks5://ann:two@:1080?bind=true -L http://:8081")
    assert [entry["auth"] for entry in result.config["listeners"]] == [
        *("required", "required", "none")
    ]
    assert result.rules == [
        {"listener": "http-8080", "not": {"user": ["bob"]}, "via": "block"},
        {"listener": "socks5-1080", "not": {"user": ["ann"]}, "via": "block"},
    ]


def test_second_password_of_a_user_leaves_its_service_out() -> None:
    result = gost("-L http://bob:one@:8080 -L http://bob:two@:8081")
    assert [entry["listen"] for entry in result.config["listeners"]] == [":8080"]
    assert "another password" in result.lost[0][1]
    assert "password: two" not in result.text


def test_clients_that_need_no_login() -> None:
    result = gost("-L http://bob:pw@127.0.0.1:8080?skipauth=10.0.0.0/8")
    assert result.config["listeners"][0]["auth"] == "optional"
    [rule] = result.rules
    assert rule["not"] == {"client": ["10.0.0.0/8"], "user": "*"} and rule["via"] == "block"


def test_file_of_users(tmp_path: Path) -> None:
    (tmp_path / "users.txt").write_text("# name password\nbob pass word\nann  two\n")
    path = str(tmp_path / "gost.sh")
    config = gost("-L http://:8080?secrets=users.txt", path).config
    assert {name: user["password"] for name, user in config["users"].items()} == {
        **{"bob": "pass word", "ann": "two"}
    }
    lost = gost("-L http://:8080?secrets=none.txt", path)
    assert lost.config["listeners"][0]["auth"] == "required" and len(lost.lost) == 1


def test_bind_is_refused_unless_it_was_allowed() -> None:
    assert gost("-L socks5://127.0.0.1:1080").rules == [{"command": "bind", "via": "block"}]
    assert gost("-L socks5://127.0.0.1:1080?bind=true").rules == []


def test_dns_service_and_its_servers() -> None:
    config = gost(
        "-L 'dns://127.0.0.1:5353/1.1.1.1,tls://9.9.9.9:853?hosts=a.example:192.0.2.1' "
        "-F socks5://192.0.2.1:1080"
    ).config
    assert config["dns"] == {
        "servers": [
            {"url": "1.1.1.1", "upstream": "192.0.2.1"},
            {"url": "tls://9.9.9.9:853", "upstream": "192.0.2.1"},
        ],
        "hosts": {"a.example": ["192.0.2.1"]},
    }


def test_servers_of_a_second_service_are_told() -> None:
    result = gost("-L :8080?resolver=1.1.1.1 -L :8081?resolver=tcp://8.8.8.8")
    assert result.config["dns"]["servers"] == ["1.1.1.1"]
    assert "same for all listeners" in result.changed[-1][1]


def test_ports_at_the_end_of_the_chain_are_services_of_an_agent() -> None:
    result = gost(
        "-L rtcp://:2222/192.0.2.7:22 -L rudp://:5353/:53 -F http://192.0.2.9:3128 "
        "-F relay+tls://bridge.example:8443?caFile=ca.pem"
    )
    assert result.config["tunnel"]["agent"] == {
        **{"bridge": "tls://bridge.example:8443", "name": "gost", "upstream": "192.0.2.9"},
        "token": "write here the token of the bridge",
        "tls": {"ca": "ca.pem"},
        "services": {2222: "192.0.2.7:22", "5353/udp": "127.0.0.1:53"},
    }
    assert result.lost == []


def test_port_without_a_chain_is_a_listener() -> None:
    assert listener("-L rtcp://127.0.0.1:2222/192.0.2.7:22")["protocol"] == "tcp"


def test_parts_have_chains_of_their_own() -> None:
    config = gost("-L :8080 -- -L :8081 -L :8082?ignoreChain=true -F http://192.0.2.1:80").config
    assert [entry.get("upstream") for entry in config["listeners"]] == [None, "192.0.2.1", None]


def test_options_of_the_program() -> None:
    result = gost("-L http://127.0.0.1:8080 -DD -metrics 127.0.0.1:9000 -api :18080 -O yaml")
    assert result.config["log"] == {"level": "debug"}
    assert result.config["metrics"] == "127.0.0.1:9000"
    assert len(result.lost) == 1


@pytest.mark.parametrize("text", ["", "echo hello\n", "gost -L ':8080\n"])
def test_text_without_a_command_is_refused(text: str) -> None:
    with pytest.raises(ConversionError):
        converted("gost", text)


def test_no_secret_is_in_a_comment() -> None:
    result = gost(
        "-L http://bob:s3cret@:8080 -L http://:8081?auth=Ym9iOnMzY3JldA -F http://x:s3cret@a.b:1"
    )
    comments = [line for line in result.text.splitlines() if "# " in line]
    assert "s3cret" not in "".join(comments) and "Ym9i" not in "".join(comments)
