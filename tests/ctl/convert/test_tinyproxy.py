"""tinyproxy.conf: the listener, access, ports, filters and upstreams."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

PORT = "Port 8888\n"


def tinyproxy(text: str, path: str = "tinyproxy.conf") -> Converted:
    return converted("tinyproxy", PORT + text, path)


def test_listener_has_the_port_the_clients_and_the_limits() -> None:
    result = tinyproxy("Allow 127.0.0.1\nAllow ::1\nMaxClients 100\nTimeout 600\nLogLevel Notice\n")
    assert result.config == {
        "listeners": [
            {"protocol": "http", "listen": ":8888", "network": ["tcp"]}
            | {"limits": {"connections": 100}, "clients": ["127.0.0.1", "::1"]}
        ],
        "timeouts": {"tcp_idle": "600s"},
        "log": {"level": "info"},
    }
    assert result.lost == []


def test_each_listen_is_a_listener() -> None:
    result = tinyproxy("Listen 127.0.0.1\nListen ::1\nBindSame yes\n")
    listeners = result.config["listeners"]
    assert [entry["listen"] for entry in listeners] == ["127.0.0.1:8888", "[::1]:8888"]
    assert {entry["bind"] for entry in listeners} == {"incoming"}
    assert "allow_open" not in listeners[0]


def test_access_is_in_the_order_of_the_file() -> None:
    result = tinyproxy(
        "Deny 10.1.0.0/16\nAllow 10.0.0.0/255.0.0.0\nAllow localhost\nAllow 10.1.2.3\n"
    )
    clients = result.config["listeners"][0]["clients"]
    assert clients == ["!10.1.0.0/16", "10.0.0.0/8", "127.0.0.1", "::1"]


def test_proxy_for_everybody_says_so() -> None:
    assert tinyproxy("").config["listeners"][0]["allow_open"] is True


def test_client_by_name_is_not_let_in() -> None:
    result = tinyproxy("Allow .example.org\nAllow 10.0.0.0/8\n")
    assert result.config["listeners"][0]["clients"] == ["10.0.0.0/8"]
    assert [line for line, _ in result.lost] == [2]


def test_users_and_their_passwords() -> None:
    result = tinyproxy("BasicAuth bob pass:word\nBasicAuth eve $1$abc$abcdefghijklmnopqrstuv\n")
    assert result.config["listeners"][0]["auth"] == "required"
    assert result.config["users"]["bob"] == {"password": "pass:word"}
    # Not mistaken for the hash that it looks like.
    assert result.config["users"]["eve"]["password"].startswith("scrypt$")
    comments = [line for line in result.text.splitlines() if "#" in line]
    assert not any("word" in line and "pass:" in line for line in comments)


@pytest.mark.parametrize(
    "ports, rule",
    [
        ("443 563", {"command": "connect", "not": {"port": [443, 563]}, "via": "block"}),
        ("0", {"command": "connect", "via": "block"}),
    ],
)
def test_connect_ports_concern_connect_alone(ports: str, rule: dict[str, object]) -> None:
    text = "".join(f"ConnectPort {port}\n" for port in ports.split())
    assert tinyproxy(text).rules == [rule]


def test_last_upstream_that_matches_decides() -> None:
    result = tinyproxy(
        'Upstream http bob:s3cret@proxy.example:8080\nUpstream none "10.0.0.0/8"\n'
        'Upstream socks5 192.0.2.9:1080 ".onion.example"\nUpstream none "."\n'
        'Upstream http 0.0.0.0:0 ".ads.example"\nUpstream socks4 192.0.2.7:1080 "a.example"\n'
    )
    assert result.rules == [
        {"domain": "a.example", "via": "192.0.2.7"},
        {"domain": "*.ads.example", "via": "block"},
        {"domain": "regex:^[^.]*$", "via": "direct"},
        {"domain": "*.onion.example", "via": "192.0.2.9"},
        {"ip": "10.0.0.0/8", "via": "direct"},
    ]
    assert result.config["default"] == "proxy.example"
    assert result.config["upstreams"]["proxy.example"] == "http://bob:s3cret@proxy.example:8080"
    assert "bob:***@proxy" in result.text


FILTER = r"""
# the file of a filter
^cnn\.com$
\.ads\.example$    # the names below it
cnn
^adserver[0-9]\{1,2\}
^10\.1\.2\.3$
"""


def test_filter_refuses_the_names_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "filter").write_text(FILTER)
    result = tinyproxy('Filter "filter"\nFilterCaseSensitive On\n', str(tmp_path / "t.conf"))
    names = ["cnn.com", "*.ads.example", "keyword:cnn", "regex:^adserver[0-9]{1,2}"]
    assert result.rules == [{"domain": names, "via": "block"}, {"ip": ["10.1.2.3"], "via": "block"}]
    assert result.lost == []


def test_filter_that_denies_by_default_permits_the_names_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "filter").write_text("*.example.org\nwww?.example.com\n")
    text = 'Filter "filter"\nFilterType fnmatch\nFilterDefaultDeny Yes\n'
    [rule] = tinyproxy(text, str(tmp_path / "t.conf")).rules
    assert rule == {
        "not": {"domain": ["*.example.org", r"regex:^www.\.example\.com$"]},
        "via": "block",
    }


def test_filter_that_cannot_be_read_is_not_carried() -> None:
    result = tinyproxy('Filter "/nonexistent/filter"\nFilterDefaultDeny Yes\n')
    assert [line for line, _ in result.lost] == [2]
    # It permits nothing, as tinyproxy with an empty file.
    assert result.rules == [{"via": "block"}]


def test_fields_pages_and_paths_are_not_carried() -> None:
    result = tinyproxy(
        'AddHeader "A" "b"\nXTinyproxy Yes\nErrorFile 404 "x.html"\nReversePath "/" "http://a/"\n'
        'DisableViaHeader Yes\nFilterURLs On\nAnonymous "Host"\nNonsense 1\n'
    )
    assert [line for line, _ in result.lost] == list(range(2, 10))


def test_switches_that_are_off_change_nothing() -> None:
    assert tinyproxy("XTinyproxy No\nDisableViaHeader off\nReverseOnly No\n").lost == []
