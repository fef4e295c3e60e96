"""Chains of two and three daemons in every order of schemes, and a group with a dead member."""

from __future__ import annotations

import itertools
import json
import os
import random
import selectors
import socket
import threading
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, Endpoint, TcpEcho, UdpEcho, echo, exactly, socks5
from tests.e2e.support import ANY_PORT, LOOPBACK, PROCESSES, SECONDS, Netproxyd, wait_for
from tests.support.certificates import certificates
from tests.support.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.long]

KINDS = ("socks5", "http", "https", "uot")
CHAINS = [chain for hops in (2, 3) for chain in itertools.permutations(KINDS, hops)]
# Four chains of three hops. Each kind is the first hop of one of them.
QUIC_CHAINS = CHAINS[-24::6]
QUIC_BYTES = random.Random(7).randbytes(1_000_000)
QUIC_SECONDS = 60.0
SIZES = (1, 1200, 8000)
# The fixture connects to the first listener to check that a daemon still answers.
PLAIN = {"name": "plain", "listen": f"{LOOPBACK}:0", "upstream": "direct"}


def name(chain: tuple[str, ...]) -> str:
    """Return the name of the chain's listener."""
    return "-".join(chain)


class Hops(NamedTuple):
    """Ports of a daemon for each kind of hop. With one daemon for all, a chain would be a loop."""

    ports: dict[str, int]

    def url(self, kind: str) -> str:
        """Return the URL of a hop."""
        server = f"{LOOPBACK}:{self.ports[kind]}"
        if kind == "https":
            return f"https://{server}?tls.ca={certificates().path('ca.pem')}"
        return f"socks5://{server}?udp=uot" if kind == "uot" else f"{kind}://{server}"

    def urls(self, chain: tuple[str, ...]) -> list[str]:
        """Return the URLs of the hops of a chain."""
        return [self.url(kind) for kind in chain]


@pytest.fixture(scope="module")
def hops(shared_netproxyd: Start) -> Hops:
    files = certificates()
    tls = {"certificate": files.path("server.pem"), "key": files.path("server.key")}
    secured = {"name": "secured", "listen": f"{LOOPBACK}:0", "tls": tls}
    ports = {}
    for kind in KINDS:
        daemon = shared_netproxyd(config=json.dumps({"listeners": [PLAIN, secured]}))
        ports[kind] = daemon.tcp_ports[1 if kind == "https" else 0]
    return Hops(ports)


@pytest.fixture(scope="module")
def near(shared_netproxyd: Start, hops: Hops) -> Netproxyd:
    """The first daemon of all chains, with a listener for each, after the plain one."""
    ports = [
        {"name": name(chain), "listen": f"{LOOPBACK}:0", "upstream": hops.urls(chain)}
        for chain in CHAINS
    ]
    return shared_netproxyd(config=json.dumps({"listeners": [PLAIN, *ports]}))


@pytest.fixture(scope="module")
def echoes() -> Iterator[tuple[TcpEcho, UdpEcho, UdpEcho]]:
    with TcpEcho() as stream, UdpEcho() as first, UdpEcho() as second:
        yield stream, first, second


def chain_listener(near: Netproxyd, chain: tuple[str, ...]) -> Endpoint:
    """Return the address of the listener whose upstream is the chain."""
    return LOOPBACK, near.tcp_ports[1 + CHAINS.index(chain)]


@pytest.mark.parametrize("chain", CHAINS, ids=name)
def test_chain_carries_streams_and_datagrams(
    near: Netproxyd, echoes: tuple[TcpEcho, UdpEcho, UdpEcho], chain: tuple[str, ...]
) -> None:
    """Two UDP targets are used in turn: each answer names its own."""
    server, (stream, *datagrams) = chain_listener(near, chain), echoes
    with socks5(server, CONNECT, stream.address)[0] as client:
        echo(client, os.urandom(60_000))
    with Association(server) as association:
        for size in SIZES:
            for target in datagrams:
                assert association.echo(target.address, os.urandom(size)) == (
                    target.address,
                    association.bound,
                )
    for network in ("tcp", "udp"):
        assert near.said(rf"listener={name(chain)} .*network={network} ")


def test_chains_have_dropped_no_datagram(near: Netproxyd) -> None:
    assert not near.drops()
    assert not near.all_lines("udp by ")


