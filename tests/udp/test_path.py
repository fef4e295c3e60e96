"""Paths with an MTU, between network namespaces: nothing is cut towards a target, a reply is; ECN does not pass.

The relay lives on a box in the middle: its daemon's threads are children of one
that has gone there.
"""

from __future__ import annotations

import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, TypeVar

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.socks5 import encode_header
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.support.handlers import eventually
from tests.support.relays import Running, UdpClient, UdpPort, _Hold, running
from tests.support.sockets import Task
from tests.udp.flows import put_on, settled

CLIENT, BOX = "10.78.1.2", "10.78.1.1"
NEAR, NEAR6 = "10.78.2.2", "fd78:2::2"  # behind a cable of SMALL
FAR = "10.78.3.2"  # behind an ordinary one
SMALL = 1280  # bytes of MTU, of the client's cable as well
SIZE = 1400  # of payload: too long for that
PASSES, PASSES6 = SMALL - 28, SMALL - 48  # the longest payloads that are one packet there
LISTENER = "listeners: [{listen: '%s:0', clients: [10.78.1.0/24]}]" % BOX
TOS = 0b10111011  # expedited forwarding, and a congestion that somebody has met

Value = TypeVar("Value")


class Net(NamedTuple):
    client: Namespace
    box: Namespace
    near: Namespace
    far: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("client", "box", "near", "far") as made:
        net = Net(*made)
        connect(net.client, [f"{CLIENT}/24"], net.box, [f"{BOX}/24"])
        connect(net.box, ["10.78.2.1/24", "fd78:2::1/64"], net.near, [f"{NEAR}/24", f"{NEAR6}/64"])
        connect(net.box, ["10.78.3.1/24"], net.far, [f"{FAR}/24"])
        for host, device in (
            (net.client, "to-box"),
            (net.box, "to-client"),
            (net.box, "to-near"),
            (net.near, "to-box"),
        ):
            host.ip("link", "set", device, "mtu", str(SMALL))
        yield net


def inside(host: Namespace, call: Callable[[], Value]) -> Value:
    """What a call gives there.  The sockets it makes stay there."""

    def run() -> Value:
        host.enter()
        return call()

    result: Value = Task(run).result(10)
    return result


def counted(host: Namespace, name: str) -> int:
    """A counter of its IPv4, or of its IPv6 ("Ip6...")."""

    def read() -> int:
        if name.startswith("Ip6"):
            lines = Path("/proc/thread-self/net/snmp6").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.split()[0] == name))
        names, values = (
            line.split()
            for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
            if line.startswith("Ip:")
        )
        return int(values[names.index(name)])

    return inside(host, read)


@pytest.fixture
def boxed(net: Net, level: str) -> Iterator[Running]:
    """The relay on the box."""
    entered: list[Any] = []

    def start() -> Running:
        entered.append(running(LISTENER + level))
        return entered[0].__enter__()

    relay = inside(net.box, start)
    if relay.daemon._runtime.datagrams.level not in level:
        entered[0].__exit__(None, None, None)
        pytest.skip("this machine has no such level")
    yield relay
    entered[0].__exit__(None, None, None)


@pytest.fixture
def client(boxed: Running, net: Net) -> Iterator[UdpClient]:
    client = inside(net.client, lambda: UdpClient(boxed.port, BOX, CLIENT))
    with client:
        yield client


@contextmanager
def held(net: Net, boxed: Running) -> Iterator[None]:
    """As Running.held, of the relay on the box."""
    listener = next(one for one in boxed.daemon._manager.listeners if one.network == "udp")
    handler, hold = listener.handler, _Hold()
    listener.handler = hold
    with inside(net.client, lambda: UdpPort(CLIENT)) as nudge:
        nudge.send(b"", listener.address)
        assert hold.entered.wait(5)
    try:
        yield
    finally:
        listener.handler = handler
        hold.release.set()


def echo(client: UdpClient, target: UdpPort, data: bytes) -> Address:
    """To the target and back; the address it saw."""
    client.to(target.address, data)
    seen = target.expect(data)
    target.send(data, seen)
    assert client.receive() == (data, target.address)
    return seen


@pytest.mark.parametrize(
    "host, passes, cut", [(NEAR, PASSES, "FragCreates"), (NEAR6, PASSES6, "Ip6FragCreates")]
)
def test_towards_a_target_nothing_is_cut(
    net: Net, boxed: Running, client: UdpClient, host: str, passes: int, cut: str
) -> None:
    """Hazard 45: what is longer than the path is dropped and counted, and the session lives."""
    with inside(net.near, lambda: UdpPort(host)) as target:
        seen = echo(client, target, b"open")
        before = counted(net.box, cut)
        for number, size in enumerate((SIZE, passes + 1, 9000), 1):
            client.to(target.address, bytes(size))
            eventually(lambda: boxed.drops() == {"too big": number})
            client.to(target.address, b"x" * passes)
            assert target.expect(b"x" * passes) == seen
        assert counted(net.box, cut) == before
        assert echo(client, target, b"the session lives") == seen


