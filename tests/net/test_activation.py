"""Sockets that the service manager passes: found by network and name, taken as duplicates, never shut down."""

from __future__ import annotations

import os
import socket
import time
from typing import Iterator

import pytest

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.activation import ActivationSockets, set_receive_timeout
from tests.support.doubles import Counts, Lines
from tests.support.sockets import address_of, listen, udp

FIRST = 200  # where the descriptors begin here: 3 and the following belong to pytest


class Manager:
    """Stands for the service manager: its sockets, and the environment it would make."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.taken: list[ActivationSockets] = []

    def pass_on(
        self, *sockets: socket.socket, names: str | None, **environment: str
    ) -> ActivationSockets:
        self.sockets += sockets
        for number, sock in enumerate(sockets):
            os.dup2(sock.fileno(), FIRST + number)
        given = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sockets)), **environment}
        if names is not None:
            given["LISTEN_FDNAMES"] = names
        self.taken.append(ActivationSockets(given, FIRST))
        return self.taken[-1]


@pytest.fixture
def manager() -> Iterator[Manager]:
    made = Manager()
    yield made
    for taken in made.taken:
        taken.close()
    for sock in made.sockets:
        sock.close()


def test_each_network_has_names_of_its_own(manager: Manager) -> None:
    stream, datagram, other = listen(), udp(), listen()
    activated = manager.pass_on(stream, datagram, other, names="main:main:other")
    for network, name, wanted in (
        ("tcp", "main", stream),
        ("udp", "main", datagram),
        ("tcp", "other", other),
    ):
        with activated.take(network, ActivationAddress(f"systemd:{name}", 0)) as sock:
            assert address_of(sock) == address_of(wanted)
            assert not os.get_inheritable(sock.fileno())


def test_the_original_stays_for_the_next(manager: Manager) -> None:
    stream = listen()
    activated = manager.pass_on(stream, names="main")
    for _ in range(2):
        activated.take("tcp", ActivationAddress("systemd:main", 0)).close()
    with socket.create_connection(address_of(stream), 5):
        pass


def test_without_names_it_is_unknown(manager: Manager) -> None:
    """As sd_listen_fds_with_names(3) has it."""
    manager.pass_on(listen(), names=None).take(
        "tcp", ActivationAddress("systemd:unknown", 0)
    ).close()


@pytest.mark.parametrize(
    "names, network, name, message",
    [
        (
            "main:web",
            "tcp",
            "man",
            "tcp systemd:man: expected one activation socket of this name, found 0 (available: tcp main, tcp web)",
        ),
        (
            "main:web",
            "udp",
            "main",
            "udp systemd:main: expected one activation socket of this name, found 0 (available: tcp main, tcp web)",
        ),
        (
            "main:main",
            "tcp",
            "main",
            "tcp systemd:main: expected one activation socket of this name, found 2 (available: tcp main)",
        ),
    ],
)
def test_what_is_not_there_is_one_clear_line(
    manager: Manager, names: str, network: str, name: str, message: str
) -> None:
    activated = manager.pass_on(listen(), listen(), names=names)
    with pytest.raises(ListenError) as caught:
        activated.take(network, ActivationAddress(f"systemd:{name}", 0))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "some"},
    ],
)
def test_what_is_meant_for_others_is_left_alone(environment: dict[str, str]) -> None:
    activated = ActivationSockets(environment, FIRST)
    with pytest.raises(ListenError, match=r"\(available: none\)"):
        activated.take("tcp", ActivationAddress("systemd:main", 0))


def test_a_stream_socket_that_does_not_listen(manager: Manager) -> None:
    activated = manager.pass_on(socket.socket(), names="main")
    with pytest.raises(
        ListenError, match="tcp systemd:main: the activation socket is not listening"
    ):
        activated.take("tcp", ActivationAddress("systemd:main", 0))


def test_unix_sockets_and_pipes_are_nobodys(manager: Manager) -> None:
    reader, writer = os.pipe()
    os.dup2(reader, FIRST + 1)
    activated = manager.pass_on(socket.socket(socket.AF_UNIX), names="main:pipe", LISTEN_FDS="2")
    with pytest.raises(ListenError, match=r"\(available: other main\)"):
        activated.take("tcp", ActivationAddress("systemd:main", 0))
    for descriptor in (reader, writer, FIRST + 1):
        os.close(descriptor)


def test_a_datagram_call_ends_now_and_then() -> None:
    with udp() as sock:
        sock.settimeout(None)
        set_receive_timeout(sock)
        started = time.monotonic()
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize("level", ["auto", "trains", "single"])
def test_datagrams_wait_for_the_next_when_one_has_stopped(manager: Manager, level: str) -> None:
    bound = udp()
    activated = manager.pass_on(bound, names="main")
    datagrams = UdpSocketFactory(Counts(), Lines(), level, activated)
    with udp() as client:
        for number in range(2):
            local = datagrams.listen(ActivationAddress("systemd:main", 0))
            assert local.address == address_of(bound)
            if not number:
                local.shutdown()
                assert not local.wait()
                client.sendto(b"meanwhile", address_of(bound))
            else:
                arena = datagrams.arena()
                batch = local.receive_waiting(arena)
                ((offsets, length, _, _),) = batch.spans
                assert bytes(arena.view[offsets[0] : offsets[0] + length]) == b"meanwhile"
            local.close()
