"""The local address, the interface, the mark and the keepalive of outgoing sockets.

Of TCP and UDP sockets, and of upstreams whose configuration has such options.
"""

from __future__ import annotations

import socket
from typing import Any, Callable, Iterator

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.config.sections.binds import parse_bind
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import PacketConn
from netproxy.net import socket_options, udp_sockets
from netproxy.net.connect import connect
from netproxy.net.socket_options import DEFAULT_OPTIONS, KEEPALIVE_IDLE, SocketOptions
from netproxy.net.stream import Stream
from netproxy.net.udp_sockets import UdpSocketFactory, largest_payload
from netproxy.resolver.resolver import Resolver
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

LOCAL = "127.0.0.2"
"""An address of this machine, as all of 127.0.0.0/8 on Linux."""
FOREIGN = "203.0.113.9"
"""An address that this machine does not have."""
NO_DEVICE = "no-such-device"
MARK = 0x4E50
NO_CAPABILITY = "cannot set the mark: CAP_NET_ADMIN is missing"
LEVELS = ("mmsg", "trains", "single")
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")


@pytest.fixture(scope="module")
def may_mark() -> None:
    """Skip a test if CAP_NET_ADMIN is missing."""
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        except PermissionError:
            pytest.skip("SO_MARK needs CAP_NET_ADMIN")


