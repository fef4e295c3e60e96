"""Groups of sockets: one socket for each worker at each address, and nobody else in them."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from contextlib import ExitStack
from typing import Iterator, Mapping

import pytest

from netproxy.config.schema import Config
from netproxy.daemon.process.activation import ActivationSockets
from netproxy.daemon.workers.groups import GroupBinder, SocketGroup, group_specs, with_ports
from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.listeners import GivenSockets
from netproxy.listener.manager import ListenerManager
from netproxy.listener.steering import owner
from tests.support.relays import configuration
from tests.support.sockets import HAS_IPV6, SECONDS, address_of, listen, udp

WORKERS = 3
LOCALHOST = Address("127.0.0.1", 0)
MAIN = ActivationAddress("systemd:main", 0)
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}

Groups = ListenerManager[SocketGroup]


class Given:
    """Sockets of a service manager."""

    def __init__(self, sockets: Mapping[tuple[str, str], socket.socket]) -> None:
        self._sockets = sockets

    def take(self, network: str, address: Address) -> socket.socket | None:
        if not isinstance(address, ActivationAddress):
            return None
        return self._sockets[network, address.name].dup()

    def is_served(self, network: str, address: Address) -> bool:
        return True

    def close(self) -> None:
        pass


def binder(given: GivenSockets | None = None, workers: int = WORKERS) -> GroupBinder:
    return GroupBinder(workers, given or ActivationSockets({}), lambda address: address)


@pytest.fixture
def groups() -> Iterator[Groups]:
    manager = manager_of(binder())
    yield manager
    manager.stop()


def manager_of(bind: GroupBinder) -> Groups:
    return ListenerManager({"tcp": bind.tcp, "udp": bind.udp})


def bind(groups: Groups, text: str) -> list[SocketGroup]:
    """Bind what a configuration wants; return its groups."""
    groups.bind(list(group_specs(configuration(text)))).commit()
    return groups.listeners


@contextlib.contextmanager
def bound(network: str) -> Iterator[SocketGroup]:
    group: SocketGroup = getattr(binder(), network)(LOCALHOST)
    try:
        yield group
    finally:
        group.stop()


def sockets_of(group: SocketGroup) -> list[socket.socket]:
    sockets = [sock for sock in group.sockets if sock is not None]
    assert len(sockets) == len(group.sockets)
    return sockets


@pytest.mark.parametrize("network", ["tcp", "udp"])
def test_group_has_a_socket_for_each_worker_on_one_port(network: str) -> None:
    with bound(network) as group:
        sockets = sockets_of(group)
        assert len({sock.fileno() for sock in sockets}) == WORKERS
        assert {address_of(sock) for sock in sockets} == {group.address}
        assert {sock.type for sock in sockets} == {KINDS[network]}
        assert not any(os.get_inheritable(sock.fileno()) for sock in sockets)
    assert all(sock.fileno() < 0 for sock in sockets)


def test_all_sockets_of_a_tcp_group_listen() -> None:
    with bound("tcp") as group:
        listens = [
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in sockets_of(group)
        ]
        assert listens == [1] * WORKERS


@pytest.mark.parametrize("holder", ["alone", "SO_REUSEADDR", "SO_REUSEPORT"])
@pytest.mark.parametrize("network", ["tcp", "udp"])
def test_port_of_another_program_is_refused(network: str, holder: str) -> None:
    """One with SO_REUSEPORT, of the same user, would let the sockets join its group."""
    with socket.socket(socket.AF_INET, KINDS[network]) as other:
        if holder != "alone":
            other.setsockopt(socket.SOL_SOCKET, getattr(socket, holder), 1)
        other.bind(("127.0.0.1", 0))
        if network == "tcp":
            other.listen()
        with pytest.raises(ListenError, match=f"{network} 127.0.0.1:.*in use"):
            getattr(binder(), network)(address_of(other))


@pytest.mark.parametrize("network", ["tcp", "udp"])
@pytest.mark.parametrize("alone", [True, False])
def test_port_of_a_group_is_refused_to_a_program_without_reuse(network: str, alone: bool) -> None:
    with bound(network) as group, socket.socket(socket.AF_INET, KINDS[network]) as other:
        if not alone and network == "tcp":
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", group.address.port))


@pytest.mark.parametrize("network", ["tcp", "udp"])
def test_second_group_on_a_port_is_refused(network: str) -> None:
    with bound(network) as group, pytest.raises(ListenError, match="in use"):
        getattr(binder(), network)(group.address)


def test_port_with_connections_of_the_group_before_is_bound_again() -> None:
    with ExitStack() as stack:
        with bound("tcp") as group:
            client = stack.enter_context(
                socket.create_connection(group.address, SECONDS, ("127.0.0.2", 0))
            )
            ready, _, _ = select.select(sockets_of(group), [], [], SECONDS)
            stack.enter_context(ready[0].accept()[0])
        again = binder().tcp(group.address)
        assert again.address == group.address
        again.stop()
        client.sendall(b"still here")


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
@pytest.mark.parametrize("network", ["tcp", "udp"])
def test_unspecified_ipv6_address_takes_ipv4_and_loopback_does_not(network: str) -> None:
    make = getattr(binder(), network)
    for host, only in (("::", 0), ("::1", 1)):
        group = make(Address(host, 0))
        options = {
            sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) for sock in sockets_of(group)
        }
        group.stop()
        assert options == {only}, host


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ListenError, match="udp 192.0.2.1:1080.*(assign|not available)"):
        binder().udp(Address("192.0.2.1", 1080))


def test_nothing_stays_bound_after_a_failure() -> None:
    with listen() as other:
        taken = address_of(other)
        for _ in range(3):
            with pytest.raises(ListenError):
                binder().tcp(taken)


def test_concrete_address_is_bound() -> None:
    asked = []

    def concrete(address: Address) -> Address:
        asked.append(address)
        return LOCALHOST

    group = GroupBinder(2, ActivationSockets({}), concrete).udp(Address("eth7", 53))
    group.stop()
    assert asked == [Address("eth7", 53)]
    assert group.address.host == "127.0.0.1"


# -- what the service manager has bound


def test_activation_socket_for_connections_is_shared() -> None:
    with listen() as original:
        group = binder(Given({("tcp", "main"): original})).tcp(MAIN)
        sockets = sockets_of(group)
        assert {address_of(sock) for sock in sockets} == {address_of(original)}
        assert len({sock.fileno() for sock in sockets}) == WORKERS
        group.stop()
        with socket.create_connection(address_of(original), SECONDS):
            original.accept()[0].close()


def test_activation_socket_for_datagrams_is_of_the_first_worker() -> None:
    with udp() as original:
        group = binder(Given({("udp", "main"): original})).udp(MAIN)
        first, *others = group.sockets
        assert first is not None
        assert address_of(first) == address_of(original)
        assert others == [None] * (WORKERS - 1)
        assert group.address == address_of(original)
        group.stop()


# -- the specs of a configuration


SPS = "listeners: [{listen: '127.0.0.1:0', name: main}]"
TWO_LISTENERS = """
listeners: [{listen: '127.0.0.1:0', name: first}, {listen: '127.0.0.2:0', name: second}]
"""
BRIDGE = """
listeners: [{listen: '127.0.0.1:0', network: tcp}]
tunnel: {bridge: {listen: 'tcp://127.0.0.1:0', agents: {home: {token: 'a token of 24 characters'}}}}
"""


def test_both_networks_of_an_address_get_one_port(groups: Groups) -> None:
    for _ in range(8):
        udp_group, tcp_group = bind(groups, SPS)
        assert (udp_group.network, tcp_group.network) == ("udp", "tcp")
        assert udp_group.address == tcp_group.address
        groups.stop()


def test_each_address_is_a_group(groups: Groups) -> None:
    bound_groups = bind(groups, TWO_LISTENERS)
    assert [(group.network, group.address.host) for group in bound_groups] == [
        ("udp", "127.0.0.1"),
        ("tcp", "127.0.0.1"),
        ("udp", "127.0.0.2"),
        ("tcp", "127.0.0.2"),
    ]
    assert all(len(group.sockets) == WORKERS for group in bound_groups)


def test_configuration_gets_the_ports_that_were_bound(groups: Groups) -> None:
    config: Config = configuration(TWO_LISTENERS + "\ntimeouts: {drain: 7s}")
    groups.bind(list(group_specs(config))).commit()
    listeners = with_ports(config, groups.pairs).listeners
    ports = [group.address.port for group in groups.listeners if group.network == "tcp"]
    assert [listener.addresses[0].port for listener in listeners] == ports
    assert 0 not in ports
    assert with_ports(config, groups.pairs).timeouts == config.timeouts


def test_configuration_keeps_the_names_of_activation_sockets() -> None:
    config = configuration("listeners: [{listen: 'systemd:main', network: tcp, allow_open: true}]")
    with listen() as original:
        manager = manager_of(binder(Given({("tcp", "main"): original})))
        manager.bind(list(group_specs(config))).commit()
        (listener,) = with_ports(config, manager.pairs).listeners
        assert listener.addresses == (MAIN,)
        assert isinstance(listener.addresses[0], ActivationAddress)
        manager.stop()


def test_datagrams_of_a_group_go_to_the_owner_of_the_client(groups: Groups) -> None:
    udp_group, _ = bind(groups, SPS)
    sockets = sockets_of(udp_group)
    for number in range(2, 30):
        client = f"127.0.0.{number}"
        with udp(client) as sock:
            sock.sendto(client.encode(), udp_group.address)
        receiving = sockets[owner(client, WORKERS)]
        receiving.settimeout(SECONDS)
        assert receiving.recv(64) == client.encode()


def test_connections_are_spread_except_those_of_agents() -> None:
    specs = group_specs(configuration(BRIDGE))
    by_client = [
        (spec.group.startswith("tunnel "), spec.by_client)
        for spec in specs
        if spec.network == "tcp"
    ]
    assert sorted(by_client) == [(False, False), (True, True)]


def test_kernel_without_steering_is_told_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket, processes: int) -> None:
        raise OSError(92, "Protocol not available")

    monkeypatch.setattr("netproxy.daemon.workers.groups.steer_by_client", refuse)
    manager = manager_of(binder())
    with pytest.raises(ListenError, match="cannot steer .*workers: 1"):
        manager.bind(list(group_specs(configuration(SPS))))
    assert not manager.listeners
