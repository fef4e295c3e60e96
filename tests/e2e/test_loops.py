"""Proxies that are each other's upstream (HAZARDS 78), and one that is its own (HAZARDS 77)."""

from __future__ import annotations

import time

import pytest

from netproxy.dialer.hop import LOOP_LIMIT
from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Refused, socks5
from tests.e2e.support import LOOPBACK, free_port, wait_for

UNSPECIFIED_ADDRESS = ("192.0.2.1", 9)  # what is looped; everything else goes directly
CONFIG = "listeners: [{{listen: '127.0.0.1:{own}', name: main}}]\nrules: [{{port: 9, via: '{scheme}://127.0.0.1:{other}'}}]\n"


@pytest.mark.parametrize("scheme", ["socks5", "socks4", "http"])
def test_hazard_78_two_proxies_that_are_each_others_upstream(netproxyd: Start, scheme: str) -> None:
    """The connection is refused in good time, and nothing of the circle stays."""
    ports = free_port(), free_port()
    first = netproxyd(config=CONFIG.format(own=ports[0], other=ports[1], scheme=scheme))
    second = netproxyd(config=CONFIG.format(own=ports[1], other=ports[0], scheme=scheme))
    started = time.monotonic()
    with pytest.raises(Refused):
        socks5(first.server, CONNECT, UNSPECIFIED_ADDRESS, None, seconds=8.0)
    assert time.monotonic() - started < 8.0
    records = [line for line in first.all_lines("finished") if "192.0.2.1:9" in line]
    assert 2 <= len(records) <= LOOP_LIMIT + 2
    for proxy in (first, second):
        wait_for(
            lambda: proxy.descriptors() <= proxy.baseline + 2,
            5.0,
            "descriptors back to the baseline",
        )


def test_hazard_77_a_proxy_that_is_its_own_upstream(netproxyd: Start) -> None:
    port = free_port()
    proxy = netproxyd(config=CONFIG.format(own=port, other=port, scheme="socks5"))
    with pytest.raises(Refused):
        socks5((LOOPBACK, port), CONNECT, UNSPECIFIED_ADDRESS, None, seconds=5.0)
    assert len([line for line in proxy.all_lines("finished") if "192.0.2.1:9" in line]) == 1
    proxy.said("would loop back to this proxy")
