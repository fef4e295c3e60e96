"""A bridge and an agent together, both daemons in this process: TCP and UDP through ports and through an exit."""
from __future__ import annotations

import socket

import pytest

from tests.support.relays import LOCALHOST, SECONDS, UdpClient, UdpPort
from tests.support.sockets import is_reset, read_exactly, read_to_end, refusing, wait_until
from tests.support.tunnels import Echo, UdpEcho, free_port, side, tunnel

HOME = "default: tunnel://home"


def dial(port: int) -> socket.socket:
    return socket.create_connection((LOCALHOST, port), SECONDS)


def test_stream_through_a_port() -> None:
    port = free_port()
    with Echo() as echo, tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent):
        bridge.wait_for_agent(1)
        with dial(port) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            sock.shutdown(socket.SHUT_WR)
            assert read_to_end(sock) == b""
        wait_until(lambda: not bridge.agents()[0]["streams"])


def test_datagrams_through_a_port() -> None:
    port = free_port()
    with UdpEcho() as echo, tunnel(f'{{"{port}/udp": "127.0.0.1:{echo.address.port}"}}', f"[{port}/udp]") as (bridge, agent):
        bridge.wait_for_agent(1)
        with UdpPort() as client:
            client.socket.connect((LOCALHOST, port))
            for size in (0, 1, 1200, 9000, 65507):
                data = bytes(size)
                client.socket.send(data)
                assert client.socket.recv(65536) == data
        assert len(set(echo.sources)) == 1
