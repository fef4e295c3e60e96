"""Local addresses of direct connections: the choice within a prefix, precedence, families."""

from __future__ import annotations

import errno
import socket
from typing import Any, Callable, NoReturn, Sequence

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.config.sections.binds import parse_bind
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.plain import rotation
from netproxy.dialer.plain.rotation import source_address, usable_address
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, FlowSource
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import Bind, RouteSelectors
from netproxy.net.socket_options import IP_FREEBIND, IPV6_FREEBIND, SocketOptions
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.support.doubles import Counts, Lines
from tests.support.flows import Anywhere, tcp_to, udp_to
from tests.support.sockets import address_of, listen, udp

SIX, FOUR = "2001:db8:1::/64", "127.9.0.0/16"
TARGET = Address("198.51.100.7", 443)
ALICE = "users.alice.bind"


def bind(text: str, rotate: str = "connection", period: float = 0.0) -> Bind:
    return parse_bind(text)._replace(rotate=rotate, period=period)


def flow(network: str = "tcp", client: str = "192.0.2.1", user: str = "", **more: Any) -> Flow:
    return Flow(network, Address(client, 5), TARGET, "main", user)._replace(**more)


def sourced(flow: Flow, text: str, incoming: str = "") -> Flow:
    """Return the flow of a user who has a bind."""
    return flow._replace(source=FlowSource(parse_bind(text), ALICE, incoming))


class TestUsableAddress:
    @pytest.mark.parametrize(
        "prefix, expected",
        [
            ("192.0.2.0/29", [f"192.0.2.{number}" for number in range(1, 7)]),
            ("192.0.2.0/30", ["192.0.2.1", "192.0.2.2"]),
            ("192.0.2.0/31", ["192.0.2.0", "192.0.2.1"]),
            ("192.0.2.5/32", ["192.0.2.5"]),
            ("2001:db8::/126", ["2001:db8::1", "2001:db8::2", "2001:db8::3"]),
            ("2001:db8::/127", ["2001:db8::", "2001:db8::1"]),
            ("2001:db8::5/128", ["2001:db8::5"]),
        ],
    )
    def test_network_broadcast_and_anycast_addresses_are_left_out(
        self, prefix: str, expected: list[str]
    ) -> None:
        network = IpNetwork.parse(prefix)
        addresses = [usable_address(network, number) for number in range(len(expected))]
        assert addresses == expected
        assert usable_address(network, len(expected)) == expected[0]
        assert usable_address(network, (1 << 128) - 1) in expected