@pytest.mark.any_workers
@pytest.mark.parametrize("chain", QUIC_CHAINS, ids=name)
def test_chain_of_three_hops_carries_quic(
    netproxyd: Start, hops: Hops, tmp_path: Path, chain: tuple[str, ...]
) -> None:
    pytest.importorskip("aioquic")
    from tests.e2e import quic

    with quic.EchoServer(tmp_path) as server:
        port = free_port()
        daemon = netproxyd(
            "-l",
            ANY_PORT,
            "-l",
            f"udp://{LOOPBACK}:{port}?target={LOOPBACK}:{server.port}",
            config=json.dumps({"default": hops.urls(chain)}),
        )
        assert quic.transfer(port, QUIC_BYTES, QUIC_SECONDS) == QUIC_BYTES
    assert not daemon.drops()


# -- a group of two members, one of which is killed

FLOWS = 50
# New connections after the kill.
DIALS = 20
# The source addresses of the members' connections: targets tell the members apart by them.
SOURCES = {"one": "127.0.0.2", "two": "127.0.0.3"}


class SourceEcho(TcpEcho):
    """An echo server that first sends four bytes, the address that the connection comes from."""

    def _serve(self, sock: Any) -> None:
        if sock is not self.socket:
            super()._serve(sock)
            return
        client, peer = sock.accept()
        client.sendall(socket.inet_aton(peer[0]))
        self._selector.register(client, selectors.EVENT_READ)


class Flow:
    """A connection that sends a message to an echo server when the previous one has come back.

    `rounds` counts the messages; `failure` is "" as long as all is well.
    """

    def __init__(self, server: Endpoint, target: Endpoint) -> None:
        self.socket, _ = socks5(server, CONNECT, target)
        self.source = socket.inet_ntoa(exactly(self.socket, 4))
        self.rounds = 0
        self.failure = ""
        self._due = b""

    def send_message(self) -> None:
        """Send the next message."""
        self._due = os.urandom(1000)
        self.socket.sendall(self._due)

    def receive(self) -> bool:
        """Receive what has arrived. Return False if the flow has failed."""
        try:
            data = self.socket.recv(len(self._due))
            if not data or not self._due.startswith(data):
                self.failure = "other bytes" if data else "ended"
                return False
            self._due = self._due[len(data) :]
            if not self._due:
                self.rounds += 1
                self.send_message()
        except OSError as error:
            self.failure = str(error)
        return not self.failure


class Flows:
    """Many flows at once, served by one thread."""

    def __init__(self, server: Endpoint, target: Endpoint, count: int) -> None:
        self.all = [Flow(server, target) for _ in range(count)]
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Flows:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join(SECONDS)
        for flow in self.all:
            flow.socket.close()

    def through(self, member: str) -> list[Flow]:
        """Return the flows that leave through the member."""
        return [flow for flow in self.all if flow.source == SOURCES[member]]

    def check_progress(self, flows: list[Flow]) -> None:
        """Wait until each flow has completed another round."""
        before = [flow.rounds for flow in flows]
        wait_for(
            lambda: (
                any(flow.failure for flow in flows)
                or all(flow.rounds > count for flow, count in zip(flows, before, strict=True))
            ),
            SECONDS,
            "another round of every flow",
        )
        assert not [flow.failure for flow in flows if flow.failure]

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for flow in self.all:
                selector.register(flow.socket, selectors.EVENT_READ, flow)
                flow.send_message()
            while not self._stop:
                for key, _ in selector.select(0.1):
                    if not key.data.receive():
                        selector.unregister(key.fileobj)


class Group:
    """Two daemons that are members of a group, and the daemon `near` that uses it."""

    def __init__(self, start: Start, url: str) -> None:
        """`url` is that of a member, with {port} for its port."""
        self._start = start
        self._ports = {member: free_port() for member in SOURCES}
        self.members = {member: self.start(member) for member in SOURCES}
        upstreams = {member: url.format(port=port) for member, port in self._ports.items()}
        group = {
            "members": list(SOURCES),
            "balance": "round-robin",
            "health_check": {"interval": "1s"},
        }
        self.near = start(
            config=json.dumps(
                {
                    "listeners": [PLAIN, {"name": "pair", "listen": f"{LOOPBACK}:0"}],
                    "upstreams": {**upstreams, "pair": group},
                    "default": "pair",
                }
            )
        )
        self.server: Endpoint = LOOPBACK, self.near.tcp_ports[1]

    def start(self, member: str) -> Netproxyd:
        """Start a member on its port."""
        return self._start(
            config=json.dumps(
                {
                    "listeners": [{"listen": f"{LOOPBACK}:{self._ports[member]}"}],
                    "default": {"url": "direct", "bind": SOURCES[member]},
                }
            )
        )

    def kill(self, member: str) -> None:
        """End a member with SIGKILL."""
        self.members[member].kill()

    def restart(self, member: str) -> None:
        """Start a killed member again."""
        self.members[member] = self.start(member)

    def dial(self, target: Endpoint) -> str:
        """Use a new connection to the target. Return its source address."""
        with socks5(self.server, CONNECT, target)[0] as client:
            source = socket.inet_ntoa(exactly(client, 4))
            echo(client, b"new")
        return source

    def said(self, member: str, state: str) -> list[str]:
        """Wait until the log says that the member is "up" or "down"."""
        return self.near.said(f"warning group 'pair': {member} is {state}", PROCESSES)


def test_group_serves_while_a_member_is_killed_and_started_again(netproxyd: Start) -> None:
    """Flows through the other member continue, new ones leave through it; later both are used."""
    group = Group(netproxyd, f"socks5://{LOOPBACK}:{{port}}")
    with SourceEcho() as target, Flows(group.server, target.address, FLOWS) as flows:
        killed, living = flows.through("one"), flows.through("two")
        assert len(killed) == len(living) == FLOWS // 2 or PROCESSES > 1 and killed and living
        flows.check_progress(flows.all)
        group.kill("one")
        assert {group.dial(target.address) for _ in range(DIALS)} == {SOURCES["two"]}
        wait_for(
            lambda: all(flow.failure for flow in killed),
            SECONDS,
            "the end of the flows through the killed member",
        )
        assert "refused" in group.said("one", "down")[0]
        assert {group.dial(target.address) for _ in range(DIALS)} == {SOURCES["two"]}
        flows.check_progress(living)
        group.restart("one")
        group.said("one", "up")
        sources = sorted(group.dial(target.address) for _ in range(DIALS))
        if PROCESSES == 1:
            assert sources == [source for source in SOURCES.values() for _ in range(DIALS // 2)]
        assert set(sources) == {*SOURCES.values()}
        with UdpEcho() as datagrams:
            assert {_new_source(group, datagrams) for _ in SOURCES} == {*SOURCES.values()}
        flows.check_progress(living)
    assert not group.near.all_lines("group 'pair': two is")


def send_until_answered(client: Association, target: Endpoint, data: bytes) -> None:
    """Send a datagram again and again until its answer arrives."""
    deadline = time.monotonic() + SECONDS
    client.socket.settimeout(0.05)
    while True:
        client.send(target, data)
        try:
            answer, source, _ = client.receive()
        except TimeoutError:
            assert time.monotonic() < deadline, "no answer"
            continue
        if answer == data:
            assert source == target
            return


@pytest.mark.any_workers
@pytest.mark.parametrize(
    "url",
    ("socks5://{host}:{{port}}", "http://{host}:{{port}}", "socks5://{host}:{{port}}?udp=uot"),
    ids=("associate", "connect-udp", "uot"),
)
def test_sessions_of_a_killed_member_continue_through_the_other(netproxyd: Start, url: str) -> None:
    """Sessions through the other member keep their source port."""
    group = Group(netproxyd, url.format(host=LOOPBACK))
    with UdpEcho() as target:
        clients = [Association(group.server) for _ in range(4)]
        try:
            before = [_source(client, target) for client in clients]
            assert sorted(host for host, _ in before) == [
                source for source in SOURCES.values() for _ in range(2)
            ]
            group.kill("one")
            for client, source in zip(clients, before, strict=True):
                if source[0] == SOURCES["two"]:
                    assert _source(client, target) == source
            for client, source in zip(clients, before, strict=True):
                if source[0] == SOURCES["one"]:
                    send_until_answered(client, target.address, b"later")
                    assert target.sources[-1][0] == SOURCES["two"]
        finally:
            for client in clients:
                client.close()


def _new_source(group: Group, target: UdpEcho) -> str:
    with Association(group.server) as client:
        return _source(client, target)[0]


def _source(client: Association, target: UdpEcho) -> Endpoint:
    """Send a datagram to the target. Return the source address that it sees."""
    client.echo(target.address, os.urandom(100))
    return target.sources[-1]
