"""Bytes in one segment with the end of a TLS handshake reach the target at once."""

from __future__ import annotations

import socket
import ssl

from tests.support.certificates import certificates
from tests.support.relays import running
from tests.support.sockets import SECONDS, read_exactly


def test_bytes_with_the_end_of_the_tls_handshake_reach_the_target() -> None:
    files = certificates()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        target = listening.getsockname()[1]
        text = (
            "listeners: [{protocol: tcp, listen: '127.0.0.1:0', "
            f"target: '127.0.0.1:{target}', tls: {files.listener()}}}]"
        )
        with (
            running(text) as relay,
            socket.create_connection(("127.0.0.1", relay.port), SECONDS) as sock,
        ):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = files.client_context().wrap_bio(
                incoming, outgoing, server_hostname="localhost"
            )
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
            client.write(b"first")
            # The client's Finished and its first bytes.
            sock.sendall(outgoing.read())
            listening.settimeout(SECONDS)
            server, _ = listening.accept()
            with server:
                server.settimeout(SECONDS)
                assert read_exactly(server, 5) == b"first"
