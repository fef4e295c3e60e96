"""The sockets that a worker is given: who serves which address, and who closes what."""

from __future__ import annotations

import resource
import socket

import pytest

from netproxy.daemon.workers.sockets import WorkerSockets, socket_key
from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress, Address
from tests.support.sockets import address_of, listen, udp

HERE = Address("127.0.0.1", 1080)
MAIN = ActivationAddress("systemd:main", 0)


def test_given_socket_is_taken_as_a_duplicate() -> None:
    sockets = WorkerSockets()
    sockets.add(socket_key("tcp", HERE), listening := listen())
    for _ in range(2):
        taken = sockets.take("tcp", HERE)
        assert taken is not None
        with taken:
            assert taken.fileno() != listening.fileno()
            assert address_of(taken) == address_of(listening)
    sockets.close()
    assert listening.fileno() < 0


def test_networks_of_one_address_are_told_apart() -> None:
    sockets = WorkerSockets()
    sockets.add(socket_key("udp", HERE), udp())
    assert sockets.take("tcp", HERE) is None
    taken = sockets.take("udp", HERE)
    assert taken is not None
    with taken:
        assert taken.type == socket.SOCK_DGRAM
    sockets.close()


def test_address_that_is_not_given_is_bound_by_the_worker_itself() -> None:
    sockets = WorkerSockets()
    assert sockets.take("tcp", HERE) is None
    assert sockets.is_served("tcp", HERE)


def test_address_that_another_worker_serves_is_not_served() -> None:
    sockets = WorkerSockets()
    sockets.add(socket_key("udp", MAIN), None)
    assert not sockets.is_served("udp", MAIN)
    assert sockets.is_served("tcp", MAIN)
    sockets.remove(socket_key("udp", MAIN))
    assert sockets.is_served("udp", MAIN)


def test_activation_socket_of_another_worker_is_refused() -> None:
    sockets = WorkerSockets()
    sockets.add(socket_key("udp", MAIN), None)
    with pytest.raises(ListenError, match="another worker has the activation socket"):
        sockets.take("udp", MAIN)


def test_removed_socket_is_closed_and_a_taken_one_stays() -> None:
    sockets = WorkerSockets()
    key = socket_key("tcp", HERE)
    sockets.add(key, original := listen())
    taken = sockets.take("tcp", HERE)
    assert taken is not None
    with taken:
        sockets.remove(key)
        assert original.fileno() < 0
        with socket.create_connection(address_of(taken)):
            taken.accept()[0].close()
    assert sockets.keys == set()
    sockets.remove(key)


def test_keys_name_what_was_added() -> None:
    sockets = WorkerSockets()
    sockets.add(socket_key("tcp", HERE), listen())
    sockets.add(socket_key("udp", MAIN), None)
    assert sockets.keys == {("tcp", "127.0.0.1:1080"), ("udp", "systemd:main")}
    sockets.close()
    assert not sockets.keys


def test_want_of_descriptors_is_a_listen_error() -> None:
    sockets = WorkerSockets()
    with listen() as original:
        sockets.add(socket_key("tcp", HERE), original)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (original.fileno(), hard))
        try:
            with pytest.raises(ListenError, match="127.0.0.1:1080: Too many open files"):
                sockets.take("tcp", HERE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        sockets.close()
