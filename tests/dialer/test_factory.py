"""Ways out from the configuration: folded first hop innermost, one and the same for the same configuration."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.dialer.block import BlockDialer
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.group import Member
from netproxy.dialer.http import HttpDialer
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.interfaces.addresses import Address
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.support.doubles import Counts, Lines, no_services

HTTP = HopConfig("http", Address("192.0.2.1", 3128), "user", "secret")
SOCKS = HopConfig("socks5", Address("192.0.2.2", 1080))
SOCKS_H = HopConfig("socks5h", Address("192.0.2.3", 1080))


@pytest.fixture
def factory(reach: TargetResolver) -> DialerFactory:
    return DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), 3.0, no_services())


def way(*hops: HopConfig, name: str = "") -> UpstreamConfig:
    return UpstreamConfig(hops, name)


def last_hop(factory: DialerFactory, *hops: HopConfig) -> Any:
    """The dialer of the last proxy, behind what counts its connections."""
    dialer = factory.dialer(way(*hops))
    assert isinstance(dialer, Member)
    return dialer.dialer


@pytest.mark.parametrize(
    "config, kind",
    [
        (way(HopConfig("direct")), DirectDialer),
        (way(), DirectDialer),
        (UpstreamConfig(), DirectDialer),
        (way(HopConfig("block")), BlockDialer),
    ],
)
def test_no_proxy_has_its_dialer(
    factory: DialerFactory, config: UpstreamConfig, kind: type
) -> None:
    dialer = factory.dialer(config)
    assert type(dialer) is kind
    assert dialer.name == ("block" if kind is BlockDialer else "direct")


@pytest.mark.parametrize(
    "hop, kind, name",
    [
        (HTTP, HttpDialer, "http://192.0.2.1:3128"),
        (SOCKS, Socks5Dialer, "socks5://192.0.2.2:1080"),
        (SOCKS_H, Socks5Dialer, "socks5h://192.0.2.3:1080"),
    ],
)
def test_each_scheme_has_its_dialer(
    factory: DialerFactory, hop: HopConfig, kind: type, name: str
) -> None:
    dialer = last_hop(factory, hop)
    assert type(dialer) is kind
    assert dialer.name == factory.dialer(way(hop)).name == name


def test_a_chain_is_dialled_from_its_last_hop(factory: DialerFactory) -> None:
    outer: Any = last_hop(factory, HTTP, SOCKS, SOCKS_H)
    assert outer._hop.server == SOCKS_H.server
    middle = outer._hop.via
    assert middle._hop.server == SOCKS.server
    inner = middle._hop.via
    assert (inner._hop.server, inner._hop.user, inner._hop.password, inner._hop.seconds) == (
        HTTP.server,
        "user",
        "secret",
        3.0,
    )
    assert isinstance(inner._hop.via, DirectDialer)


def test_only_socks5_resolves_here(factory: DialerFactory) -> None:
    here, there = last_hop(factory, SOCKS), last_hop(factory, SOCKS_H)
    assert not here.resolves_names and there.resolves_names


def test_the_same_hops_have_the_same_dialer(factory: DialerFactory) -> None:
    """A reload must leave UDP sessions, which hang on their dialer, as they are."""
    assert factory.dialer(way(HTTP, SOCKS)) is factory.dialer(
        way(HTTP, HopConfig("socks5", SOCKS.server))
    )
    assert factory.dialer(way(HTTP, SOCKS)) is not factory.dialer(way(SOCKS, HTTP))
    assert factory.dialer(way(HTTP)) is not factory.dialer(
        way(HopConfig("http", HTTP.server, "user", "other"))
    )
    assert factory.dialer(way()) is not factory.dialer(way(SOCKS))


def test_what_each_carries(factory: DialerFactory) -> None:
    assert factory.dialer(UpstreamConfig()).carries == {"tcp", "udp", "bind"}
    assert (
        factory.dialer(way(HTTP)).carries
        == factory.dialer(way(HTTP, SOCKS)).carries
        == {"tcp", "udp"}
    )
    without = HTTP._replace(udp="none")
    assert (
        factory.dialer(way(without)).carries
        == factory.dialer(way(without, SOCKS)).carries
        == {"tcp"}
    )
