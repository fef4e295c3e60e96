"""Ways for the datagrams of real-time clients: a proxy behind a NAT, a chain, a tunnel.

The network is that of test_public_address.py: the clients, the targets and the second daemons are
`outside`, the proxy is the `box` behind a router that forwards ports.
"""

from __future__ import annotations

import re
from typing import Callable

from tests.e2e.conftest import Start
from tests.e2e.support import Netproxyd
from tests.e2e.test_public_address import (
    BOX,
    CLIENT,
    CLIENTS,
    FORWARD,
    PORT,
    PUBLIC,
    SECOND,
    STUN,
    Net,
    translate,
)
from tests.e2e.test_tunnel import IDLE_DESCRIPTORS, TOKEN
from tests.support.certificates import certificates

AGENTS = 7000
SPS = f'listeners: [{{listen: ":{PORT}", name: main, {CLIENTS}, announce: auto, {STUN}}}]'
# The checks of every test ask for a target on the box itself.
RULES = "rules: [{ip: [192.168.1.0/24], via: direct}]"
HOP = f"listeners: [{{listen: '{SECOND}:0', clients: [5.5.5.0/24]}}]"


def start_direct(netproxyd: Start, net: Net) -> Netproxyd:
    """Start a proxy that reaches targets itself."""
    return _start_box(netproxyd, net, SPS)


def start_chain(netproxyd: Start, net: Net) -> Netproxyd:
    """Start a proxy that reaches targets by two others, one behind the other."""
    hops = [_start_outside(netproxyd, net, HOP, SECOND) for _ in range(2)]
    chain = ", ".join(hop.url("socks5") for hop in hops)
    return _start_box(netproxyd, net, f"{SPS}\n{RULES}\ndefault: [{chain}]")


def start_tunnel(netproxyd: Start, net: Net) -> Netproxyd:
    """Start a proxy that reaches targets by an agent, whose datagrams go by UDP."""
    bridge = _start_box(
        netproxyd,
        net,
        f"""{SPS}
{RULES}
default: tunnel://home
tunnel:
  bridge:
    listen: ":{AGENTS}"
    datagrams: true
    tls: {certificates().listener()}
    agents: {{home: {{token: {TOKEN}}}}}
""",
    )
    agent = _start_outside(
        netproxyd,
        net,
        f"""listeners: [{{listen: "127.0.0.1:0"}}]
tunnel:
  agent:
    bridge: tls://{PUBLIC}:{AGENTS}
    datagrams: true
    name: home
    token: {TOKEN}
    tls: {{ca: "{certificates().path("ca.pem")}", server_name: localhost}}
    exit: true
""",
        "127.0.0.1",
    )
    for daemon in (bridge, agent):
        daemon.said("go by UDP")
        daemon.baseline += IDLE_DESCRIPTORS
    return bridge


WAYS: dict[str, Callable[[Start, Net], Netproxyd]] = {
    "behind a NAT": start_direct,
    "chain of two": start_chain,
    "tunnel by UDP": start_tunnel,
}


def open_way(name: str, netproxyd: Start, net: Net) -> Netproxyd:
    """Start the daemons of a way, and wait until clients outside are told a public address."""
    ports = f"th dport {{ {PORT}, {AGENTS} }}"
    translate(net, f"meta l4proto {{tcp, udp}} {ports} {FORWARD}", "masquerade")
    daemon = WAYS[name](netproxyd, net)
    daemon.said(rf"'main' announces {re.escape(PUBLIC)}:{PORT}")
    return daemon


def _start_box(netproxyd: Start, net: Net, config: str) -> Netproxyd:
    return netproxyd(config=config, host=BOX, make=net.box.socket, preexec_fn=net.box.enter)


def _start_outside(netproxyd: Start, net: Net, config: str, host: str) -> Netproxyd:
    enter = net.outside.enter
    return netproxyd(config=config, host=host, make=net.outside.socket, preexec_fn=enter)


__all__ = ["CLIENT", "WAYS", "open_way"]