@pytest.fixture
def without_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel refuse marks, whoever runs the test."""

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
    factory = UdpSocketFactory(counts, Lines(), request.param)
    if factory.level != request.param:
        pytest.skip("this machine has no such level")
    return factory


@pytest.fixture
def targets(counts: Counts) -> TargetResolver:
    return TargetResolver(Resolver(lambda task: task.run(), counts), Anywhere())


@pytest.fixture(params=["alone", "race"])
def dial(request: pytest.FixtureRequest) -> Callable[[Address, SocketOptions], socket.socket]:
    """Call connect() with one address or with two: the code paths differ."""
    times = 1 if request.param == "alone" else 2
    return lambda address, options: connect([address] * times, 2.0, options)


@pytest.fixture
def opened(
    datagrams: UdpSocketFactory, targets: TargetResolver
) -> Iterator[Callable[[SocketOptions], PacketConn]]:
    """Open packet connections of the direct upstream, which are closed at the end."""
    conns: list[PacketConn] = []

    def open_conn(options: SocketOptions) -> PacketConn:
        dialer = DirectDialer(targets, datagrams, 2.0, options)
        conns.append(dialer.dial_packet(udp_to(Address("127.0.0.1", 9))))
        return conns[-1]

    yield open_conn
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
    def test_tcp_target_sees_the_configured_address(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(LOCAL)) as sock,
            listening.accept()[0] as accepted,
        ):
            assert accepted.getpeername() == sock.getsockname()
            assert sock.getsockname()[0] == LOCAL

    def test_system_chooses_the_address_by_default(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), DEFAULT_OPTIONS) as sock,
            listening.accept()[0],
        ):
            assert sock.getsockname()[0] == "127.0.0.1"

    @needs_ipv6
    def test_tcp_target_sees_the_configured_ipv6_address(self, dial: Callable) -> None:
        with (
            listen("::1") as listening,
            dial(address_of(listening), SocketOptions("::1")) as sock,
            listening.accept()[0] as accepted,
        ):
            assert accepted.getpeername()[:2] == sock.getsockname()[:2]

    def test_port_is_chosen_when_the_target_is_known(self) -> None:
        """IP_BIND_ADDRESS_NO_PORT: different targets may share a local port."""
        with socket.socket() as sock:
            SocketOptions(LOCAL).apply(sock)
            assert sock.getsockname() == (LOCAL, 0)

    @needs_ipv6
    @pytest.mark.parametrize("host, local", [("127.0.0.1", "::1"), ("::1", LOCAL)])
    def test_address_of_the_other_family_fails_with_a_reason(
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
    @pytest.mark.parametrize("local, family", [(LOCAL, socket.AF_INET), ("::1", socket.AF_INET6)])
    def test_local_address_decides_the_family_of_the_target(self, local: str, family: int) -> None:
        with listen() as four, socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as six:
            six.bind(("::1", address_of(four).port))
            six.listen()
            targets = [Address("::1", address_of(four).port), address_of(four)]
            for order in (targets, targets[::-1]):
                with connect(order, 2.0, SocketOptions(local)) as sock:
                    assert (sock.family, sock.getsockname()[0]) == (family, local)

    def test_foreign_address_fails_with_a_reason(self, dial: Callable) -> None:
        with listen() as listening:
            assert (
                failure(dial, address_of(listening), SocketOptions(FOREIGN)).reason
                is Reason.NETWORK_UNREACHABLE
            )
            assert nothing_comes(listening, 0.0)

    def test_tcp_socket_is_bound_to_the_interface(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(device="lo")) as sock,
            listening.accept()[0],
        ):
            assert (
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
                == b"lo"
            )

    def test_error_names_a_missing_interface(self, dial: Callable) -> None:
        """Not just "failed": the configuration or a link is at fault, not the target."""
        with listen() as listening:
            error = failure(dial, address_of(listening), SocketOptions(device=NO_DEVICE))
            assert nothing_comes(listening, 0.0)
        assert NO_DEVICE in str(error) or "No such device" in str(error)

    @pytest.mark.usefixtures("may_mark")
    def test_tcp_socket_has_the_mark(self, dial: Callable) -> None:
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

    def test_error_names_the_capability_that_a_mark_on_tcp_needs(
        self, dial: Callable, without_capability: None
    ) -> None:
        """The fault is ours: no rule of the kernel denies the target.  No socket is left."""
        with listen() as listening:
            for _ in range(20):
                error = failure(dial, address_of(listening), SocketOptions(mark=MARK))
                assert (error.reason, str(error)) == (Reason.GENERAL, NO_CAPABILITY)
            assert nothing_comes(listening, 0.0)

    def test_socket_option_that_is_not_permitted_fails_with_a_reason(
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
        "seconds, idle, gives_up",
        [
            *((1.0, 1, 120), (7.0, 7, 120), (300.0, 300, 360), (0.2, 1, 120), (61.0, 61, 121)),
            *((KEEPALIVE_IDLE, 60, 120), (840.0, 840, 900), (841.0, 841, 0), (7200.0, 7200, 0)),
        ],
    )
    def test_tcp_socket_has_the_keepalive(
        self, dial: Callable, seconds: float, idle: int, gives_up: int
    ) -> None:
        """Hazards 86, 190."""
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(keepalive=seconds)) as sock,
            listening.accept()[0],
        ):
            assert option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
            assert (
                option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
                == socket_options.KEEPALIVE_INTERVAL
            )
            assert option(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == gives_up * 1000
            if not gives_up:
                probes = option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
                assert probes == socket_options.KEEPALIVE_PROBES

    def test_keepalive_of_0_disables_it(self, dial: Callable) -> None:
        with (
            listen() as listening,
            dial(address_of(listening), SocketOptions(keepalive=0.0)) as sock,
            listening.accept()[0],
        ):
            assert option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            assert option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    @pytest.mark.parametrize(
        "options", [SocketOptions("::1"), SocketOptions(FOREIGN), SocketOptions(device=NO_DEVICE)]
    )
    def test_failed_dial_leaves_no_socket(self, options: SocketOptions, dial: Callable) -> None:
        """The fixture of all tests counts descriptors."""
        for _ in range(20):
            failure(dial, Address("127.0.0.1", 9), options)


class TestUdp:
    def test_udp_targets_see_the_configured_address_and_one_port(
        self, datagrams: UdpSocketFactory, opened: Callable
    ) -> None:
        conn = opened(SocketOptions(LOCAL))
        with udp() as first, udp() as second:
            seen = []
            for target in (first, second):
                send(datagrams, conn, b"ping", address_of(target))
                data, source = target.recvfrom(16)
                assert data == b"ping"
                seen.append(source)
            assert seen[0] == seen[1] and seen[0][0] == LOCAL

    def test_replies_to_the_configured_address_are_received(
        self, datagrams: UdpSocketFactory, opened: Callable
    ) -> None:
        conn, arena = opened(SocketOptions(LOCAL)), datagrams.arena()
        with udp() as target:
            send(datagrams, conn, b"ping", address_of(target))
            target.sendto(b"pong", target.recvfrom(16)[1])
            assert conn.wait()
            ((offsets, length, _, peer),) = conn.receive(arena).spans
            assert bytes(arena.view[offsets[0] : offsets[0] + length]) == b"pong"
            assert conn.source(peer) == address_of(target)

    @needs_ipv6
    def test_udp_target_sees_the_configured_ipv6_address(
        self, datagrams: UdpSocketFactory, opened: Callable
    ) -> None:
        conn = opened(SocketOptions("::1"))
        with udp("::1") as target:
            send(datagrams, conn, b"ping", address_of(target))
            assert target.recvfrom(16)[1][0] == "::1"

    def test_ipv6_target_from_an_ipv4_address_fails_with_a_reason(self, opened: Callable) -> None:
        error = failure(opened(SocketOptions(LOCAL)).prepare, udp_to(Address("2001:db8::1", 53)))
        assert error.reason is Reason.NETWORK_UNREACHABLE and "2001:db8::1" in str(error)

    @needs_ipv6
    def test_datagrams_to_ipv4_from_an_ipv6_address_are_counted(
        self, datagrams: UdpSocketFactory, opened: Callable, counts: Counts
    ) -> None:
        conn = opened(SocketOptions("::1"))
        with udp() as target:
            send(datagrams, conn, b"ping", address_of(target))
            assert counts.counts == {("drops", "unreachable"): 1}
            assert nothing_comes(target, 0.01)

    @pytest.mark.parametrize(
        "options, text, reason",
        [
            (SocketOptions(FOREIGN), "Cannot assign requested address", Reason.NETWORK_UNREACHABLE),
            (
                SocketOptions("2001:db8::9"),
                "Cannot assign requested address",
                Reason.NETWORK_UNREACHABLE,
            ),
            (SocketOptions(device=NO_DEVICE), "No such device", Reason.GENERAL),
        ],
    )
    def test_udp_options_that_cannot_be_set_fail_the_dial(
        self, opened: Callable, options: SocketOptions, text: str, reason: Reason
    ) -> None:
        """No socket is left."""
        for _ in range(20):
            error = failure(opened, options)
            assert error.reason is reason and text in str(error)

    @pytest.mark.parametrize("address", ["", LOCAL])
    def test_error_names_the_capability_that_a_mark_on_udp_needs(
        self, opened: Callable, without_capability: None, address: str
    ) -> None:
        """No socket is left."""
        for _ in range(20):
            error = failure(opened, SocketOptions(address, mark=MARK))
            assert (error.reason, str(error)) == (Reason.GENERAL, NO_CAPABILITY)

    def test_udp_socket_is_bound_to_the_interface(self, datagrams: UdpSocketFactory) -> None:
        local = datagrams.outgoing(SocketOptions(device="lo"))
        device = local.socket.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
        assert device.rstrip(b"\0") == b"lo"
        local.close()

    @pytest.mark.usefixtures("may_mark")
    @pytest.mark.parametrize("address", ["", LOCAL])
    def test_udp_socket_has_the_mark(self, datagrams: UdpSocketFactory, address: str) -> None:
        local = datagrams.outgoing(SocketOptions(address, mark=MARK))
        assert option(local.socket, socket.SOL_SOCKET, socket.SO_MARK) == MARK
        local.close()

    def test_udp_socket_with_an_ipv4_address_has_path_mtu_discovery(
        self, datagrams: UdpSocketFactory
    ) -> None:
        """Hazard 45: as without an address, nothing is fragmented on the way."""
        local = datagrams.outgoing(SocketOptions(LOCAL))
        discovery = option(local.socket, socket.IPPROTO_IP, udp_sockets.IP_MTU_DISCOVER)
        assert discovery == udp_sockets.PMTUDISC_PROBE == 3
        local.close()


class TestUpstream:
    """Upstreams whose hops have such options."""

    def dialer(self, targets: TargetResolver, *hops: HopConfig) -> Any:
        datagrams = UdpSocketFactory(Counts(), Lines())
        factory = DialerFactory(targets, datagrams, 2.0, no_packets())
        return factory.dialer(UpstreamConfig(hops))

    def test_options_of_a_direct_hop_apply_to_the_target(self, targets: TargetResolver) -> None:
        with listen() as listening:
            stream = self.dialer(
                targets, HopConfig("direct", bind=parse_bind(LOCAL), keepalive=9.0)
            ).dial(tcp_to(address_of(listening)))
            with listening.accept()[0]:
                assert stream.local_address().host == LOCAL
                assert option(stream.socket, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 9
            stream.close()

    @pytest.mark.parametrize(
        "hops",
        [
            lambda address: (HopConfig("socks4", address, bind=parse_bind(LOCAL), keepalive=0.0),),
            lambda address: (
                HopConfig("direct", bind=parse_bind(LOCAL), keepalive=0.0),
                HopConfig("socks4", address),
            ),
        ],
        ids=("of-the-hop", "of-direct-before-it"),
    )
    def test_options_of_the_first_hop_apply_to_its_server(
        self, targets: TargetResolver, hops: Callable[[Address], tuple]
    ) -> None:
        seen: list[str] = []

        def script(sock: socket.socket) -> None:
            seen.append(sock.getpeername()[0])
            read_exactly(sock, 9)
            sock.sendall(b"\0\x5a" + bytes(6))
            read_to_end(sock)

        with server(script) as address:
            stream: Stream = self.dialer(targets, *hops(address)).dial(
                tcp_to(Address("198.51.100.7", 443))
            )
            assert stream.local_address().host == LOCAL
            assert option(stream.socket, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            stream.close()
        assert seen == [LOCAL]

    @pytest.mark.parametrize("bind", [NO_DEVICE, FOREIGN])
    def test_error_of_an_option_names_the_hop(self, targets: TargetResolver, bind: str) -> None:
        with listen() as listening:
            address = address_of(listening)
            error = failure(
                self.dialer(targets, HopConfig("socks4", address, bind=parse_bind(bind))).dial,
                tcp_to(Address("198.51.100.7", 443)),
            )
            assert nothing_comes(listening, 0.0)
        assert error.upstream and str(error).startswith(f"socks4://{address}: ")
        assert str(error) != f"socks4://{address}: failed"


def test_largest_payload_is_what_the_first_link_takes() -> None:
    assert largest_payload(Address("127.0.0.1", 9)) == 65535 - 28
    assert largest_payload(Address("a.name", 9)) == 0
    if HAS_IPV6:
        assert largest_payload(Address("::1", 9)) == 65536 - 48