def test_a_run_of_datagrams_too_long_is_dropped_whole(
    net: Net, boxed: Running, client: UdpClient
) -> None:
    """They come together, so that they would leave as a train: that fails, and then each by itself."""
    with inside(net.near, lambda: UdpPort(NEAR)) as target:
        echo(client, target, b"open")
        settled(boxed)
        before = counted(net.box, "FragCreates")
        with held(net, boxed):
            for _ in range(5):
                client.to(target.address, bytes(SIZE))
        eventually(lambda: boxed.drops().get("too big") == 5)
        assert counted(net.box, "FragCreates") == before
        for size in (PASSES, 1000):
            sent = [bytes((at,)) * size for at in range(10)]
            with held(net, boxed):
                for data in sent:
                    client.to(target.address, data)
            assert [target.receive()[0] for _ in sent] == sent
        assert boxed.drops()["too big"] == 5


def test_what_was_too_long_for_one_target_passes_to_another(
    net: Net, boxed: Running, client: UdpClient
) -> None:
    """And it does not come as an error of ICMP, because nobody has sent one."""
    with (
        inside(net.near, lambda: UdpPort(NEAR)) as near,
        inside(net.far, lambda: UdpPort(FAR)) as far,
    ):
        seen = echo(client, near, b"open"), echo(client, far, b"open")
        for number in range(1, 20):
            client.to(near.address, bytes(SIZE))
            client.to(far.address, b"%d" % number * 500)
            assert far.expect(b"%d" % number * 500) == seen[1]
            assert echo(client, near, b"short") == seen[0]
        assert boxed.drops() == {"too big": 19}
        assert not boxed.count("icmp", "too big")


def test_a_reply_longer_than_the_clients_path_arrives(
    net: Net, boxed: Running, client: UdpClient
) -> None:
    """Our header makes it longer than it was: towards a client it may be cut.  Singly, and as a train."""
    with inside(net.far, lambda: UdpPort(FAR)) as target:
        seen = echo(client, target, b"open")
        before = counted(net.box, "FragCreates")
        for size in (PASSES - 10, PASSES - 9, SIZE, 1472, 9000):
            target.send(b"y" * size, seen)
            assert client.receive() == (b"y" * size, target.address)
        assert counted(net.box, "FragCreates") > before
        sent = [bytes((at,)) * SIZE for at in range(10)]
        put_on(target.socket, b"".join(sent), SIZE, seen)
        assert [client.receive()[0] for _ in sent] == sent, boxed.drops()
        sent = [bytes((at,)) * 1000 for at in range(10)]
        put_on(target.socket, b"".join(sent), 1000, seen)
        assert [client.receive()[0] for _ in sent] == sent
        assert not boxed.drops()


# -- ECN; any path will do


@pytest.mark.parametrize(
    "host, level_of, option, kind",
    [
        ("127.0.0.1", socket.IPPROTO_IP, socket.IP_RECVTOS, socket.IP_TOS),
        ("::1", socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, socket.IPV6_TCLASS),
    ],
)
def test_a_targets_packets_are_not_ect_whatever_the_clients_were(
    relay: Running, host: str, level_of: int, option: int, kind: int
) -> None:
    """Hazard 46: bits of one path mean nothing on the other."""
    with UdpClient(relay.port) as client, UdpPort(host) as target:
        target.socket.setsockopt(level_of, option, 1)
        client.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TOS)
        header = encode_header(target.address)
        client.to(target.address, b"0000")
        assert mark(target, level_of, kind) == (b"0000", 0)
        put_on(
            client.socket,
            b"".join(header + b"%04d" % at for at in range(8)),
            len(header) + 4,
            client.bound,
        )
        for at in range(8):
            assert mark(target, level_of, kind) == (b"%04d" % at, 0)


def test_a_clients_packets_are_not_ect_whatever_the_targets_were(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        client.socket.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        target.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TOS)
        target.send(b"marked", seen)
        data, tos = mark(client, socket.IPPROTO_IP, socket.IP_TOS)
        assert data.endswith(b"marked") and tos == 0


def mark(port: UdpPort, level_of: int, kind: int) -> tuple[bytes, int]:
    """The next datagram, and its byte of service."""
    data, control, _, _ = port.socket.recvmsg(65536, 64)
    ((_, _, value),) = [one for one in control if one[:2] == (level_of, kind)]
    return data, value[0]


def test_the_marks_of_this_test_do_reach_a_socket() -> None:
    """Or it would show nothing."""
    with UdpPort() as sender, UdpPort() as target:
        target.socket.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        sender.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TOS)
        sender.send(b"marked", target.address)
        assert mark(target, socket.IPPROTO_IP, socket.IP_TOS) == (b"marked", TOS)
