"""A client, a proxy box with two addresses and a server, each a host of its own."""

from __future__ import annotations

import os
import socket
from typing import Any, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import (
    ASSOCIATE,
    CONNECT,
    Association,
    TcpEcho,
    UdpEcho,
    echo,
    encode,
    socks5,
    udp,
)
from tests.e2e.support import Netproxyd, wait_for

pytestmark = pytest.mark.e2e

CLIENT, CLIENT6 = "10.77.1.2", "fd77:1::2"
# Both pairs on one cable: of its own accord the kernel would answer from the first of each.
BOX, BOX_SECOND = "10.77.1.1", "10.77.1.9"
BOX6, BOX6_SECOND = "fd77:1::1", "fd77:1::9"
BOX_TO_SERVER = "10.77.3.1"
SERVER, SERVER_SECOND = "10.77.3.2", "10.77.3.3"
SERVER6 = "fd77:3::2"
OUTSIDE = "203.0.113.5"  # what the NAT in front of the box makes of BOX
PORT = 1080
FULL_SIZE = 1472  # bytes of the largest UDP payload that is one packet on a cable
CLIENTS = "10.77.1.0/24,fd77:1::/64"
SILENCE = 0.3  # seconds after which nothing is taken for an answer


class Net(NamedTuple):
    client: Namespace
    box: Namespace
    server: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("client", "box", "server") as made:
        net = Net(*made)
        connect(
            net.client,
            [f"{CLIENT}/24", f"{CLIENT6}/64"],
            net.box,
            [f"{BOX}/24", f"{BOX_SECOND}/24", f"{BOX6}/64", f"{BOX6_SECOND}/64"],
        )
        connect(
            net.box,
            [f"{BOX_TO_SERVER}/24", "fd77:3::1/64"],
            net.server,
            [f"{SERVER}/24", f"{SERVER_SECOND}/24", f"{SERVER6}/64"],
        )
        net.client.ip("route", "add", "default", "via", BOX)
        yield net


@pytest.fixture
def two_echoes(net: Net) -> Iterator[tuple[UdpEcho, UdpEcho]]:
    with (
        UdpEcho(SERVER, net.server.socket) as first,
        UdpEcho(SERVER_SECOND, net.server.socket) as second,
    ):
        yield first, second


def start(netproxyd: Start, net: Net, listen: str, host: str = BOX, **more: Any) -> Netproxyd:
    return netproxyd(
        "-l", f"sps://{listen}", host=host, make=net.box.socket, preexec_fn=net.box.enter, **more
    )


def silent(sock: socket.socket) -> bool:
    sock.settimeout(SILENCE)
    try:
        sock.recv(65535)
    except TimeoutError:
        return True
    return False


# -- announce


@pytest.fixture
def behind_nat(netproxyd: Start, net: Net) -> Iterator[Netproxyd]:
    net.box.nft(f"""
table ip netproxy-test {{
    chain before {{ type nat hook prerouting priority -100; ip daddr {OUTSIDE} dnat to {BOX}; }}
}}""")
    yield start(netproxyd, net, f"{BOX}:{PORT}?announce={OUTSIDE}&clients={CLIENTS}")
    net.box.nft("delete table ip netproxy-test")


def test_announce_behind_nat(
    behind_nat: Netproxyd, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    with Association((OUTSIDE, PORT), make=net.client.socket) as client:
        assert client.bound == (OUTSIDE, PORT)
        for target in two_echoes:
            assert client.echo(target.address, b"hello") == (target.address, client.bound)


def test_announced_connect_says_where_it_really_is(behind_nat: Netproxyd, net: Net) -> None:
    """BND of a CONNECT is the address that the target sees, not the announced one."""
    with TcpEcho(SERVER, net.server.socket) as target:
        sock, bound = socks5((OUTSIDE, PORT), CONNECT, target.address, make=net.client.socket)
        with sock:
            assert bound[0] == BOX_TO_SERVER
            echo(sock, b"hello")


def test_announce_by_client(netproxyd: Start, net: Net) -> None:
    """Each network of clients is told the address that it can reach."""
    config = f"""
listeners:
- listen: "0.0.0.0:{PORT}"
  clients: [10.77.0.0/16]
  announce: [{{clients: 10.77.3.0/24, address: {BOX_TO_SERVER}}}, {{address: {BOX_SECOND}}}]
"""
    netproxyd(config=config, host=BOX, make=net.box.socket, preexec_fn=net.box.enter)
    for host, box, announced in (
        (net.client, BOX, BOX_SECOND),
        (net.server, BOX_TO_SERVER, BOX_TO_SERVER),
    ):
        sock, bound = socks5((box, PORT), ASSOCIATE, ("0.0.0.0", 0), make=host.socket)
        sock.close()
        assert bound == (announced, PORT)


def test_announce_is_of_the_clients_family(netproxyd: Start, net: Net) -> None:
    start(netproxyd, net, f":{PORT}?announce={OUTSIDE}&clients={CLIENTS}")
    sock, bound = socks5((BOX6, PORT), ASSOCIATE, ("::", 0), make=net.client.socket)
    sock.close()
    assert bound == (BOX6, PORT)


# -- a wildcard listener


@pytest.mark.parametrize("relay_port", ("shared", "any", "20000-20010"))
@pytest.mark.parametrize("box", (BOX, BOX_SECOND, BOX6, BOX6_SECOND))
def test_replies_leave_from_the_address_used(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho], box: str, relay_port: str
) -> None:
    start(netproxyd, net, f":{PORT}?clients={CLIENTS}&udp.relay_port={relay_port}")
    with Association((box, PORT), make=net.client.socket) as client:
        assert client.bound[0] == box and (client.bound[1] == PORT) == (relay_port == "shared")
        for target in two_echoes:
            assert client.echo(target.address, b"hello") == (target.address, client.bound)


