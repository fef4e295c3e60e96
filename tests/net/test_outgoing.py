"""How this machine is left: the local address, the interface, the mark and the keepalive that a way out is given."""

from __future__ import annotations

import socket
from typing import Any, Callable, Iterator

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import PacketConn
from netproxy.net import connect as connect_module
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.connect import DEFAULT_OPTIONS, KEEPALIVE_IDLE, SocketOptions, connect
from netproxy.resolver.resolver import Resolver
from netproxy.net.stream import Stream
from tests.support.doubles import Counts, Lines, no_packets
from tests.support.flows import Anywhere, tcp_to, udp_to
from tests.support.sockets import (
    HAS_IPV6,
    address_of,
    listen,
    nothing_comes,
    read_exactly,
    read_to_end,
    server,
    udp,
)

HERE = "127.0.0.2"  # of this machine, as all of 127.0.0.0/8 on Linux
UNSPECIFIED_ADDRESS = "203.0.113.9"  # of none
NO_DEVICE = "no-such-device"
MARK = 0x4E50
NO_CAPABILITY = "cannot set the mark: CAP_NET_ADMIN is missing"
LEVELS = ("mmsg", "trains", "single")
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")


@pytest.fixture(scope="module")
def may_mark() -> None:
    """CAP_NET_ADMIN."""
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        except PermissionError:
            pytest.skip("SO_MARK needs CAP_NET_ADMIN")


