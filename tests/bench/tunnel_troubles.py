"""Measures what a flow through a tunnel's UDP path loses when something happens to the tunnel.

    python3 tests/bench/tunnel_troubles.py [--rounds 3] [--after 12] [--only reset,blocked]

A flow of 60 datagrams a second goes to an echo server behind the agent, and the agent is behind a
NAT, in network namespaces. In each round the agent's address is replaced, its connections are
reset, the NAT forgets them, UDP is blocked and passes again, and the bridge is started again. Needs
root, pytest, openssl, Debian's iproute2 and nftables, and the Python package cryptography.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import Callable, Iterator, NamedTuple

from rig import LOOPBACK, Endpoint, Netproxyd, free_port, print_row

from tests.e2e.namespaces import Namespace, connect, hosts
from tests.support.certificates import certificates

BRIDGE, NAT_OUTSIDE, NAT_INSIDE = "10.91.0.1", "10.91.0.2", "10.92.0.1"
AGENT, NEXT_AGENT = "10.92.0.2", "10.92.0.50"
DEVICE = "to-nat"
RATE, SIZE = 60, 120
TOKEN = "a token for a bench of troubles"
SETTLE, STEP = 3.0, 0.02
"""Seconds before an event; and between two looks at the log."""
WIDTHS = (22, 7, 6, 6, 10, 10, 10)
NAT = """
table ip bench { chain out {
    type nat hook postrouting priority 100;
    ip saddr 10.92.0.0/24 masquerade;
}; }
"""
BLOCKED = """
table ip blocked { chain out {
    type filter hook forward priority -10;
    udp dport %d drop;
}; }
"""
FORGOTTEN = """
table ip forgotten { chain out {
    type filter hook forward priority -10;
    tcp sport { %(ports)s } drop;
    tcp dport { %(ports)s } drop;
}; }
"""


class Net(NamedTuple):
    """The network namespaces."""

    near: Namespace
    """The user, and the bridge."""
    nat: Namespace
    far: Namespace
    """The agent, and the echo server on its loopback."""


@contextmanager
def network() -> Iterator[Net]:
    """Make the namespaces, and remove them at the end."""
    with hosts("near", "nat", "far") as made:
        net = Net(*made)
        connect(net.near, [f"{BRIDGE}/24"], net.nat, [f"{NAT_OUTSIDE}/24"])
        connect(net.nat, [f"{NAT_INSIDE}/24"], net.far, [f"{AGENT}/24"])
        net.far.ip("route", "add", "default", "via", NAT_INSIDE)
        net.nat.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        promote = f"echo 1 > /proc/sys/net/ipv4/conf/{DEVICE}/promote_secondaries"
        net.far.run("sh", "-c", promote)
        net.nat.nft(NAT)
        yield net


# -- the tunnel


class Tunnel:
    """A bridge and an agent, with a public UDP port of the echo server."""

    def __init__(self, net: Net, target: Endpoint) -> None:
        self.net = net
        self.agents, self.port = free_port(), free_port()
        files, log = certificates(), "log: {access: false}\nlisteners: [{listen: '127.0.0.1:0'}]\n"
        self._bridge = f"""{log}tunnel: {{bridge: {{listen: "{BRIDGE}:{self.agents}",
  datagrams: true, tls: {files.listener()},
  agents: {{home: {{token: {TOKEN}, ports: [{self.port}/udp]}}}}}}}}
"""
        agent = f"""{log}tunnel: {{agent: {{bridge: "tls://{BRIDGE}:{self.agents}", name: home,
  datagrams: true, token: {TOKEN},
  tls: {{ca: "{files.path("ca.pem")}", server_name: localhost}},
  services: {{"{self.port}/udp": "{target[0]}:{target[1]}"}}}}}}
