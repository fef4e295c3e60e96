"""Connections to UNIX sockets of this machine."""

from __future__ import annotations

import errno
import os
import socket
import struct

from netproxy.errors import DialError, Reason
from netproxy.net.connect import note_dial
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import UnixAddress

_TIMEVAL = struct.Struct("@ll")
_FAILURES = {
    errno.ENOENT: (Reason.REFUSED, "there is no such socket (is its service running?)"),
    errno.ECONNREFUSED: (Reason.REFUSED, "nobody listens at the socket (is its service running?)"),
    errno.EAGAIN: (Reason.TIMEOUT, "its service accepts no connection"),
    errno.EACCES: (
        Reason.GENERAL,
        "permission denied (the daemon's user must be able to write to the socket, and to enter "
        "its folders)",
    ),
}
"""Failures with what to do about them, by errno."""


def connect_unix(address: UnixAddress, seconds: float) -> socket.socket:
    """Return a connected, non-blocking socket.

    Blocks for at most `seconds`, while the service has too many connections to accept: poll(2)
    does not tell when it has room.  Raises DialError without a detail.
    """
    try:
        sock = socket.socket(socket.AF_UNIX)
        try:
            note_dial(sock, address)
            whole = int(seconds)
            # At least a microsecond: 0 is no limit.
            timeval = _TIMEVAL.pack(whole, max(1, int((seconds - whole) * 1e6)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
            sock.connect(address.sockaddr)
            sock.setblocking(False)
            return sock
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        code = error.errno or 0
        reason, said = _FAILURES.get(code, (Reason.GENERAL, os.strerror(code)))
        raise DialError(reason, said=said) from error
