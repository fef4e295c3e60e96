"""danted.conf: settings, client rules, socks rules with their replies, and routes."""

from __future__ import annotations

import pytest

from netproxy.ctl.convert.draft.draft import UNUSABLE_HASH
from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

HEAD = """
internal: 10.1.1.1 port = 1080
external: 192.0.2.1
clientmethod: none
"""
NONE = "socksmethod: none\n"
CLIENTS = "client pass { from: 10.0.0.0/8 to: 0.0.0.0/0 }\n"
REPLIES = "socks pass { from: 0/0 to: 0/0\n command: bindreply udpreply\n}\n"
EVERYTHING = "socks pass { from: 0/0 to: 0/0 }\n"
BLOCK = {"via": "block"}


def dante(rules: str, head: str = HEAD + NONE + CLIENTS) -> Converted:
    return converted("dante", head + rules)


def test_listener_has_the_address_the_bind_and_the_clients() -> None:
    result = dante(EVERYTHING)
    assert result.config["listeners"] == [
        {"protocol": "socks5", "listen": "10.1.1.1:1080", "bind": "192.0.2.1"}
        | {"clients": ["10.0.0.0/8"]}
    ]
    assert result.rules == [{"via": "direct"}]


def test_client_rules_are_in_force_in_their_order() -> None:
    rules = (
        "client block { from: 10.9.0.0/16 to: 0/0 }\n"
        "client pass { from: 10.9.9.0/24 to: 0/0 }\n"  # within the network above: never reached
        "client pass { from: 10.0.0.0/8 port 1-65535 to: 0/0 }\n"
    )
    result = dante(EVERYTHING, HEAD + NONE + rules)
    assert result.config["listeners"][0]["clients"] == ["!10.9.0.0/16", "10.0.0.0/8"]


def test_client_rule_is_about_the_address_that_it_names() -> None:
    head = "internal: 10.1.1.1 port = 1080\ninternal: 10.2.2.2 port = 1081\n" + NONE
    rules = (
        "client pass { from: 10.0.0.0/8 to: 10.1.1.1 }\nclient pass { from: 10.7.0.0/16 to: 0/0 }\n"
    )
    result = dante(EVERYTHING, head + rules)
    assert [entry["clients"] for entry in result.config["listeners"]] == [
        ["10.0.0.0/8"],
        ["10.7.0.0/16"],
    ]


@pytest.mark.parametrize("head", [HEAD + CLIENTS, HEAD + NONE])
def test_file_without_a_method_or_a_client_rule_serves_nobody(head: str) -> None:
    result = dante(EVERYTHING, head)
    assert result.rules == [BLOCK] or result.config["listeners"][0]["clients"] == ["127.0.0.1"]


def test_target_has_a_network_a_name_and_ports() -> None:
    result = dante(
        "socks block { from: 0.0.0.0/0 to: 172.16.0.0/12 port = http }\n"
        "socks block { from: 0/0 to: .ads.example port ge 1024 }\n"
        "socks block { from: 0/0 to: www.ads.example port 80-443 }\n"
        "socks block { from: 10.7.0.0/16 to: 0/0 port != 25\n protocol: tcp\n command: connect }\n"
        + EVERYTHING
    )
    both = ["connect", "udp"]
    assert result.rules == [
        {"command": both, "ip": "172.16.0.0/12", "port": 80, "via": "block"},
        {"command": both, "domain": ".ads.example", "port": "1024-65535", "via": "block"},
        # The ports below 1024: the others are in the rule before.
        {"command": both, "domain": "www.ads.example", "port": "80-443", "via": "block"},
        {"command": "connect", "client": "10.7.0.0/16", "port": ["0-24", "26-65535"]}
        | {"via": "block"},
        {"via": "direct"},
    ]


def test_loopback_interface_stands_for_all_loopback_addresses() -> None:
    rules = dante("socks block { from: 0/0 to: lo log: connect }\n" + EVERYTHING).rules
    assert rules[0] == {"command": ["connect", "udp"], "ip": ["127.0.0.0/8", "::1"], "via": "block"}


def test_answers_pass_only_from_where_a_rule_says() -> None:
    result = dante(
        "socks pass { from: 10.0.0.0/8 to: 0/0\n command: connect udpassociate bind\n}\n"
        "socks pass { from: 198.51.100.0/24 to: 10.0.0.0/8\n command: udpreply\n}\n"
    )
    assert result.rules == [
        {"command": "connect", "via": "direct"},
        {"command": "udp", "ip": "198.51.100.0/24", "via": "direct"},
        {"command": "udp", "via": "block"},
        {"command": "bind", "via": "block"},
        BLOCK,
    ]