@pytest.fixture
def without_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses marks, whoever runs the test."""

    class Socket(socket.socket):
        def setsockopt(self, level: int, option: int, *value: Any) -> None:
            if (level, option) == (socket.SOL_SOCKET, socket.SO_MARK):
                raise PermissionError(1, "Operation not permitted")
            super().setsockopt(level, option, *value)

    monkeypatch.setattr(socket, "socket", Socket)


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture(params=LEVELS)
def datagrams(request: pytest.FixtureRequest, counts: Counts) -> UdpSocketFactory:
    found = UdpSocketFactory(counts, Lines(), request.param)
    if found.level != request.param:
        pytest.skip("this machine has no such level")
    return found


@pytest.fixture
def reach(counts: Counts) -> TargetResolver:
    def submit(task: Callable[[], None]) -> bool:
        task()
        return True

    return TargetResolver(Resolver(submit, counts), Anywhere())


@pytest.fixture(params=["alone", "race"])
def dial(request: pytest.FixtureRequest) -> Callable[[Address, SocketOptions], socket.socket]:
    """One address has a way of its own through connect()."""
    times = 1 if request.param == "alone" else 2
    return lambda address, outgoing: connect([address] * times, 2.0, outgoing)


@pytest.fixture
def opened(
    datagrams: UdpSocketFactory, reach: TargetResolver
) -> Iterator[Callable[[SocketOptions], PacketConn]]:
    """Packet connections of the direct way out, closed at the end."""
    conns: list[PacketConn] = []

    def open_one(outgoing: SocketOptions) -> PacketConn:
        conns.append(
            DirectDialer(reach, datagrams, 2.0, outgoing).dial_packet(
                udp_to(Address("127.0.0.1", 9))
            )
        )
        return conns[-1]

    yield open_one
    for conn in conns:
        conn.close()


def failure(call: Callable[..., Any], *arguments: Any) -> DialError:
    with pytest.raises(DialError) as caught:
        call(*arguments)
    return caught.value


def send(datagrams: UdpSocketFactory, conn: PacketConn, data: bytes, target: Address) -> None:
    arena = datagrams.arena()
    conn.send(arena, arena.put(data), conn.prepare(udp_to(target)))


def option(sock: socket.socket, level: int, name: int) -> int:
    return sock.getsockopt(level, name)


class TestTcp:
    def test_the_target_sees_the_address(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(HERE)) as sock,
            listening.accept()[0] as accepted,
        ):
            assert accepted.getpeername() == sock.getsockname()
            assert sock.getsockname()[0] == HERE

    def test_without_one_the_system_chooses(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), DEFAULT_OPTIONS) as sock,
            listening.accept()[0],
        ):
            assert sock.getsockname()[0] == "127.0.0.1"

    @needs_ipv6
    def test_one_of_ipv6(self, dial: Callable) -> None:
        with (
            listen("::1") as listening,
            dial(address_of(listening), SocketOptions("::1")) as sock,
            listening.accept()[0] as accepted,
        ):
            assert accepted.getpeername()[:2] == sock.getsockname()[:2]

    def test_its_port_is_chosen_late(self) -> None:
        """So that one local address does not run out of ports while targets differ (IP_BIND_ADDRESS_NO_PORT)."""
        with socket.socket() as sock:
            SocketOptions(HERE).apply(sock)
            assert sock.getsockname() == (HERE, 0)

    @needs_ipv6
    @pytest.mark.parametrize("host, local", [("127.0.0.1", "::1"), ("::1", HERE)])
    def test_one_of_the_other_family_has_a_reason(
        self, dial: Callable, host: str, local: str
    ) -> None:
        with listen(host) as listening:
            error = failure(dial, address_of(listening), SocketOptions(local))
            assert (error.reason, str(error)) == (
                Reason.NETWORK_UNREACHABLE,
                f"{address_of(listening)}: network unreachable",
            )
            assert nothing_comes(listening, 0.0)

    @needs_ipv6
    @pytest.mark.parametrize("local, family", [(HERE, socket.AF_INET), ("::1", socket.AF_INET6)])
    def test_of_both_families_of_a_target_the_one_that_fits_is_taken(
        self, local: str, family: int
    ) -> None:
        with listen() as four, socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as six:
            six.bind(("::1", address_of(four).port))
            six.listen()
            targets = [Address("::1", address_of(four).port), address_of(four)]
            for order in (targets, targets[::-1]):
                with connect(order, 2.0, SocketOptions(local)) as sock:
                    assert (sock.family, sock.getsockname()[0]) == (family, local)

    def test_one_that_is_not_of_this_machine_has_a_reason(self, dial: Callable) -> None:
        with listen() as listening:
            assert (
                failure(dial, address_of(listening), SocketOptions(UNSPECIFIED_ADDRESS)).reason
                is Reason.NETWORK_UNREACHABLE
            )
            assert nothing_comes(listening, 0.0)

    def test_the_interface(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(device="lo")) as sock,
            listening.accept()[0],
        ):
            assert (
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
                == b"lo"
            )

    def test_an_interface_that_is_not_there_is_said_to_be_missing(self, dial: Callable) -> None:
        """Not just "failed": it is our configuration, or a link that is down, and no fault of the target's."""
        with listen() as listening:
            error = failure(dial, address_of(listening), SocketOptions(device=NO_DEVICE))
            assert nothing_comes(listening, 0.0)
        assert NO_DEVICE in str(error) or "No such device" in str(error)

    @pytest.mark.usefixtures("may_mark")
    def test_the_mark(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(mark=MARK)) as sock,
            listening.accept()[0],
        ):
            assert option(sock, socket.SOL_SOCKET, socket.SO_MARK) == MARK
        with (
            listen() as listening,
            dial(address_of(listening), DEFAULT_OPTIONS) as sock,
            listening.accept()[0],
        ):
            assert option(sock, socket.SOL_SOCKET, socket.SO_MARK) == 0

    def test_a_mark_without_the_capability_says_so(
        self, dial: Callable, without_capability: None
    ) -> None:
        """It is our own fault, and no rule of the kernel's that denies the target."""
        with listen() as listening:
            for _ in range(20):  # and leaves no socket
                error = failure(dial, address_of(listening), SocketOptions(mark=MARK))
                assert (error.reason, str(error)) == (Reason.GENERAL, NO_CAPABILITY)
            assert nothing_comes(listening, 0.0)

    def test_a_mark_that_is_not_allowed_has_a_reason(
        self, dial: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: SocketOptions, sock: socket.socket) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(SocketOptions, "apply", refuse)
        with listen() as listening:
            assert (
                failure(dial, address_of(listening), SocketOptions(mark=MARK)).reason
                is Reason.DENIED
            )

    @pytest.mark.parametrize(
        "seconds, idle", [(1.0, 1), (7.0, 7), (300.0, 300), (0.2, 1), (KEEPALIVE_IDLE, 60)]
    )
    def test_keepalive(self, dial: Callable, seconds: float, idle: int) -> None:
        """HAZARDS 86."""
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(keepalive=seconds)) as sock,
            listening.accept()[0],
        ):
            assert option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
            assert (
                option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
                == connect_module.KEEPALIVE_INTERVAL
            )
            assert (
                option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
                == connect_module.KEEPALIVE_PROBES
            )

    def test_no_keepalive(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(keepalive=0.0)) as sock,
            listening.accept()[0],
        ):
            assert option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            assert option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    @pytest.mark.parametrize(
        "outgoing",
        [SocketOptions("::1"), SocketOptions(UNSPECIFIED_ADDRESS), SocketOptions(device=NO_DEVICE)],
    )
    def test_what_failed_leaves_no_socket(self, outgoing: SocketOptions, dial: Callable) -> None:
        """The fixture of all tests counts descriptors."""
        for _ in range(20):
            failure(dial, Address("127.0.0.1", 9), outgoing)


