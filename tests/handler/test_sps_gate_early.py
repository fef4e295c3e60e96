"""What a client sends in one piece with the end of its TLS handshake reaches the target at once."""

from __future__ import annotations

import socket
import ssl

from tests.support.certificates import certificates
from tests.support.relays import running
from tests.support.sockets import SECONDS, read_exactly


def test_bytes_that_come_with_the_handshakes_end_are_not_left_waiting() -> None:
    made = certificates()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        target = listening.getsockname()[1]
        text = f"listeners: [{{protocol: tcp, listen: '127.0.0.1:0', target: '127.0.0.1:{target}', tls: {made.listener()}}}]"
        with (
            running(text) as relay,
            socket.create_connection(("127.0.0.1", relay.port), SECONDS) as sock,
        ):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = made.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
            client.write(b"first")
            sock.sendall(outgoing.read())  # the client's Finished and its first bytes
            listening.settimeout(SECONDS)
            server, _ = listening.accept()
            with server:
                server.settimeout(SECONDS)
                assert read_exactly(server, 5) == b"first"
