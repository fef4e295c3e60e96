"""Activation sockets: found by network and name, taken as duplicates, never shut down."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Iterator

import pytest

from netproxy.daemon.process.activation import ActivationSockets
from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress
from netproxy.net.socket_options import set_receive_timeout
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.support.doubles import Counts, Lines
from tests.support.sockets import SECONDS, address_of, listen, udp

FIRST_DESCRIPTOR = 200
"""Where the descriptors begin here: 3 and the following belong to pytest."""

MAIN = ActivationAddress("systemd:main", 0)


class ServiceManager:
    """Owns sockets, and makes the environment that a service manager would make."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.activated: list[ActivationSockets] = []

    def activate(
        self, *sockets: socket.socket, names: str | None, **variables: str
    ) -> ActivationSockets:
        """Give sockets, and with them the names in LISTEN_FDNAMES, unless None."""
        self.sockets += sockets
        for number, sock in enumerate(sockets):
            os.dup2(sock.fileno(), FIRST_DESCRIPTOR + number)
        environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sockets)), **variables}
        if names is not None:
            environment["LISTEN_FDNAMES"] = names
        self.activated.append(ActivationSockets(environment, FIRST_DESCRIPTOR))
        return self.activated[-1]


@pytest.fixture
def manager() -> Iterator[ServiceManager]:
    manager = ServiceManager()
    yield manager
    for activated in manager.activated:
        activated.close()
    for sock in manager.sockets:
        sock.close()


def test_tcp_and_udp_sockets_may_have_the_same_name(manager: ServiceManager) -> None:
    stream, datagram, other = listen(), udp(), listen()
    activated = manager.activate(stream, datagram, other, names="main:main:other")
    for network, name, expected in (
        ("tcp", "main", stream),
        ("udp", "main", datagram),
        ("tcp", "other", other),
    ):
        with activated.take(network, ActivationAddress(f"systemd:{name}", 0)) as sock:
            assert address_of(sock) == address_of(expected)
            assert not os.get_inheritable(sock.fileno())


def test_activation_socket_can_be_taken_again_after_its_duplicate_was_closed(
    manager: ServiceManager,
) -> None:
    stream = listen()
    activated = manager.activate(stream, names="main")
    for _ in range(2):
        activated.take("tcp", MAIN).close()
    with socket.create_connection(address_of(stream), SECONDS):
        pass


def test_activation_socket_without_a_name_is_called_unknown(manager: ServiceManager) -> None:
    """As sd_listen_fds_with_names(3) says."""
    activated = manager.activate(listen(), names=None)
    activated.take("tcp", ActivationAddress("systemd:unknown", 0)).close()


@pytest.mark.parametrize(
    "names, network, name, problem",
    [
        ("main:web", "tcp", "man", "found 0 (available: tcp main, tcp web)"),
        ("main:web", "udp", "main", "found 0 (available: tcp main, tcp web)"),
        ("main:main", "tcp", "main", "found 2 (available: tcp main)"),
    ],
)
def test_error_names_the_missing_activation_socket_and_those_available(
    manager: ServiceManager, names: str, network: str, name: str, problem: str
) -> None:
    activated = manager.activate(listen(), listen(), names=names)
    with pytest.raises(ListenError) as caught:
        activated.take(network, ActivationAddress(f"systemd:{name}", 0))
    expected = f"{network} systemd:{name}: expected one activation socket of this name, {problem}"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "some"},
    ],
)
def test_activation_sockets_of_another_process_are_ignored(environment: dict[str, str]) -> None:
    activated = ActivationSockets(environment, FIRST_DESCRIPTOR)
    with pytest.raises(ListenError, match=r"\(available: none\)"):
        activated.take("tcp", MAIN)


def test_activation_socket_that_does_not_listen_is_refused(manager: ServiceManager) -> None:
    activated = manager.activate(socket.socket(), names="main")
    with pytest.raises(
        ListenError, match="tcp systemd:main: the activation socket is not listening"
    ):
        activated.take("tcp", MAIN)


def test_unix_sockets_and_pipes_cannot_be_taken(manager: ServiceManager) -> None:
    reader, writer = os.pipe()
    os.dup2(reader, FIRST_DESCRIPTOR + 1)
    unix = socket.socket(socket.AF_UNIX)
    activated = manager.activate(unix, names="main:pipe", LISTEN_FDS="2")
    with pytest.raises(ListenError, match=r"\(available: other main\)"):
        activated.take("tcp", MAIN)
    for descriptor in (reader, writer, FIRST_DESCRIPTOR + 1):
        os.close(descriptor)


def test_receive_timeout_ends_a_blocking_receive() -> None:
    with udp() as sock:
        sock.settimeout(None)
        set_receive_timeout(sock)
        timeval = struct.pack("@ll", 0, 500_000)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == timeval
        with pytest.raises(BlockingIOError):
            sock.recv(1)


def taken(activated: ActivationSockets) -> socket.socket:
    sock = activated.take("udp", MAIN)
    assert sock is not None
    return sock


@pytest.mark.parametrize("level", ["auto", "trains", "single"])
def test_datagrams_that_come_between_two_listeners_are_received(
    manager: ServiceManager, level: str
) -> None:
    bound = udp()
    activated = manager.activate(bound, names="main")
    factory = UdpSocketFactory(Counts(), Lines(), level)
    with udp() as client:
        first = factory.take_over(taken(activated))
        assert first.address == address_of(bound)
        first.shutdown()
        assert not first.wait()
        client.sendto(b"meanwhile", address_of(bound))
        first.close()

        second, arena = factory.take_over(taken(activated)), factory.arena()
        assert second.address == address_of(bound)
        ((offsets, length, _, _),) = second.receive_waiting(arena).spans
        assert bytes(arena.view[offsets[0] : offsets[0] + length]) == b"meanwhile"
        second.close()


def test_lack_of_descriptors_is_a_listen_error(
    manager: ServiceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dup(self: socket.socket) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    activated = manager.activate(listen(), names="main")
    monkeypatch.setattr(socket.socket, "dup", dup)
    with pytest.raises(ListenError, match="tcp systemd:main: Too many open files"):
        activated.take("tcp", MAIN)
