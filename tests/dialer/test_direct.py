"""The upstreams without a proxy: direct over this machine's own sockets, and block."""

from __future__ import annotations

import errno
import socket
from typing import Any, Callable, Sequence

import pytest

from netproxy.dialer import direct as direct_module
from netproxy.dialer.plain.block import BlockDialer
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import RouteSelectors
from netproxy.net.socket_options import DEFAULT_OPTIONS, SocketOptions
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.dialer.doubles import Clock
from tests.support.batches import cut
from tests.support.doubles import Counts, Lines
from tests.support.flows import Anywhere, tcp_to, udp_to
from tests.support.sockets import (
    SECONDS,
    Task,
    address_of,
    black_hole,
    listen,
    refusing,
    udp,
    wait_until,
)

FLOW = Flow("udp", Address("192.0.2.1", 5), Address("127.0.0.1", 9), "main", "")


def reason(dialer: DirectDialer, target: Address) -> Reason:
    """Dial and return the reason of the failure."""
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(target))
    return caught.value.reason


class TestTcp:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_direct_dial_connects_to_an_address_or_a_name(
        self, direct: DirectDialer, host: str
    ) -> None:
        with listen() as listening:
            stream = direct.dial(tcp_to(Address(host, address_of(listening).port)))
            with listening.accept()[0] as peer:
                stream.write(b"x")
                assert peer.recv(1) == b"x"
                assert stream.local_address() == Address(*peer.getpeername())
            stream.close()

    def test_failed_direct_dials_have_their_reasons(self, direct: DirectDialer) -> None:
        with refusing() as address:
            assert reason(direct, address) is Reason.REFUSED
        assert reason(direct, Address("nowhere.invalid", 80)) in (Reason.NAME, Reason.TIMEOUT)
        assert reason(direct, Address("127.0.0.1", 0)) is Reason.REFUSED

    def test_silent_target_is_a_timeout(self, target_resolver: TargetResolver) -> None:
        dialer = DirectDialer(target_resolver, UdpSocketFactory(Counts(), Lines()), 0.1)
        with black_hole() as silent:
            assert reason(dialer, silent) is Reason.TIMEOUT

    def test_lookup_and_connection_share_one_deadline(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of 8 seconds the lookup takes 3, so that 5 are left for the connection."""
        clock = Clock()
        limits: list[float] = []

        class SlowResolver:
            def resolve(
                self, target: Address, client: str = "", seconds: float = 0.0
            ) -> list[Address]:
                limits.append(seconds)
                clock.now += 3.0
                return [target._replace(host="192.0.2.9")]

            def known(self, target: Address) -> None:
                raise AssertionError

        def connect(addresses: Any, seconds: float, outgoing: SocketOptions) -> socket.socket:
            assert addresses == (Address("192.0.2.9", 80),)
            limits.append(seconds)
            raise DialError(Reason.TIMEOUT)

        monkeypatch.setattr(direct_module, "time", clock)
        monkeypatch.setattr(direct_module, "connect", connect)
        resolver = TargetResolver(SlowResolver(), Anywhere())
        dialer = DirectDialer(resolver, UdpSocketFactory(Counts(), Lines()), 8.0)
        assert reason(dialer, Address("slow.example", 80)) is Reason.TIMEOUT
        assert limits == [8.0, 5.0]


class OwnSince(Anywhere):
    """A guard for which every address is the daemon's own from the second look on.

    `selectors` are those of the sockets that it was asked about.
    """

    def __init__(self, looks: int = 1) -> None:
        """Let the first `looks` pass."""
        self._looks = looks
        self.selectors: list[RouteSelectors] = []

    def is_own_port(self, flow: Flow) -> bool:
        return True

    def without_own(
        self, flow: Flow, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> tuple[Address, ...]:
        self.selectors.append(selectors)
        if len(self.selectors) > self._looks:
            raise DialError(Reason.LOOP, str(flow.target))
        return tuple(addresses)


class TestOwnPorts:
    """Hazards 77 and 136.  A flow to the number of a port that the daemon listens on."""

    @staticmethod
    def dialer(
        target_resolver: TargetResolver, guard: OwnSince, outgoing: SocketOptions = DEFAULT_OPTIONS
    ) -> DirectDialer:
        resolver = target_resolver._replace(guard=guard)
        return DirectDialer(resolver, UdpSocketFactory(Counts(), Lines()), 5.0, outgoing)

    @pytest.mark.parametrize("blocking", [True, False])
    def test_connection_that_has_reached_the_daemon_is_closed(
        self, target_resolver: TargetResolver, blocking: bool
    ) -> None:
        """The address has become the machine's own after it was permitted."""
        guard = OwnSince(0)
        dialer = self.dialer(target_resolver, guard)
        with listen() as listening:
            target = address_of(listening)
            flow = tcp_to(target)._replace(addresses=(target,))
            with pytest.raises(DialError) as caught:
                if blocking:
                    dialer.dial(flow)
                else:
                    pending = dialer.begin(flow)
                    assert pending is not None
                    wait_until(pending.settled)
                    pending.finish()
            assert caught.value.reason is Reason.LOOP
            with listening.accept()[0] as peer:
                peer.settimeout(SECONDS)
                assert peer.recv(1) == b""
        assert guard.selectors == [RouteSelectors()]

    def test_connection_to_another_machine_goes_on(self, target_resolver: TargetResolver) -> None:
        guard = OwnSince()
        with listen() as listening:
            target = address_of(listening)
            stream = self.dialer(target_resolver, guard).dial(tcp_to(target))
            with listening.accept()[0] as peer:
                stream.write(b"x")
                assert peer.recv(1) == b"x"
            stream.close()
        assert guard.selectors == [RouteSelectors()]

    @pytest.mark.parametrize("looks", [0, 1])
    def test_options_of_the_socket_count(self, target_resolver: TargetResolver, looks: int) -> None:
        """Before and after the connection."""
        outgoing, selectors = SocketOptions("127.0.0.1"), RouteSelectors(source="127.0.0.1")
        with listen() as listening:
            target = address_of(listening)
            flow = tcp_to(target)._replace(addresses=(target,))
            guard = OwnSince(looks)
            with pytest.raises(DialError):
                self.dialer(target_resolver, guard, outgoing).dial(flow)
            assert guard.selectors == [selectors] * (looks + 1)
            if not looks:
                guard = OwnSince(looks)
                with pytest.raises(DialError) as caught:
                    self.dialer(target_resolver, guard, outgoing).begin(flow)
                assert caught.value.reason is Reason.LOOP

    def test_options_of_the_socket_count_for_datagrams(
        self, target_resolver: TargetResolver
    ) -> None:
        guard = OwnSince(0)
        dialer = self.dialer(target_resolver, guard, SocketOptions("127.0.0.1"))
        conn = dialer.dial_packet(FLOW)
        target = Address("127.0.0.1", 9)
        with pytest.raises(DialError) as caught:
            conn.prepare(udp_to(target)._replace(addresses=(target,)))
        assert caught.value.reason is Reason.LOOP
        assert guard.selectors == [RouteSelectors(source="127.0.0.1")]
        conn.close()


class TestUdp:
    def test_datagrams_go_both_ways(self, direct: DirectDialer) -> None:
        conn, arena = direct.dial_packet(FLOW), UdpSocketFactory(Counts(), Lines()).arena()
        with udp() as target:
            conn.send(arena, arena.put(b"ping"), conn.prepare(udp_to(address_of(target))))
            data, source = target.recvfrom(100)
            assert data == b"ping"
            target.sendto(b"pong", source)
            assert conn.wait()
            ((answer, peer),) = cut(conn.receive(arena))
            assert (answer, conn.source(peer)) == (b"pong", address_of(target))
        conn.close()

    def test_prepare_resolves_a_name(self, direct: DirectDialer) -> None:
        conn = direct.dial_packet(FLOW)
        assert conn.prepare(udp_to(Address("localhost", 53))).sockaddr[1] == 53
        with pytest.raises(DialError):
            conn.prepare(udp_to(Address("nowhere.invalid", 53)))
        conn.close()

    def test_ipv6_target_is_unreachable_on_a_machine_without_ipv6(
        self, direct: DirectDialer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 131."""
        real = socket.socket

        class Ipv4OnlySocket(socket.socket):
            def __init__(self, family: int = -1, *more: Any, **named: Any) -> None:
                if family == socket.AF_INET6:
                    raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
                super().__init__(family, *more, **named)

        monkeypatch.setattr(socket, "socket", Ipv4OnlySocket)
        conn = direct.dial_packet(FLOW)
        monkeypatch.setattr(socket, "socket", real)
        with pytest.raises(DialError) as caught:
            conn.prepare(udp_to(Address("2001:db8::1", 53)))
        assert caught.value.reason is Reason.NETWORK_UNREACHABLE
        assert conn.prepare(udp_to(Address("127.0.0.1", 53)))
        conn.close()

    def test_missing_descriptor_is_a_dial_error(
        self, direct: DirectDialer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 92."""

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(socket, "socket", refuse)
        with pytest.raises(DialError) as caught:
            direct.dial_packet(FLOW)
        assert str(caught.value) == "Too many open files"

    def test_shutdown_wakes_the_reader(self, direct: DirectDialer) -> None:
        conn = direct.dial_packet(FLOW)
        waiting = Task(conn.wait)
        conn.shutdown()
        assert waiting.result() is False
        assert not conn.receive(UdpSocketFactory(Counts(), Lines()).arena()).spans
        conn.close()


@pytest.mark.parametrize("dial", [BlockDialer.dial, BlockDialer.dial_packet])
def test_block_denies_every_dial(dial: Callable[[BlockDialer, Flow], None]) -> None:
    with pytest.raises(DialError) as caught:
        dial(BlockDialer(), FLOW)
    assert caught.value.reason is Reason.DENIED
