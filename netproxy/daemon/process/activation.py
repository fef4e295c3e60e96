"""Socket activation: sockets that the service manager has bound (sd_listen_fds(3)).

A listener on `systemd:NAME` works on a duplicate of such a socket.  The original stays
open as long as the process lives, so that a reload can take it again.  Nothing here may
be shut down: the service manager has the same socket, and so will the next process.
"""

from __future__ import annotations

import os
import socket

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress
from netproxy.typed import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START."""

_NETWORKS = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}


class ActivationSockets:
    """The sockets that the service manager has given to this process, by network and name."""

    def __init__(
        self, environment: Mapping[str, str], first_descriptor: int = FIRST_DESCRIPTOR
    ) -> None:
        """Take over what LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES describe, if it is for us."""
        self._sockets: dict[tuple[str, str], list[socket.socket]] = {}
        count = environment.get("LISTEN_FDS", "")
        if environment.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit():
            return
        text = environment.get("LISTEN_FDNAMES", "")
        # sd_listen_fds_with_names(3) calls sockets without names "unknown".
        names = text.split(":") if text else ["unknown"] * int(count)
        descriptors = range(first_descriptor, first_descriptor + int(count))
        for descriptor, name in zip(descriptors, names, strict=False):
            try:
                sock = socket.socket(fileno=descriptor)
            except OSError:
                # A FIFO, or not open: nobody can ask for it.
                continue
            os.set_inheritable(descriptor, False)
            is_ip = sock.family in (socket.AF_INET, socket.AF_INET6)
            network = _NETWORKS.get(sock.type, "other") if is_ip else "other"
            self._sockets.setdefault((network, name), []).append(sock)

    def take(self, network: str, address: Address) -> socket.socket | None:
        """Return a duplicate of the socket of a network ("tcp" or "udp") and name.

        Returns None for an address that is not the name of a socket.  Raises ListenError if
        there is not exactly one, or no descriptor for it.
        """
        if not isinstance(address, ActivationAddress):
            return None
        sockets = self._sockets.get((network, address.name), [])
        if len(sockets) != 1:
            available = ", ".join(f"{kind} {name}" for kind, name in sorted(self._sockets))
            raise ListenError(
                f"{network} {address}: expected one activation socket of this name, "
                f"found {len(sockets)} (available: {available or 'none'})"
            )
        (sock,) = sockets
        if network == "tcp" and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(f"{network} {address}: the activation socket is not listening")
        try:
            return sock.dup()
        except OSError as error:
            raise ListenError(f"{network} {address}: {error.strerror}") from error

    def is_served(self, network: str, address: Address) -> bool:
        """Return True: a process alone serves everything."""
        return True

    def close(self) -> None:
        """Close the originals."""
        for sockets in self._sockets.values():
            for sock in sockets:
                sock.close()
