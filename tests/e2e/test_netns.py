"""A client, a proxy with two addresses in one network, and a server, each in its own namespace."""

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
from tests.e2e.support import PROCESSES, SECONDS, Netproxyd, wait_for

pytestmark = pytest.mark.e2e

CLIENT, CLIENT6 = "10.77.1.2", "fd77:1::2"
# Both pairs are on one link: without a source address the kernel would choose the first of each.
BOX, BOX_SECOND = "10.77.1.1", "10.77.1.9"
BOX6, BOX6_SECOND = "fd77:1::1", "fd77:1::9"
BOX_TO_SERVER = "10.77.3.1"
SERVER, SERVER_SECOND = "10.77.3.2", "10.77.3.3"
SERVER6 = "fd77:3::2"
# The address to which the NAT in front of the box maps BOX.
OUTSIDE = "203.0.113.5"
PORT = 1080
# Bytes of the largest UDP payload that fits into one packet of 1500 bytes.
FULL_SIZE = 1472
CLIENTS = "10.77.1.0/24,fd77:1::/64"
# How long a test waits for an answer that must not come.
SILENCE = 0.3
STRANGERS = "drops{unknown sender}"


class Net(NamedTuple):
    """The three hosts. The box is where netproxyd runs."""

    client: Namespace
    box: Namespace
    server: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("client", "box", "server") as created:
        net = Net(*created)
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


def start_on_box(
    netproxyd: Start, net: Net, listen: str, host: str = BOX, **more: Any
) -> Netproxyd:
    """Start the daemon on the box. `listen` is an sps URL without its scheme."""
    return netproxyd(
        "-l", f"sps://{listen}", host=host, make=net.box.socket, preexec_fn=net.box.enter, **more
    )


def is_silent(sock: socket.socket) -> bool:
    """Return True if nothing arrives."""
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
    yield start_on_box(netproxyd, net, f"{BOX}:{PORT}?announce={OUTSIDE}&clients={CLIENTS}")
    net.box.nft("delete table ip netproxy-test")


def test_associate_behind_nat_names_the_announced_address(
    behind_nat: Netproxyd, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    with Association((OUTSIDE, PORT), make=net.client.socket) as client:
        assert client.bound == (OUTSIDE, PORT)
        for target in two_echoes:
            assert client.echo(target.address, b"hello") == (target.address, client.bound)


def test_connect_behind_nat_names_the_address_that_the_target_sees(
    behind_nat: Netproxyd, net: Net
) -> None:
    with TcpEcho(SERVER, net.server.socket) as target:
        sock, bound = socks5((OUTSIDE, PORT), CONNECT, target.address, make=net.client.socket)
        with sock:
            assert bound[0] == BOX_TO_SERVER
            echo(sock, b"hello")


def test_announced_address_depends_on_the_clients_network(netproxyd: Start, net: Net) -> None:
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


def test_ipv6_client_is_not_told_an_announced_ipv4_address(netproxyd: Start, net: Net) -> None:
    start_on_box(netproxyd, net, f":{PORT}?announce={OUTSIDE}&clients={CLIENTS}")
    sock, bound = socks5((BOX6, PORT), ASSOCIATE, ("::", 0), make=net.client.socket)
    sock.close()
    assert bound == (BOX6, PORT)


@pytest.fixture
def uplink(net: Net) -> Iterator[str]:
    """Return the name of an interface of the box without an address."""
    net.box.ip("link", "add", "uplink", "type", "veth", "peer", "name", "modem")
    net.box.ip("link", "set", "uplink", "up")
    yield "uplink"
    net.box.ip("link", "delete", "uplink")


def test_announced_address_follows_an_interface_without_a_restart(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho], uplink: str
) -> None:
    first, second = "198.51.100.1", "198.51.100.2"
    listen = f":{PORT}?announce.interface={uplink}&clients={CLIENTS}"
    daemon = start_on_box(netproxyd, net, listen)
    for before, announced in ((BOX, ""), ("", first), (first, second), (second, "")):
        if before in (first, second):
            net.box.ip("address", "delete", f"{before}/24", "dev", uplink)
        if announced:
            net.box.ip("address", "add", f"{announced}/24", "dev", uplink)
        with Association((BOX, PORT), make=net.client.socket) as client:
            assert client.bound == (announced or BOX, PORT)
            target = two_echoes[0].address
            assert client.echo(target, b"hello") == (target, client.bound)
    daemon.said("uplink has no IPv4 address to announce", 2)
    daemon.said(rf"announces {second}:{PORT} \(interface uplink, it was {first}:{PORT}\)")


# -- a wildcard listener


@pytest.mark.parametrize("relay_port", ("shared", "any", "20000-20010"))
@pytest.mark.parametrize("box", (BOX, BOX_SECOND, BOX6, BOX6_SECOND))
def test_replies_of_a_wildcard_listener_leave_from_the_address_that_the_client_used(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho], box: str, relay_port: str
) -> None:
    start_on_box(netproxyd, net, f":{PORT}?clients={CLIENTS}&udp.relay_port={relay_port}")
    with Association((box, PORT), make=net.client.socket) as client:
        assert client.bound[0] == box and (client.bound[1] == PORT) == (relay_port == "shared")
        for target in two_echoes:
            assert client.echo(target.address, b"hello") == (target.address, client.bound)