def test_ipv6_client_to_both_families(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    start(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with (
        UdpEcho(SERVER6, net.server.socket) as sixth,
        Association((BOX6, PORT), make=net.client.socket) as client,
    ):
        for target in (sixth, *two_echoes):
            assert client.echo(target.address, b"hello") == (target.address, client.bound)


def test_fragments_only_on_the_clients_side(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    """The header of a full-sized datagram makes it two packets, which is fine; towards a target nothing is cut (row 45)."""
    target = two_echoes[0]
    daemon = start(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with Association((BOX_SECOND, PORT), make=net.client.socket) as client:
        client.echo(target.address, bytes(FULL_SIZE))
        client.send(target.address, bytes(FULL_SIZE + 1))
        wait_for(lambda: daemon.status().get("drops{too big}"), 2.0, "the datagram is counted")
        client.echo(target.address, b"the session goes on")
    assert len(target.sources) == 2 and len(set(target.sources)) == 1


# -- the NAT table as servers and strangers see it


def test_one_source_port_for_all_servers(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    start(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with Association((BOX, PORT), make=net.client.socket) as client:
        for target in (*two_echoes, *two_echoes):
            client.echo(target.address, b"hello")
    assert two_echoes[0].sources == two_echoes[1].sources
    assert {host for host, _ in two_echoes[0].sources} == {BOX_TO_SERVER}


def test_another_server_may_answer(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    """Endpoint-independent filtering: what comes to the client's port outside is the client's."""
    start(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with (
        Association((BOX, PORT), make=net.client.socket) as client,
        udp(SERVER_SECOND, net.server.socket) as third,
    ):
        client.echo(two_echoes[0].address, b"hello")
        third.sendto(b"from a third", two_echoes[0].sources[0])
        data, source, _ = client.receive()
        assert (data, source) == (b"from a third", third.getsockname())


def test_stranger(netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]) -> None:
    """No packet, no state, one counter, whether or not somebody else is in."""
    first, second = two_echoes
    daemon = start(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    datagram = b"\0\0\0" + encode(second.address) + b"hello"
    with udp(SERVER, net.server.socket) as stranger:
        stranger.sendto(datagram, (BOX_TO_SERVER, PORT))
        assert silent(stranger)
        status = daemon.status()
        assert (status["sessions"], status["entries"], status["drops{unknown sender}"]) == (0, 0, 1)
        with Association((BOX, PORT), make=net.client.socket) as client:
            stranger.sendto(
                datagram, (BOX_TO_SERVER, PORT)
            )  # the association has no endpoint yet: this must not be it
            assert silent(stranger)
            client.echo(first.address, b"hello")
            stranger.sendto(datagram, (BOX_TO_SERVER, PORT))
            assert silent(stranger)
            with udp(
                CLIENT, net.client.socket
            ) as neighbour:  # of the client's address, but not its port
                neighbour.sendto(datagram, (BOX, PORT))
                assert silent(neighbour)
            status = daemon.status()
            assert (status["sessions"], status["entries"], status["drops{unknown sender}"]) == (
                1,
                1,
                4,
            )
        assert not second.sources
        wait_for(
            lambda: not daemon.status()["sessions"], 2.0, "the session ends with its association"
        )
        assert daemon.status()["associations"] == 0


def test_stranger_on_tcp(netproxyd: Start, net: Net) -> None:
    """`clients` lets nobody else in: closed at once, without a byte."""
    daemon = start(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with net.server.socket(socket.AF_INET, socket.SOCK_STREAM) as stranger:
        stranger.settimeout(2.0)
        stranger.connect((BOX_TO_SERVER, PORT))
        try:
            assert stranger.recv(100) == b""
        except ConnectionResetError:
            pass
    assert (
        sum(
            value
            for name, value in daemon.status().items()
            if name.startswith("connections_refused{")
        )
        == 1
    )


# -- the command as a newcomer types it


def test_without_arguments(netproxyd: Start, net: Net) -> None:
    """The documented default, on a host where its port is free for certain; one line says it."""
    if os.path.exists("/etc/netproxy/netproxyd.yaml"):
        pytest.skip("this machine has a configuration of its own")
    daemon = netproxyd(make=net.client.socket, preexec_fn=net.client.enter)
    assert [line.split(" serves ")[1] for line in daemon.log.splitlines()] == [
        f"udp 127.0.0.1:{PORT}, tcp 127.0.0.1:{PORT}, upstream direct"
    ]
    with (
        UdpEcho(make=net.client.socket) as target,
        Association(daemon.server, make=net.client.socket) as client,
    ):
        client.echo(target.address, b"hello")
    assert daemon.answers()
