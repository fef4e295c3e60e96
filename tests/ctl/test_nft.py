"""What netproxyctl nft prints, by configuration and options."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy import cli
from netproxy.ctl.nft.iptables import iptables_script
from netproxy.ctl.nft.nftables import nftables_text
from netproxy.ctl.nft.routes import add_routes, remove_routes
from netproxy.ctl.nft.rules import Rules, RulesError, Wishes, make_rules
from tests.config.reading import read

pytest.importorskip("yaml")

TPROXY = "{protocol: tproxy, listen: '127.0.0.1:7893', name: lan4}"
TPROXY6 = "{protocol: tproxy, listen: '[::1]:7893', name: lan6}"
REDIRECT = "{protocol: redirect, listen: ':7892', name: red, clients: [10.0.0.0/8]}"
UDP_ALONE = "{protocol: tproxy, listen: '127.0.0.1:7893', network: udp, name: lan4}"
MARKED = "default: {url: 'socks5://192.0.2.1:1080', mark: 77}"
WISHES = Wishes((), (), "no-such-user", False)


def rules(listeners: str, more: str = "", wishes: Wishes = WISHES) -> Rules:
    return make_rules(read(f"listeners: [{listeners}]\n{more}"), wishes)


def text(listeners: str, more: str = "", wishes: Wishes = WISHES) -> str:
    return nftables_text(rules(listeners, more, wishes), ())


def test_first_listener_of_a_network_and_a_family_gets_the_flows() -> None:
    leads = rules(f"{REDIRECT}, {TPROXY}").leads
    assert [(lead.protocol, lead.network, lead.family) for lead in leads] == [
        ("redirect", "tcp", "ipv6"),
        ("redirect", "tcp", "ipv4"),
        ("tproxy", "udp", "ipv4"),
    ]


def test_tproxy_rule_names_the_listener_and_the_mark() -> None:
    printed = text(f"{TPROXY}, {TPROXY6}")
    for family, word, host in (("ipv4", "ip", "127.0.0.1"), ("ipv6", "ip6", "[::1]")):
        for network in ("tcp", "udp"):
            assert (
                f"meta nfproto {family} meta l4proto {network} "
                f"tproxy {word} to {host}:7893 meta mark set 0x4e50 accept\n"
            ) in printed


def test_redirect_needs_no_route_and_leads_only_its_clients() -> None:
    printed = text(REDIRECT)
    assert "meta nfproto ipv4 meta l4proto tcp redirect to :7892\n" in printed
    assert 'iifname != "lo" ip saddr != { 10.0.0.0/8 } return\n' in printed
    # It has no clients of IPv6.
    assert 'iifname != "lo" meta nfproto ipv6 return\n' in printed
    assert add_routes(rules(REDIRECT)) == []


def test_interfaces_upstream_servers_and_excluded_networks() -> None:
    wishes = WISHES._replace(interfaces=("br-lan",), exclude=("198.51.100.0/24", "2001:db8::/32"))
    printed = text(TPROXY, "default: [socks5://192.0.2.1:1080, http://192.0.2.2:1]", wishes)
    assert 'iifname != { "br-lan" } return\n' in printed
    assert ", 198.51.100.0/24, 192.0.2.1 }\n" in printed
    assert "ff00::/8, 2001:db8::/32 }\n" in printed
    # Only the first hop is dialled from here.
    assert "192.0.2.2" not in printed


FAKE = "dns: {fake: [198.18.0.0/15, 'fc00:1815::/64']}"


def test_fake_addresses_are_led_although_they_are_private() -> None:
    exclude = WISHES._replace(exclude=("198.18.0.0/15",), output=True)
    printed = text(f"{TPROXY}, {TPROXY6}", f"{FAKE}\n{MARKED}", exclude)
    for word, family, network in (
        ("ip", "ipv4", "198.18.0.0/15"),
        ("ip6", "ipv6", "fc00:1815::/64"),
    ):
        line = f"{word} daddr != {{ {network} }} {word} daddr @never_{family} return\n"
        # In prerouting, and for the machine's own flows.
        assert printed.count(line) == 2
    assert "ip daddr @never_ipv4 return\n" in text(TPROXY).replace("        ", "")


def test_script_of_iptables_leads_fake_addresses_before_it_returns_private_ones() -> None:
    script = iptables_script(rules(f"{TPROXY6}, {REDIRECT}", FAKE), ()).splitlines()
    for program, table, network, private, lead in (
        ("ip6tables", "mangle", "fc00:1815::/64", "fc00::/7", "-p tcp -j TPROXY"),
        ("iptables", "nat", "198.18.0.0/15", "10.0.0.0/8", "-p tcp -j REDIRECT"),
    ):
        begin = f"{program} -w -t {table} -A NETPROXY_LEAD"
        leads = [
            at for at, line in enumerate(script) if line.startswith(f"{begin} -d {network} {lead}")
        ]
        private_at = script.index(f"{begin} -d {private} -j RETURN")
        assert leads and leads[0] < private_at
        assert any(line.startswith(f"{begin} {lead}") for line in script[private_at:])


def test_upstream_known_by_name_is_told() -> None:
    assert "# The upstream server proxy.example is known by name only" in text(
        TPROXY, "default: socks5://proxy.example:1080"
    )


def test_output_leaves_out_the_marks_of_the_daemon() -> None:
    printed = text(TPROXY, MARKED, WISHES._replace(output=True, interfaces=("lan0",)))
    assert "meta mark { 0x4d } return\n" in printed
    assert 'oifname { "lan0", "lo" } return\n' in printed
    assert 'iifname "lo" meta mark != 0x4e50 return\n' in printed


@pytest.mark.parametrize(
    "more", ["", "upstreams: {a: {url: direct, mark: 1}}", "default: {url: direct, mark: 0x4e50}"]
)
def test_output_that_would_be_a_loop_is_refused(more: str) -> None:
    with pytest.raises(RulesError):
        rules(TPROXY, more, WISHES._replace(output=True))


def test_root_is_no_user_that_the_rules_can_leave_out() -> None:
    with pytest.raises(RulesError):
        rules(TPROXY, "", WISHES._replace(output=True, user="root"))


def test_configuration_without_a_transparent_listener_is_refused() -> None:
    with pytest.raises(RulesError):
        rules("{listen: '127.0.0.1:1080'}")


@pytest.mark.parametrize("network", ["x", "10.0.0.0.0/8", ""])
def test_exclusion_that_is_no_network_is_refused(network: str) -> None:
    with pytest.raises(RulesError):
        rules(TPROXY, "", WISHES._replace(exclude=(network,)))


def test_routes_of_both_families_are_added_and_removed() -> None:
    both = rules(f"{TPROXY}, {TPROXY6}")
    assert "ip -6 rule add pref 20048 fwmark 0x4e50 lookup 20048" in add_routes(both)
    assert "ip -4 route replace local default dev lo table 20048" in add_routes(both)
    assert len(remove_routes(both)) == 4


def test_iptables_script_has_a_chain_for_each_family() -> None:
    script = iptables_script(
        rules(f"{REDIRECT}, {UDP_ALONE}", MARKED, WISHES._replace(output=True)), ["ip route"]
    )
    for line in (
        "iptables -w -t nat -A NETPROXY_LEAD -p tcp -j REDIRECT --to-ports 7892",
        "iptables -w -t nat -A NETPROXY_OUTPUT -m mark --mark 0x4d -j RETURN",
        "iptables -w -t mangle -A NETPROXY -i lo -m mark --mark 0x4e50 -j NETPROXY_LEAD",
        "iptables -w -t mangle -A NETPROXY_OUTPUT -p udp -j MARK --set-mark 0x4e50",
        "ip6tables -w -t nat -N NETPROXY",
    ):
        assert line in script.splitlines()


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.control_main(["nft", *arguments])
    return (status, *capsys.readouterr())


def test_command_reads_a_file_and_needs_no_daemon(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "netproxyd.yaml"
    path.write_text(f"listeners: [{TPROXY}]\n")
    for option, first in (
        ("--lan=a", "#!/usr/sbin/nft -f"),
        ("--iptables", "#!/bin/sh"),
        ("--routes", "while ip -4 rule del pref 20048 2>/dev/null; do :; done"),
        ("--remove", "nft delete table inet netproxy 2>/dev/null"),
    ):
        status, output, error = command(capsys, "-c", str(path), option)
        assert (status, output.splitlines()[0], error) == (0, first, "")


def test_errors_are_one_line_and_have_a_status(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "netproxyd.yaml"
    path.write_text("listeners: []\n")
    status, _, error = command(capsys, "-c", str(path))
    assert (status, error.count("\n")) == (64, 1)
    path.write_text("listeners: 1\n")
    status, _, error = command(capsys, "-c", str(path))
    assert (status, error.count("\n")) == (78, 1)


def test_file_that_does_not_exist_is_told_the_option_for_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "netproxyd.yaml"
    hint = "(the daemon's file is named with -c)"
    line = f"netproxyctl: {path}: cannot be read: No such file or directory {hint}\n"
    assert command(capsys, "-c", str(path)) == (78, "", line)
