"""A thread that answers the datagrams of one UDP socket, until it is closed."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

# Bytes of a datagram: no request that tests send is longer.
DATAGRAM_LIMIT = 1500


class DatagramServer:
    """Reads a socket on a thread of its own; subclasses say what to do with a datagram."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a bound socket."""
        self.socket = sock
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        # It has no peer, but its reader wakes up.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.socket.close()

    def take(self, datagram: bytes, sockaddr: Any) -> None:
        """Answer a datagram."""
        raise NotImplementedError

    def _run(self) -> None:
        while True:
            try:
                datagram, sockaddr = self.socket.recvfrom(DATAGRAM_LIMIT)
            except OSError:
                return
            if not sockaddr:
                return
            self.take(datagram, sockaddr)
