"""The sockets that the parent has bound for one worker.  Thread: main, take() any."""

from __future__ import annotations

import socket

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

SocketKey = tuple[str, str]
"""The network and the text of the configured address, which a message can hold."""


def socket_key(network: str, address: Address) -> SocketKey:
    """Return the key of an address."""
    return network, str(address)


class WorkerSockets:
    """The sockets of one worker (interfaces.listeners.GivenSockets).

    The originals stay open until remove(), so that a listener can stop and start again.
    """

    def __init__(self) -> None:
        self._sockets: dict[SocketKey, socket.socket] = {}
        self._addresses: set[SocketKey] = set()

    def add(self, key: SocketKey, sock: socket.socket | None) -> None:
        """Keep the socket of an address; None: another worker serves the address."""
        self._addresses.add(key)
        if sock is not None:
            self._sockets[key] = sock

    def remove(self, key: SocketKey) -> None:
        """Close the socket of an address."""
        self._addresses.discard(key)
        sock = self._sockets.pop(key, None)
        if sock is not None:
            sock.close()

    @property
    def keys(self) -> set[SocketKey]:
        """The addresses."""
        return set(self._addresses)

    def take(self, network: str, address: Address) -> socket.socket | None:
        """Return a duplicate of the socket of an address, None if it is not given.

        Raises ListenError if there is no descriptor for it.
        """
        sock = self._sockets.get(socket_key(network, address))
        if sock is None:
            if isinstance(address, ActivationAddress):
                raise ListenError(f"{network} {address}: another worker has the activation socket")
            return None
        try:
            return sock.dup()
        except OSError as error:
            raise ListenError(f"{network} {address}: {error.strerror}") from error

    def is_served(self, network: str, address: Address) -> bool:
        """Return whether this worker serves an address."""
        key = socket_key(network, address)
        return key in self._sockets or key not in self._addresses

    def close(self) -> None:
        """Close all sockets."""
        for key in list(self._addresses):
            self.remove(key)
