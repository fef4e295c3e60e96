"""Paths with a small MTU between network namespaces, and ECN.

Datagrams to targets are never cut, replies to clients may be.  The relay runs on the box in the
middle: the threads of its daemon are children of a thread that has entered that namespace.
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
from tests.support.sockets import SECONDS, Task
from tests.udp.flows import put_on, settled

CLIENT, BOX = "10.78.1.2", "10.78.1.1"
NEAR, NEAR6 = "10.78.2.2", "fd78:2::2"
"""Behind a link with the small MTU."""
FAR = "10.78.3.2"
"""Behind an ordinary link."""
SMALL = 1280
"""Bytes of the small MTU, which the client's link has as well."""
SIZE = 1400
"""Bytes of a payload that is too long for it."""
PASSES, PASSES6 = SMALL - 28, SMALL - 48
"""The longest payloads that are one packet there, for IPv4 and IPv6."""
LISTENER = "listeners: [{listen: '%s:0', clients: [10.78.1.0/24]}]" % BOX
TOS = 0b10111011
"""Expedited forwarding with the mark for congestion experienced."""

Value = TypeVar("Value")


class Net(NamedTuple):
    client: Namespace
    box: Namespace
    near: Namespace
    far: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("client", "box", "near", "far") as namespaces:
        net = Net(*namespaces)
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
    """Return the result of a call within a namespace.  Its sockets stay there."""

    def run() -> Value:
        host.enter()
        return call()

    result: Value = Task(run).result()
    return result


def counted(host: Namespace, name: str) -> int:
    """Return a counter of a namespace's IPv4, or of its IPv6 ("Ip6...")."""

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
    """Run the relay on the box."""
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
    """Keep the relay on the box busy, as Running.held does."""
    listeners = boxed.daemon._manager.listeners
    listener = next(listener for listener in listeners if listener.network == "udp")
    handler, hold = listener.handler, _Hold()
    listener.handler = hold
    with inside(net.client, lambda: UdpPort(CLIENT)) as nudge:
        nudge.send(b"", listener.address)
        assert hold.entered.wait(SECONDS)
    try:
        yield
    finally:
        listener.handler = handler
        hold.release.set()


def echo(client: UdpClient, target: UdpPort, data: bytes) -> Address:
    """Send a datagram to the target and one back; return the address that the target saw."""
    client.to(target.address, data)
    seen = target.expect(data)
    target.send(data, seen)
    assert client.receive() == (data, target.address)
    return seen


@pytest.mark.parametrize(
    "host, passes, cut", [(NEAR, PASSES, "FragCreates"), (NEAR6, PASSES6, "Ip6FragCreates")]
)
def test_datagrams_to_a_target_are_never_cut(
    net: Net, boxed: Running, client: UdpClient, host: str, passes: int, cut: str
) -> None:
    """Hazard 45.  What is longer than the path is dropped and counted, and the session lives."""
    with inside(net.near, lambda: UdpPort(host)) as target:
        seen = echo(client, target, b"open")
        before = counted(net.box, cut)
        for number, size in enumerate((SIZE, passes + 1, 9000), 1):
            client.to(target.address, bytes(size))
            boxed.wait_for_count("drops", "too big", number)
            client.to(target.address, b"x" * passes)
            assert target.expect(b"x" * passes) == seen
        assert boxed.drops() == {"too big": 3}
        assert counted(net.box, cut) == before
        assert echo(client, target, b"the session lives") == seen


def test_run_of_datagrams_that_are_too_long_is_dropped_whole(
    net: Net, boxed: Running, client: UdpClient
) -> None:
    """They come together and leave as a train.  That fails, and then each of them fails."""
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


def test_datagram_too_long_for_one_path_passes_on_another(
    net: Net, boxed: Running, client: UdpClient
) -> None:
    """It is not counted as an ICMP error, because nobody has sent one."""
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


def test_reply_longer_than_the_clients_path_arrives(
    net: Net, boxed: Running, client: UdpClient
) -> None:
    """The SOCKS5 header makes a reply longer.  Towards a client it may be cut."""
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
def test_packets_to_a_target_have_no_ecn_bits_of_the_client(
    relay: Running, host: str, level_of: int, option: int, kind: int
) -> None:
    """Hazard 46.  The ECN bits of one path mean nothing on the other."""
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


def test_packets_to_a_client_have_no_ecn_bits_of_the_target(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        client.socket.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        target.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TOS)
        target.send(b"marked", seen)
        data, tos = mark(client, socket.IPPROTO_IP, socket.IP_TOS)
        assert data.endswith(b"marked") and tos == 0


def mark(port: UdpPort, level_of: int, kind: int) -> tuple[bytes, int]:
    """Return the next datagram and its type of service."""
    data, control, _, _ = port.socket.recvmsg(65536, 64)
    ((_, _, value),) = [message for message in control if message[:2] == (level_of, kind)]
    return data, value[0]


def test_ecn_bits_do_reach_a_socket_without_a_relay() -> None:
    """Otherwise the tests of ECN would show nothing."""
    with UdpPort() as sender, UdpPort() as target:
        target.socket.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        sender.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TOS)
        sender.send(b"marked", target.address)
        assert mark(target, socket.IPPROTO_IP, socket.IP_TOS) == (b"marked", TOS)
