"""Discovery over real sockets of loopback: what answers, what is closed, what has no route."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

import pytest

from netproxy.admin.nat.report import ENDPOINT_INDEPENDENT
from netproxy.admin.nat.exchange import SendError, probe_nat
from netproxy.admin.nat.sockets import SocketTransport
from netproxy.interfaces.addresses import Address
from tests.support.sockets import HAS_IPV6
from tests.support.stun import Script, stun_server


@pytest.fixture
def transport():  # type: ignore[no-untyped-def]
    with contextlib.closing(SocketTransport(ipv6=False)) as transport:
        yield transport


def test_machine_without_nat_is_recognized(transport: SocketTransport) -> None:
    with stun_server() as server:
        report = probe_nat([server.first], transport)
    assert (report.works, report.nat) == (True, False)
    assert (report.mapping, report.filtering) == (ENDPOINT_INDEPENDENT, ENDPOINT_INDEPENDENT)
    assert report.external == [report.local] and report.local.startswith("127.0.0.1:")
    # The four questions of rounds 1 and 2, and the two of round 3.
    assert len(server.requests) == 6


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")
def test_ipv6_is_asked() -> None:
    with contextlib.closing(SocketTransport(ipv6=True)) as transport:
        with stun_server(["::1"], Script(second=False)) as server:
            report = probe_nat([server.first], transport)
    assert report.external == [report.local] and report.local.startswith("[::1]:")


def test_closed_port_is_told_at_once(transport: SocketTransport) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        address = Address(*closed.getsockname())
    with stun_server(["127.0.0.1"], Script(second=False)) as server:
        report = probe_nat([address, server.first], transport)
    assert [row.error for row in report.servers] == ["connection refused", ""]


def test_address_that_cannot_be_sent_to_is_an_error(transport: SocketTransport) -> None:
    with pytest.raises(SendError, match="another family"):
        transport.send(0, Address("::1", 1), b"")
    with pytest.raises(SendError, match=os.strerror(errno.EACCES).lower()):
        transport.send(0, Address("255.255.255.255", 1), b"")
    assert transport.local(Address("255.255.255.255", 1)) == [None, None]


def test_nothing_comes_within_the_time(transport: SocketTransport) -> None:
    assert transport.receive(0.001) is None


def test_datagram_that_is_too_long_is_cut(transport: SocketTransport) -> None:
    local = transport.local(Address("127.0.0.1", 9))[1]
    assert local is not None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes(60000), local)
        arrival = transport.receive(5)
    assert arrival is not None and (arrival.port, len(arrival.data)) == (1, 2048)
