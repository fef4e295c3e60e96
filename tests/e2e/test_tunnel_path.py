"""Datagrams of a tunnel by UDP: blocked networks, an agent that moves, a bridge that starts again.

A user, a bridge, and an agent behind a NAT, in network namespaces.
"""

from __future__ import annotations

import json
import random
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import UdpEcho, udp
from tests.e2e.support import SECONDS, Netproxyd, wait_for
from tests.e2e.test_tunnel import (
    AGENTS,
    BRIDGE,
    HOME,
    IDLE_DESCRIPTORS,
    NAT_INSIDE,
    OUTSIDE,
    PRINTER,
    UDP,
    Net,
    agent_text,
    bridge_text,
    net,
)

pytestmark = [pytest.mark.e2e, pytest.mark.long]

__all__ = ["net"]

BLOCKED = f"""
table ip blocked {{ chain out {{
    type filter hook forward priority -10;
    udp dport {AGENTS} drop;
}}; }}
"""
UNBLOCKED = "delete table ip blocked"
BY_UDP, BY_TCP, MOVED = "go by UDP", "go by TCP", "go to another address"
UNNUMBERED = 0xFFFFFFFF
RATE = 50
"""Datagrams per second of a steady flow."""


class Tunnel(NamedTuple):
    """The daemons of a tunnel."""

    bridge: Netproxyd
    agent: Netproxyd
    folder: Path

    def path(self, daemon: str = "bridge") -> dict[str, Any]:
        """Return a side's path, as netproxyctl shows it."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SECONDS)
            sock.connect(str(self.folder / f"{daemon}.sock"))
            sock.sendall(b'{"command": "tunnels"}\n')
            answer = json.loads(sock.makefile().readline())["result"]
        side: dict[str, Any] = answer["agents"][0] if daemon == "bridge" else answer["agent"]
        path: dict[str, Any] = side["path"]
        return path

    def attached(self) -> int:
        """Return how many work connections the bridge has attached to flows."""
        return self.bridge.status().get("tunnel_handshakes{attached}", 0)

    def changed(self, text: str, times: int = 1) -> None:
        """Wait until both sides have told a change of the path so often."""
        for daemon in (self.bridge, self.agent):
            daemon.said(text, times, SECONDS)


@pytest.fixture
def tunnel(request: pytest.FixtureRequest, netproxyd: Start, net: Net, tmp_path: Path) -> Tunnel:
    """Run a tunnel whose datagrams go by UDP, with a public UDP port.

    A parameter is the arguments of the bridge.
    """
    bridge = start_bridge(netproxyd, net, tmp_path, *getattr(request, "param", ()))
    text = agent_text(f'{{"{UDP}/udp": "{HOME}:{UDP}"}}')
    text = text.replace("    exit:", "    datagrams: true\n    exit:")
    agent = netproxyd(
        config=f"control: unix:{tmp_path}/agent.sock\n{text}",
        make=net.home.socket,
        preexec_fn=net.home.enter,
    )
    agent.baseline += IDLE_DESCRIPTORS
    tunnel = Tunnel(bridge, agent, tmp_path)
    tunnel.changed(BY_UDP)
    return tunnel


def start_bridge(netproxyd: Start, net: Net, folder: Path, *arguments: str) -> Netproxyd:
    text = bridge_text(f'["{BRIDGE}:{UDP}/udp"]')
    text = text.replace("    agents:", "    datagrams: true\n    agents:")
    bridge = netproxyd(
        *arguments,
        config=f"control: unix:{folder}/bridge.sock\n{text}",
        host=BRIDGE,
        make=net.bridge.socket,
        preexec_fn=net.bridge.enter,
    )
    bridge.baseline += IDLE_DESCRIPTORS
    return bridge


class Flow:
    """A user that sends a numbered datagram every 1/RATE s, and counts what comes back."""

    def __init__(self, net: Net, echo: UdpEcho) -> None:
        self.echo = echo
        self._socket = udp("0.0.0.0", net.user.socket)
        self._stopped = threading.Event()
        self.sent = self.repeated = 0
        self.answered: set[int] = set()
        self.sizes: list[int] = []
        """Of the answers to send()."""
        self._threads = [threading.Thread(target=run) for run in (self._send, self._receive)]

    def _send(self) -> None:
        while not self._stopped.wait(1 / RATE):
            self._socket.sendto(self.sent.to_bytes(4, "big") + bytes(96), (BRIDGE, UDP))
            self.sent += 1

    def _receive(self) -> None:
        self._socket.settimeout(0.1)
        while not self._stopped.is_set():
            with suppress(TimeoutError):
                self._note(self._socket.recv(65536))

    def _note(self, answer: bytes) -> None:
        number = int.from_bytes(answer[:4], "big")
        if number == UNNUMBERED:
            self.sizes.append(len(answer))
            return
        self.repeated += number in self.answered
        self.answered.add(number)

    def send(self, size: int) -> None:
        """Send a datagram of `size` bytes beside the numbered ones."""
        data = UNNUMBERED.to_bytes(4, "big") + bytes(size - 4)
        self._socket.sendto(data, (BRIDGE, UDP))

    def goes_on(self, count: int = RATE) -> None:
        """Wait until so many more datagrams have been answered."""
        wanted = len(self.answered) + count
        wait_for(lambda: len(self.answered) >= wanted, SECONDS, "answers")

    def lost(self) -> int:
        """Return how many datagrams were not answered, those of the last second left out."""
        sent = self.sent - RATE
        return sent - sum(number < sent for number in self.answered)


@contextmanager
def flow(net: Net, host: str = HOME) -> Iterator[Flow]:
    """Run a flow to an echo server in the agent's network."""
    with UdpEcho(host, net.home.socket, port=UDP) as echo:
        flow = Flow(net, echo)
        for thread in flow._threads:
            thread.start()
        try:
            flow.goes_on()
            yield flow
        finally:
            flow._stopped.set()
            for thread in flow._threads:
                thread.join()
            flow._socket.close()


