"""A client and an agent that talk directly: through NATs of several kinds, blocked, attacked.

Two sites behind NATs, in network namespaces, and a bridge that both can reach.
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
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import Association, UdpEcho
from tests.e2e.support import SECONDS, Netproxyd, program, wait_for
from tests.support.certificates import certificates

# A flow goes directly only if the worker that has the client has the agent.
pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]

BRIDGE, TO_CLIENTS, CLIENT_NAT, TO_HOME, HOME_NAT = (
    *("10.90.0.1", "10.91.1.1", "10.91.1.2"),
    *("10.91.2.1", "10.91.2.2"),
)
CLIENT_INSIDE, CLIENT, HOME_INSIDE, HOME = (
    *("192.168.71.1", "192.168.71.2"),
    *("192.168.72.1", "192.168.72.2"),
)
AGENTS, PROXY, SPS, ECHO = 7000, 8443, 1080, 8053
IDLE_DESCRIPTORS = 24
"""Of an idle tunnel, and of a client: connections, sockets, sessions."""
TOKEN = "a token for network namespaces"
NAT = """
table ip test-nat {{
    chain out {{
        type nat hook postrouting priority 100;
        oifname "to-wan" masquerade {more};
    }}
    chain in {{
        type nat hook prerouting priority -100;
        {open}
    }}
    chain here {{ type filter hook input priority 0; iifname "to-wan" drop; }}
    chain through {{ type filter hook forward priority 0; {closed} }}
}}
"""
CLOSED = 'iifname "to-wan" ct state new drop;'
BLOCKED = f"""
table ip blocked {{ chain forward {{
    type filter hook forward priority -10;
    ip saddr {CLIENT_NAT} ip daddr {HOME_NAT} drop;
    ip saddr {HOME_NAT} ip daddr {CLIENT_NAT} drop;
}}; }}
"""
UNBLOCKED = "delete table ip blocked"
DIRECTLY, RELAYED = "go directly", "are relayed"
RATE = 50
"""Datagrams per second of a steady flow."""


def restricted(inside: str) -> str:
    """A NAT that maps a port to itself, and lets answers in alone: what most homes have."""
    return NAT.format(more="", open="", closed=CLOSED)


def open_to_all(inside: str) -> str:
    """A NAT that maps a port to itself, and lets everybody send to it."""
    everybody = f'iifname "to-wan" meta l4proto udp dnat to {inside};'
    return NAT.format(more="", open=everybody, closed="")


def symmetric(inside: str) -> str:
    """A NAT with another random port for each target."""
    return NAT.format(more="fully-random", open="", closed=CLOSED)


class Net(NamedTuple):
    """The network namespaces."""

    client: Namespace
    client_nat: Namespace
    wan: Namespace
    home_nat: Namespace
    home: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("client", "cnat", "wan", "hnat", "home") as namespaces:
        net = Net(*namespaces)
        connect(net.client, [f"{CLIENT}/24"], net.client_nat, [f"{CLIENT_INSIDE}/24"])
        connect(net.client_nat, [f"{CLIENT_NAT}/24"], net.wan, [f"{TO_CLIENTS}/24"])
        connect(net.wan, [f"{TO_HOME}/24"], net.home_nat, [f"{HOME_NAT}/24"])
        connect(net.home_nat, [f"{HOME_INSIDE}/24"], net.home, [f"{HOME}/24"])
        net.wan.ip("address", "add", f"{BRIDGE}/32", "dev", "lo")
        for host, gateway in (
            (net.client, CLIENT_INSIDE),
            (net.client_nat, TO_CLIENTS),
            (net.home_nat, TO_HOME),
            (net.home, HOME_INSIDE),
        ):
            host.ip("route", "add", "default", "via", gateway)
        for router in (net.client_nat, net.wan, net.home_nat):
            router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        yield net


class Three(NamedTuple):
    """The daemons."""

    bridge: Netproxyd
    agent: Netproxyd
    client: Netproxyd
    folder: Path

    def rows(self, daemon: str) -> list[dict[str, Any]]:
        """Return the direct paths, as netproxyctl shows them."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SECONDS)
            sock.connect(str(self.folder / f"{daemon}.sock"))
            sock.sendall(b'{"command": "tunnels"}\n')
            answer = json.loads(sock.makefile().readline())["result"]
        rows: list[dict[str, Any]] = (answer["agent"] if daemon == "agent" else answer)["direct"]
        return rows

    def states(self) -> list[str]:
        """Return the state of the only pair, as each of the three sees it."""
        daemons = ("bridge", "agent", "client")
        return [row["state"] for daemon in daemons for row in self.rows(daemon)]

    def changed(self, text: str, times: int = 1) -> None:
        """Wait until both ends have told a change of the path so often."""
        for daemon in (self.client, self.agent):
            daemon.said(text, times, SECONDS)


