"""The way out without another proxy: TCP and UDP over this machine's own sockets."""

from __future__ import annotations

import errno
import socket
import time
from typing import Any

import pytest

from netproxy.dialer.block import BlockDialer
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.resolver.resolver import Resolver
from tests.support.batches import cut
from tests.support.doubles import Counts, Lines
from tests.support.flows import Anywhere, tcp_to, udp_to
from tests.support.sockets import Task, address_of, black_hole, listen, refusing, udp

FLOW = Flow("udp", Address("192.0.2.1", 5), Address("127.0.0.1", 9), "main", "")


def reason(dialer: DirectDialer, target: Address) -> Reason:
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(target))
    return caught.value.reason


class TestTcp:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_a_connection(self, direct: DirectDialer, host: str) -> None:
        with listen() as listening:
            stream = direct.dial(tcp_to(Address(host, address_of(listening).port)))
            with listening.accept()[0] as peer:
                stream.write(b"x")
                assert peer.recv(1) == b"x"
                assert stream.local_address() == Address(*peer.getpeername())
            stream.close()

    def test_failures_have_their_reasons(self, direct: DirectDialer) -> None:
        with refusing() as address:
            assert reason(direct, address) is Reason.REFUSED
        assert reason(direct, Address("nowhere.invalid", 80)) in (Reason.NAME, Reason.TIMEOUT)
        assert reason(direct, Address("127.0.0.1", 0)) is Reason.REFUSED

    def test_the_name_and_the_connection_have_one_deadline_together(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def slow(*_: Any, **__: Any) -> list:
            time.sleep(0.2)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (silent.host, silent.port))]

        def submit(task: Any) -> bool:
            Task(task)
            return True

        monkeypatch.setattr(socket, "getaddrinfo", slow)
        counts = Counts()
        dialer = DirectDialer(
            TargetResolver(Resolver(submit, counts), Anywhere()),
            UdpSocketFactory(counts, Lines()),
            0.4,
        )
        with black_hole() as silent:
            started = time.monotonic()
            assert reason(dialer, Address("slow.example", silent.port)) is Reason.TIMEOUT
            assert 0.35 < time.monotonic() - started < 0.58


class TestUdp:
    def test_there_and_back(self, direct: DirectDialer) -> None:
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

    def test_a_name_is_resolved(self, direct: DirectDialer) -> None:
        conn = direct.dial_packet(FLOW)
        assert conn.prepare(udp_to(Address("localhost", 53))).sockaddr[1] == 53
        with pytest.raises(DialError):
            conn.prepare(udp_to(Address("nowhere.invalid", 53)))
        conn.close()

    def test_ipv6_on_a_machine_without_it_is_unreachable(
        self, direct: DirectDialer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """HAZARDS 131."""
        real = socket.socket

        class OnlyIpv4(socket.socket):
            def __init__(self, family: int = -1, *more: Any, **named: Any) -> None:
                if family == socket.AF_INET6:
                    raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
                super().__init__(family, *more, **named)

        monkeypatch.setattr(socket, "socket", OnlyIpv4)
        conn = direct.dial_packet(FLOW)
        monkeypatch.setattr(socket, "socket", real)
        with pytest.raises(DialError) as caught:
            conn.prepare(udp_to(Address("2001:db8::1", 53)))
        assert caught.value.reason is Reason.NETWORK_UNREACHABLE
        assert conn.prepare(udp_to(Address("127.0.0.1", 53)))
        conn.close()

    def test_no_socket_is_a_failed_dial(
        self, direct: DirectDialer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """HAZARDS 92."""

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(socket, "socket", refuse)
        with pytest.raises(DialError) as caught:
            direct.dial_packet(FLOW)
        assert str(caught.value) == "Too many open files: failed"

    def test_shutdown_wakes_the_reader(self, direct: DirectDialer) -> None:
        conn = direct.dial_packet(FLOW)
        waiting = Task(conn.wait)
        conn.shutdown()
        assert waiting.result() is False
        assert not conn.receive(UdpSocketFactory(Counts(), Lines()).arena()).spans
        conn.close()


def test_the_way_to_nowhere_refuses_everything() -> None:
    for call in (
        lambda: BlockDialer().dial(tcp_to(Address("example.com", 80))),
        lambda: BlockDialer().dial_packet(FLOW),
    ):
        with pytest.raises(DialError) as caught:
            call()
        assert caught.value.reason is Reason.DENIED
