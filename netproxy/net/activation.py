"""Sockets that the service manager has bound and passes on (sd_listen_fds(3)): `listen: systemd:NAME`.

They stay open here as long as the process lives, so that a reload may come back to one.  A listener works on a
duplicate, and must never shut it down: the service manager has the same socket, and so will the next process.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Mapping

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import ActivationAddress

FIRST = 3  # SD_LISTEN_FDS_START
LOOK_SECONDS = (
    0.5  # how often who waits on a passed socket looks whether it is to stop: nothing else wakes it
)
_KINDS = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}
_TIMEVAL = struct.Struct("@ll")


class ActivationSockets:
    def __init__(self, environment: Mapping[str, str], first: int = FIRST) -> None:
        """Takes over what LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES say is there for this process."""
        self._sockets: dict[tuple[str, str], list[socket.socket]] = {}  # by network and name
        count = environment.get("LISTEN_FDS", "")
        if environment.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit():
            return
        given = environment.get("LISTEN_FDNAMES", "")
        names = (
            given.split(":") if given else ["unknown"] * int(count)
        )  # as sd_listen_fds_with_names(3) calls them
        for descriptor, name in zip(range(first, first + int(count)), names):
            try:
                sock = socket.socket(fileno=descriptor)
            except OSError:
                continue  # a FIFO, or not even open: nobody can ask for it
            os.set_inheritable(descriptor, False)
            network = (
                _KINDS.get(sock.type, "")
                if sock.family in (socket.AF_INET, socket.AF_INET6)
                else ""
            )
            self._sockets.setdefault((network or "other", name), []).append(sock)

    def take(self, network: str, address: ActivationAddress) -> socket.socket:
        """A duplicate of the one socket of that name; ListenError."""
        found = self._sockets.get((network, address.name), [])
        if len(found) != 1:
            there = ", ".join(f"{kind} {name}" for kind, name in sorted(self._sockets)) or "nothing"
            raise ListenError(
                f"{network} {address}: {len(found) or 'no'} sockets of that name were passed, not one (passed: {there})"
            )
        if network == "tcp" and not found[0].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(f"{network} {address}: the socket that was passed does not listen")
        return found[0].dup()

    def close(self) -> None:
        for sockets in self._sockets.values():
            for sock in sockets:
                sock.close()


def look_now_and_then(sock: socket.socket) -> None:
    """Makes a call that waits for a datagram end every LOOK_SECONDS."""
    seconds = int(LOOK_SECONDS)
    sock.setsockopt(
        socket.SOL_SOCKET,
        socket.SO_RCVTIMEO,
        _TIMEVAL.pack(seconds, round((LOOK_SECONDS - seconds) * 1e6)),
    )
