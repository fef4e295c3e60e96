"""An agent whose TCP connections die with its address: its datagrams go on by UDP.

A user, a bridge, and an agent behind a NAT, in network namespaces.  The agent's service listens on
the agent's loopback, whose address stays.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Iterator

import pytest

from netproxy.listener.steering import owner
from tests.e2e.conftest import Start
from tests.e2e.support import Netproxyd, program, wait_for
from tests.e2e.test_tunnel import (
    AGENTS,
    BRIDGE,
    HOME,
    IDLE_DESCRIPTORS,
    NAT_INSIDE,
    NAT_OUTSIDE,
    UDP,
    Net,
    agent_text,
    bridge_text,
    net,
    run_in,
)
from tests.e2e.test_tunnel_path import (
    BY_TCP,
    BY_UDP,
    MOVED,
    RATE,
    SECONDS,
    Flow,
    Tunnel,
    flow,
    start_bridge,
)

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]

__all__ = ["net"]

NEXT_HOME, LOCAL, NAT_ELSEWHERE = "192.168.77.50", "127.0.0.1", "10.80.2.99"
LEAVE_FROM_ELSEWHERE = f"""
table ip elsewhere {{ chain out {{
    type nat hook postrouting priority 90;
    ip saddr {NEXT_HOME} snat to {NAT_ELSEWHERE};
}}; }}
"""
DEVICE = "to-nat"
RESUMED, AGAIN = "goes on from", "connected again as 'home'"
LARGE = 9000
"""Bytes of a datagram that fits into no packet: it goes by the work connection."""


@pytest.fixture
def restored(net: Net) -> Iterator[Net]:
    """Return the network, and restore it once its daemons have ended."""
    yield net
    restore(net)


@pytest.fixture
def tunnel(
    request: pytest.FixtureRequest, restored: Net, netproxyd: Start, net: Net, tmp_path: Path
) -> Tunnel:
    """Run a tunnel to a service on the agent's loopback.  A parameter: the bridge's arguments."""
    bridge = start_bridge(netproxyd, net, tmp_path, *getattr(request, "param", ()))
    tunnel = Tunnel(bridge, start_agent(netproxyd, net, tmp_path), tmp_path)
    tunnel.changed(BY_UDP)
    return tunnel


def start_agent(netproxyd: Start, net: Net, folder: Path) -> Netproxyd:
    text = agent_text(f'{{"{UDP}/udp": "{LOCAL}:{UDP}"}}')
    text = text.replace("    exit:", "    datagrams: true\n    exit:")
    agent = netproxyd(
        config=f"control: unix:{folder}/agent.sock\n{text}",
        make=net.home.socket,
        preexec_fn=net.home.enter,
    )
    agent.baseline += IDLE_DESCRIPTORS
    return agent


def replace_address(net: Net, before: str, after: str) -> None:
    """Give the agent's machine another address in place of the one that it has."""
    # Else the kernel deletes the others of the network as well.
    promote = f"echo 1 > /proc/sys/net/ipv4/conf/{DEVICE}/promote_secondaries"
    run_in(net.home, "sh", "-c", promote)
    net.home.ip("address", "add", f"{after}/24", "dev", DEVICE)
    net.home.ip("address", "del", f"{before}/24", "dev", DEVICE)
    net.home.ip("route", "replace", "default", "via", NAT_INSIDE, "src", after)


def agent_ports(net: Net) -> list[str]:
    """Return the ports of the agent's TCP connections to the bridge."""
    found = run_in(net.home, program("ss"), "-Htn", "state", "established", "dport", f"= :{AGENTS}")
    return re.findall(r":(\d+)\s+\S+:7000", found)


def lose_address(net: Net) -> None:
    """Replace the address: nothing comes back for the connections of before."""
    replace_address(net, HOME, NEXT_HOME)


def reset_connections(net: Net) -> None:
    """Have the kernel reset the agent's connections, in the middle of all, on both sides."""
    run_in(net.home, program("ss"), "-K", "dport", "=", f":{AGENTS}")


def forget_connections(net: Net) -> None:
    """Have the NAT pass no packet of the agent's connections any more, without a word."""
    ports = ", ".join(agent_ports(net))
    net.nat.nft(
        f"""
        table ip forgotten {{ chain out {{
            type filter hook forward priority -10;
            tcp sport {{ {ports} }} drop;
            tcp dport {{ {ports} }} drop;
        }}; }}
        """
    )


def restore(net: Net) -> None:
    """Undo what has been done to the network."""
    if NEXT_HOME in net.home.ip("address", "show", "dev", DEVICE):
        replace_address(net, NEXT_HOME, HOME)
    net.nat.nft("table ip forgotten\ndelete table ip forgotten")


def pass_by_tcp(user: Flow) -> None:
    """Send a large datagram until it is answered: some are lost as connections are replaced."""
    before = len(user.sizes)

    def is_answered() -> bool:
        user.send(LARGE)
        return len(user.sizes) > before

    wait_for(is_answered, SECONDS, "an answer by the work connection")


LOSSES: dict[str, Callable[[Net], None]] = {
    "address replaced": lose_address,
    "connections reset": reset_connections,
    "connections forgotten": forget_connections,
}