def test_without_answers_to_datagrams_the_listener_has_no_udp() -> None:
    result = dante("socks pass { from: 10.0.0.0/8 to: 0/0\n command: connect\n}\n")
    assert result.config["listeners"][0]["network"] == ["tcp"]
    assert any("udpreply" in why for _, why in result.changed)


def test_rule_for_bind_looks_at_no_target() -> None:
    rules = dante(
        "socks block { from: 0/0 to: 0/0 port le 1023\n command: bind\n}\n"
        "socks block { from: 10.8.0.0/16 to: 0/0\n command: bind\n}\n" + EVERYTHING
    ).rules
    # No port that danted would listen on is below 1024.
    assert rules == [
        {"command": "bind", "client": "10.8.0.0/16", "via": "block"},
        {"via": "direct"},
    ]


def test_rule_with_a_method_or_a_user_wants_a_login() -> None:
    head = HEAD + "socksmethod: username none\n" + CLIENTS
    result = dante(
        "socks pass { from: 0/0 to: .a.example\n socksmethod: username\n}\n"
        "socks pass { from: 0/0 to: .b.example\n user: joe\n}\n"
        "socks block { from: 0/0 to: .a.example }\n" + EVERYTHING,
        head,
    )
    assert result.config["listeners"][0]["auth"] == "optional"
    assert result.config["users"] == {"joe": {"password": UNUSABLE_HASH}}
    assert result.rules[0] == {
        "command": ["connect", "udp"],
        "user": "*",
        "domain": ".a.example",
        "via": "direct",
    }
    assert result.rules[1]["user"] == "joe"


def test_login_is_required_if_no_other_method_is_there() -> None:
    result = dante(EVERYTHING, HEAD + "socksmethod: username\n" + CLIENTS)
    assert result.config["listeners"][0]["auth"] == "required"
    assert result.rules == [{"user": "*", "via": "direct"}, BLOCK]


def test_routes_lead_connect_and_refuse_the_rest() -> None:
    result = dante(
        EVERYTHING + "route { from: 0/0 to: 10.5.0.0/16 via: direct }\n"
        "route { from: 0/0 to: 0/0 via: socks.example port = 1081 }\n"
    )
    assert result.rules == [
        {"command": "connect", "ip": "10.5.0.0/16", "via": "direct"},
        {"command": "connect", "via": "socks.example"},
        BLOCK,
    ]
    assert result.config["upstreams"] == {"socks.example": "socks5h://socks.example:1081"}


def test_times_and_the_log() -> None:
    result = dante(
        EVERYTHING,
        "logoutput: stderr /var/log/sockd.log\ntimeout.negotiate: 30\ntimeout.io: 0\n"
        "timeout.connect: 20\ndebug: 1\n" + HEAD + NONE + CLIENTS,
    )
    assert result.config["timeouts"] == {"handshake": "30s", "tcp_idle": "3650d", "connect": "20s"}
    assert result.config["log"] == {"level": "debug"}
    assert [line for line, _ in result.changed if line] == [1]


def test_what_is_not_carried_is_named_with_its_line() -> None:
    result = dante(
        "socks pass {\n from: 0/0 to: 0/0\n libwrap: spawn finger @%a\n bandwidth: 1024\n}\n"
        "monitor { from: 0/0 to: 0/0\n alarm.data: 1\n}\n",
        NONE + CLIENTS + "internal: 10.1.1.1\nextension: bind\nsrchost: nodnsunknown\n",
    )
    assert [line for line, _ in result.lost] == [4, 5, 8, 9, 11, 11, 11, 12]
    # A rule is not lost for an action that is.
    assert result.rules == [{"via": "direct"}]


def test_rule_with_a_group_is_left_out_instead_of_matching_everybody() -> None:
    result = dante("socks pass { from: 0/0 to: 0/0\n group: staff\n}\n")
    assert result.rules == [BLOCK]


def test_file_without_an_internal_address_has_no_listener() -> None:
    result = converted("dante", "logoutput: stderr\nsocks block { from: 0/0 to: lo }\n")
    assert (result.config, result.lost) == ({"listeners": []}, [])


@pytest.mark.parametrize("text", ["socks pass { from: 0/0", "from: 0/0 }"])
def test_unbalanced_braces_are_an_error(text: str) -> None:
    from netproxy.ctl.convert.source import ConversionError

    with pytest.raises(ConversionError, match="old.conf:1: a "):
        converted("dante", text)
