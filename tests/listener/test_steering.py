"""Which process of a group the kernel gives a client to, and what owner() says of it."""

from __future__ import annotations

import contextlib
import select
import socket
from contextlib import ExitStack
from typing import Callable, Iterator, Sequence

import pytest

from netproxy.interfaces.fairness import client_key
from netproxy.listener.steering import (
    identifier,
    owner,
    steer_by_client,
    steer_by_connection,
    steer_by_identifier,
)
from tests.support.sockets import HAS_IPV6, SECONDS

IPV4_CLIENTS = [f"127.0.0.{number}" for number in range(2, 42)]
NETWORK, SAME_NETWORK = "2001:db8:7:8::%x", "2001:db8:7:8:%x::1"
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")

Steer = Callable[[socket.socket, int], None]


@contextlib.contextmanager
def group(kind: int, host: str, processes: int, steer: Steer) -> Iterator[list[socket.socket]]:
    """Yield the sockets of a group on one port, in the order of their processes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        for _ in range(processes):
            sock = stack.enter_context(socket.socket(family, kind))
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host, port_of(sockets[0]) if sockets else 0))
            sock.settimeout(SECONDS)
            sockets.append(sock)
        if kind == socket.SOCK_STREAM:
            for sock in sockets:
                sock.listen(64)
        steer(sockets[0], processes)
        yield sockets


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def receiver_of(
    sockets: Sequence[socket.socket], kind: int, client: str, to: str
) -> tuple[int, socket.socket]:
    """Send from a client's address; return the place of the socket that has it, and the client."""
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    sock = socket.socket(family, kind)
    sock.settimeout(SECONDS)
    sock.bind((client, 0))
    sock.connect((to, port_of(sockets[0])))
    if kind == socket.SOCK_DGRAM:
        sock.send(b"hello")
    poll = select.poll()
    for listening in sockets:
        poll.register(listening, select.POLLIN)
    ((descriptor, _),) = poll.poll(SECONDS * 1000)
    place = [listening.fileno() for listening in sockets].index(descriptor)
    if kind == socket.SOCK_DGRAM:
        assert sockets[place].recv(16) == b"hello"
    else:
        sockets[place].accept()[0].close()
    return place, sock


KINDS = pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])


@KINDS
@pytest.mark.parametrize("processes", [2, 3, 7, 64])
def test_kernel_gives_ipv4_clients_to_their_owners(kind: int, processes: int) -> None:
    with group(kind, "127.0.0.1", processes, steer_by_client) as sockets:
        for client in IPV4_CLIENTS:
            place, sock = receiver_of(sockets, kind, client, "127.0.0.1")
            sock.close()
            assert place == owner(client, processes), client


@KINDS
@needs_ipv6
def test_kernel_gives_ipv4_clients_of_a_dual_stack_socket_to_their_owners(kind: int) -> None:
    with group(kind, "::", 3, steer_by_client) as sockets:
        for client in IPV4_CLIENTS:
            place, sock = receiver_of(sockets, kind, client, "127.0.0.1")
            sock.close()
            assert place == owner(client, 3), client


@KINDS
@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "::"])
def test_kernel_gives_ipv6_loopback_to_its_owner(kind: int, host: str) -> None:
    with group(kind, host, 3, steer_by_client) as sockets:
        place, sock = receiver_of(sockets, kind, "::1", "::1")
        sock.close()
        assert place == owner("::1", 3)


def test_all_processes_own_clients() -> None:
    owners = [owner(client, 4) for client in IPV4_CLIENTS]
    assert set(owners) == {0, 1, 2, 3}


def test_ipv6_clients_of_one_network_have_one_owner() -> None:
    owners = {owner(NETWORK % number, 64) for number in range(1, 40)}
    assert len(owners) == 1
    assert len({client_key(NETWORK % number) for number in range(1, 40)}) == 1


def test_ipv6_networks_have_different_owners() -> None:
    assert len({owner(f"2001:db8:7:{number:x}::1", 4) for number in range(1, 40)}) == 4


def test_scope_of_a_client_does_not_count() -> None:
    assert owner("fe80::1:2:3:4%lo", 64) == owner("fe80::1:2:3:4", 64)


@pytest.mark.parametrize("host", ["", "a.name.test", "not:an:address"])
def test_owner_of_what_is_no_address_is_a_process(host: str) -> None:
    assert owner(host, 2) in (0, 1)


@pytest.mark.parametrize(
    ("kind", "steer"),
    [
        (socket.SOCK_DGRAM, steer_by_client),
        (socket.SOCK_STREAM, steer_by_client),
        (socket.SOCK_STREAM, steer_by_connection),
    ],
    ids=["udp", "tcp", "tcp by connection"],
)
def test_foreign_socket_in_the_group_gets_nothing(kind: int, steer: Steer) -> None:
    with ExitStack() as stack:
        sockets = stack.enter_context(group(kind, "127.0.0.1", 2, steer))
        foreign = stack.enter_context(socket.socket(socket.AF_INET, kind))
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        foreign.bind(("127.0.0.1", port_of(sockets[0])))
        if kind == socket.SOCK_STREAM:
            foreign.listen(64)
        for client in IPV4_CLIENTS:
            place, sock = receiver_of([*sockets, foreign], kind, client, "127.0.0.1")
            sock.close()
            assert place < 2, client


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "client"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")]
)
def test_connections_of_one_client_come_to_all_processes(host: str, client: str) -> None:
    with group(socket.SOCK_STREAM, host, 2, steer_by_connection) as sockets, ExitStack() as stack:
        places = set()
        # With other ports each: 64 connections in one process are no accident of the hash.
        for _ in range(64):
            place, sock = receiver_of(sockets, socket.SOCK_STREAM, client, client)
            stack.enter_context(sock)
            places.add(place)
        assert places == {0, 1}


def test_datagrams_of_all_ports_of_a_client_come_to_one_process() -> None:
    with group(socket.SOCK_DGRAM, "127.0.0.1", 4, steer_by_client) as sockets:
        places = set()
        for _ in range(40):
            place, sock = receiver_of(sockets, socket.SOCK_DGRAM, "127.0.0.9", "127.0.0.1")
            sock.close()
            places.add(place)
        assert places == {owner("127.0.0.9", 4)}


def test_socket_without_a_group_is_refused() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, pytest.raises(OSError):
        steer_by_client(sock, 2)


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 64])
def test_kernel_gives_datagrams_to_the_process_of_their_identifier(processes: int) -> None:
    """Whatever the address of the client is; the byte before the identifier does not matter."""

    def steer(sock: socket.socket, count: int) -> None:
        steer_by_identifier(sock, count, 1)

    with group(socket.SOCK_DGRAM, "127.0.0.1", processes, steer) as sockets:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for process in range(processes):
            packet = b"\x9e" + identifier(8, process, processes)
            client.sendto(packet, ("127.0.0.1", port_of(sockets[0])))
            assert sockets[process].recv(16) == packet
        # What is too short has no identifier.
        client.sendto(b"\x9e", ("127.0.0.1", port_of(sockets[0])))
        assert sockets[0].recv(16) == b"\x9e"
        client.close()


@pytest.mark.parametrize("processes", [1, 2, 3, 64])
def test_identifiers_of_a_process_are_its_own_and_differ(processes: int) -> None:
    made = [identifier(8, processes - 1, processes) for _ in range(500)]
    assert {first[0] % processes for first in made} == {processes - 1}
    assert len(set(made)) == 500 and {len(each) for each in made} == {8}
