"""Chains of two and three NetProxy in every order of their schemes, and a group of two of which one is killed under load."""

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
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, Where, echo, exactly, socks5
from tests.e2e.support import ANY_PORT, LOOPBACK, Netproxyd, free_port, wait_for
from tests.support.certificates import certificates

pytestmark = pytest.mark.e2e

KINDS = ("socks5", "http", "https", "uot")
CHAINS = [chain for hops in (2, 3) for chain in itertools.permutations(KINDS, hops)]
QUIC_CHAINS = CHAINS[-24::6]  # of three; each kind is the first hop of one
QUIC_BYTES = random.Random(7).randbytes(1_000_000)
QUIC_SECONDS = 20.0
SIZES = (1, 1200, 8000)
PLAIN = {
    "name": "plain",
    "listen": f"{LOOPBACK}:0",
    "upstream": "direct",
}  # which the fixture asks at the end


def name(chain: tuple[str, ...]) -> str:
    return "-".join(chain)


class Hops(NamedTuple):
    """A daemon for each kind of hop: none leads back to itself (HAZARDS 77)."""

    ports: dict[str, int]

    def url(self, kind: str) -> str:
        server = f"{LOOPBACK}:{self.ports[kind]}"
        if kind == "https":
            return f"https://{server}?tls.ca={certificates().path('ca.pem')}"
        return f"socks5://{server}?udp=uot" if kind == "uot" else f"{kind}://{server}"

    def urls(self, chain: tuple[str, ...]) -> list[str]:
        return [self.url(kind) for kind in chain]


@pytest.fixture(scope="module")
def hops(shared_netproxyd: Start) -> Hops:
    made = certificates()
    secured = {
        "name": "secured",
        "listen": f"{LOOPBACK}:0",
        "tls": {"certificate": made.path("server.pem"), "key": made.path("server.key")},
    }
    return Hops(
        {
            kind: shared_netproxyd(config=json.dumps({"listeners": [PLAIN, secured]})).tcp_ports[
                kind == "https"
            ]
            for kind in KINDS
        }
    )


@pytest.fixture(scope="module")
def near(shared_netproxyd: Start, hops: Hops) -> Netproxyd:
    """A port for each chain, behind the plain one."""
    ports = [
        {"name": name(chain), "listen": f"{LOOPBACK}:0", "upstream": hops.urls(chain)}
        for chain in CHAINS
    ]
    return shared_netproxyd(config=json.dumps({"listeners": [PLAIN, *ports]}))


@pytest.fixture(scope="module")
def echoes() -> Iterator[tuple[TcpEcho, UdpEcho, UdpEcho]]:
    with TcpEcho() as stream, UdpEcho() as one, UdpEcho() as other:
        yield stream, one, other


def entrance(near: Netproxyd, chain: tuple[str, ...]) -> Where:
    return LOOPBACK, near.tcp_ports[1 + CHAINS.index(chain)]


def drops(daemon: Netproxyd) -> dict[str, int]:
    return {name: value for name, value in daemon.status().items() if name.startswith("drops{")}


@pytest.mark.parametrize("chain", CHAINS, ids=name)
def test_streams_and_datagrams_through_a_chain(
    near: Netproxyd, echoes: tuple[TcpEcho, UdpEcho, UdpEcho], chain: tuple[str, ...]
) -> None:
    server, (stream, *datagrams) = entrance(near, chain), echoes
    with socks5(server, CONNECT, stream.address)[0] as client:
        echo(client, os.urandom(60_000))
    with Association(server) as association:
        for size in SIZES:
            for target in datagrams:  # both at once: each keeps its own name
                assert association.echo(target.address, os.urandom(size)) == (
                    target.address,
                    association.bound,
                )
    for network in ("tcp", "udp"):
        assert near.said(rf"listener={name(chain)} .*network={network} ")