def test_datagrams_of_all_sizes_pass(tunnel: Tunnel, net: Net) -> None:
    """What does not fit into a packet goes by the work connection, and is counted."""
    with UdpEcho(HOME, net.home.socket, port=UDP), udp("0.0.0.0", net.user.socket) as sock:
        wait_for(lambda: tunnel.path()["mtu"] == 1472, SECONDS, "the size of packets is known")
        before = tunnel.path()
        for size in (0, 1, 100, 1200, 1400, 1472, 9000, 65507):
            data = random.Random(size).randbytes(size)
            sock.sendto(data, (BRIDGE, UDP))
            assert sock.recvfrom(65536) == (data, (BRIDGE, UDP))
        after = tunnel.path()
        assert after["too_long"] - before["too_long"] == 3
        assert after["sent"] - before["sent"] >= 2701 and after["received"] > before["received"]


def test_blocked_udp_falls_back_to_tcp_and_returns(tunnel: Tunnel, net: Net) -> None:
    """Hazard 168."""
    with flow(net) as user:
        net.nat.nft(BLOCKED)
        tunnel.changed(BY_TCP)
        user.goes_on()
        lost = user.lost()
        assert tunnel.path()["up"] is tunnel.path("agent")["up"] is False
        net.nat.nft(UNBLOCKED)
        tunnel.changed(BY_UDP, 2)
        user.goes_on()
        assert 0 < lost <= 3 * RATE
        # The way back loses nothing.
        assert user.lost() == lost


@pytest.mark.parametrize("tunnel", [(), ("-w", "3")], indirect=True, ids=["alone", "workers"])
def test_flow_goes_on_as_the_agent_moves(tunnel: Tunnel, net: Net) -> None:
    """Hazard 169: its packets come from another address: the NAT gives them another port, too."""
    home = ("route", "replace", "default", "via", NAT_INSIDE)
    with flow(net) as user:
        net.home.ip(*home, "src", PRINTER)
        try:
            tunnel.bridge.said(MOVED, 1, SECONDS)
            user.goes_on()
            assert user.lost() <= RATE
            assert not tunnel.bridge.lines("disconnected")
        finally:
            net.home.ip(*home)


def test_bridge_that_starts_again_is_found(netproxyd: Start, tunnel: Tunnel, net: Net) -> None:
    """Hazard 169."""
    with flow(net) as user:
        tunnel.bridge.finish()
        bridge = start_bridge(netproxyd, net, tunnel.folder)
        bridge.said(BY_UDP, 1, SECONDS)
        tunnel.agent.said(BY_UDP, 2, SECONDS)
        user.goes_on()


def test_strangers_get_no_answer(tunnel: Tunnel, net: Net) -> None:
    """Hazard 166."""
    with net.nat.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        packets = [b"", b"x", b"\x9e", b"\x9e" + bytes(50), random.randbytes(1200)]
        for packet in packets:
            stranger.sendto(packet, (OUTSIDE, AGENTS))
        counted = ("drops{malformed}", "drops{truncated}", "drops{unknown connection}")

        def dropped() -> list[int]:
            drops = tunnel.bridge.drops()
            return [drops.get(name, 0) for name in counted]

        wait_for(lambda: sum(dropped()) >= len(packets), SECONDS, "all are dropped")
        assert dropped() == [3, 1, 1]
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(2048)
