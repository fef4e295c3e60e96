"""3proxy.cfg: services with the access lists, parents and limits that are active at each."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.ctl.convert.draft.draft import UNUSABLE_HASH
from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

BLOCK = {"via": "block"}
USERS = 'users bob:CL:secret "ann:CL:other word"\n'


def threeproxy(text: str, path: str = "3proxy.cfg") -> Converted:
    return converted("3proxy", text, path)


def rules(*lines: str) -> list[dict[str, object]]:
    """Return the rules of a file with one service, after these commands."""
    return threeproxy("auth iponly\n" + "\n".join(lines) + "\nsocks\n").rules


def test_each_service_is_a_listener() -> None:
    result = threeproxy(
        "internal 192.0.2.1\nexternal 192.0.2.2\nmaxconn 50\nproxy -p8080 -n -a\n"
        "socks -i127.0.0.1 -e192.0.2.3 -Ni203.0.113.5\nauto -p3129 -H\n"
        "tcppm -i127.0.0.1 25 mail.example 26\nudppm 53 192.0.2.53 53\n"
    )
    common = {"bind": "192.0.2.2", "limits": {"connections": 50}}
    assert result.config["listeners"] == [
        {"protocol": "http", "listen": "192.0.2.1:8080", "network": ["tcp"], **common}
        | {"allow_open": True},
        {"protocol": "socks5", "listen": "127.0.0.1:1080", "bind": "192.0.2.3"}
        | {"announce": "203.0.113.5", "limits": {"connections": 50}},
        {"protocol": "sps", "listen": "192.0.2.1:3129", "network": ["tcp"], **common}
        | {"proxy_protocol": ["0.0.0.0/0", "::/0"], "allow_open": True},
        {"protocol": "tcp", "target": "mail.example:26", "listen": "127.0.0.1:25", **common},
        {"protocol": "udp", "target": "192.0.2.53:53", "listen": "192.0.2.1:53"}
        | {"bind": "192.0.2.2", "allow_open": True},
    ]
    assert result.lost == []


def test_services_after_flush_have_a_list_of_their_own() -> None:
    result = threeproxy(
        "auth iponly\nallow * 10.0.0.0/8\nproxy\nsocks\n"
        "flush\nallow * 192.168.0.0/16\nproxy -p3129\n"
    )
    assert result.rules == [
        {"client": "10.0.0.0/8", "listener": "http-3128", "via": "direct"},
        {"listener": "http-3128", "via": "block"},
        {"client": "10.0.0.0/8", "listener": "socks5-1080", "via": "direct"},
        {"listener": "socks5-1080", "via": "block"},
        {"client": "192.168.0.0/16", "listener": "http-3129", "via": "direct"},
        {"listener": "http-3129", "via": "block"},
    ]
    assert [entry["clients"] for entry in result.config["listeners"]] == [
        ["10.0.0.0/8"],
        ["10.0.0.0/8"],
        ["192.168.0.0/16"],
    ]


def test_entry_has_sources_targets_ports_operations_and_times() -> None:
    assert rules(
        "deny * 10.9.0.0/16,10.8.0.1-10.8.0.2",
        "allow * * 10.0.0.0/8,www.a.example,*.b.example,*ads*,c*,*d 80,8000-8100 CONNECT 1-5,0 "
        "08:00:00-17:59:59,20:00:00-21:00:00",
        "allow * * * * BIND,UDPASSOC",
    ) == [
        {"client": ["10.9.0.0/16", "10.8.0.1", "10.8.0.2"], "via": "block"},
        {"port": [80, "8000-8100"], "command": "connect", "ip": "10.0.0.0/8", "via": "direct"}
        | {"hours": ["mon-fri,sun 08:00-18:00", "mon-fri,sun 20:00-21:00"]},
        {
            "port": [80, "8000-8100"],
            "command": "connect",
            "domain": ["www.a.example", "*.b.example", "keyword:ads", "regex:^c", "regex:.d$"],
            "via": "direct",
        }
        | {"hours": ["mon-fri,sun 08:00-18:00", "mon-fri,sun 20:00-21:00"]},
        {"command": ["bind", "udp"], "via": "direct"},
        BLOCK,
    ]


def test_entry_that_refuses_a_target_refuses_all_associations() -> None:
    assert rules("deny * * 10.0.0.0/8", "allow *") == [
        {"command": "udp", "via": "block"},
        {"ip": "10.0.0.0/8", "via": "block"},
        {"via": "direct"},
    ]


def test_empty_list_allows_everything_and_so_does_a_list_without_auth() -> None:
    assert threeproxy("auth iponly\nsocks\n").rules == []
    result = threeproxy("auth none\ndeny * * 10.0.0.0/8\nsocks\n")
    assert result.rules == []
    assert any("without auth" in why for _, why in result.changed)


def test_operations_are_those_of_the_service() -> None:
    text = "auth iponly\nallow * * * 80 HTTP\nallow * * * 443 HTTPS\nallow * * * * CONNECT\nproxy\n"
    assert threeproxy(text).rules == [
        {"port": 80, "command": "http", "via": "direct"},
        {"port": 443, "command": "connect", "via": "direct"},
        BLOCK,
    ]


@pytest.mark.parametrize(
    "auth, login", [("strong", "required"), ("iponly strong", "optional"), ("iponly", "none")]
)
def test_auth_says_whether_there_is_a_login(auth: str, login: str) -> None:
    result = threeproxy(f"{USERS}auth {auth}\nallow bob\nallow * 10.0.0.0/8\nproxy\n")
    assert result.config["listeners"][0]["auth"] == login
    assert ({"user": "bob", "via": "direct"} in result.rules) is (login != "none")
    assert result.config["users"] == {
        "bob": {"password": "secret"},
        "ann": {"password": "other word"},
    }
    assert "secret" not in "".join(line for line in result.text.splitlines() if "# " in line)


def test_hashes_cannot_be_carried() -> None:
    result = threeproxy('users "test:CR:$1$qwer$CHFTUFGqkjue9HyhcMHEe1" x:NT:BD7D\nsocks\n')
    assert result.config["users"] == {
        "test": {"password": UNUSABLE_HASH},
        "x": {"password": UNUSABLE_HASH},
    }
    assert [line for line, _ in result.lost] == [1, 1] or [line for line, _ in result.lost] == [1]


def test_users_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("bob:CL:secret\nann:CL:word\n")
    (tmp_path / "more.cfg").write_text("auth strong\nallow *\n")
    text = "users $passwd\ninclude more.cfg\nproxy\nend\nnonsense\n"
    result = threeproxy(text, str(tmp_path / "3proxy.cfg"))
    assert set(result.config["users"]) == {"bob", "ann"}
    assert result.config["listeners"][0]["auth"] == "required"
    assert result.lost == []


def test_parents_are_groups_and_chains() -> None:
    result = threeproxy(
        "auth iponly\nallow * * * 80\nparent 500 socks5 192.0.2.1 1080\n"
        "parent 500 connect+ 192.0.2.2 3128 bob s3cret\nallow * * * 443\n"
        "parent 1000 socks5+ 192.0.2.3 1080\nparent 300 socks4 192.0.2.4 1080\n"
        "parent 700 https 192.0.2.5 443\nallow * * * 22\nparent 1000 extip 192.0.2.9 0\n"
        "allow * * * 25\nparent 1000 ha 0.0.0.0 0\nparent 1000 socks5 192.0.2.6 1080\nsocks\n"
    )
    upstreams = result.config["upstreams"]
    assert [rule["via"] for rule in result.rules] == [
        *("parents", "chain", "direct-192.0.2.9", "192.0.2.6", "block")
    ]
    assert upstreams["parents"] == {"members": ["192.0.2.1", "192.0.2.2"], "balance": "round-robin"}
    assert upstreams["chain"] == ["192.0.2.3", "parents-2"]
    assert upstreams["parents-2"]["balance"] == "weighted"
    assert upstreams["192.0.2.2"] == "http://bob:s3cret@192.0.2.2:3128"
    assert upstreams["direct-192.0.2.9"] == {"url": "direct", "bind": "192.0.2.9"}
    assert upstreams["192.0.2.6"] == {"url": "socks5://192.0.2.6:1080", "send_proxy": "v1"}


def test_parent_that_cannot_be_an_upstream_blocks() -> None:
    result = threeproxy("auth iponly\nallow *\nparent 1000 tcp 192.0.2.1 25\nsocks\n")
    assert result.rules == [BLOCK]
    assert [line for line, _ in result.lost] == [3]


def test_names_times_and_tls() -> None:
    result = threeproxy(
        "nserver 10.0.0.53\nnserver 10.0.0.54:5353/tcp\nnscache 1000\nnsrecord a.lan 10.0.0.9\n"
        "nsrecord bad.lan 0.0.0.0\ntimeouts 1 5 30 60 180 1800 15 60 20\n"
        "ssl_server_cert /etc/a.pem\nssl_server_key /etc/a.key\nssl_serv\n"
        "proxy\nssl_noserv\nsocks\n"
    )
    assert result.config["dns"] == {
        "servers": ["10.0.0.53", "tcp://10.0.0.54:5353"],
        "cache": 1000,
        "hosts": {"a.lan": ["10.0.0.9"], "bad.lan": []},
    }
    assert result.config["timeouts"] == {"handshake": "60s", "tcp_idle": "1800s", "connect": "20s"}
    proxy, socks = result.config["listeners"]
    assert proxy["tls"] == {"certificate": "/etc/a.pem", "key": "/etc/a.key"}
    assert "tls" not in socks


def test_limits_of_users() -> None:
    result = threeproxy(
        USERS + "auth strong\nallow *\nproxy\nbandlimin 1000000 bob\nbandlimout 500000 bob\n"
        "connlim 20 0 bob,ann\nconnlim 5 60 ann\ncountall 1 D 100 bob\ncountin 2 M 2000 bob\n"
        "bandlimin 57600 * 192.168.10.16\nnobandlimin * * * 110\n"
    )
    users = result.config["users"]
    assert users["bob"]["limits"] == {
        "rate_down": "1000000bit/s",
        "rate_up": "500000bit/s",
        "connections": 20,
        "quota": {"day": "100MB", "month": "2000MB"},
    }
    assert users["ann"]["limits"] == {"connections": 20, "connection_rate": "5/m"}
    assert [line for line, _ in result.lost] == [11, 12]


def test_what_is_not_carried_is_named() -> None:
    result = threeproxy(
        "plugin a.so start\npop3p\nadmin -p8080\nsystem reboot\nredirect 1.1.1.1 80\nradius s a\n"
        "pcre request deny x\nsocks -Rhost:1 -z\nallow * * * * HTTP_GET\nauth iponly\nproxy\nwhat\n"
        "log /var/log/3proxy.log D\nrotate 30\ndaemon\n  a comment\n"
    )
    assert sorted({line for line, _ in result.lost}) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 12]
    assert result.rules == [{"listener": "http-3128", "via": "block"}]


def test_dns_service_needs_a_server() -> None:
    result = threeproxy("dnspr\n")
    assert (result.config["listeners"], [line for line, _ in result.lost]) == ([], [1])
    result = threeproxy("nserver 10.0.0.53\ndnspr -i192.0.2.1\n")
    assert result.config["listeners"][0]["listen"] == "192.0.2.1:53"
