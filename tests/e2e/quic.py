"""Provides a QUIC echo server and client: everything sent comes back on the same stream."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import threading
from pathlib import Path
from typing import Any, Callable

from aioquic.asyncio.client import connect
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.sockets import SECONDS

PROTOCOL = "echo"
PIECE = 65536
NAME = "quic.test"


class EchoServer:
    """A QUIC server in a new thread. `enter` may move that thread to another network namespace."""

    def __init__(
        self,
        directory: Path,
        host: str = "127.0.0.1",
        enter: Callable[[], None] = lambda: None,
        port: int = 0,
    ) -> None:
        self._host, self._enter, self._wanted = host, enter, port
        certificate, key = self_signed(directory)
        self._configuration = QuicConfiguration(is_client=False, alpn_protocols=[PROTOCOL])
        self._configuration.load_cert_chain(certificate, key)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self.port = 0
        self.sources: list[tuple[str, int]] = []
        """Where datagrams have come from, each once."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(SECONDS)

    def _run(self) -> None:
        async def start() -> Any:
            return await serve(
                self._host,
                self._wanted,
                configuration=self._configuration,
                stream_handler=start_echo,
            )

        self._enter()
        server = self._loop.run_until_complete(start())
        self.port = server._transport.get_extra_info("sockname")[1]
        take = server.datagram_received

        def note(data: bytes, peer: Any) -> None:
            if peer[:2] not in self.sources:
                self.sources.append(peer[:2])
            take(data, peer)

        server.datagram_received = note
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def __enter__(self) -> EchoServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)


_tasks: set[Any] = set()


def start_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echo a stream. For aioquic, whose stream handlers are plain functions."""
    task = asyncio.get_running_loop().create_task(_echo(reader, writer))
    # The loop itself holds no strong reference to a task.
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(PIECE):
        writer.write(piece)
    writer.write_eof()


def transfer(port: int, data: bytes, seconds: float, host: str = "127.0.0.1") -> bytes:
    """Send `data` to a server and return what comes back. Raises TimeoutError after `seconds`."""

    async def run() -> bytes:
        configuration = QuicConfiguration(
            alpn_protocols=[PROTOCOL], server_name=NAME, verify_mode=ssl.CERT_NONE
        )
        async with connect(host, port, configuration=configuration) as client:
            reader, writer = await client.create_stream()
            writer.write(data)
            writer.write_eof()
            return await reader.read()

    return asyncio.run(asyncio.wait_for(run(), seconds))


def self_signed(directory: Path) -> tuple[Path, Path]:
    """Create a certificate for NAME. Return its path and that of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .sign(key, hashes.SHA256())
    )
    paths = directory / "quic.pem", directory / "quic.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths
