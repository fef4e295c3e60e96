"""A QUIC connection goes on as its client moves to another socket, whatever way it goes."""

from __future__ import annotations

import asyncio
import random
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import Association, Endpoint
from tests.e2e.quic import EchoServer
from tests.e2e.support import SECONDS, wait_for
from tests.e2e.test_public_address import CLIENT, PORT, PUBLIC, Net, net, servers, told
from tests.e2e.test_quic_loss import Shim
from tests.e2e.ways import WAYS, open_way
from tests.support.sockets import Task

pytestmark = pytest.mark.e2e

__all__ = ["net", "servers"]

SIZE = 100_000
"""Bytes before the client moves, and as many afterwards."""
TRANSFER_SECONDS = 60.0


class MovingShim(Shim):
    """The transport of a QUIC connection, whose socket may be replaced."""

    def connection_made(self, transport: Any) -> None:
        """Use a socket in place of the one before."""
        before, self._transport = self._transport, transport
        if before is None:
            self._quic.connection_made(self)
        else:
            before.close()


async def use(shim: MovingShim, association: Association) -> None:
    """Let a connection go by an association from now on."""
    association.socket.setblocking(False)
    association.socket.connect(association.bound)
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: shim, sock=association.socket)


async def transfer(first: Association, second: Association, target: Endpoint, data: bytes) -> bytes:
    """Send `data` to an echo server, the second half by the second association."""
    from aioquic.asyncio.protocol import QuicConnectionProtocol
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.connection import QuicConnection
    from tests.e2e.quic import NAME, PROTOCOL

    configuration = QuicConfiguration(
        alpn_protocols=[PROTOCOL], server_name=NAME, verify_mode=ssl.CERT_NONE
    )
    quic = QuicConnectionProtocol(QuicConnection(configuration=configuration))
    shim = MovingShim(quic, target)
    await use(shim, first)
    quic.connect(target)
    await quic.wait_connected()
    reader, writer = await quic.create_stream()
    writer.write(data[:SIZE])
    received = await reader.readexactly(SIZE)
    quic.change_connection_id()
    await use(shim, second)
    writer.write(data[SIZE:])
    writer.write_eof()
    received += await reader.read()
    quic.close()
    await quic.wait_closed()
    shim.close()
    assert not shim.strangers
    return received


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("way", WAYS)
def test_quic_connection_goes_on_as_its_client_moves(
    netproxyd: Start, net: Net, tmp_path: Path, way: str
) -> None:
    """Hazard 47: the server sees two endpoints, and one connection."""
    open_way(way, netproxyd, net)
    server = PUBLIC, PORT
    wait_for(lambda: told(net, server) == server, SECONDS, "a client is told the public address")
    data = random.Random(5).randbytes(2 * SIZE)
    with EchoServer(tmp_path, CLIENT, net.outside.enter) as quic:
        target = CLIENT, quic.port

        def run() -> bytes:
            net.outside.enter()
            with Association(server) as first, Association(server) as second:
                assert first.bound == second.bound == server
                moving = transfer(first, second, target, data)
                return asyncio.run(asyncio.wait_for(moving, TRANSFER_SECONDS))

        assert Task(run).result(2 * TRANSFER_SECONDS) == data
        assert len(quic.sources) == 2, quic.sources