def test_ipv6_client_sends_datagrams_to_targets_of_both_families(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    start_on_box(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with (
        UdpEcho(SERVER6, net.server.socket) as sixth,
        Association((BOX6, PORT), make=net.client.socket) as client,
    ):
        for target in (sixth, *two_echoes):
            assert client.echo(target.address, b"hello") == (target.address, client.bound)


def test_datagrams_are_fragmented_towards_the_client_but_not_towards_the_target(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    """Hazard 45. With its SOCKS5 header a full-sized datagram needs two packets."""
    target = two_echoes[0]
    daemon = start_on_box(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with Association((BOX_SECOND, PORT), make=net.client.socket) as client:
        client.echo(target.address, bytes(FULL_SIZE))
        client.send(target.address, bytes(FULL_SIZE + 1))
        wait_for(lambda: daemon.status().get("drops{too big}"), SECONDS, "the datagram is counted")
        client.echo(target.address, b"the session goes on")
    assert len(target.sources) == 2 and len(set(target.sources)) == 1


# -- the NAT table as servers and strangers see it


def test_client_has_one_source_port_for_all_targets(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    start_on_box(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with Association((BOX, PORT), make=net.client.socket) as client:
        for target in (*two_echoes, *two_echoes):
            client.echo(target.address, b"hello")
    assert two_echoes[0].sources == two_echoes[1].sources
    assert {host for host, _ in two_echoes[0].sources} == {BOX_TO_SERVER}


def test_client_receives_datagrams_of_a_server_that_it_has_not_sent_to(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    """Filtering is endpoint-independent (RFC 4787 section 5)."""
    start_on_box(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with (
        Association((BOX, PORT), make=net.client.socket) as client,
        udp(SERVER_SECOND, net.server.socket) as third,
    ):
        client.echo(two_echoes[0].address, b"hello")
        third.sendto(b"from a third server", two_echoes[0].sources[0])
        data, source, _ = client.receive()
        assert (data, source) == (b"from a third server", third.getsockname())


def test_datagrams_of_strangers_are_dropped_and_counted(
    netproxyd: Start, net: Net, two_echoes: tuple[UdpEcho, UdpEcho]
) -> None:
    """Hazards 21, 22, 23, 24 and 44. They send nothing and leave no state.

    It makes no difference whether a client has an association, and whether that has an endpoint.
    """
    first, second = two_echoes
    daemon = start_on_box(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    datagram = b"\0\0\0" + encode(second.address) + b"hello"
    with udp(SERVER, net.server.socket) as stranger:
        stranger.sendto(datagram, (BOX_TO_SERVER, PORT))
        assert is_silent(stranger)
        assert daemon.counted(STRANGERS, 1) == 1
        status = daemon.status()
        assert (status["sessions"], status["entries"]) == (0, 0)
        with Association((BOX, PORT), make=net.client.socket) as client:
            # The association has no endpoint yet. The stranger must not become it.
            stranger.sendto(datagram, (BOX_TO_SERVER, PORT))
            assert is_silent(stranger)
            client.echo(first.address, b"hello")
            stranger.sendto(datagram, (BOX_TO_SERVER, PORT))
            assert is_silent(stranger)
            # The client's address, but another port.
            with udp(CLIENT, net.client.socket) as neighbour:
                neighbour.sendto(datagram, (BOX, PORT))
                assert is_silent(neighbour)
            assert daemon.counted(STRANGERS, 4) == 4
            status = daemon.status()
            assert (status["sessions"], status["entries"]) == (1, 1)
        assert not second.sources
        wait_for(lambda: not daemon.status()["sessions"], SECONDS, "the session has ended")
        wait_for(lambda: not daemon.status()["associations"], SECONDS, "the association, too")


def test_tcp_client_that_is_not_permitted_is_closed_without_a_byte(
    netproxyd: Start, net: Net
) -> None:
    daemon = start_on_box(netproxyd, net, f":{PORT}?clients={CLIENTS}")
    with net.server.socket(socket.AF_INET, socket.SOCK_STREAM) as stranger:
        stranger.settimeout(SECONDS)
        stranger.connect((BOX_TO_SERVER, PORT))
        try:
            assert stranger.recv(100) == b""
        except ConnectionResetError:
            pass
    refused = [
        count for name, count in daemon.status().items() if name.startswith("connections_refused{")
    ]
    assert sum(refused) == 1


# -- the command without arguments


def test_daemon_without_arguments_listens_on_loopback(netproxyd: Start, net: Net) -> None:
    """In a namespace of its own, where the default port is free."""
    if os.path.exists("/etc/netproxy/netproxyd.yaml"):
        pytest.skip("this machine has a configuration of its own")
    daemon = netproxyd(make=net.client.socket, preexec_fn=net.client.enter)
    workers = f", {PROCESSES} workers" if PROCESSES > 1 else ""
    assert [line.split(" serves ")[1] for line in daemon.log.splitlines()] == [
        f"udp 127.0.0.1:{PORT}, tcp 127.0.0.1:{PORT}, upstream direct{workers}"
    ]
    with (
        UdpEcho(make=net.client.socket) as target,
        Association(daemon.server, make=net.client.socket) as client,
    ):
        client.echo(target.address, b"hello")
    assert daemon.answers()
