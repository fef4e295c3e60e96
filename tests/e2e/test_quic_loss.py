"""QUIC through the relay on paths that lose three datagrams of a hundred: a client, a box with the relay, a server.

20 MB up, and at the same time down.  aioquic does the QUIC; between it and its socket
stands a shim that speaks SOCKS5 UDP.
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
from tests.e2e.support import environment, program, wait_for
from tests.support.sockets import Task

pytest.importorskip("aioquic", reason="aioquic is not installed")
pytestmark = pytest.mark.e2e

SIZE = 20_000_000
SECONDS = 90.0  # it takes ten
LOSS = 3  # of a hundred, each way
CLIENT, BOX, BOX_TO_SERVER, SERVER = "10.79.1.2", "10.79.1.1", "10.79.2.1", "10.79.2.2"
PORT = 1080
SHORT_HEADER = 10  # bytes before a datagram from an IPv4 source
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
    def __init__(self, client: Namespace, box: Namespace, server: Namespace) -> None:
        self.client, self.box, self.server = client, box, server


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("client", "box", "server") as made:
        net = Net(*made)
        connect(net.client, [f"{CLIENT}/24"], net.box, [f"{BOX}/24"])
        connect(net.box, [f"{BOX_TO_SERVER}/24"], net.server, [f"{SERVER}/24"])
        net.box.nft(RULES)  # what comes to the box, from either side
        yield net


def counted(box: Namespace) -> tuple[int, int]:
    """Datagrams lost, and those that passed."""
    text = subprocess.run(
        [
            program("ip"),
            "netns",
            "exec",
            box.name,
            program("nft"),
            "list",
            "table",
            "inet",
            "netproxy-test",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lost, passed = map(int, re.findall(r"counter packets (\d+)", text))
    return lost, passed


def payload() -> bytes:
    return random.Random(3).randbytes(SIZE)


@pytest.fixture
def server(net: Net, tmp_path: Path) -> Iterator[Endpoint]:
    """An echo server in a process of its own: aioquic is slow, and here two of it would share one interpreter."""
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
        found = wait_for(
            lambda: re.search(r"port (\d+)", log.read_text()), 20.0, "the server listens"
        )
        yield SERVER, int(found[1])
    finally:
        process.kill()
        process.wait()


def serve(directory: Path) -> None:
    """Runs in the server's process; an echo server on any port of SERVER."""
    from aioquic.asyncio.server import serve as listen
    from aioquic.quic.configuration import QuicConfiguration
    from tests.e2e.quic import PROTOCOL, _echo_soon, _self_signed

    async def run() -> None:
        configuration = QuicConfiguration(is_client=False, alpn_protocols=[PROTOCOL])
        configuration.load_cert_chain(*_self_signed(directory))
        made: Any = await listen(SERVER, 0, configuration=configuration, stream_handler=_echo_soon)
        print("port", made._transport.get_extra_info("sockname")[1], flush=True)
        await asyncio.sleep(SECONDS)

    asyncio.run(run())


class Shim(asyncio.DatagramProtocol, asyncio.DatagramTransport):
    """Between a QUIC connection and an association's socket: puts the header before what goes, takes it off what comes."""

    def __init__(self, quic: Any, target: Endpoint) -> None:
        super().__init__()
        self._quic = quic
        self._header = b"\0\0\0" + encode(target)
        self._target = target
        self._transport: Any = None
        self.strangers = 0

    # as the socket's protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._quic.connection_made(self)

    def datagram_received(self, data: bytes, peer: Any) -> None:
        if data[:SHORT_HEADER] == self._header:
            self._quic.datagram_received(data[SHORT_HEADER:], self._target)
        else:
            self.strangers += 1

    # as QUIC's transport

    def sendto(self, data: Any, addr: Any = None) -> None:
        self._transport.sendto(self._header + data)

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return bool(self._transport.is_closing())


async def transfer(association: Association, target: Endpoint, data: bytes) -> bytes:
    """What comes back of `data`."""
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


def test_megabytes_both_ways_with_loss(netproxyd: Start, net: Net, server: Endpoint) -> None:
    daemon = netproxyd(
        "-l",
        f"sps://{BOX}:{PORT}?clients=10.79.1.0/24",
        host=BOX,
        make=net.box.socket,
        preexec_fn=net.box.enter,
    )
    data = payload()

    def run() -> bytes:
        net.client.enter()
        with Association((BOX, PORT)) as association:
            return asyncio.run(asyncio.wait_for(transfer(association, server, data), SECONDS))

    received = Task(run).result(SECONDS + 5)
    assert len(received) == SIZE
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
    lost, passed = counted(net.box)
    assert lost > (lost + passed) * LOSS / 200, "the path was better than it should have been"
    record = daemon.said(f" network=udp target={SERVER}:{server[1]} ")[-1]
    sent, reply_destination = (
        int(record.split(f" {name}=")[1].split()[0]) for name in ("sent", "received")
    )
    assert min(sent, reply_destination) > SIZE
    assert not daemon.status().get("drops{truncated}")