def test_nothing_was_dropped_on_the_way(near: Netproxyd) -> None:
    assert not drops(near)
    assert not near.all_lines(" udp by ")


@pytest.mark.parametrize("chain", QUIC_CHAINS, ids=name)
def test_quic_through_a_chain_of_three(
    netproxyd: Start, hops: Hops, tmp_path: Path, chain: tuple[str, ...]
) -> None:
    pytest.importorskip("aioquic")
    from tests.e2e import quic

    with quic.EchoServer(tmp_path) as server:
        door = free_port()
        daemon = netproxyd(
            "-l",
            ANY_PORT,
            "-l",
            f"udp://{LOOPBACK}:{door}?target={LOOPBACK}:{server.port}",
            config=json.dumps({"default": hops.urls(chain)}),
        )
        assert quic.transfer(door, QUIC_BYTES, QUIC_SECONDS) == QUIC_BYTES
    assert not drops(daemon)


# -- a group of two, one of which is killed

FLOWS = 50
DIALS = 20  # at once after the kill
DIAL_SECONDS = 2.0
HEALTH_SECONDS = 8.0  # for an interval of one second, and a clock that ticks once a second
SECONDS = 10.0
SOURCES = {"one": "127.0.0.2", "two": "127.0.0.3"}  # by which targets know the members


class WhoEcho(TcpEcho):
    """Begins with four bytes, the address that the connection comes from."""

    def _serve(self, sock: Any) -> None:
        if sock is not self.socket:
            super()._serve(sock)
            return
        client, peer = sock.accept()
        client.sendall(socket.inet_aton(peer[0]))
        self._selector.register(client, selectors.EVENT_READ)


class Flow:
    """An echo whose next message goes out when the one before is back."""

    def __init__(self, server: Where, target: Where) -> None:
        self.socket, _ = socks5(server, CONNECT, target)
        self.source = socket.inet_ntoa(exactly(self.socket, 4))
        self.rounds = 0
        self.failure = ""
        self._message = self._due = b""

    def begin(self) -> None:
        self._message = self._due = os.urandom(1000)
        self.socket.sendall(self._message)

    def go_on(self) -> bool:
        """Takes what is there; whether the flow goes on."""
        try:
            data = self.socket.recv(len(self._due))
            if not data or not self._due.startswith(data):
                self.failure = "other bytes" if data else "ended"
                return False
            self._due = self._due[len(data) :]
            if not self._due:
                self.rounds += 1
                self.begin()
        except OSError as error:
            self.failure = str(error)
        return not self.failure


class Flows:
    """Many at once, kept busy by a thread."""

    def __init__(self, server: Where, target: Where, count: int) -> None:
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

    def by(self, member: str) -> list[Flow]:
        return [flow for flow in self.all if flow.source == SOURCES[member]]

    def check_that_all_go_on(self, flows: list[Flow]) -> None:
        """Each has come further than it is now."""
        before = [flow.rounds for flow in flows]
        wait_for(
            lambda: (
                any(flow.failure for flow in flows)
                or all(flow.rounds > rounds for flow, rounds in zip(flows, before))
            ),
            SECONDS,
            "every flow went on",
        )
        assert not [flow.failure for flow in flows if flow.failure]

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for flow in self.all:
                selector.register(flow.socket, selectors.EVENT_READ, flow)
                flow.begin()
            while not self._stop:
                for key, _ in selector.select(0.1):
                    if not key.data.go_on():
                        selector.unregister(key.fileobj)


