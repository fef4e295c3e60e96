"""squid.conf: listeners, access lists, parents, and what else belongs to a forward proxy."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.ctl.convert.draft.draft import UNUSABLE_HASH
from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

PORT = "http_port 3128\n"
DENY = "http_access deny all\n"
BLOCK = {"via": "block"}


def squid(text: str, path: str = "squid.conf") -> Converted:
    return converted("squid", text, path)


def access(*lines: str) -> list[dict[str, object]]:
    """Return the rules of a file with one port and these lines."""
    return squid(PORT + "\n".join(lines) + "\n").rules


def test_listener_lets_in_who_is_allowed_anything() -> None:
    result = squid(
        PORT + "acl lan src 10.0.0.0/8 # the office\nacl lan src 192.168.1.0-192.168.1.255\n"
        "http_access allow lan\n" + DENY
    )
    [listener] = result.config["listeners"]
    assert listener == {
        "protocol": "http",
        "listen": ":3128",
        "network": ["tcp"],
        "clients": ["10.0.0.0/8", "192.168.1.0/24"],
    }
    assert result.rules == [{"client": ["10.0.0.0/8", "192.168.1.0/24"], "via": "direct"}, BLOCK]
    assert result.lost == []


def test_port_has_an_address_a_name_and_tls() -> None:
    result = squid(
        "http_port 127.0.0.1:3128 name=local\nhttp_port [::1]:3129\n"
        "https_port 8443 tls-cert=/etc/a.pem tls-key=/etc/a.key tls-cafile=/etc/ca.pem\n"
        "acl in myportname local\nhttp_access allow in\n" + DENY
    )
    listeners = result.config["listeners"]
    assert [(entry["listen"], entry.get("name")) for entry in listeners] == [
        ("127.0.0.1:3128", "local"),
        ("[::1]:3129", None),
        (":8443", None),
    ]
    assert listeners[2]["tls"] == {
        "certificate": "/etc/a.pem",
        "key": "/etc/a.key",
        "client_ca": "/etc/ca.pem",
    }
    assert result.rules[0] == {"listener": "local", "via": "direct"}


@pytest.mark.parametrize("mode, protocol", [("intercept", "redirect"), ("tproxy", "tproxy")])
def test_intercepted_connections_have_transparent_listeners(mode: str, protocol: str) -> None:
    result = squid(f"http_port 3129 {mode}\nacl lan src 10.0.0.0/8\nhttp_access allow lan\n")
    assert result.config["listeners"][0]["protocol"] == protocol
    assert any("kernel" in why for _, why in result.changed)


def test_bumping_and_reverse_proxies_are_not_carried() -> None:
    result = squid(
        "http_port 3128 ssl-bump cert=/a.pem\nhttp_port 80 accel defaultsite=a.example\n"
    )
    assert [line for line, _ in result.lost] == [1, 2]
    assert [entry["listen"] for entry in result.config["listeners"]] == [":3128"]


def test_lists_of_a_line_are_joined_by_and_and_those_of_a_name_by_or() -> None:
    assert access(
        "acl ssl port 443 563",
        "acl safe port 80 443 1025-65535",
        "acl lan src 10.0.0.0/8",
        "acl office src 10.7.0.0/16 192.168.0.0/16",
        "http_access deny !safe",
        "http_access deny CONNECT !ssl",
        "http_access allow lan office",
        "http_access deny all",
    ) == [
        {"not": {"port": [80, 443, "1025-65535"]}, "via": "block"},
        {"command": "connect", "not": {"port": [443, 563]}, "via": "block"},
        # The only client network that is left: all who may connect.
        {"client": "10.7.0.0/16", "via": "direct"},
        BLOCK,
    ]


def test_names_addresses_times_and_expressions() -> None:
    rules = access(
        "acl bad dstdomain -n .ads.example www.bad.example 192.0.2.7",
        "acl robots dstdom_regex -i ^adserver[0-9] \\.track\\.example$",
        "acl inside dst 10.0.0.0/255.0.0.0 fd00::/8",
        "acl work time MTWHF 8:00-18:00",
        "acl work time A 10:00-12:00",
        "http_access deny bad",
        "http_access deny robots",
        "http_access allow inside work",
        "http_access allow to_localhost",
        "http_access deny all",
    )
    assert rules == [
        {"domain": [".ads.example", "www.bad.example"], "via": "block"},
        {"ip": "192.0.2.7", "via": "block"},
        {"domain": ["regex:^adserver[0-9]", "*.track.example"], "via": "block"},
        {"ip": ["10.0.0.0/8", "fd00::/8"]}
        | {"hours": ["mon,tue,wed,thu,fri 8:00-18:00", "sat 10:00-12:00"], "via": "direct"},
        {"ip": ["127.0.0.0/8", "0.0.0.0", "::1", "::"], "via": "direct"},
        BLOCK,
    ]


def test_flows_that_no_line_is_about_get_the_opposite_of_the_last_line() -> None:
    banned = "acl banned src 10.9.0.0/16"
    assert access(banned, "http_access deny banned") == [
        {"client": "10.9.0.0/16", "via": "block"},
        {"via": "direct"},
    ]
    assert access(banned, "http_access allow banned")[-1] == BLOCK
    assert access(banned) == [BLOCK]


def test_lists_about_the_cache_match_nothing() -> None:
    result = squid(
        PORT
        + "acl purge method PURGE\nhttp_access allow localhost manager\nhttp_access deny purge\n"
        "http_access deny manager\nhttp_access allow localhost\n" + DENY
    )
    assert result.rules == [{"via": "direct"}, BLOCK] or result.rules == [
        {"client": ["127.0.0.1", "::1"], "via": "direct"},
        BLOCK,
    ]
    assert result.config["listeners"][0]["clients"] == ["127.0.0.1", "::1"]
    assert result.lost == []


def test_what_rules_cannot_say_is_left_out_and_named() -> None:
    result = squid(
        PORT + "acl words url_regex -i casino\nacl posts method POST\nacl lan src 10.0.0.0/8\n"
        "http_access deny words\nhttp_access allow lan posts\nhttp_access deny missing\n"
        "http_access allow lan\n" + DENY
    )
    assert [line for line, _ in result.lost] == [2, 3, 5, 6, 7]
    assert result.rules == [{"client": "10.0.0.0/8", "via": "direct"}, BLOCK]


def test_lists_in_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "short").write_text(".a.example\n# a comment\nb.example # b\n")
    names = [f"n{number}.example" for number in range(200)]
    (tmp_path / "long").write_text("\n".join(names))
    (tmp_path / "more.conf").write_text("http_access deny long\n")
    result = squid(
        PORT + 'acl short dstdomain "short"\nacl long dstdomain "long"\n'
        'acl none dstdomain "/nonexistent"\nhttp_access deny short\nhttp_access deny none\n'
        "include more*.conf\n" + DENY,
        str(tmp_path / "squid.conf"),
    )
    assert result.rules == [
        {"domain": [".a.example", "b.example"], "via": "block"},
        {"domain_file": str(tmp_path / "long"), "via": "block"},
        BLOCK,
    ]
    assert "more.conf:1: http_access deny long" in result.text
    assert [line for line, _ in result.lost] == [4, 6]


HELPER = "auth_param basic program /usr/lib/squid/basic_ncsa_auth /etc/squid/passwd\n"
ANYBODY = "acl anybody proxy_auth REQUIRED\n"


def test_login_is_required_if_nothing_is_allowed_without() -> None:
    result = squid(
        HELPER + PORT + ANYBODY + "acl lan src 10.0.0.0/8\nhttp_access deny !anybody\n"
        "http_access allow lan\n" + DENY
    )
    assert result.config["listeners"][0]["auth"] == "required"
    assert result.config["auth"]["command"][3:] == [
        "/usr/lib/squid/basic_ncsa_auth",
        "/etc/squid/passwd",
    ]
    assert result.rules == [{"client": "10.0.0.0/8", "via": "direct"}, BLOCK]


def test_list_with_a_login_refuses_who_has_none() -> None:
    result = squid(
        HELPER + PORT + "acl bosses proxy_auth alice bob\nacl lan src 10.0.0.0/8\n"
        "http_access allow localhost\nhttp_access allow lan bosses\nhttp_access allow lan\n" + DENY
    )
    assert result.config["listeners"][0]["auth"] == "optional"
    assert result.rules == [
        {"client": ["127.0.0.1", "::1"], "via": "direct"},
        # Squid asks for a login here, and later lines do not count for who gives none.
        {"client": "10.0.0.0/8", "not": {"user": "*"}, "via": "block"},
        {"client": "10.0.0.0/8", "user": ["alice", "bob"], "via": "direct"},
        {"client": "10.0.0.0/8", "via": "direct"},
        BLOCK,
    ]


def test_login_without_a_helper_lets_nobody_in() -> None:
    result = squid(
        "auth_param digest program /x\n" + PORT + ANYBODY + "http_access allow anybody\n"
    )
    assert result.config["users"] == {"change-me": {"password": UNUSABLE_HASH}}
    assert [line for line, _ in result.lost] == [1]


ALLOW = PORT + "acl lan src 10.0.0.0/8\nhttp_access allow lan\n" + DENY
LAN = {"client": "10.0.0.0/8"}


def test_parents_get_forwarded_requests_and_connect_goes_direct() -> None:
    result = squid(
        ALLOW + "cache_peer a.example parent 3128 0 no-query login=bob:s%40crt\n"
        "cache_peer sibling.example sibling 3128 3130\n"
    )
    upstreams = result.config["upstreams"]
    assert upstreams["a.example"] == "http://bob:s%40crt@a.example:3128"
    assert upstreams["a.example-or-direct"] == {
        "members": ["a.example", "direct"],
        "balance": "failover",
    }
    assert result.rules == [
        {**LAN, "command": "http", "via": "a.example-or-direct"},
        {**LAN, "via": "direct"},
        BLOCK,
    ]
    assert "s%40crt" not in "".join(line for line in result.text.splitlines() if "# " in line)


def test_never_direct_and_always_direct() -> None:
    result = squid(
        ALLOW + "acl inside dst 10.0.0.0/8\nacl secret dst 10.9.0.0/16\n"
        "cache_peer a.example parent 3128 0 default\n"
        "always_direct deny secret\nalways_direct allow inside\nnever_direct allow all\n"
    )
    assert result.rules == [
        {**LAN, "ip": "10.0.0.0/8", "not": {"ip": "10.9.0.0/16"}, "via": "direct"},
        {**LAN, "via": "a.example"},
        BLOCK,
    ]


def test_parents_share_the_load_and_are_chosen_by_lists() -> None:
    result = squid(
        ALLOW + "acl corp dstdomain -n .corp.example\n"
        "cache_peer a.example parent 3128 0 round-robin weight=2\n"
        "cache_peer b.example parent 3128 0 round-robin name=b\n"
        "cache_peer c.example parent 8080 0 tls name=c connect-timeout=3\n"
        "cache_peer_access c allow corp\ncache_peer_access c deny all\n"
        "never_direct allow all\nnonhierarchical_direct off\n"
    )
    upstreams = result.config["upstreams"]
    assert upstreams["c.example"] == {"url": "https://c.example:8080", "timeout": "3s"}
    assert upstreams["parents"] == {
        "members": [{"via": "a.example", "weight": 2}, {"via": "b.example", "weight": 1}],
        "balance": "weighted",
    }
    assert upstreams["parents-2"] == {"members": ["parents", "c.example"], "balance": "failover"}
    assert result.rules == [
        {**LAN, "domain": ".corp.example", "via": "parents-2"},
        {**LAN, "via": "parents"},
        BLOCK,
    ]


def test_parent_that_cannot_be_an_upstream_blocks() -> None:
    result = squid(ALLOW + "cache_peer a.example parent 0 0\nnever_direct allow all\n")
    assert result.rules == [{**LAN, "via": "block"}, BLOCK]
    assert [line for line, _ in result.lost] == [5]


def test_outgoing_addresses_and_marks() -> None:
    result = squid(
        ALLOW + "acl vip src 10.7.0.0/16\ntcp_outgoing_address 192.0.2.7 vip\n"
        "tcp_outgoing_mark 0x20\n"
    )
    assert result.rules == [
        {"client": "10.7.0.0/16", "via": "direct-192.0.2.7"},
        {**LAN, "via": "direct-0x20"},
        BLOCK,
    ]
    assert result.config["upstreams"]["direct-0x20"] == {"url": "direct", "mark": "0x20"} or (
        result.config["upstreams"]["direct-0x20"] == {"url": "direct", "mark": 0x20}
    )


def test_times_names_limits_and_workers() -> None:
    result = squid(
        ALLOW + "connect_timeout 1 minute\nread_timeout 15 minutes\nrequest_timeout 30 seconds\n"
        "shutdown_lifetime 1.5 hours\ndns_nameservers 10.0.0.53 2001:db8::1\ndns_v4_first on\n"
        "workers 2\nacl many maxconn 20\nhttp_access deny many\naccess_log none\n"
        "delay_pools 1\ndelay_class 1 2\ndelay_access 1 allow all\n"
        "delay_parameters 1 -1/-1 64000/128000\n"
    )
    assert result.config["timeouts"] == {
        "connect": "60s",
        "tcp_idle": "900s",
        "handshake": "30s",
        "drain": "5400s",
    }
    assert result.config["dns"] == {"servers": ["10.0.0.53", "2001:db8::1"], "prefer": "ipv4"}
    assert (result.config["workers"], result.config["log"]) == (2, {"access": False})
    assert result.config["listeners"][0]["limits"] == {
        "connections_per_client": 20,
        "rate_per_client": "64000B/s",
    }
    assert result.lost == []


def test_proxy_header_is_taken_from_the_peers_of_a_list() -> None:
    result = squid(
        "http_port 3128 require-proxy-header\nacl lb src 10.0.0.2\n"
        "proxy_protocol_access allow lb\nacl lan src 10.0.0.0/8\nhttp_access allow lan\n"
    )
    assert result.config["listeners"][0]["proxy_protocol"] == ["10.0.0.2"]


def test_cache_and_tuning_need_nothing_and_fields_are_lost() -> None:
    result = squid(
        ALLOW + "cache_mem 64 MB\nrefresh_pattern . 0 20% 4320\ncoredump_dir /var/spool/squid\n"
        "forwarded_for delete\nicap_preview_size 1024\nvia off\nforwarded_for on\n"
        "request_header_access Referer deny all\nicap_service a reqmod_precache icap://a/\n"
        "icap_preview_enable on\nnonsense 1\n"
    )
    lost = [line for line, _ in result.lost]
    assert lost == [9, 10, 11, 12, 13, 14, 15]


def test_lines_go_on_after_a_backslash() -> None:
    result = squid(PORT + "acl lan src \\\n  10.0.0.0/8 \\\n  10.1.0.0/16\nhttp_access allow lan\n")
    assert result.config["listeners"][0]["clients"] == ["10.0.0.0/8", "10.1.0.0/16"]
