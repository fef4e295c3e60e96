"""Networks, ports, and ordered lists of them."""

from __future__ import annotations

import random

import pytest

from netproxy.ctl.convert.terms import networks
from netproxy.interfaces.networks import IpNetwork, NetworkSet

TEXTS = (
    *("10.0.0.0/8", "10.0.0.0/9", "10.64.0.0/10", "10.64.1.0/24", "10.64.1.7", "0.0.0.0/0"),
    *("192.168.0.0/16", "192.168.4.0/22", "fd00::/8", "fd00::/64", "fd00::1", "::/0"),
)
HOSTS = (
    "10.1.1.1",
    "10.64.1.7",
    "10.64.1.8",
    "10.200.0.1",
    "192.168.5.5",
    "8.8.8.8",
    "fd00::1",
    "fd00:1::",
)


@pytest.mark.parametrize("seed", range(60))
def test_clients_permit_what_the_first_match_of_a_list_permits(seed: int) -> None:
    chance = random.Random(seed)
    rules = [(chance.random() < 0.6, chance.choice(TEXTS)) for _ in range(chance.randint(1, 8))]
    clients = networks.first_match(rules)
    parsed = [] if clients is None else clients
    allowed = NetworkSet(
        [IpNetwork.parse(text) for text in parsed if text[0] != "!"],
        [IpNetwork.parse(text[1:]) for text in parsed if text[0] == "!"],
    )
    for host in HOSTS:
        first = [yes for yes, text in rules if host in NetworkSet([IpNetwork.parse(text)])][:1]
        assert (host in allowed if clients else False) == (first == [True]), (rules, clients, host)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("10.1.2.3/255.0.0.0", "10.0.0.0/8"),
        ("[fd00::1]", "fd00::1"),
        ("192.0.2.1/32", "192.0.2.1"),
    ],
)
def test_network_is_canonical(text: str, expected: str) -> None:
    assert networks.parse_network(text) == expected


def test_span_of_addresses_is_networks() -> None:
    assert networks.parse_span("10.0.0.0", "10.0.1.255") == ["10.0.0.0/23"]
    assert networks.parse_span("10.0.0.1", "10.0.0.2") == ["10.0.0.1", "10.0.0.2"]
    with pytest.raises(ValueError, match="no range"):
        networks.parse_span("10.0.0.1", "::1")


@pytest.mark.parametrize("text", ["", "a", "2-1", "70000", "-1", "1-"])
def test_wrong_port_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        networks.parse_port_range(text)
