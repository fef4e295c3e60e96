"""QUIC through the relay on paths that lose three of a hundred datagrams.

Client, relay and server have their own network namespaces. 20 MB go up and down at the same time.
aioquic speaks QUIC; a shim between it and its socket adds and removes the SOCKS5 UDP header.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import Association, Endpoint, encode
from tests.e2e.support import SECONDS, environment, wait_for
from tests.support.sockets import Task

pytest.importorskip("aioquic", reason="aioquic is not installed")
pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.any_workers]

SIZE = 10_000_000
# The limit of the transfer, which takes five seconds.
TRANSFER_SECONDS = 90.0
# Per cent of the datagrams, in each direction.
LOSS = 3
# At least so many are lost of some 15,000: the transfer meets real loss.
LOST = 150
CLIENT, BOX, BOX_TO_SERVER, SERVER = "10.79.1.2", "10.79.1.1", "10.79.2.1", "10.79.2.2"
PORT = 1080
# Bytes of the SOCKS5 header before a datagram of an IPv4 source.
SHORT_HEADER = 10
RULES = f"""
table inet netproxy-test {{
    chain lost {{
        type filter hook input priority 0;
        meta l4proto udp numgen random mod 100 < {LOSS} counter drop
        meta l4proto udp counter
    }}
}}
"""


class Net:
    """The three hosts. The box is where the relay runs."""

    def __init__(self, client: Namespace, box: Namespace, server: Namespace) -> None:
        self.client, self.box, self.server = client, box, server


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("client", "box", "server") as created:
        net = Net(*created)
        connect(net.client, [f"{CLIENT}/24"], net.box, [f"{BOX}/24"])
        connect(net.box, [f"{BOX_TO_SERVER}/24"], net.server, [f"{SERVER}/24"])
        # Datagrams are lost on arrival at the box, from either side.
        net.box.nft(RULES)
        yield net


def lost_datagrams(box: Namespace) -> int:
    """Return how many datagrams were lost so far."""
    text = box.nft_list("inet netproxy-test")
    lost, _ = map(int, re.findall(r"counter packets (\d+)", text))
    return lost


@pytest.fixture
def server(net: Net, tmp_path: Path) -> Iterator[Endpoint]:
    """An echo server in its own process: aioquic is too slow for both ends in one interpreter."""
    program_text = (
        "import sys, pathlib, tests.e2e.test_quic_loss as here\n"
        "here.serve(pathlib.Path(sys.argv[1]))\n"
    )
    log = tmp_path / "server.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", program_text, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=net.server.enter,
        )
    try:
        match = wait_for(
            lambda: re.search(r"port (\d+)", log.read_text()), SECONDS, "the server listens"
        )
        yield SERVER, int(match[1])
    finally:
        process.kill()
        process.wait()


def serve(directory: Path) -> None:
    """Run the echo server on a port of SERVER, and print the port. Runs in the server's process."""
    from aioquic.asyncio.server import serve as listen
    from aioquic.quic.configuration import QuicConfiguration
    from tests.e2e.quic import PROTOCOL, self_signed, start_echo

    async def run() -> None:
        configuration = QuicConfiguration(is_client=False, alpn_protocols=[PROTOCOL])
        configuration.load_cert_chain(*self_signed(directory))
        server: Any = await listen(
            SERVER, 0, configuration=configuration, stream_handler=start_echo
        )
        print("port", server._transport.get_extra_info("sockname")[1], flush=True)
        await asyncio.sleep(TRANSFER_SECONDS)

    asyncio.run(run())


class Shim(asyncio.DatagramProtocol, asyncio.DatagramTransport):
    """Adds the SOCKS5 header to datagrams of a QUIC connection, and removes it from others."""

    def __init__(self, quic: Any, target: Endpoint) -> None:
        super().__init__()
        self._quic = quic
        self._header = b"\0\0\0" + encode(target)
        self._target = target
        self._transport: Any = None
        # Datagrams that name another source.
        self.strangers = 0

    # -- the protocol of the socket

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._quic.connection_made(self)

    def datagram_received(self, data: bytes, peer: Any) -> None:
        if data[:SHORT_HEADER] == self._header:
            self._quic.datagram_received(data[SHORT_HEADER:], self._target)
        else:
            self.strangers += 1

    # -- the transport of QUIC

    def sendto(self, data: Any, addr: Any = None) -> None:
        self._transport.sendto(self._header + data)

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return bool(self._transport.is_closing())


async def transfer(association: Association, target: Endpoint, data: bytes) -> bytes:
    """Send `data` to the echo server through the association. Return what comes back."""
    from aioquic.asyncio.protocol import QuicConnectionProtocol
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.connection import QuicConnection
    from tests.e2e.quic import NAME, PROTOCOL

    configuration = QuicConfiguration(
        alpn_protocols=[PROTOCOL], server_name=NAME, verify_mode=ssl.CERT_NONE
    )
    quic = QuicConnectionProtocol(QuicConnection(configuration=configuration))
    shim = Shim(quic, target)
    association.socket.setblocking(False)
    association.socket.connect(association.bound)
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: shim, sock=association.socket)
    quic.connect(target)
    await quic.wait_connected()
    reader, writer = await quic.create_stream()
    writer.write(data)
    writer.write_eof()
    received = await reader.read()
    quic.close()
    await quic.wait_closed()
    shim.close()
    assert not shim.strangers
    return received


def test_quic_transfer_completes_although_datagrams_are_lost(
    netproxyd: Start, net: Net, server: Endpoint
) -> None:
    """Hazard 47."""
    daemon = netproxyd(
        "-l",
        f"sps://{BOX}:{PORT}?clients=10.79.1.0/24",
        host=BOX,
        make=net.box.socket,
        preexec_fn=net.box.enter,
    )
    data = random.Random(3).randbytes(SIZE)

    def run() -> bytes:
        net.client.enter()
        with Association((BOX, PORT)) as association:
            return asyncio.run(
                asyncio.wait_for(transfer(association, server, data), TRANSFER_SECONDS)
            )

    received = Task(run).result(2 * TRANSFER_SECONDS)
    assert len(received) == SIZE
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
    assert lost_datagrams(net.box) >= LOST
    record = daemon.said(f" network=udp target={SERVER}:{server[1]} ")[-1]
    for name in ("sent", "received"):
        assert int(record.split(f" {name}=")[1].split()[0]) > SIZE
    assert not daemon.status().get("drops{truncated}")
