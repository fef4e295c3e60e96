"""redsocks.conf: transparent listeners, datagrams and DNS."""

from __future__ import annotations

import pytest

from netproxy.ctl.convert.source import ConversionError
from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

BASE = """
base {
    log_debug = on; // a comment
    /* another = one; */
    log_info = off;
    log = "file:/var/log/redsocks.log";
    daemon = on;
    redirector = iptables;
    redsocks_conn_max = 500;
}
"""
REDSOCKS = """
redsocks {
    local_ip = 0.0.0.0;
    local_port = 12345;
    ip = proxy.example;
    port = 1080;
    type = socks5;
    login = "bob";
    password = "a b;c";
    splice = false;
}
"""
REDUDP = """
redudp {
    local_ip = 127.0.0.1;
    local_port = 10053;
    ip = 10.0.0.1;
    port = 1080;
    %s
    udp_timeout = 30;
    udp_timeout_stream = 180;
}
"""
DNSTC = "dnstc { local_ip = 127.0.0.1; local_port = 5300; }"


def redsocks(text: str) -> Converted:
    return converted("redsocks", text)


def test_redsocks_section_is_a_listener_with_its_upstream() -> None:
    result = redsocks(BASE + REDSOCKS)
    assert result.config == {
        "listeners": [
            {"protocol": "redirect", "listen": "0.0.0.0:12345", "sniff": []}
            | {"upstream": "proxy.example", "limits": {"connections": 500}, "allow_open": True}
        ],
        "upstreams": {"proxy.example": "socks5://bob:a%20b%3Bc@proxy.example:1080"},
        "tcp": {"splice": False},
        "log": {"level": "debug", "access": False},
    }
    assert result.lost == []
    assert "netproxyctl nft" in result.text
    assert "a b;c" not in result.text


@pytest.mark.parametrize(
    "kind, scheme", [("socks4", "socks4"), ("http-connect", "http"), ("http-relay", "http")]
)
def test_kinds_of_proxies(kind: str, scheme: str) -> None:
    text = f"redsocks {{ local_port = 1; ip = 192.0.2.1; port = 3128; type = {kind}; }}"
    assert redsocks(text).config["upstreams"] == {"192.0.2.1": f"{scheme}://192.0.2.1:3128"}


def test_unknown_kind_of_a_proxy_blocks() -> None:
    result = redsocks("redsocks { local_port = 1; ip = 192.0.2.1; port = 1; type = shadow; }")
    assert result.config["listeners"][0]["upstream"] == "block"
    assert [line for line, _ in result.lost] == [1]


def test_datagrams_with_a_target_have_a_forwarder() -> None:
    result = redsocks(REDUDP % "dest_ip = 192.0.2.2; dest_port = 53;")
    assert result.config["listeners"] == [
        {"listen": "127.0.0.1:10053", "upstream": "10.0.0.1", "protocol": "udp"}
        | {"target": "192.0.2.2:53", "udp": {"idle_timeout": "180s"}}
    ]


def test_datagrams_without_a_target_are_transparent() -> None:
    [listener] = redsocks(REDUDP % "").config["listeners"]
    assert (listener["protocol"], listener["network"]) == ("tproxy", ["udp"])


def test_truncated_answers_become_queries_through_the_proxy() -> None:
    result = redsocks(DNSTC + REDUDP % "dest_ip = 192.0.2.2; dest_port = 53;")
    assert {"protocol": "dns", "listen": "127.0.0.1:5300"} in result.config["listeners"]
    assert result.config["dns"] == {"servers": [{"url": "tcp://192.0.2.2", "upstream": "10.0.0.1"}]}


def test_truncated_answers_without_a_known_server_are_not_carried() -> None:
    result = redsocks(DNSTC)
    assert result.config == {"listeners": []}
    assert [line for line, _ in result.lost] == [1, 1, 1]


def test_dns_over_tcp_is_a_dns_listener() -> None:
    result = redsocks(
        "dnsu2t { local_ip = 127.0.0.1; local_port = 5313;"
        " remote_ip = 192.0.2.8; remote_port = 54; }"
    )
    assert result.config["listeners"] == [{"protocol": "dns", "listen": "127.0.0.1:5313"}]
    assert result.config["dns"] == {"servers": ["tcp://192.0.2.8:54"]}


def test_what_is_not_carried_is_named() -> None:
    result = redsocks(
        "base {\n redirector = pf;\n}\nredsocks {\n local_port = 1;\n ip = 192.0.2.1;\n port = 1;\n"
        " disclose_src = X-Forwarded-For;\n on_proxy_fail = forward_http_err;\n autoproxy = 1;\n}\n"
    )
    assert [line for line, _ in result.lost] == [2, 8, 9, 10]


@pytest.mark.parametrize("text", ["base {", "redsocks { local_port = x; }"])
def test_broken_files_are_an_error(text: str) -> None:
    with pytest.raises(ConversionError):
        redsocks(text)