@pytest.mark.parametrize("tunnel", [(), ("-w", "3")], indirect=True, ids=["alone", "workers"])
@pytest.mark.parametrize("loss", LOSSES)
def test_flow_outlives_the_connections(tunnel: Tunnel, net: Net, loss: str) -> None:
    """Hazard 173: the flow, its numbers and its endpoint at the target go on."""
    with flow(net, LOCAL) as user:
        pass_by_tcp(user)
        LOSSES[loss](net)
        tunnel.bridge.said(RESUMED, 1, SECONDS)
        tunnel.agent.said(AGAIN, 1, SECONDS)
        user.goes_on()
        # By TCP again: the flow has got another work connection.
        wait_for(lambda: tunnel.attached() >= 1, SECONDS, "the flow has a connection")
        pass_by_tcp(user)
        assert user.lost() <= RATE
        assert len(set(user.echo.sources)) == 1, "the target sees another endpoint"
        assert user.repeated == 0
        assert not tunnel.bridge.lines("disconnected")


def test_flow_is_served_again_after_the_bridge_was_killed(
    netproxyd: Start, tunnel: Tunnel, net: Net
) -> None:
    """Hazard 175: the next bridge does not know the session, and the agent begins another one."""
    with flow(net, LOCAL) as user:
        tunnel.bridge.kill()
        bridge = start_bridge(netproxyd, net, tunnel.folder)
        bridge.said(BY_UDP, 1, SECONDS)
        tunnel.agent.said(BY_UDP, 2, SECONDS)
        user.goes_on()
        assert not bridge.lines(RESUMED) and not tunnel.agent.lines(AGAIN)


def test_agent_is_not_followed_to_a_network_that_is_not_allowed(
    netproxyd: Start, restored: Net, net: Net, tmp_path: Path
) -> None:
    """Hazard 169: its packets are dropped and counted; it comes back where it may be."""
    text = bridge_text(f'["{BRIDGE}:{UDP}/udp"]')
    more = f"    datagrams: true\n    clients: [{NAT_OUTSIDE}]\n    agents:"
    bridge = netproxyd(
        config=f"control: unix:{tmp_path}/bridge.sock\n{text.replace('    agents:', more)}",
        host=BRIDGE,
        make=net.bridge.socket,
        preexec_fn=net.bridge.enter,
    )
    bridge.baseline += IDLE_DESCRIPTORS
    tunnel = Tunnel(bridge, start_agent(netproxyd, net, tmp_path), tmp_path)
    tunnel.changed(BY_UDP)
    net.nat.ip("address", "add", f"{NAT_ELSEWHERE}/24", "dev", "to-bridge")
    try:
        with flow(net, LOCAL) as user:
            net.nat.nft(LEAVE_FROM_ELSEWHERE)
            lose_address(net)
            tunnel.changed(BY_TCP)
            bridge.counted("drops{client not allowed}", 1)
            replace_address(net, NEXT_HOME, HOME)
            tunnel.changed(BY_UDP, 2)
            user.goes_on()
            assert not bridge.lines(MOVED)
    finally:
        net.nat.nft("table ip elsewhere\ndelete table ip elsewhere")
        net.nat.ip("address", "del", f"{NAT_ELSEWHERE}/24", "dev", "to-bridge")


@pytest.mark.parametrize("tunnel", [("-w", "3")], indirect=True, ids=["workers"])
def test_session_is_resumed_in_the_worker_that_has_it(tunnel: Tunnel, net: Net) -> None:
    """Hazard 173: the new address leads to another worker, which hands the connections over."""
    elsewhere = next(
        address
        for address in (f"10.80.2.{number}" for number in range(100, 200))
        if owner(address, 3) != owner(NAT_OUTSIDE, 3)
    )
    net.nat.ip("address", "add", f"{elsewhere}/24", "dev", "to-bridge")
    try:
        with flow(net, LOCAL) as user:
            pass_by_tcp(user)
            net.nat.nft(LEAVE_FROM_ELSEWHERE.replace(NAT_ELSEWHERE, elsewhere))
            lose_address(net)
            tunnel.bridge.said(f"{RESUMED} {elsewhere}", 1, SECONDS)
            wait_for(lambda: tunnel.attached() >= 1, SECONDS, "the flow has a connection")
            pass_by_tcp(user)
            user.goes_on()
            assert user.lost() <= RATE
            assert len(set(user.echo.sources)) == 1 and user.repeated == 0
            # Keys are told by the connection that was handed over.
            assert tunnel.bridge.counted("tunnel_paths{renewed}", 1) == 1
            assert tunnel.path()["up"] and not tunnel.bridge.lines("disconnected")
            # The next one is a connection of the same worker again.
            reset_connections(net)
            tunnel.bridge.said(f"{RESUMED} {elsewhere}", 2, SECONDS)
            user.goes_on()
            assert len(set(user.echo.sources)) == 1
    finally:
        net.nat.nft("table ip elsewhere\ndelete table ip elsewhere")
        net.nat.ip("address", "del", f"{elsewhere}/24", "dev", "to-bridge")
