"""A connection in records, in memory: what carries the streams of tunnel.streams.chunks."""

from __future__ import annotations

import socket

from netproxy.interfaces.sockets import RecordSocket
from netproxy.net.tls_socket import ENCRYPT_LIMIT

DESCRIPTOR = 1 << 20
"""What stands for a descriptor; there is none."""


class Records(RecordSocket):
    """A connection in memory: `pieces` are what each read of the network gives.

    Only plain values stand in for a descriptor.
    """

    send_limit = ENCRYPT_LIMIT

    def __init__(self, pieces: list[bytes], is_cut: bool = False) -> None:
        self._pieces, self._is_cut = pieces, is_cut
        self._ready = b""
        self.sent = bytearray()
        self.room = 1 << 30
        """Bytes that can be sent."""
        self._unreported = b""
        self.reserved = 0
        self.shut: list[int] = []

    def fileno(self) -> int:
        return DESCRIPTOR

    detach = gettimeout = getsockname = getpeername = getsockopt = setsockopt = fileno

    def reserve_record(self, count: int = 1) -> None:
        self.reserved += count

    def recv_ready(self, buffer: memoryview) -> int:
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def recv_into(self, buffer: memoryview) -> int:
        if not self._ready:
            if not self._pieces:
                if self._is_cut:
                    return 0
                raise BlockingIOError
            self._ready = self._pieces.pop(0)
        return self.recv_ready(buffer)

    def send(self, data: bytes) -> int:
        return self.send_behind(b"", data)

    def send_behind(self, head: bytes, data: bytes | memoryview) -> int:
        if not self._unreported:
            self._unreported = bytes(data)
            self.sent += head + self._unreported
        if not self.room:
            raise BlockingIOError
        count, self._unreported = len(self._unreported), b""
        return count

    def shutdown(self, how: int) -> None:
        self.shut.append(how)

    def shutdown_in_tcp(self) -> None:
        self.shut.append(socket.SHUT_WR)
