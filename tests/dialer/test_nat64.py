"""Direct dials from a network without IPv4: translated addresses, and the targets of replies."""

from __future__ import annotations

from typing import Any, Sequence

import pytest

from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import RouteSelectors
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.support.batches import cut
from tests.support.doubles import Counts, Lines
from tests.support.flows import Anywhere, tcp_to, udp_to
from tests.support.sockets import address_of, listen, udp

FOUR = "198.51.100.1"


class Loopback:
    """A Nat64 in which ::1 leads to every IPv4 address that is not loopback."""

    def __init__(self, is_known: bool = True) -> None:
        self.is_known = is_known

    def translate(
        self, addresses: Sequence[Address], selectors: RouteSelectors, seconds: float
    ) -> Sequence[Address]:
        if addresses[0].host.startswith("127."):
            return addresses
        return tuple(address._replace(host="::1") for address in addresses)

    def translate_now(
        self, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> Sequence[Address] | None:
        return self.translate(addresses, selectors, 0.0) if self.is_known else None


class NoNames:
    """A Resolver of literal addresses."""

    def resolve(self, target: Address, client: str = "", seconds: float = 0.0) -> list[Address]:
        return [target]

    known = resolve


class Refusing(Anywhere):
    """A DestinationGuard that refuses ::1."""

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        if any(address.host == "::1" for address in addresses):
            raise DialError(Reason.DENIED, str(flow.target))
        return tuple(addresses)


def dialer(nat64: Any, guard: Any = None) -> DirectDialer:
    """Return a direct dialer."""
    targets = TargetResolver(NoNames(), guard or Anywhere(), nat64)
    return DirectDialer(targets, UdpSocketFactory(Counts(), Lines()), 5.0)


class TestDials:
    def test_ipv4_target_is_dialled_through_the_nat64(self) -> None:
        with listen("::1") as listening:
            target = Address(FOUR, address_of(listening).port)
            stream = dialer(Loopback()).dial(tcp_to(target))
            with listening.accept()[0] as peer:
                stream.write(b"x")
                assert peer.recv(1) == b"x"
            stream.close()

    def test_known_prefix_needs_no_thread(self) -> None:
        with listen("::1") as listening:
            target = Address(FOUR, address_of(listening).port)
            flow = tcp_to(target)._replace(addresses=(target,))
            assert dialer(Loopback(is_known=False)).begin(flow) is None
            pending = dialer(Loopback()).begin(flow)
            assert pending is not None
            with listening.accept()[0]:
                pending.finish().close()

    def test_ipv4_target_with_a_route_is_dialled_as_it_is(self) -> None:
        """Such as one in the local network."""
        with listen() as listening:
            stream = dialer(Loopback()).dial(tcp_to(address_of(listening)))
            listening.accept()[0].close()
            stream.close()

    def test_reply_comes_from_the_ipv4_target(self) -> None:
        conn = dialer(Loopback()).dial_packet(udp_to(Address(FOUR, 1)))
        arena = UdpSocketFactory(Counts(), Lines()).arena()
        with udp("::1") as target:
            port = address_of(target).port
            destination = conn.prepare(udp_to(Address(FOUR, port)))
            conn.send(arena, arena.put(b"ping"), destination)
            data, source = target.recvfrom(100)
            assert data == b"ping"
            target.sendto(b"pong", source)
            assert conn.wait()
            ((answer, peer),) = cut(conn.receive(arena))
            assert (answer, conn.source(peer)) == (b"pong", Address(FOUR, port))
        conn.close()

    def test_translated_address_must_be_permitted(self) -> None:
        """A name server must not lead a client to an address that it may not reach."""
        target = Address(FOUR, 80)
        refusing = dialer(Loopback(), Refusing())
        calls = (
            lambda: refusing.dial(tcp_to(target)),
            lambda: refusing.begin(tcp_to(target)._replace(addresses=(target,))),
            lambda: refusing.dial_packet(udp_to(target)).prepare(udp_to(target)),
        )
        for call in calls:
            with pytest.raises(DialError) as caught:
                call()
            assert caught.value.reason is Reason.DENIED
