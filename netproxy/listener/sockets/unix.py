"""A listener at a UNIX socket: a TcpListener whose clients are processes of this machine.

The file is made for its owner alone, and gets its permissions before the first connection is
accepted.  A file that is left from before is replaced if nobody listens there.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import UNIX_CLIENT, UNSPECIFIED_ADDRESS, Address, UnixAddress
from netproxy.listener.tcp import BACKLOG, TcpListener
from netproxy.net.address import is_abandoned
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import SocketAddress
    from netproxy.interfaces.listeners import Admission
    from netproxy.listener.accepted import Accepted
    from netproxy.listener.handshake_driver import Serving
    from netproxy.net.stream import Stream

OWNER_ONLY = 0o600


class FileAccess(NamedTuple):
    """Who may connect to a UNIX socket."""

    mode: int
    owner: int = -1
    """The user's number; -1: that of the daemon."""
    group: int = -1
    """The group's number; -1: that of the daemon."""


def bind_unix(address: UnixAddress, sock: socket.socket | None = None) -> socket.socket:
    """Return a socket that listens at a path.  Raises OSError; EADDRINUSE if another one does."""
    if sock is None:
        sock = socket.socket(socket.AF_UNIX)
    try:
        if is_abandoned(address.path):
            os.unlink(address.path)
        # Linux: the file gets the mode of the socket.
        os.fchmod(sock.fileno(), OWNER_ONLY)
        sock.bind(address.path)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def allow(address: UnixAddress, access: FileAccess) -> None:
    """Set who may connect.  Raises ListenError."""
    try:
        if (access.owner, access.group) != (-1, -1):
            os.chown(address.path, access.owner, access.group)
        os.chmod(address.path, access.mode)
    except OSError as error:
        message = f"cannot set owner, group and mode of {address}: {error.strerror}"
        raise ListenError(message) from error


class SocketFile:
    """The file of a bound socket, to be removed when the socket is closed."""

    def __init__(self, address: UnixAddress) -> None:
        """Note the file that has just been made.  Raises OSError."""
        self._path = address.path
        self._file = _identity(self._path)

    def remove(self) -> None:
        """Remove the file, unless another one has its place."""
        with suppress(OSError):
            if _identity(self._path) == self._file:
                os.unlink(self._path)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


class UnixListener(TcpListener):
    """A bound, listening UNIX socket and its thread."""

    local_address = UNSPECIFIED_ADDRESS

    def __init__(
        self, address: UnixAddress, serving: Serving, given: socket.socket | None = None
    ) -> None:
        """As TcpListener; the file of a given socket is not this listener's."""
        self._file: SocketFile | None = None
        super().__init__(address, serving, given)

    @staticmethod
    def _place(address: Address) -> tuple[int, SocketAddress]:
        assert isinstance(address, UnixAddress)
        return socket.AF_UNIX, (address.path, 0)

    @staticmethod
    def _to_address(sockaddr: SocketAddress) -> Address:
        # The listening socket's own: a path, or bytes of a socket without a file.
        return UnixAddress.of(sockaddr) if isinstance(sockaddr, str) else UNIX_CLIENT

    @staticmethod
    def _accept(sock: socket.socket) -> tuple[socket.socket, Address] | None:
        try:
            connection, _ = sock.accept()
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return None
            raise
        connection.setblocking(False)
        return connection, UNIX_CLIENT

    def _resident(self, stream: Stream, client: Address, admission: Admission) -> Accepted:
        stream.hang_up = 0
        return super()._resident(stream, client, admission)

    def server_bind(self) -> None:
        """Bind and listen."""
        address = UnixAddress.of(self.server_address[0])
        bind_unix(address, self.socket)
        self._file = SocketFile(address)

    def server_activate(self) -> None:
        """Do nothing: the socket listens since server_bind()."""

    def _set_options(self) -> None:
        """Do nothing: the options are those of TCP."""

    def server_close(self) -> None:
        """Close the socket and remove its file."""
        if self._file is not None:
            self._file.remove()
        super().server_close()

    def allow(self, access: FileAccess) -> None:
        """Set who may connect.  Raises ListenError, unless the listener runs."""
        if self._file is None:
            # The parent of the workers has done it.
            return
        assert isinstance(self.address, UnixAddress)
        try:
            allow(self.address, access)
        except ListenError as error:
            if not self.thread.is_alive():
                raise
            self._log.warning("%s", error)
