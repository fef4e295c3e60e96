"""What a client sends to open a connection by SOCKS5 or HTTP, and both ends of an exchange."""

from __future__ import annotations

import socket

from netproxy.interfaces.addresses import Address
from tests.support.sockets import read_to_end

GREETING, ANONYMOUS = b"\5\1\0", b"\5\0"
"""The greeting of SOCKS5 with "no authentication", and the reply to it."""


def pack_address(address: Address) -> bytes:
    """Return an IPv4 address and its port as SOCKS5 encodes them."""
    return b"\1" + socket.inet_aton(address.host) + address.port.to_bytes(2, "big")


def socks5_request(address: Address, command: int = 1) -> bytes:
    """Return a request of SOCKS5, CONNECT by default."""
    return bytes((5, command, 0)) + pack_address(address)


def socks5_request_by_name(name: bytes, port: int = 80) -> bytes:
    """Return a CONNECT of SOCKS5 for a host name."""
    return b"\5\1\0\3" + bytes((len(name),)) + name + port.to_bytes(2, "big")


def http_connect(target: object, fields: bytes = b"") -> bytes:
    """Return a CONNECT of HTTP."""
    return b"CONNECT %b HTTP/1.1\r\nHost: x\r\n" % str(target).encode() + fields + b"\r\n"


class EchoTarget:
    """A target that reads to the end of the stream and then returns all of it.

    It is called with each connection.
    """

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def __call__(self, sock: socket.socket) -> None:
        data = read_to_end(sock)
        self.received.append(data)
        sock.sendall(b"got " + data)


def converse(sock: socket.socket, *pieces: bytes) -> bytes:
    """Send `pieces` and the end of the stream.  Return all that comes back until it ends."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the proxy has refused already
    answer = b""
    try:
        while piece := sock.recv(65536):
            answer += piece
    except ConnectionResetError:
        pass  # it closed with unread bytes
    return answer
