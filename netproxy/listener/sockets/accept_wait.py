"""Waits for connections of a listening socket, on the listener's thread, until it is woken.

A socket of this process alone is shut down to wake its thread.  A socket that other processes
have too must never be shut down: an event descriptor wakes the thread instead, and each new
connection wakes only one of the processes (EPOLLEXCLUSIVE).
"""

from __future__ import annotations

import errno
import os
import select
import socket

from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Watched
    from netproxy.interfaces.services import Counter, Log

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class AcceptWait:
    """The wait of one listening socket that no other process has."""

    def __init__(self) -> None:
        """Begin without a socket: watch() must follow."""
        self._socket: socket.socket
        self._poll = select.poll()

    def watch(self, sock: socket.socket) -> None:
        """Wait for connections of a socket."""
        self._socket = sock
        self._poll.register(sock, select.POLLIN)

    @property
    def watched(self) -> Watched:
        """What another thread has to watch in place of wait()."""
        return ((self._socket, select.POLLIN),)

    def wait(self) -> None:
        """Block until a connection may be there, or wake() is called.  Raises OSError."""
        self._poll.poll()

    def wake(self) -> None:
        """End wait(), now and from now on.  Thread: any."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Do nothing: the socket is its owner's."""


class SharedAcceptWait:
    """The wait of a listening socket that other processes have too."""

    def __init__(self) -> None:
        """Begin without a socket: watch() must follow.  Raises OSError."""
        self._socket: socket.socket
        self._wake_up = _EventDescriptor()
        try:
            self._epoll = select.epoll()
        except OSError:
            self._wake_up.close()
            raise
        self._epoll.register(self._wake_up, select.EPOLLIN)

    def watch(self, sock: socket.socket) -> None:
        """Wait for connections of a socket.  Raises OSError."""
        self._socket = sock
        self._epoll.register(sock, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    @property
    def watched(self) -> Watched:
        """What another thread has to watch in place of wait()."""
        return ((self._socket, select.POLLIN), (self._wake_up, select.POLLIN))

    def wait(self) -> None:
        """Block until a connection may be there, or wake() is called.  Raises OSError."""
        self._epoll.poll()

    def wake(self) -> None:
        """End wait(), now and from now on.  Thread: any."""
        if self._wake_up.fileno() >= 0:
            os.eventfd_write(self._wake_up.fileno(), 1)

    def close(self) -> None:
        """Close the descriptors."""
        self._epoll.close()
        self._wake_up.close()


class _EventDescriptor:
    """A descriptor that becomes readable, and stays so (eventfd(2))."""

    def __init__(self) -> None:
        self._number = os.eventfd(0, os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._number

    def close(self) -> None:
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)


def note_accept_error(error: OSError, address: Address, counter: Counter, log: Log) -> bool:
    """Count an accept(2) that failed; return whether descriptors or memory have run out."""
    counter.count("accept_errors", errno.errorcode.get(error.errno or 0, "other"))
    is_exhausted = error.errno in _EXHAUSTED
    if is_exhausted:
        log.limited(("accept", address), "%s: cannot accept: %s", address, error.strerror)
    return is_exhausted
