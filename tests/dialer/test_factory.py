"""Dialers from the configuration: folded first hop innermost, one for each configuration."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.dialer.plain.block import BlockDialer
from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.web.http import HttpDialer
from netproxy.dialer.member import Member
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.interfaces.addresses import Address
from tests.dialer.doubles import SECONDS

HTTP = HopConfig("http", Address("192.0.2.1", 3128), "user", "secret")
SOCKS5 = HopConfig("socks5", Address("192.0.2.2", 1080))
SOCKS5H = HopConfig("socks5h", Address("192.0.2.3", 1080))


def upstream(*hops: HopConfig, name: str = "") -> UpstreamConfig:
    return UpstreamConfig(hops, name)


def last_hop(factory: DialerFactory, *hops: HopConfig) -> Any:
    """Return the dialer of the last proxy, without the Member around it."""
    dialer = factory.dialer(upstream(*hops))
    assert isinstance(dialer, Member)
    return dialer.dialer


@pytest.mark.parametrize(
    "config, kind",
    [
        (upstream(HopConfig("direct")), DirectDialer),
        (upstream(), DirectDialer),
        (UpstreamConfig(), DirectDialer),
        (upstream(HopConfig("block")), BlockDialer),
    ],
)
def test_direct_and_block_have_their_dialers(
    factory: DialerFactory, config: UpstreamConfig, kind: type
) -> None:
    dialer = factory.dialer(config)
    assert type(dialer) is kind
    assert dialer.name == ("block" if kind is BlockDialer else "direct")


@pytest.mark.parametrize(
    "hop, kind, name",
    [
        (HTTP, HttpDialer, "http://192.0.2.1:3128"),
        (SOCKS5, Socks5Dialer, "socks5://192.0.2.2:1080"),
        (SOCKS5H, Socks5Dialer, "socks5h://192.0.2.3:1080"),
    ],
)
def test_each_scheme_has_its_dialer(
    factory: DialerFactory, hop: HopConfig, kind: type, name: str
) -> None:
    dialer = last_hop(factory, hop)
    assert type(dialer) is kind
    assert dialer.name == factory.dialer(upstream(hop)).name == name


def test_chain_is_dialled_through_its_last_hop(factory: DialerFactory) -> None:
    last = last_hop(factory, HTTP, SOCKS5, SOCKS5H).hop
    assert last.server == SOCKS5H.server
    middle = last.via.hop
    assert middle.server == SOCKS5.server
    first = middle.via.hop
    assert (first.server, first.user, first.password) == (HTTP.server, "user", "secret")
    assert first.seconds == SECONDS
    assert isinstance(first.via, DirectDialer)


def test_socks5_resolves_names_here_and_socks5h_at_the_proxy(factory: DialerFactory) -> None:
    assert not last_hop(factory, SOCKS5).resolves_names
    assert last_hop(factory, SOCKS5H).resolves_names


def test_same_hops_have_the_same_dialer(factory: DialerFactory) -> None:
    """A reload must leave UDP sessions, which belong to a dialer, as they are."""
    dialer = factory.dialer(upstream(HTTP, SOCKS5))
    assert factory.dialer(upstream(HTTP, HopConfig("socks5", SOCKS5.server))) is dialer
    assert factory.dialer(upstream(SOCKS5, HTTP)) is not dialer
    other_password = HopConfig("http", HTTP.server, "user", "other")
    assert factory.dialer(upstream(HTTP)) is not factory.dialer(upstream(other_password))
    assert factory.dialer(upstream()) is not factory.dialer(upstream(SOCKS5))


def test_upstreams_carry_udp_unless_a_hop_does_not(factory: DialerFactory) -> None:
    assert factory.dialer(UpstreamConfig()).carries == {"tcp", "udp", "bind"}
    assert factory.dialer(upstream(HTTP)).carries == {"tcp", "udp"}
    assert factory.dialer(upstream(HTTP, SOCKS5)).carries == {"tcp", "udp"}
    without = HTTP._replace(udp="none")
    assert factory.dialer(upstream(without)).carries == {"tcp"}
    assert factory.dialer(upstream(without, SOCKS5)).carries == {"tcp"}