class TestUdp:
    def test_every_target_sees_the_address_and_one_port(
        self, datagrams: UdpSocketFactory, opened: Callable
    ) -> None:
        conn = opened(SocketOptions(HERE))
        with udp() as first, udp() as second:
            seen = []
            for target in (first, second):
                send(datagrams, conn, b"ping", address_of(target))
                data, source = target.recvfrom(16)
                assert data == b"ping"
                seen.append(source)
            assert seen[0] == seen[1] and seen[0][0] == HERE

    def test_answers_come_back(self, datagrams: UdpSocketFactory, opened: Callable) -> None:
        conn, arena = opened(SocketOptions(HERE)), datagrams.arena()
        with udp() as target:
            send(datagrams, conn, b"ping", address_of(target))
            target.sendto(b"pong", target.recvfrom(16)[1])
            assert conn.wait()
            ((offsets, length, _, peer),) = conn.receive(arena).spans
            assert bytes(arena.view[offsets[0] : offsets[0] + length]) == b"pong"
            assert conn.source(peer) == address_of(target)

    @needs_ipv6
    def test_one_of_ipv6(self, datagrams: UdpSocketFactory, opened: Callable) -> None:
        conn = opened(SocketOptions("::1"))
        with udp("::1") as target:
            send(datagrams, conn, b"ping", address_of(target))
            assert target.recvfrom(16)[1][0] == "::1"

    def test_a_target_of_ipv6_from_an_address_of_ipv4_has_a_reason(self, opened: Callable) -> None:
        error = failure(opened(SocketOptions(HERE)).prepare, udp_to(Address("2001:db8::1", 53)))
        assert error.reason is Reason.NETWORK_UNREACHABLE and "2001:db8::1" in str(error)

    @needs_ipv6
    def test_a_target_of_ipv4_from_an_address_of_ipv6_is_counted(
        self, datagrams: UdpSocketFactory, opened: Callable, counts: Counts
    ) -> None:
        conn = opened(SocketOptions("::1"))
        with udp() as target:
            send(datagrams, conn, b"ping", address_of(target))
            assert counts.counts == {("drops", "unreachable"): 1}
            assert nothing_comes(target, 0.01)

    @pytest.mark.parametrize(
        "outgoing, said, reason",
        [
            (
                SocketOptions(UNSPECIFIED_ADDRESS),
                "Cannot assign requested address",
                Reason.NETWORK_UNREACHABLE,
            ),
            (
                SocketOptions("2001:db8::9"),
                "Cannot assign requested address",
                Reason.NETWORK_UNREACHABLE,
            ),
            (SocketOptions(device=NO_DEVICE), "No such device", Reason.GENERAL),
        ],
    )
    def test_what_cannot_be_had_is_a_failed_dial(
        self, opened: Callable, outgoing: SocketOptions, said: str, reason: Reason
    ) -> None:
        for _ in range(20):  # and leaves no socket
            error = failure(opened, outgoing)
            assert error.reason is reason and said in str(error)

    @pytest.mark.parametrize("address", ["", HERE])
    def test_a_mark_without_the_capability_says_so(
        self, opened: Callable, without_capability: None, address: str
    ) -> None:
        for _ in range(20):  # and leaves no socket
            error = failure(opened, SocketOptions(address, mark=MARK))
            assert (error.reason, str(error)) == (Reason.GENERAL, NO_CAPABILITY)

    def test_the_interface(self, datagrams: UdpSocketFactory) -> None:
        found = datagrams.outgoing(SocketOptions(device="lo"))
        assert (
            found.socket.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
            == b"lo"
        )
        found.close()

    @pytest.mark.usefixtures("may_mark")
    @pytest.mark.parametrize("address", ["", HERE])
    def test_the_mark(self, datagrams: UdpSocketFactory, address: str) -> None:
        found = datagrams.outgoing(SocketOptions(address, mark=MARK))
        assert option(found.socket, socket.SOL_SOCKET, socket.SO_MARK) == MARK
        found.close()

    def test_an_address_of_ipv4_has_its_path_mtu_discovery_too(
        self, datagrams: UdpSocketFactory
    ) -> None:
        """HAZARDS 45: as without an address, nothing is fragmented on the way."""
        found = datagrams.outgoing(SocketOptions(HERE))
        assert (
            option(found.socket, socket.IPPROTO_IP, 10) == 3
        )  # IP_MTU_DISCOVER, IP_PMTUDISC_PROBE
        found.close()


