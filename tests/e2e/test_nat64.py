"""A box in an IPv6-only network, and a server that its NAT64 leads to, each in a namespace.

The server has the address that the NAT64 would translate to 198.51.100.1.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import CONNECT, Association, Refused, TcpEcho, UdpEcho, echo, socks5
from tests.e2e.support import LOOPBACK, PROCESSES, Netproxyd
from tests.support.dns import question, record
from tests.support.nameservers import answer_datagrams, answer_to, question_of
from tests.support.sockets import Task

pytestmark = pytest.mark.e2e

BOX6, SERVER6 = "fd77:6::1", "fd77:6::2"
TARGET, TRANSLATED = "198.51.100.1", "64:ff9b::c633:6401"
WELL_KNOWN = "64:ff9b::c000:aa"
NAME = "ipv4only.arpa"
NETWORK_UNREACHABLE = 3


class Net(NamedTuple):
    """The two hosts. `asked` has the questions to the name server of the network."""

    box: Namespace
    server: Namespace
    asked: list[bytes]


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("box6", "server6") as (box, server):
        connect(box, [f"{BOX6}/64"], server, [f"{SERVER6}/64"])
        server.ip("address", "add", f"{TRANSLATED}/128", "dev", "lo", "nodad")
        box.ip("route", "add", "64:ff9b::/96", "via", SERVER6)
        asked: list[bytes] = []

        def reply(query: bytes) -> bytes:
            asked.append(question_of(query))
            address = socket.inet_pton(socket.AF_INET6, WELL_KNOWN)
            if question_of(query) == question(NAME, 28):
                return answer_to(query, record(b"\xc0\x0c", 28, 60, address))
            return answer_to(query)

        over: list[bool] = []
        with server.socket(socket.AF_INET6, socket.SOCK_DGRAM) as names:
            names.bind((SERVER6, 53))
            names.setblocking(False)
            task = Task(answer_datagrams, names, reply, lambda: bool(over))
            yield Net(box, server, asked)
            over.append(True)
            task.result()


def start(netproxyd: Start, net: Net, file: Path, nat64: str) -> Netproxyd:
    """Start the daemon on the box, where clients reach it by loopback."""
    net.asked.clear()
    write(file, nat64)
    return netproxyd("-c", str(file), make=net.box.socket, preexec_fn=net.box.enter)


def write(file: Path, nat64: str) -> None:
    file.write_text(
        f"listeners: [{{listen: '{LOOPBACK}:1080'}}]\n"
        f"dns: {{servers: ['{SERVER6}'], nat64: '{nat64}'}}\n"
    )


@pytest.mark.parametrize("nat64", ["auto", "64:ff9b::/96"])
def test_ipv4_target_is_reached_from_an_ipv6_only_network(
    netproxyd: Start, net: Net, tmp_path: Path, nat64: str
) -> None:
    daemon = start(netproxyd, net, tmp_path / "nat64.yaml", nat64)
    with (
        TcpEcho(TRANSLATED, net.server.socket) as tcp,
        UdpEcho(TRANSLATED, net.server.socket) as udp,
    ):
        for _ in range(2):
            target = (TARGET, tcp.address[1])
            sock, _ = socks5(daemon.server, CONNECT, target, make=net.box.socket)
            with sock:
                echo(sock, b"hello")
        with Association(daemon.server, make=net.box.socket) as client:
            target = (TARGET, udp.address[1])
            assert client.echo(target, b"hello") == (target, client.bound)
        assert {host for host, _ in udp.sources} == {BOX6}
    # The prefix is looked up once, by each process that needs it.
    lookups = net.asked.count(question(NAME, 28))
    assert 1 <= lookups <= PROCESSES if nat64 == "auto" else not lookups
    assert len(daemon.said(f" target={TARGET}:", 3)) == 3


def test_nat64_is_not_used_if_it_is_off(netproxyd: Start, net: Net, tmp_path: Path) -> None:
    file = tmp_path / "nat64.yaml"
    daemon = start(netproxyd, net, file, "off")
    with TcpEcho(TRANSLATED, net.server.socket) as tcp:
        target = (TARGET, tcp.address[1])
        with pytest.raises(Refused) as caught:
            socks5(daemon.server, CONNECT, target, make=net.box.socket)
        assert caught.value.code == NETWORK_UNREACHABLE and not net.asked
        write(file, "auto")
        daemon.reload()
        sock, _ = socks5(daemon.server, CONNECT, target, make=net.box.socket)
        with sock:
            echo(sock, b"hello")