class Group:
    """Two daemons of one group, and the daemon that uses it."""

    def __init__(self, start: Start, url: str) -> None:
        """`url`: a member's, with a place for its port."""
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
        self.server: Where = LOOPBACK, self.near.tcp_ports[1]

    def start(self, member: str) -> Netproxyd:
        return self._start(
            config=json.dumps(
                {
                    "listeners": [{"listen": f"{LOOPBACK}:{self._ports[member]}"}],
                    "default": {"url": "direct", "bind": SOURCES[member]},
                }
            )
        )

    def kill(self, member: str) -> None:
        self.members[member].kill()

    def restart(self, member: str) -> None:
        self.members[member] = self.start(member)

    def dial(self, target: Where) -> str:
        """A new connection that works within DIAL_SECONDS; whose it is."""
        started = time.monotonic()
        with socks5(self.server, CONNECT, target)[0] as client:
            source = socket.inet_ntoa(exactly(client, 4))
            echo(client, b"new")
        assert time.monotonic() - started < DIAL_SECONDS
        return source

    def said(self, member: str, state: str) -> list[str]:
        return self.near.said(rf"warning group 'pair': {member} is {state}", seconds=HEALTH_SECONDS)


def test_connections_when_a_member_is_killed_and_comes_back(netproxyd: Start) -> None:
    group = Group(netproxyd, f"socks5://{LOOPBACK}:{{port}}")
    with WhoEcho() as target, Flows(group.server, target.address, FLOWS) as flows:
        dying, living = flows.by("one"), flows.by("two")
        assert len(dying) == len(living) == FLOWS // 2
        flows.check_that_all_go_on(flows.all)
        group.kill("one")
        assert {group.dial(target.address) for _ in range(DIALS)} == {SOURCES["two"]}
        wait_for(
            lambda: all(flow.failure for flow in dying),
            SECONDS,
            "the killed one's flows have ended",
        )
        assert "refused" in group.said("one", "down")[0]
        assert {group.dial(target.address) for _ in range(DIALS)} == {SOURCES["two"]}
        flows.check_that_all_go_on(living)
        group.restart("one")
        group.said("one", "up")
        assert sorted(group.dial(target.address) for _ in range(DIALS)) == [
            source for source in SOURCES.values() for _ in range(DIALS // 2)
        ]
        with UdpEcho() as datagrams:
            assert {_new_source(group, datagrams) for _ in SOURCES} == {*SOURCES.values()}
        flows.check_that_all_go_on(living)
    assert not group.near.all_lines("group 'pair': two is")


def insist(client: Association, target: Where, data: bytes) -> None:
    """Sends until the answer comes."""
    deadline = time.monotonic() + SECONDS
    client.socket.settimeout(0.05)
    while True:
        client.send(target, data)
        try:
            answer, source, _ = client.receive()
        except TimeoutError:
            assert time.monotonic() < deadline, "no answer any more"
            continue
        if answer == data:
            assert source == target
            return


@pytest.mark.parametrize(
    "url",
    ("socks5://{host}:{{port}}", "http://{host}:{{port}}", "socks5://{host}:{{port}}?udp=uot"),
    ids=("associate", "connect-udp", "uot"),
)
def test_sessions_whose_member_is_killed_work_again_by_the_other(
    netproxyd: Start, url: str
) -> None:
    group = Group(netproxyd, url.format(host=LOOPBACK))
    with UdpEcho() as target:
        clients = [Association(group.server) for _ in range(4)]
        try:
            before = [_source(client, target) for client in clients]
            assert sorted(host for host, _ in before) == [
                source for source in SOURCES.values() for _ in range(2)
            ]
            group.kill("one")
            for client, (host, port) in zip(clients, before):
                if host == SOURCES["two"]:
                    assert _source(client, target) == (host, port), (
                        "a session of the other's was touched"
                    )
            for client, (host, _) in zip(clients, before):
                if host == SOURCES["one"]:
                    insist(client, target.address, b"later")
                    assert target.sources[-1][0] == SOURCES["two"]
        finally:
            for client in clients:
                client.close()


def _new_source(group: Group, target: UdpEcho) -> str:
    with Association(group.server) as client:
        return _source(client, target)[0]


def _source(client: Association, target: UdpEcho) -> Where:
    """Where the target sees the client."""
    client.echo(target.address, os.urandom(100))
    return target.sources[-1]
