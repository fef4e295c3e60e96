"""Flows to fake addresses in a whole daemon, by every protocol whose clients may name addresses."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol import dns
from netproxy.protocol.http.connect_udp import encode_accept
from netproxy.router.named import UNKNOWN
from tests.handler.test_dns_memory import ask, connect
from tests.support.dns import a, query, question
from tests.support.exchanges import EchoTarget, converse, http_connect
from tests.support.handlers import LOCALHOST, SECONDS, eventually
from tests.support.nameservers import answer_to, name_server, nxdomain
from tests.support.relays import Running, UdpClient, UdpPort, running
from tests.support.sockets import read_exactly, server

STRANGE = "198.18.9.9"
"""A fake address that nobody was told."""
LISTENERS = "listeners: [{listen: '127.0.0.1:0'}, {protocol: dns, listen: '127.0.0.1:0'}]"


@contextmanager
def faking(rest: str = "") -> Iterator[Running]:
    """Run a daemon with fake addresses, whose name server knows three names."""

    def reply(asked: bytes) -> bytes:
        name = dns.parse_question(asked)[0].name
        if name == "fake.example":
            return answer_to(asked, a(60, bytes((198, 18, 0, 200))))
        return answer_to(asked, a(60, b"\x7f\0\0\1")) if "example" in name else nxdomain(asked)

    with name_server(reply) as address:
        section = f"dns: {{servers: ['{address}'], fake: 198.18.0.0/15}}"
        with running(f"{LISTENERS}\n{section}\n{rest}") as relay:
            yield relay


def fake(relay: Running, host: str) -> str:
    """Ask for a name, return its fake address."""
    asked = query(question(host))
    (address,) = dns.parse_answer(ask(relay, asked), dns.Question(host, dns.A, dns.IN)).addresses
    assert address.startswith("198.18.")
    return address


def test_connections_to_a_fake_address_reach_the_name() -> None:
    with server(EchoTarget()) as target, faking() as relay:
        at = Address(fake(relay, "www.example"), target.port)
        assert connect(relay, at).endswith(b"got x")
        for opening in (
            http_connect(at),
            b"\4\1" + at.port.to_bytes(2, "big") + packed(at) + b"\0",
        ):
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                assert converse(sock, opening + b"x").endswith(b"got x")
        eventually(lambda: len(relay.log.records) == 3)
        assert {str(record.flow.target) for record in relay.log.records} == {
            f"www.example:{target.port}"
        }


def read_head(sock: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += read_exactly(sock, 1)
    return head


def packed(address: Address) -> bytes:
    return socket.inet_aton(address.host)


def test_http_requests_to_a_fake_address_share_a_connection() -> None:
    accepted: list[int] = []

    def origin(sock: socket.socket) -> None:
        accepted.append(1)
        for _ in range(2):
            read_head(sock)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with server(origin) as target, faking() as relay:
        host = Address(fake(relay, "www.example"), target.port)
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            for _ in range(2):
                sock.sendall(b"GET http://%b/ HTTP/1.1\r\nHost: x\r\n\r\n" % str(host).encode())
                assert read_head(sock).startswith(b"HTTP/1.1 200")
                assert read_exactly(sock, 2) == b"ok"
        assert accepted == [1]


def test_datagrams_of_socks5_come_back_from_the_fake_address() -> None:
    with faking() as relay, UdpPort() as target, UdpClient(relay.port) as client:
        at = Address(fake(relay, "www.example"), target.address.port)
        for text in (b"first", b"second"):
            client.to(at, text)
            target.send(text[::-1], target.expect(text))
            assert client.receive() == (text[::-1], at)
        client.check_echo(target)
        client.to(Address(STRANGE, 9), b"lost")
        relay.wait_for_count("drops", UNKNOWN, 1)


def test_connect_udp_to_a_fake_address_reaches_the_name() -> None:
    with faking() as relay, UdpPort() as target:
        host, port = fake(relay, "www.example"), target.address.port
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            path = f"/.well-known/masque/udp/{host}/{port}/".encode()
            sock.sendall(
                b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: connect-udp\r\n"
                b"Capsule-Protocol: ?1\r\n\r\n" % path
            )
            assert read_exactly(sock, len(encode_accept())) == encode_accept()
            sock.sendall(b"\0\6\0hello")
            target.send(b"HELLO", target.expect(b"hello"))
            assert read_exactly(sock, 8) == b"\0\6\0HELLO"


def test_unknown_fake_address_is_refused_with_its_own_reason_and_never_dialled() -> None:
    """Hazard 158."""
    with faking() as relay:
        assert connect(relay, Address(STRANGE, 80))[3] == 4
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            head = b"GET http://%b/ HTTP/1.1\r\nHost: x\r\n\r\n" % STRANGE.encode()
            assert converse(sock, head).startswith(b"HTTP/1.1 50")
        assert relay.count("requests_refused", UNKNOWN) == 2
        assert not relay.count("dial_failures", "host unreachable")


@pytest.mark.parametrize("host", ["fake.example", "nowhere.test"])
def test_name_that_cannot_be_reached_is_recorded_by_its_name(host: str) -> None:
    """Hazard 160.  The name server says that fake.example has a fake address."""
    with faking("rules: []") as relay:
        at = Address(fake(relay, host), 80)
        assert connect(relay, at)[3] != 0
        eventually(lambda: relay.log.records)
        (record,) = relay.log.records
    assert str(record.flow.target) == f"{host}:80"
    looped = "the connection would loop back to this proxy", "dns.fake 198.18.0.0/15"
    expected = looped if host == "fake.example" else ("name not resolved", "")
    assert (record.ended, record.decided) == expected


def test_reload_keeps_the_addresses_of_names() -> None:
    with server(EchoTarget()) as target, faking() as relay:
        before = fake(relay, "www.example")
        fake(relay, "other.example")
        section = "servers: [192.0.2.1], hosts: {www.example: [127.0.0.1]}, fake: 198.18.0.0/15"
        relay.reload(f"{LISTENERS}\ndns: {{{section}}}")
        assert connect(relay, Address(before, target.port)).endswith(b"got x")
        assert fake(relay, "new.example") not in (before, "198.18.0.17")


def test_explain_tells_the_name_of_a_fake_address() -> None:
    with faking() as relay:
        host = fake(relay, "www.example")
        lines = relay.daemon.explain(f"tcp 127.0.0.1 -> {host}:443 on sps-0")
        assert f"name: www.example (fake address {host})" in lines
        assert lines[-1] == "carried: yes"
        lines = relay.daemon.explain(f"{STRANGE}:443")
        assert lines[1:] == [f"refused: {STRANGE}:443: {UNKNOWN}"]