class TestRotation:
    def test_10000_connections_have_at_least_9990_addresses(self) -> None:
        addresses = {source_address(bind(SIX), flow()) for _ in range(10_000)}
        assert len(addresses) >= 9_990
        assert all(IpNetwork.parse(SIX).holds(address) for address in addresses)
        assert "2001:db8:1::" not in addresses

    def test_each_address_of_a_small_prefix_is_used(self) -> None:
        addresses = {source_address(bind("192.0.2.0/29"), flow()) for _ in range(1_000)}
        assert addresses == {f"192.0.2.{number}" for number in range(1, 7)}

    @pytest.mark.parametrize(
        "rotate, same, other",
        [
            ("client", flow(user="bob"), flow(client="192.0.2.2")),
            ("client", flow("udp"), flow("udp", client="192.0.2.2")),
            ("user", flow(client="192.0.2.2", user="alice"), flow(user="bob")),
            ("user", flow("udp", user="alice"), flow(user="")),
            ("target", flow(client="192.0.2.2"), flow(target=Address("198.51.100.8", 443))),
            ("target", flow(target=TARGET._replace(port=80)), flow("udp")),
        ],
    )
    def test_address_stays_with_its_client_user_or_target(
        self, rotate: str, same: Flow, other: Flow
    ) -> None:
        rotating = bind(SIX, rotate)
        address = source_address(rotating, flow(user="alice"))
        assert source_address(rotating, same) == address
        assert source_address(rotating, other) != address

    def test_user_who_has_not_logged_in_counts_by_address(self) -> None:
        by_user, by_client = bind(SIX, "user"), bind(SIX, "client")
        assert source_address(by_user, flow()) == source_address(by_client, flow())

    def test_targets_of_a_udp_client_see_one_address(self) -> None:
        """The mapping stays endpoint-independent (RFC 4787 REQ-1)."""
        first, second = flow("udp"), flow("udp", target=Address("203.0.113.9", 53))
        rotating = bind(SIX, "target")
        assert source_address(rotating, first) == source_address(rotating, second)
        assert source_address(rotating, first) == source_address(bind(SIX, "client"), first)

    def test_address_of_a_duration_changes_with_the_period(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 6000.0
        monkeypatch.setattr(rotation.time, "monotonic", lambda: now)
        rotating = bind(SIX, "10m", 600.0)
        first = source_address(rotating, flow())
        now = 6599.0
        assert source_address(rotating, flow(client="192.0.2.2")) == first
        now = 6600.0
        assert source_address(rotating, flow()) != first

    def test_names_that_are_no_text_have_an_address(self) -> None:
        assert source_address(bind(SIX, "user"), flow(user="\udcff"))

    def test_incoming_is_the_address_that_the_client_connected_to(self) -> None:
        source = FlowSource(None, "", "192.0.2.9")
        assert source_address(bind("incoming"), flow(source=source)) == "192.0.2.9"
        assert source_address(bind("incoming"), flow()) == ""

    def test_another_process_has_other_addresses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        address = source_address(bind(SIX, "client"), flow())
        monkeypatch.setattr(rotation, "_KEY", bytes(16))
        assert source_address(bind(SIX, "client"), flow()) != address


def test_flow_to_a_proxy_keeps_only_what_incoming_needs() -> None:
    source = FlowSource(parse_bind("192.0.2.1"), ALICE, "192.0.2.9")
    hop = flow(source=source).to_hop(Address("10.0.0.1", 1080))
    assert hop.source == FlowSource(None, ALICE, "192.0.2.9")
    assert flow().to_hop(Address("10.0.0.1", 1080)).source is None


class TestFreebind:
    @pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
    @pytest.mark.parametrize(
        "host, family, level, option",
        [
            ("192.0.2.1", socket.AF_INET, socket.IPPROTO_IP, IP_FREEBIND),
            ("2001:db8::1", socket.AF_INET6, socket.IPPROTO_IPV6, IPV6_FREEBIND),
        ],
    )
    def test_address_that_the_machine_lacks_is_bound(
        self, kind: int, host: str, family: int, level: int, option: int
    ) -> None:
        with socket.socket(family, kind) as sock:
            SocketOptions(host, freebind=True).apply(sock)
            assert sock.getsockname()[0] == host
            assert sock.getsockopt(level, option) == 1

    def test_plain_address_that_the_machine_lacks_is_an_error(self) -> None:
        with socket.socket() as sock, pytest.raises(OSError):
            SocketOptions("192.0.2.1").apply(sock)


@pytest.mark.parametrize(
    "family, host, said",
    [
        (socket.AF_INET6, "192.0.2.1", "is IPv4, and the target has IPv6 addresses only"),
        (socket.AF_INET, "2001:db8::1", "is IPv6, and the target has IPv4 addresses only"),
    ],
)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_socket_of_the_other_family_is_not_bound(
    kind: int, family: int, host: str, said: str
) -> None:
    label = f"{ALICE}: {host}"
    with socket.socket(family, kind) as sock:
        with pytest.raises(DialError) as caught:
            SocketOptions(host, freebind=True, label=label).apply(sock)
        assert (caught.value.decided, str(caught.value)) == (label, f"{label} {said}")
        with pytest.raises(OSError) as failure:
            SocketOptions(host, freebind=True).apply(sock)
        assert failure.value.errno == errno.EAFNOSUPPORT
        assert sock.getsockname()[1] == 0


class Rig:
    """Dialers of upstreams, on real sockets."""

    def __init__(self, targets: TargetResolver) -> None:
        datagrams = UdpSocketFactory(Counts(), Lines())
        packets: Any = None
        self.factory = DialerFactory(targets, datagrams, 5.0, packets)

    def dialer(self, hop: HopConfig, name: str = "exit") -> Any:
        return self.factory.dialer(UpstreamConfig((hop,), name))


@pytest.fixture
def rig(target_resolver: TargetResolver) -> Rig:
    return Rig(target_resolver)


def seen_by(listening: socket.socket, opened: Callable[[], Any]) -> str:
    """Return the address that a listening socket sees of a connection."""
    connection = opened()
    accepted, peer = listening.accept()
    accepted.close()
    connection.close()
    return str(peer[0])


def begun(dialer: Any, flow: Flow) -> Any:
    """Begin to dial, and return the connected socket."""
    # A Member has no begin(); its dialer has.
    pending = getattr(dialer, "dialer", dialer).begin(flow._replace(addresses=(flow.target,)))
    assert pending is not None
    if not pending.settled():
        pending.wait()
    return pending.finish()


OPENERS = pytest.mark.parametrize("opened", [lambda dialer, flow: dialer.dial(flow), begun])


@OPENERS
class TestTcp:
    def test_connections_leave_from_addresses_of_the_prefix(self, rig: Rig, opened: Any) -> None:
        dialer = rig.dialer(HopConfig("direct", bind=bind(FOUR)))
        with listen() as listening:
            to = tcp_to(address_of(listening))
            seen = {seen_by(listening, lambda: opened(dialer, to)) for _ in range(100)}
        # Two of 100 random addresses of 65,534 are equal once in 13 runs, six pairs never.
        assert len(seen) > 94
        assert all(IpNetwork.parse(FOUR).holds(host) for host in seen)

    def test_incoming_of_an_upstream(self, rig: Rig, opened: Any) -> None:
        dialer = rig.dialer(HopConfig("direct", bind=bind("incoming")))
        with listen() as listening:
            to = tcp_to(address_of(listening))
            of_client = to._replace(source=FlowSource(None, "", "127.0.0.5"))
            assert seen_by(listening, lambda: opened(dialer, of_client)) == "127.0.0.5"
            # A flow of NetProxy's own has no client.
            assert seen_by(listening, lambda: opened(dialer, to)) == "127.0.0.1"

    @pytest.mark.parametrize(
        "own, expected",
        [
            ("", "127.0.0.7"),
            ("127.0.0.8", "127.0.0.8"),
            ("127.0.0.9/32", "127.0.0.9"),
            ("incoming", "127.0.0.6"),
            ("lo", "127.0.0.1"),
        ],
    )
    def test_bind_of_the_upstream_comes_first(
        self, rig: Rig, opened: Any, own: str, expected: str
    ) -> None:
        hop = HopConfig("direct", bind=parse_bind(own) if own else None)
        with listen() as listening:
            to = sourced(tcp_to(address_of(listening)), "127.0.0.7", "127.0.0.6")
            try:
                assert seen_by(listening, lambda: opened(rig.dialer(hop), to)) == expected
            except (DialError, PermissionError):
                if own != "lo":
                    raise
                pytest.skip("no capability for SO_BINDTODEVICE")

    def test_options_of_the_upstream_stay_with_the_bind_of_a_user(
        self, rig: Rig, opened: Any
    ) -> None:
        dialer = rig.dialer(HopConfig("direct", keepalive=9.0))
        with listen() as listening:
            to = sourced(tcp_to(address_of(listening)), "127.0.0.7/32")
            connection = opened(dialer, to)
            sock = getattr(connection, "socket", connection)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 9
            assert sock.getsockname()[0] == "127.0.0.7"
            connection.close()

    def test_interface_of_a_user_that_does_not_exist_is_an_error(
        self, rig: Rig, opened: Any
    ) -> None:
        with listen() as listening, pytest.raises(DialError):
            opened(
                rig.dialer(HopConfig("direct")),
                sourced(tcp_to(address_of(listening)), "nonexistent0"),
            )

    @pytest.mark.parametrize(
        "text, label, host",
        [
            ("::1", "::1 is IPv6", "127.0.0.1"),
            ("::1/128", "::1/128 is IPv6", "127.0.0.1"),
            ("127.0.0.3", "127.0.0.3 is IPv4", "2001:db8::1"),
            (FOUR, f"{FOUR} is IPv4", "2001:db8::1"),
        ],
    )
    def test_target_of_the_other_family_fails_with_the_key(
        self, rig: Rig, opened: Any, text: str, label: str, host: str
    ) -> None:
        other = "IPv4" if host == "127.0.0.1" else "IPv6"
        said = f"{label}, and the target has {other} addresses only"
        to = tcp_to(Address(host, 9))
        for dialer, wanted, key in (
            (rig.dialer(HopConfig("direct", bind=bind(text))), to, "upstreams.exit.bind"),
            (rig.dialer(HopConfig("direct")), sourced(to, text), ALICE),
        ):
            with pytest.raises(DialError) as caught:
                opened(dialer, wanted)
            error = caught.value
            assert str(error) == f"{to.target}: {key}: {said}"
            assert (error.reason, error.decided) == (
                Reason.NETWORK_UNREACHABLE,
                f"{key}: {label.partition(' ')[0]}",
            )


class TwoFamilies:
    """A Resolver that finds an IPv6 and an IPv4 address for every name."""

    def resolve(self, target: Address, client: str = "", seconds: float = 0.0) -> Sequence[Address]:
        return Address("2001:db8::99", target.port), Address("127.0.0.1", target.port)

    def known(self, target: Address) -> NoReturn:
        raise NotImplementedError


def test_only_addresses_of_the_binds_family_are_tried() -> None:
    rig = Rig(TargetResolver(TwoFamilies(), Anywhere()))
    dialer = rig.dialer(HopConfig("direct", bind=bind(FOUR)))
    with listen() as listening:
        to = tcp_to(Address("two.test", address_of(listening).port))
        assert IpNetwork.parse(FOUR).holds(seen_by(listening, lambda: dialer.dial(to)))


class TestUdp:
    def send(self, dialer: Any, flow: Flow, *targets: socket.socket) -> list[str]:
        """Send from one packet connection to targets; return the sockaddrs that they see."""
        conn = dialer.dial_packet(flow._replace(target=address_of(targets[0])))
        seen = []
        for target in targets:
            to = conn.prepare(flow._replace(target=address_of(target)))
            arena = UdpSocketFactory(Counts(), Lines()).arena()
            conn.send(arena, arena.put(b"query"), to)
            seen.append(target.recvfrom(100)[1])
        conn.close()
        return seen

    @pytest.mark.parametrize("of_user", [False, True])
    def test_session_has_one_address_of_the_prefix_for_all_targets(
        self, rig: Rig, of_user: bool
    ) -> None:
        """RFC 4787 REQ-1 and REQ-2."""
        hop = HopConfig("direct", bind=None if of_user else bind(FOUR))
        to = sourced(udp_to(TARGET), FOUR) if of_user else udp_to(TARGET)
        with udp() as first, udp() as second:
            sessions = [self.send(rig.dialer(hop), to, first, second) for _ in range(20)]
        assert all(of_first == of_second for of_first, of_second in sessions)
        hosts = {of_first[0] for of_first, _ in sessions}
        assert len(hosts) > 15
        assert all(IpNetwork.parse(FOUR).holds(host) for host in hosts)

    def test_incoming_address(self, rig: Rig) -> None:
        to = sourced(udp_to(TARGET), "incoming", "127.0.0.6")
        with udp() as target:
            ((host, _),) = self.send(rig.dialer(HopConfig("direct")), to, target)
        assert host == "127.0.0.6"

    @pytest.mark.parametrize("text, own", [("::1", "IPv6"), ("127.0.0.3", "IPv4")])
    def test_target_of_the_other_family_fails_with_the_key(
        self, rig: Rig, text: str, own: str
    ) -> None:
        conn = rig.dialer(HopConfig("direct", bind=bind(text))).dial_packet(udp_to(TARGET))
        host, other = ("127.0.0.1", "IPv4") if own == "IPv6" else ("::1", "IPv6")
        with pytest.raises(DialError) as caught:
            conn.prepare(udp_to(Address(host, 9)))
        conn.close()
        said = f"upstreams.exit.bind: {text} is {own}, and the target has {other} addresses only"
        assert str(caught.value) == f"{Address(host, 9)}: {said}"


class Guard(Anywhere):
    """Records the selectors that it is asked about."""

    def __init__(self) -> None:
        self.selectors: list[RouteSelectors] = []

    def without_own(
        self, flow: Flow, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> tuple[Address, ...]:
        self.selectors.append(selectors)
        return tuple(addresses)


def test_own_sockets_are_looked_for_by_the_route_from_the_chosen_address() -> None:
    """Hazard 77: with another source, policy routing may lead back to this machine."""
    guard = Guard()
    dialer = DirectDialer(
        TargetResolver(TwoFamilies(), guard), UdpSocketFactory(Counts(), Lines()), 5.0
    )
    with listen() as listening:
        to = sourced(tcp_to(address_of(listening)), "127.0.0.7/32")
        begun(dialer, to).close()
        dialer.dial(to._replace(addresses=(to.target,))).close()
    assert guard.selectors == [RouteSelectors(source="127.0.0.7")] * 2
