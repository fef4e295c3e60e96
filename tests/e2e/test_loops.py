"""Proxies that are each other's upstream, and a proxy that is its own upstream."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.dialer.hop import LOOP_LIMIT
from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Refused, socks5
from tests.e2e.support import LOOPBACK, PROCESSES, SECONDS, SPARE_DESCRIPTORS, Netproxyd, wait_for
from tests.support.ports import free_port

# The target of the loop. Rules send all other targets directly.
LOOPED = ("192.0.2.1", 9)
CONFIG = """
listeners: [{{listen: '127.0.0.1:{own}', name: main}}]
rules: [{{port: 9, via: '{scheme}://127.0.0.1:{other}'}}]
"""


@pytest.mark.parametrize("scheme", ["socks5", "socks4", "http"])
def test_loop_of_two_proxies_is_refused_and_leaves_nothing_open(
    netproxyd: Start, scheme: str
) -> None:
    """Hazard 78."""
    ports = free_port(), free_port()
    first = netproxyd(config=CONFIG.format(own=ports[0], other=ports[1], scheme=scheme))
    second = netproxyd(config=CONFIG.format(own=ports[1], other=ports[0], scheme=scheme))
    with pytest.raises(Refused):
        socks5(first.server, CONNECT, LOOPED)
    records = [line for line in first.all_lines("finished") if "192.0.2.1:9" in line]
    assert 2 <= len(records) <= LOOP_LIMIT * PROCESSES + 2

    def is_clean(proxy: Netproxyd) -> bool:
        return proxy.descriptors() <= proxy.baseline + SPARE_DESCRIPTORS

    wait_for(lambda: is_clean(first) and is_clean(second), SECONDS, "no descriptor left")


def test_loop_through_a_unix_socket_is_refused(netproxyd: Start, tmp_path: Path) -> None:
    """Hazard 78.  The clients of a UNIX socket have no address."""
    ports, path = (free_port(), free_port()), tmp_path / "a.sock"
    config = CONFIG.format(own=ports[0], other=ports[1], scheme="socks5")
    config = config.replace("}]\nrules", "}, {listen: 'unix:%s'}]\nrules" % path)
    first = netproxyd(config=config)
    config = CONFIG.format(own=ports[1], other=0, scheme="socks5")
    netproxyd(config=config.replace("127.0.0.1:0", f"unix:{path}"))
    with pytest.raises(Refused):
        socks5(first.server, CONNECT, LOOPED)
    records = [line for line in first.all_lines("finished") if "192.0.2.1:9" in line]
    assert 2 <= len(records) <= LOOP_LIMIT * PROCESSES + 2


def test_proxy_that_is_its_own_upstream_refuses_at_once(netproxyd: Start) -> None:
    """Hazard 77."""
    port = free_port()
    # By a name: an address would be an error of the configuration.
    config = CONFIG.format(own=port, other=port, scheme="socks5").replace(
        "//127.0.0.1", "//own.test"
    )
    proxy = netproxyd(config=config + "dns: {hosts: {own.test: 127.0.0.1}}\n")
    with pytest.raises(Refused):
        socks5((LOOPBACK, port), CONNECT, LOOPED)
    assert len([line for line in proxy.all_lines("finished") if "192.0.2.1:9" in line]) == 1
    proxy.said("would loop back to this proxy")