class TestFromTheConfiguration:
    def way(self, reach: TargetResolver, *hops: HopConfig) -> Any:
        return DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), 2.0, no_packets()).dialer(
            UpstreamConfig(hops)
        )

    def test_a_direct_way(self, reach: TargetResolver) -> None:
        with listen() as listening:
            stream = self.way(reach, HopConfig("direct", bind=HERE, keepalive=9.0)).dial(
                tcp_to(address_of(listening))
            )
            with listening.accept()[0]:
                assert stream.local_address().host == HERE
                assert option(stream.socket, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 9
            stream.close()

    @pytest.mark.parametrize(
        "hops",
        [
            lambda address: (HopConfig("socks4", address, bind=HERE, keepalive=0.0),),
            lambda address: (
                HopConfig("direct", bind=HERE, keepalive=0.0),
                HopConfig("socks4", address),
            ),
        ],
        ids=("of-the-hop", "of-direct-before-it"),
    )
    def test_a_first_hop_is_reached_so(
        self, reach: TargetResolver, hops: Callable[[Address], tuple]
    ) -> None:
        seen: list[str] = []

        def script(sock: socket.socket) -> None:
            seen.append(sock.getpeername()[0])
            read_exactly(sock, 9)
            sock.sendall(b"\0\x5a" + bytes(6))
            read_to_end(sock)

        with server(script) as address:
            stream: Stream = self.way(reach, *hops(address)).dial(
                tcp_to(Address("198.51.100.7", 443))
            )
            assert stream.local_address().host == HERE
            assert option(stream.socket, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            stream.close()
        assert seen == [HERE]

    @pytest.mark.parametrize("bind", [NO_DEVICE, UNSPECIFIED_ADDRESS])
    def test_what_cannot_be_had_names_the_hop(self, reach: TargetResolver, bind: str) -> None:
        with listen() as listening:
            address = address_of(listening)
            error = failure(
                self.way(reach, HopConfig("socks4", address, bind=bind)).dial,
                tcp_to(Address("198.51.100.7", 443)),
            )
            assert nothing_comes(listening, 0.0)
        assert error.upstream and str(error).startswith(f"socks4://{address}: ")
        assert str(error) != f"socks4://{address}: failed"