"""
        self.bridge = Netproxyd(config=self._bridge, enter=net.near.enter)
        self.agent = Netproxyd(config=agent, enter=net.far.enter)
        self.agent.said("go by UDP")

    def restart(self) -> None:
        """Start the bridge again."""
        self.bridge.stop()
        self.bridge = Netproxyd(config=self._bridge, enter=self.net.near.enter)

    def kill(self) -> None:
        """Kill the bridge, and start it again."""
        self.bridge.kill()
        self.bridge = Netproxyd(config=self._bridge, enter=self.net.near.enter)

    def stop(self) -> None:
        """End both daemons."""
        self.agent.stop()
        self.bridge.stop()

    def sockets(self, *arguments: str) -> str:
        """Run ss(8) for the agent's connections to the bridge; return its output."""
        command = ["ip", "netns", "exec", self.net.far.name, "ss", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -- what happens


def replace_address(tunnel: Tunnel, before: str = AGENT, after: str = NEXT_AGENT) -> None:
    """Give the agent's machine another address in place of its own."""
    far = tunnel.net.far
    far.ip("address", "add", f"{after}/24", "dev", DEVICE)
    far.ip("address", "del", f"{before}/24", "dev", DEVICE)
    far.ip("route", "replace", "default", "via", NAT_INSIDE, "src", after)


def reset(tunnel: Tunnel) -> None:
    """Have the kernel reset the agent's connections."""
    tunnel.sockets("-K", "dport", "=", f":{tunnel.agents}")


def forget(tunnel: Tunnel) -> None:
    """Have the NAT drop the agent's connections without a word."""
    listed = tunnel.sockets("-Htn", "state", "established", "dport", f"= :{tunnel.agents}")
    ports = ", ".join(re.findall(rf":(\d+)\s+\S+:{tunnel.agents}\b", listed))
    tunnel.net.nat.nft(FORGOTTEN % {"ports": ports})


def block(tunnel: Tunnel) -> None:
    """Block the UDP of the path."""
    tunnel.net.nat.nft(BLOCKED % tunnel.agents)


def unblock(tunnel: Tunnel) -> None:
    """Let UDP pass again."""
    tunnel.net.nat.nft("delete table ip blocked")


class Trouble(NamedTuple):
    """Something that happens."""

    name: str
    happen: Callable[[Tunnel], None]
    undo: Callable[[Tunnel], None] | None
    told: str
    """What the agent's log says when all is well again."""


TROUBLES = (
    Trouble(
        "address replaced",
        replace_address,
        lambda tunnel: replace_address(tunnel, NEXT_AGENT, AGENT),
        "connected again",
    ),
    Trouble("connections reset", reset, None, "connected again"),
    Trouble(
        "connections forgotten",
        forget,
        lambda tunnel: tunnel.net.nat.nft("delete table ip forgotten"),
        "connected again",
    ),
    Trouble("udp blocked", block, None, "go by TCP"),
    Trouble("udp unblocked", unblock, None, "go by UDP"),
    Trouble("bridge restarted", Tunnel.restart, None, "go by UDP"),
    Trouble("bridge killed", Tunnel.kill, None, "go by UDP"),
)


# -- the flow


class Flow:
    """A user that sends numbered datagrams to the tunnel's public port."""

    def __init__(self, net: Net, port: int) -> None:
        self._socket = net.near.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((LOOPBACK, port))
        self._socket.settimeout(0.2)
        self._stopped = threading.Event()
        self.sent: list[float] = []
        self.answered: dict[int, float] = {}
        self._threads = [threading.Thread(target=run) for run in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        began = time.monotonic()
        while not self._stopped.is_set():
            number = len(self.sent)
            time.sleep(max(0.0, began + number / RATE - time.monotonic()))
            self.sent.append(time.monotonic())
            try:
                self._socket.send(number.to_bytes(4, "big").ljust(SIZE))
            except OSError:
                pass  # the port is closed while the bridge starts

    def _receive(self) -> None:
        while not self._stopped.is_set():
            try:
                number = int.from_bytes(self._socket.recv(2048)[:4], "big")
            except OSError:
                continue
            self.answered.setdefault(number, time.monotonic())

    def stop(self) -> None:
        """End the flow."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._socket.close()


class Result(NamedTuple):
    """What the flow has met."""

    sent: int
    lost: int
    silence: float
    """Seconds of the longest time without an answer."""
    back: float
    """Seconds from the event to the end of that time."""
    told: float
    """Seconds from the event until the agent's log says that all is well."""


def meet(tunnel: Tunnel, trouble: Trouble, after: float) -> Result:
    """Let something happen to a flow, and look at it for `after` seconds more."""
    flow = Flow(tunnel.net, tunnel.port)
    time.sleep(SETTLE)
    before, began = tunnel.agent.count_said(trouble.told), time.monotonic()
    trouble.happen(tunnel)
    told, until = float("nan"), began + after
    while time.monotonic() < until:
        if told != told and tunnel.agent.count_said(trouble.told) > before:
            told = time.monotonic() - began
        time.sleep(STEP)
    flow.stop()
    counted = [number for number, at in enumerate(flow.sent) if at < until - 1.0]
    lost = sum(number not in flow.answered for number in counted)
    times = [at for at in sorted(flow.answered.values()) if at >= began - 0.5]
    gaps = [(later - at, later) for at, later in zip(times, times[1:], strict=False)]
    silence, end = max(gaps, default=(float("nan"), float("nan")))
    return Result(len(counted), lost, silence, max(0.0, end - began), told)


def echo(sock: socket.socket, sources: list[Endpoint]) -> None:
    """Send everything back, and note from where it has come, until an empty datagram comes."""
    while True:
        data, peer = sock.recvfrom(2048)
        if not data:
            return
        if peer not in sources:
            sources.append(peer)
        sock.sendto(data, peer)


def measure(rounds: int, only: list[str], after: float) -> None:
    """Print a row for each trouble of each round."""
    with ExitStack() as stack:
        net = stack.enter_context(network())
        target = net.far.socket(socket.AF_INET, socket.SOCK_DGRAM)
        target.bind((LOOPBACK, 0))
        sources: list[Endpoint] = []
        server = threading.Thread(target=echo, args=(target, sources), daemon=True)
        server.start()
        tunnel = Tunnel(net, target.getsockname())
        stack.callback(tunnel.stop)
        print_row(WIDTHS, "trouble", "sent", "lost", "ends", "silent s", "back s", "told s")
        for _ in range(rounds):
            for trouble in TROUBLES:
                if only and not any(word in trouble.name for word in only):
                    continue
                # The last datagrams of the flow before are still on their way.
                time.sleep(SETTLE)
                sources.clear()
                result = meet(tunnel, trouble, after)
                figures = [f"{seconds:.2f}" for seconds in result[2:]]
                print_row(WIDTHS, trouble.name, *result[:2], len(sources), *figures)
                if trouble.undo is not None:
                    trouble.undo(tunnel)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what troubles of a tunnel cost a flow.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--after", type=float, default=12.0, help="seconds after each trouble")
    parser.add_argument("--only", default="", help="words in the names of troubles, with commas")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("network namespaces need root")
    print(f"a flow of {RATE}/s x {SIZE} bytes; ends: endpoints of the flow at the target\n")
    only = [word for word in options.only.split(",") if word]
    measure(options.rounds, only, options.after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