@pytest.fixture
def three(request: pytest.FixtureRequest, netproxyd: Start, net: Net, tmp_path: Path) -> Three:
    """Run the daemons.  The parameter is the NATs of the client and of the agent."""
    client_nat, home_nat = request.param
    for router, text in ((net.client_nat, client_nat(CLIENT)), (net.home_nat, home_nat(HOME))):
        with suppress(AssertionError, pytest.skip.Exception):
            router.nft("delete table ip test-nat")
        router.nft(text)
        router.run("conntrack", "-F") if _has("conntrack") else None
    files = certificates()
    trust = f'{{ca: "{files.path("ca.pem")}", server_name: localhost}}'
    bridge = netproxyd(
        config=f"""
control: unix:{tmp_path}/bridge.sock
listeners:
  - {{listen: "127.0.0.1:{SPS}"}}
  - {{listen: "{BRIDGE}:{PROXY}", clients: [{CLIENT_NAT}], tls: {files.listener()}}}
tunnel:
  bridge:
    listen: {BRIDGE}:{AGENTS}
    tls: {files.listener()}
    datagrams: true
    direct: true
    agents: {{home: {{token: {TOKEN}}}}}
rules: [{{ip: [192.168.72.0/24], via: tunnel://home}}]
""",
        make=net.wan.socket,
        preexec_fn=net.wan.enter,
    )
    agent = netproxyd(
        config=f"""
control: unix:{tmp_path}/agent.sock
listeners: [{{listen: "127.0.0.1:{SPS}"}}]
tunnel:
  agent:
    bridge: tls://{BRIDGE}:{AGENTS}
    name: home
    token: {TOKEN}
    tls: {trust}
    exit: true
    datagrams: true
    direct: true
""",
        make=net.home.socket,
        preexec_fn=net.home.enter,
    )
    agent.said("go by UDP", 1, SECONDS)
    client = netproxyd(
        config=f"""
control: unix:{tmp_path}/client.sock
listeners: [{{listen: "127.0.0.1:{SPS}"}}]
upstreams: {{home: {{url: "https://{BRIDGE}:{PROXY}", direct: true, tls: {trust}}}}}
rules: [{{ip: [192.168.72.0/24], via: home}}]
""",
        make=net.client.socket,
        preexec_fn=net.client.enter,
    )
    for daemon in (bridge, agent, client):
        daemon.baseline += IDLE_DESCRIPTORS
    return Three(bridge, agent, client, tmp_path)


def _has(name: str) -> bool:
    try:
        program(name)
    except BaseException:  # pytest's own, which skips the test
        return False
    return True


