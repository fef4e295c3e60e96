"""A STUN server on one socket, which tells what it sees, or what a test wants it to tell."""

from __future__ import annotations

import socket
from typing import Any

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.net.address import from_sockaddr
from netproxy.protocol import stun
from tests.support.datagram_server import DatagramServer


class StunServer(DatagramServer):
    """Answers Binding requests on a thread of its own, until it is closed."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a bound socket."""
        self.address = from_sockaddr(sock.getsockname())
        self.mapped: Address | None = None
        """What it tells; None for the source of each request."""
        self.silent = False
        self.error = 0
        """The code of its answers; 0 for success."""
        self.copies = 1
        """How often it sends each answer."""
        self.requests: list[Address] = []
        """The source of each request."""
        super().__init__(sock)

    def take(self, datagram: bytes, sockaddr: Any) -> None:
        """Answer a Binding request as the test wants it."""
        try:
            request = stun.parse_request(datagram)
        except ProtocolError:
            return
        client = from_sockaddr(sockaddr)
        self.requests.append(client)
        if not self.silent:
            for _ in range(self.copies):
                self.socket.sendto(self._answer(request.transaction, client), sockaddr)

    def _answer(self, transaction: bytes, client: Address) -> bytes:
        if self.error:
            return stun.encode_response(stun.BindingError(transaction, self.error))
        mapped = self.mapped or client
        return stun.encode_response(stun.BindingSuccess(transaction, mapped, software="test"))


def stun_server(host: str = "127.0.0.1") -> StunServer:
    """Return a server on a free port of this machine."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    return StunServer(sock)