class Flow:
    """A program of the client that sends a numbered datagram every 1/RATE s."""

    def __init__(self, net: Net) -> None:
        self._association = Association(("127.0.0.1", SPS), make=net.client.socket)
        self._stopped = threading.Event()
        self.sent = 0
        self.answered: set[int] = set()
        self._threads = [threading.Thread(target=run) for run in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._stopped.wait(1 / RATE):
            self._association.send((HOME, ECHO), self.sent.to_bytes(4, "big") + bytes(96))
            self.sent += 1

    def _receive(self) -> None:
        self._association.socket.settimeout(0.1)
        while not self._stopped.is_set():
            with suppress(TimeoutError):
                data, source, _ = self._association.receive()
                assert source == (HOME, ECHO)
                self.answered.add(int.from_bytes(data[:4], "big"))

    def goes_on(self, count: int = RATE) -> None:
        """Wait until so many more datagrams have been answered."""
        wanted = len(self.answered) + count
        wait_for(lambda: len(self.answered) >= wanted, SECONDS, "answers")

    def lost(self) -> int:
        """Return how many datagrams were not answered, those of the last second left out."""
        sent = self.sent - RATE
        return sent - sum(number < sent for number in self.answered)

    def close(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._association.close()


@contextmanager
def flow(net: Net) -> Iterator[Flow]:
    """Run a flow to an echo server at the agent's site."""
    with UdpEcho(HOME, net.home.socket, port=ECHO):
        flow = Flow(net)
        try:
            flow.goes_on()
            yield flow
        finally:
            flow.close()


def crossed(net: Net) -> int:
    """Return the packets that have gone between the two NATs without the bridge."""
    text = net.wan.nft_list("ip test-count")
    return int(text.partition("packets ")[2].split()[0])


@contextmanager
def counted(net: Net) -> Iterator[None]:
    """Count what goes between the two NATs."""
    net.wan.nft(f"""
        table ip test-count {{ chain forward {{
            type filter hook forward priority 10;
            ip saddr {CLIENT_NAT} ip daddr {HOME_NAT} counter;
        }}; }}
    """)
    try:
        yield
    finally:
        net.wan.nft("delete table ip test-count")


DIRECT_PAIRS = [
    (restricted, restricted),
    (open_to_all, restricted),
    (symmetric, open_to_all),
    (open_to_all, symmetric),
]
RELAYED_PAIRS = [(symmetric, symmetric), (symmetric, restricted)]


def _names(pairs: list[Any]) -> list[str]:
    return [f"{client.__name__}-{home.__name__}" for client, home in pairs]


@pytest.mark.parametrize("three", DIRECT_PAIRS, indirect=True, ids=_names(DIRECT_PAIRS))
def test_datagrams_go_directly_where_both_nats_allow_it(three: Three, net: Net) -> None:
    with counted(net), flow(net) as user:
        three.changed(DIRECTLY)
        wait_for(lambda: three.states() == ["direct"] * 3, SECONDS, "all show it")
        before = crossed(net)
        user.goes_on(2 * RATE)
        assert crossed(net) - before >= 2 * RATE - 5
        assert user.lost() == 0


@pytest.mark.parametrize("three", RELAYED_PAIRS, indirect=True, ids=_names(RELAYED_PAIRS))
def test_datagrams_are_relayed_where_a_nat_does_not_allow_it(three: Three, net: Net) -> None:
    """Hazard 182."""
    with counted(net), flow(net) as user:
        wait_for(lambda: crossed(net) > 0, SECONDS, "it is tried")
        wait_for(lambda: three.states() == ["relayed"] * 3, SECONDS, "it is given up")
        probes = crossed(net)
        user.goes_on(2 * RATE)
        assert user.lost() == 0
        # Few packets: those of one attempt, and none until the next one.
        assert probes <= crossed(net) <= 40
        assert not three.client.lines(DIRECTLY) and not three.agent.lines(DIRECTLY)


@pytest.mark.parametrize("three", [(restricted, restricted)], indirect=True, ids=["restricted"])
def test_blocked_path_falls_back_to_the_relay_and_returns(three: Three, net: Net) -> None:
    """Hazard 186."""
    with flow(net) as user:
        three.changed(DIRECTLY)
        user.goes_on()
        net.wan.nft(BLOCKED)
        try:
            three.changed(RELAYED)
            user.goes_on()
            lost = user.lost()
            assert 0 < lost <= 3 * RATE
            wait_for(lambda: three.states() == ["relayed"] * 3, SECONDS, "all show it")
        finally:
            net.wan.nft(UNBLOCKED)
        three.changed(DIRECTLY, 2)
        user.goes_on()
        # The way back loses nothing.
        assert user.lost() == lost


@pytest.mark.parametrize("three", [(restricted, open_to_all)], indirect=True, ids=["open"])
def test_strangers_get_no_answer_from_an_end(three: Three, net: Net) -> None:
    """Hazard 185."""
    with flow(net) as user:
        three.changed(DIRECTLY)
        (row,) = three.rows("client")
        port = int(row["peer"].rpartition(":")[2])
        with net.wan.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            packets = [b"x", b"\x9e", b"\x9e" + bytes(50), random.randbytes(1200)]
            counted = ("drops{malformed}", "drops{truncated}", "drops{unknown connection}")

            def dropped() -> int:
                drops = three.agent.drops()
                return sum(drops.get(name, 0) for name in counted)

            before = dropped()
            for packet in packets:
                stranger.sendto(packet, (HOME_NAT, port))
            wait_for(lambda: dropped() >= before + len(packets), SECONDS, "all are dropped")
            stranger.setblocking(False)
            with pytest.raises(BlockingIOError):
                stranger.recv(2048)
        user.goes_on()
        assert three.states() == ["direct"] * 3 and user.lost() == 0
